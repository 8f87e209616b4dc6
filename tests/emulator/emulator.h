// Runs CUDA kernels on the CPU, for tests. translate.py turns a .cu file into C++ that includes this header.
//
// Every CUDA thread is a fiber; blocks run one after the other. Threads switch only at synchronization points
// (warp-wide instructions, __syncthreads). Behavior that CUDA leaves open is chosen to expose mistakes:
//   cp.async       fills its destination with NaN; the bytes arrive at the latest wait_group that must wait
//                  for them, or, in one of four blocks, at once, to overwrite data that is still needed
//   shared memory  is NaN at the start of every block
//   order          of threads is random in every other block
// It fails, with the thread and the position, on deadlocks, lanes of a warp at different instructions,
// misaligned addresses, addresses outside the test's memory, and bank conflicts of matrix loads.
//
// The code is compiled with -fsanitize=thread, and this header defines the compiler's hooks, so that it sees
// every load and store. It fails if an address is not on the thread's own stack, in its block's shared memory
// or in device memory, if a thread reads shared memory that was never written, and if two threads access a
// word without __syncthreads in between and one of them writes it, in whatever order they ran.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(threads)
#define __align__(n)
#define NO_TSAN __attribute__((no_sanitize_thread))  // calls no hooks; for all code except the kernels

struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
inline dim3 threadIdx, blockIdx;

namespace emulator {

// ---- State ------------------------------------------------------------------------------------------------

struct Word {  // of memory: time and thread of its last accesses
  uint32_t written = 0, read = 0;
  int32_t writer = 0, reader = 0;
  bool in_flight = false;  // a cp.async will write it
};
constexpr int32_t MANY = -1;  // threads

struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
};

enum State { READY, IN_WARP, IN_BLOCK, DONE };

struct Fiber {
  static constexpr size_t STACK = 128 << 10;
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t start;
  jmp_buf at;
  bool started;
  State state;
  const char* position;                  // where it waits
  std::deque<std::vector<Copy>> copies;  // groups of cp.async; the last one is open
  std::array<uint32_t*, 4> d;            // operands of the instruction in which it waits
  std::array<const uint32_t*, 4> a;
  uint32_t b[2];
};

constexpr size_t MAX_SHARED = 227 * 1024;  // per block of an H100
alignas(1024) inline unsigned char shared[MAX_SHARED];
inline size_t shared_bytes, shared_allowed = 48 * 1024;
inline std::vector<Word> shared_words(MAX_SHARED / 4);
inline std::map<uintptr_t, std::vector<Word>> device_bytes;  // by address of each allocation

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* running;
inline int number;      // of the running thread
inline bool in_kernel;  // the kernel's own code is running
inline jmp_buf host;
inline std::function<void()> kernel;
inline std::string error;  // an exception cannot cross fibers
inline std::mt19937 rng;
inline bool shuffled, copies_at_once;                // choices for this block
inline uint32_t now = 1, block_start, kernel_start;  // times; each __syncthreads increments `now`

// ---- Fibers -----------------------------------------------------------------------------------------------

NO_TSAN inline void switch_to(Fiber* fiber) {  // nullptr: the host
  if (running && _setjmp(running->at)) return;  // switched back
  running = fiber;
  if (!fiber) _longjmp(host, 1);
  if (fiber->started) _longjmp(fiber->at, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

[[noreturn]] NO_TSAN inline void fail(const std::string& what) {
  in_kernel = false;
  error = what + " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + " thread " +
          std::to_string(number) + ")";
  switch_to(nullptr);
  abort();
}

// Release the barrier once no thread can run. All must be at the same one. Return false if all are done.
NO_TSAN inline bool release_barrier() {
  const char* barrier = nullptr;
  for (auto& f : fibers) {
    if (f->state == DONE) continue;
    if (!barrier) barrier = f->position;
    if (f->state != IN_BLOCK || f->position != barrier)
      fail(std::string("deadlock: one thread waits ") + barrier + ", another " + f->position);
  }
  for (auto& f : fibers)
    if (f->state == IN_BLOCK) f->state = READY;
  ++now;
  return barrier;
}

NO_TSAN inline Fiber* next() {
  const int threads = (int)fibers.size(), start = shuffled ? (int)(rng() % threads) : number;
  do
    for (int i = 0; i < threads; ++i) {
      number = (start + i) % threads;
      threadIdx.x = number;
      if (fibers[number]->state == READY) return fibers[number].get();
    }
  while (release_barrier());
  return nullptr;
}

NO_TSAN inline void pause(State state, const char* position) {
  running->state = state;
  running->position = position;
  Fiber* to = next();
  if (to != running) switch_to(to);
}

NO_TSAN inline void fiber_main() {
  kernel();
  for (auto& group : running->copies)
    if (!group.empty()) fail("the thread ends with a cp.async in flight");
  pause(DONE, "done");
  abort();
}

NO_TSAN inline void run_block(unsigned threads) {
  fibers.resize(threads);
  for (auto& f : fibers) {
    if (!f) f = std::make_unique<Fiber>();
    f->started = false;
    f->state = READY;
    f->position = "";
    f->copies.assign(1, {});
    getcontext(&f->start);
    f->start.uc_stack.ss_sp = f->stack.get();
    f->start.uc_stack.ss_size = Fiber::STACK;
    makecontext(&f->start, fiber_main, 0);
  }
  memset(shared, 0xff, shared_bytes);
  block_start = ++now;
  shuffled = rng() % 2 == 0;
  copies_at_once = rng() % 4 == 0;
  number = (int)(rng() % threads);
  running = nullptr;
  if (!_setjmp(host)) switch_to(next());
  if (!error.empty()) throw std::runtime_error(error);
}

// launch(kernel, grid, threads, bytes of shared memory, stream)(arguments) runs at once; streams are ignored.
template <class... P>
NO_TSAN auto launch(void (*function)(P...), dim3 grid, unsigned threads, size_t bytes, void*) {
  return [=](P... arguments) NO_TSAN {
    if (bytes > shared_allowed) throw std::runtime_error("more shared memory than was allowed");
    shared_bytes = bytes;
    kernel_start = ++now;
    kernel = [=]() NO_TSAN {
      auto call = function;  // these copies are on the fiber's stack
      auto args = std::make_tuple(arguments...);
      in_kernel = true;
      std::apply(call, args);
      in_kernel = false;
    };
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) run_block(threads);
  };
}

// ---- Memory -----------------------------------------------------------------------------------------------

NO_TSAN inline void record_access(Word& w, bool write, int32_t thread, uint32_t since, const char* memory) {
  const bool after_write = w.written >= since && w.writer != thread;
  const bool after_read = w.read >= since && w.reader != thread;
  if (w.in_flight) fail("access to shared memory with a cp.async in flight");
  if (after_write) fail(std::string("race: access to ") + memory + " that another thread wrote");
  if (write && after_read) fail(std::string("race: writes ") + memory + " that another thread read");
  if (write) {
    w.written = now;
    w.writer = thread;
  } else {
    w.reader = after_read ? MANY : thread;
    w.read = now;
  }
}

NO_TSAN inline void access_shared(size_t offset, size_t bytes, bool write, int32_t thread) {
  if (offset + bytes > shared_bytes) fail("past the end of shared memory");
  for (size_t i = offset / 4; i < (offset + bytes + 3) / 4; ++i) {
    if (!write && shared_words[i].written < block_start) fail("reads shared memory that was never written");
    record_access(shared_words[i], write, thread, now, "shared memory");
  }
}

NO_TSAN inline void access_device(uintptr_t at, size_t bytes, bool write) {
  auto found = device_bytes.upper_bound(at);
  if (found == device_bytes.begin() || at + bytes > (--found)->first + found->second.size())
    fail("an address outside the device's memory");
  const int32_t thread = (int32_t)(blockIdx.x * 1024 + blockIdx.y) * 1024 + number;
  for (size_t i = at - found->first; i < at - found->first + bytes; ++i)
    record_access(found->second[i], write, thread, kernel_start, "device memory");
}

NO_TSAN inline void access(const void* address, size_t bytes, bool write) {
  if (!in_kernel) return;
  in_kernel = false;
  const uintptr_t at = (uintptr_t)address, stack = (uintptr_t)running->stack.get();
  const bool registers = address == &threadIdx.x || address == &blockIdx.x || address == &blockIdx.y;
  if (at - stack >= Fiber::STACK && !registers) {
    if (at % bytes) fail("a misaligned address");
    if (at - (uintptr_t)shared < MAX_SHARED) access_shared(at - (uintptr_t)shared, bytes, write, number);
    else access_device(at, bytes, write);
  }
  in_kernel = true;
}

// ---- Synchronization --------------------------------------------------------------------------------------

// Run a warp-wide instruction. The last lane that arrives does the work for all.
template <class Work>
NO_TSAN void warp_instruction(const char* name, const Work& work) {
  Fiber* lane[32];
  bool last = true;
  for (int i = 0; i < 32; ++i) {
    lane[i] = fibers[number / 32 * 32 + i].get();
    last &= lane[i] == running || lane[i]->state == IN_WARP;
  }
  running->position = name;
  if (!last) return pause(IN_WARP, name);
  for (Fiber* f : lane)
    if (f->position != name) fail(std::string("lanes of a warp are ") + name + " and " + f->position);
  work(lane);
  for (Fiber* f : lane) f->state = READY;
}

NO_TSAN inline void barrier(const char* where) {
  in_kernel = false;
  pause(IN_BLOCK, where);
  in_kernel = true;
}

}  // namespace emulator

#define EMULATOR_QUOTE(x) #x
#define EMULATOR_LINE(x) "at the __syncthreads of line " EMULATOR_QUOTE(x)
#define __syncthreads() emulator::barrier(EMULATOR_LINE(__LINE__))

NO_TSAN inline float __shfl_xor_sync(uint32_t mask, float value, int distance) {
  using namespace emulator;
  in_kernel = false;
  if (mask != 0xffffffff) fail("only whole warps are emulated");
  uint32_t out;
  memcpy(running->b, &value, 4);
  running->b[1] = (uint32_t)distance;
  running->d[0] = &out;
  warp_instruction("in __shfl_xor_sync", [](Fiber** lane) NO_TSAN {
    for (int i = 0; i < 32; ++i) *lane[i]->d[0] = lane[i ^ lane[i]->b[1]]->b[0];
  });
  memcpy(&value, &out, 4);
  in_kernel = true;
  return value;
}

NO_TSAN inline size_t __cvta_generic_to_shared(const void* p) { return (unsigned char*)p - emulator::shared; }

// ---- PTX --------------------------------------------------------------------------------------------------

namespace ptx {
using namespace emulator;

template <class T, class... More>
NO_TSAN std::array<T*, 1 + sizeof...(More)> list(T& x, More&... more) {
  return {&x, &more...};
}

NO_TSAN inline void cp_async_cg_shared_global(uint32_t to, const void* from, int bytes, int from_bytes) {
  in_kernel = false;
  if (bytes != 16 || to % 16 || (uintptr_t)from % 16) fail("cp.async.cg: not 16 aligned bytes");
  if (from_bytes) access_device((uintptr_t)from, from_bytes, false);
  access_shared(to, 16, true, number);
  for (int i = 0; i < 4; ++i) shared_words[to / 4 + i].in_flight = true;
  memset(shared + to, copies_at_once ? 0 : 0xff, 16);
  if (copies_at_once) memcpy(shared + to, from, from_bytes);
  running->copies.back().push_back({shared + to, from, from_bytes});
  in_kernel = true;
}
NO_TSAN inline void cp_async_commit_group() {
  in_kernel = false;
  running->copies.emplace_back();
  in_kernel = true;
}
NO_TSAN inline void cp_async_wait_group(int pending) {
  in_kernel = false;
  for (; (int)running->copies.size() - 1 > pending; running->copies.pop_front())
    for (const Copy& c : running->copies.front()) {
      if (!copies_at_once) memset(c.to, 0, 16);
      if (!copies_at_once) memcpy(c.to, c.from, c.bytes);
      for (int i = 0; i < 4; ++i) {
        Word& w = shared_words[(c.to - shared) / 4 + i];
        w.in_flight = false;
        w.written = now;
        w.writer = number;
      }
    }
  in_kernel = true;
}

// Lane l passes row l % 8 of matrix l / 8. It gets elements 2 (l % 4) and the next of row (or column) l / 4.
template <bool TRANSPOSED>
NO_TSAN void ldmatrix(const char* name, std::array<uint32_t*, 4> d, uint32_t address) {
  in_kernel = false;
  running->d = d;
  running->b[0] = address;
  warp_instruction(name, [](Fiber** lane) NO_TSAN {
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) {
        const uint32_t at = lane[m * 8 + r]->b[0];
        if (at % 16) fail("ldmatrix: misaligned");
        access_shared(at, 16, false, MANY);
        memcpy(matrix[r], shared + at, 16);
        banks |= 1u << at / 16 % 8;
      }
      if (banks != 0xff) fail("ldmatrix: bank conflicts");
      for (int l = 0; l < 32; ++l) {
        const int i = l / 4, j = l % 4 * 2;
        const uint16_t low = TRANSPOSED ? matrix[j][i] : matrix[i][j];
        const uint16_t high = TRANSPOSED ? matrix[j + 1][i] : matrix[i][j + 1];
        *lane[l]->d[m] = low | (uint32_t)high << 16;
      }
    }
  });
  in_kernel = true;
}
NO_TSAN inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(std::array<uint32_t*, 4> d, uint32_t at) {
  ldmatrix<false>("in ldmatrix", d, at);
}
NO_TSAN inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(std::array<uint32_t*, 4> d, uint32_t at) {
  ldmatrix<true>("in ldmatrix.trans", d, at);
}

NO_TSAN inline float bf16_at(uint32_t pair, int which) {
  const uint32_t bits = which ? pair & 0xffff0000 : pair << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// With g = l / 4 and t = 2 (l % 4), a register of lane l has two elements of A[16][16] at (g, t), (g + 8, t),
// (g, t + 8), (g + 8, t + 8) and the next column, or two of B[16][8] at (t, g), (t + 8, g) and the next row,
// or one of C[16][8] at (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1).
NO_TSAN inline void multiply_warp(Fiber** lane) {
  float a[16][16], b[16][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4 * 2;
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j) a[g + i % 2 * 8][t + i / 2 * 8 + j] = bf16_at(*lane[l]->a[i], j);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) b[t + i * 8 + j][g] = bf16_at(lane[l]->b[i], j);
    for (int i = 0; i < 4; ++i) memcpy(&c[g + i / 2 * 8][t + i % 2], lane[l]->d[i], 4);
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) memcpy(lane[l]->d[i], &c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2], 4);
}

template <class A, class B>
NO_TSAN void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    std::array<float*, 4> d, std::array<A*, 4> a, std::array<B*, 2> b, std::array<float*, 4> c) {
  in_kernel = false;
  for (int i = 0; i < 4; ++i) {
    *d[i] = *c[i];
    running->d[i] = (uint32_t*)d[i];
    running->a[i] = a[i];
  }
  running->b[0] = *b[0];
  running->b[1] = *b[1];
  warp_instruction("in mma", multiply_warp);
  in_kernel = true;
}

NO_TSAN inline void ex2_approx_ftz_f32(float& y, float x) {
  y = std::exp2(x);
  if (y < 0x1p-126f) y = 0;
}

}  // namespace ptx

// ---- The rest of CUDA that cuda.cu uses -------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  NO_TSAN explicit __nv_bfloat16(float x) {  // to nearest even
    uint32_t wide;
    memcpy(&wide, &x, 4);
    bits = x == x ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fff;
  }
  NO_TSAN explicit operator float() const { return ptx::bf16_at(bits, 0); }
};
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline int min(int a, int b) { return a < b ? a : b; }

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t last_error;  // kept until it is read
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int bytes) {
  if ((size_t)bytes > emulator::MAX_SHARED) return last_error = cudaErrorInvalidValue;
  emulator::shared_allowed = bytes;
  return cudaSuccess;
}

// ---- The compiler's hooks ---------------------------------------------------------------------------------

#define HOOK(bytes)                                                                                     \
  extern "C" NO_TSAN void __tsan_read##bytes(void* p) { emulator::access(p, bytes, false); }            \
  extern "C" NO_TSAN void __tsan_write##bytes(void* p) { emulator::access(p, bytes, true); }            \
  extern "C" NO_TSAN void __tsan_unaligned_read##bytes(void* p) { emulator::access(p, bytes, false); }  \
  extern "C" NO_TSAN void __tsan_unaligned_write##bytes(void* p) { emulator::access(p, bytes, true); }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16)
extern "C" NO_TSAN void __tsan_read_range(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) emulator::access((char*)p + i, 1, false);
}
extern "C" NO_TSAN void __tsan_write_range(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) emulator::access((char*)p + i, 1, true);
}
extern "C" NO_TSAN void __tsan_init() {}
extern "C" NO_TSAN void __tsan_func_entry(void*) {}
extern "C" NO_TSAN void __tsan_func_exit() {}
extern "C" NO_TSAN void __tsan_vptr_update(void**, void*) {}
extern "C" NO_TSAN void __tsan_vptr_read(void**) {}
