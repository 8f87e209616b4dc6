// Runs CUDA kernels on the CPU, for tests; translate.py makes a .cu file C++ that includes this.
//
// Every CUDA thread is a fiber; blocks run one after the other. Threads change places only where they meet
// (warp-wide instructions, __syncthreads). The machine is as unhelpful as the rules allow:
//   cp.async       its destination is NaN at once, and the bytes arrive in the wait_group that must wait for
//                  them; in one block of four they arrive at once instead, over what was still to be read
//   shared memory  begins as NaN in every block
//   order          in every other block it is drawn anew whose turn it is
// It fails, with the thread and the place, where threads wait for each other for ever, lanes meet at
// different instructions, an address is misaligned or outside what the test allocated, or a matrix load has
// bank conflicts.
//
// It is built with -fsanitize=thread for the compiler's hooks, which are answered here: so it sees every load
// and store, and fails on an address that is not the thread's own stack, its block's shared memory or the
// device's; on shared memory that was never written; and on two threads at one word, one of them writing,
// without __syncthreads between them, in whatever order they happened to run.
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
#define UNSEEN __attribute__((no_sanitize_thread))  // by the hooks: all that is not the kernel's own

struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
inline dim3 threadIdx, blockIdx;

namespace emulator {

// ---- State ------------------------------------------------------------------------------------------------

struct Word {  // of memory: when (a time) and by which thread it was last touched
  uint32_t written = 0, read = 0;
  int32_t writer = 0, reader = 0;
  bool in_flight = false;  // a cp.async is to write it
};
constexpr int32_t SEVERAL = -1;

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
  const char* doing;
  std::deque<std::vector<Copy>> copies;  // of cp.async: groups, the open one last
  std::array<uint32_t*, 4> d;            // operands of the instruction that it waits in
  std::array<const uint32_t*, 4> a;
  uint32_t b[2];
};

constexpr size_t MAX_SHARED = 227 * 1024;  // of an H100's block
alignas(1024) inline unsigned char shared[MAX_SHARED];
inline size_t shared_bytes, shared_allowed = 48 * 1024;
inline std::vector<Word> shared_words(MAX_SHARED / 4);
inline std::map<uintptr_t, std::vector<Word>> device_bytes;  // of each allocation

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* running;
inline int number;     // of the running thread
inline bool checking;  // the kernel's own code is running
inline jmp_buf host;
inline std::function<void()> kernel;
inline std::string error;  // an exception cannot cross fibers
inline std::mt19937 dice;
inline bool restless, early;                              // this block's habits
inline uint32_t now = 1, block_began, kernel_began;       // `now` moves on at each __syncthreads

// ---- Fibers -----------------------------------------------------------------------------------------------

UNSEEN inline void go_to(Fiber* fiber) {  // null: the host
  if (running && _setjmp(running->at)) return;  // come back
  running = fiber;
  if (!fiber) _longjmp(host, 1);
  if (fiber->started) _longjmp(fiber->at, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

[[noreturn]] UNSEEN inline void fail(const std::string& what) {
  checking = false;
  error = what + " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + " thread " +
          std::to_string(number) + ")";
  go_to(nullptr);
  abort();
}

// All threads wait or are done: those at the barrier go on, if it is one barrier. False when all are done.
UNSEEN inline bool pass_barrier() {
  const char* barrier = nullptr;
  for (auto& f : fibers) {
    if (f->state == DONE) continue;
    if (!barrier) barrier = f->doing;
    if (f->state != IN_BLOCK || f->doing != barrier)
      fail(std::string("threads wait for each other for ever, one ") + barrier + ", one " + f->doing);
  }
  for (auto& f : fibers)
    if (f->state == IN_BLOCK) f->state = READY;
  ++now;
  return barrier;
}

UNSEEN inline Fiber* next() {
  const int threads = (int)fibers.size(), start = restless ? (int)(dice() % threads) : number;
  do
    for (int i = 0; i < threads; ++i) {
      number = (start + i) % threads;
      threadIdx.x = number;
      if (fibers[number]->state == READY) return fibers[number].get();
    }
  while (pass_barrier());
  return nullptr;
}

UNSEEN inline void pause(State state, const char* doing) {
  running->state = state;
  running->doing = doing;
  Fiber* to = next();
  if (to != running) go_to(to);
}

UNSEEN inline void fiber_main() {
  kernel();
  for (auto& group : running->copies)
    if (!group.empty()) fail("the thread ends while a cp.async of its is in flight");
  pause(DONE, "done");
  abort();
}

UNSEEN inline void run_block(unsigned threads) {
  fibers.resize(threads);
  for (auto& f : fibers) {
    if (!f) f = std::make_unique<Fiber>();
    f->started = false;
    f->state = READY;
    f->doing = "";
    f->copies.assign(1, {});
    getcontext(&f->start);
    f->start.uc_stack.ss_sp = f->stack.get();
    f->start.uc_stack.ss_size = Fiber::STACK;
    makecontext(&f->start, fiber_main, 0);
  }
  memset(shared, 0xff, shared_bytes);
  block_began = ++now;
  restless = dice() % 2 == 0;
  early = dice() % 4 == 0;
  number = (int)(dice() % threads);
  running = nullptr;
  if (!_setjmp(host)) go_to(next());
  if (!error.empty()) throw std::runtime_error(error);
}

// launch(kernel, grid, threads, bytes of shared memory, stream)(arguments): at once, whatever the stream.
template <class... P>
UNSEEN auto launch(void (*function)(P...), dim3 grid, unsigned threads, size_t bytes, void*) {
  return [=](P... arguments) UNSEEN {
    if (bytes > shared_allowed) throw std::runtime_error("more shared memory than was asked for");
    shared_bytes = bytes;
    kernel_began = ++now;
    kernel = [=]() UNSEEN {
      auto call = function;  // on the fiber's stack, as are the arguments
      auto mine = std::make_tuple(arguments...);
      checking = true;
      std::apply(call, mine);
      checking = false;
    };
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) run_block(threads);
  };
}

// ---- Memory -----------------------------------------------------------------------------------------------

UNSEEN inline void note(Word& w, bool write, int32_t thread, uint32_t since, const char* memory) {
  const bool after_write = w.written >= since && w.writer != thread;
  const bool after_read = w.read >= since && w.reader != thread;
  if (w.in_flight) fail("touches shared memory into which a cp.async is in flight");
  if (after_write) fail(std::string("race: touches ") + memory + " that another thread wrote");
  if (write && after_read) fail(std::string("race: writes ") + memory + " that another thread read");
  if (write) {
    w.written = now;
    w.writer = thread;
  } else {
    w.reader = after_read ? SEVERAL : thread;
    w.read = now;
  }
}

UNSEEN inline void touch_shared(size_t offset, size_t bytes, bool write, int32_t thread) {
  if (offset + bytes > shared_bytes) fail("past the end of shared memory");
  for (size_t i = offset / 4; i < (offset + bytes + 3) / 4; ++i) {
    if (!write && shared_words[i].written < block_began) fail("reads shared memory that was never written");
    note(shared_words[i], write, thread, now, "shared memory");
  }
}

UNSEEN inline void touch_device(uintptr_t at, size_t bytes, bool write) {
  auto found = device_bytes.upper_bound(at);
  if (found == device_bytes.begin() || at + bytes > (--found)->first + found->second.size())
    fail("an address outside the device's memory");
  const int32_t thread = (int32_t)(blockIdx.x * 1024 + blockIdx.y) * 1024 + number;
  for (size_t i = at - found->first; i < at - found->first + bytes; ++i)
    note(found->second[i], write, thread, kernel_began, "device memory");
}

UNSEEN inline void touch(const void* address, size_t bytes, bool write) {
  if (!checking) return;
  checking = false;
  const uintptr_t at = (uintptr_t)address, stack = (uintptr_t)running->stack.get();
  const bool registers = address == &threadIdx.x || address == &blockIdx.x || address == &blockIdx.y;
  if (at - stack >= Fiber::STACK && !registers) {
    if (at % bytes) fail("a misaligned address");
    if (at - (uintptr_t)shared < MAX_SHARED) touch_shared(at - (uintptr_t)shared, bytes, write, number);
    else touch_device(at, bytes, write);
  }
  checking = true;
}

// ---- Where threads meet -----------------------------------------------------------------------------------

// A warp-wide instruction: the last lane to come does the work for all.
template <class Work>
UNSEEN void together(const char* name, const Work& work) {
  Fiber* lane[32];
  bool last = true;
  for (int i = 0; i < 32; ++i) {
    lane[i] = fibers[number / 32 * 32 + i].get();
    last &= lane[i] == running || lane[i]->state == IN_WARP;
  }
  running->doing = name;
  if (!last) return pause(IN_WARP, name);
  for (Fiber* f : lane)
    if (f->doing != name) fail(std::string("lanes of a warp meet ") + name + " and " + f->doing);
  work(lane);
  for (Fiber* f : lane) f->state = READY;
}

UNSEEN inline void barrier(const char* where) {
  checking = false;
  pause(IN_BLOCK, where);
  checking = true;
}

}  // namespace emulator

#define EMULATOR_QUOTE(x) #x
#define EMULATOR_LINE(x) "at the __syncthreads of line " EMULATOR_QUOTE(x)
#define __syncthreads() emulator::barrier(EMULATOR_LINE(__LINE__))

UNSEEN inline float __shfl_xor_sync(uint32_t mask, float value, int distance) {
  using namespace emulator;
  checking = false;
  if (mask != 0xffffffff) fail("only whole warps are emulated");
  uint32_t out;
  memcpy(running->b, &value, 4);
  running->b[1] = (uint32_t)distance;
  running->d[0] = &out;
  together("in __shfl_xor_sync", [](Fiber** lane) UNSEEN {
    for (int i = 0; i < 32; ++i) *lane[i]->d[0] = lane[i ^ lane[i]->b[1]]->b[0];
  });
  memcpy(&value, &out, 4);
  checking = true;
  return value;
}

UNSEEN inline size_t __cvta_generic_to_shared(const void* p) { return (unsigned char*)p - emulator::shared; }

// ---- PTX --------------------------------------------------------------------------------------------------

namespace ptx {
using namespace emulator;

template <class T, class... More>
UNSEEN std::array<T*, 1 + sizeof...(More)> list(T& x, More&... more) {
  return {&x, &more...};
}

UNSEEN inline void cp_async_cg_shared_global(uint32_t to, const void* from, int bytes, int from_bytes) {
  checking = false;
  if (bytes != 16 || to % 16 || (uintptr_t)from % 16) fail("cp.async.cg: not 16 aligned bytes");
  if (from_bytes) touch_device((uintptr_t)from, from_bytes, false);
  touch_shared(to, 16, true, number);
  for (int i = 0; i < 4; ++i) shared_words[to / 4 + i].in_flight = true;
  memset(shared + to, early ? 0 : 0xff, 16);
  if (early) memcpy(shared + to, from, from_bytes);
  running->copies.back().push_back({shared + to, from, from_bytes});
  checking = true;
}
UNSEEN inline void cp_async_commit_group() {
  checking = false;
  running->copies.emplace_back();
  checking = true;
}
UNSEEN inline void cp_async_wait_group(int pending) {
  checking = false;
  for (; (int)running->copies.size() - 1 > pending; running->copies.pop_front())
    for (const Copy& c : running->copies.front()) {
      if (!early) memset(c.to, 0, 16);
      if (!early) memcpy(c.to, c.from, c.bytes);
      for (int i = 0; i < 4; ++i) {
        Word& w = shared_words[(c.to - shared) / 4 + i];
        w.in_flight = false;
        w.written = now;
        w.writer = number;
      }
    }
  checking = true;
}

// Lane l names row l % 8 of matrix l / 8. It gets elements 2 (l % 4) and the next of row (or column) l / 4.
template <bool TRANSPOSED>
UNSEEN void ldmatrix(const char* name, std::array<uint32_t*, 4> d, uint32_t address) {
  checking = false;
  running->d = d;
  running->b[0] = address;
  together(name, [](Fiber** lane) UNSEEN {
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) {
        const uint32_t at = lane[m * 8 + r]->b[0];
        if (at % 16) fail("ldmatrix: misaligned");
        touch_shared(at, 16, false, SEVERAL);
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
  checking = true;
}
UNSEEN inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(std::array<uint32_t*, 4> d, uint32_t at) {
  ldmatrix<false>("in ldmatrix", d, at);
}
UNSEEN inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(std::array<uint32_t*, 4> d, uint32_t at) {
  ldmatrix<true>("in ldmatrix.trans", d, at);
}

UNSEEN inline float bf16_at(uint32_t pair, int which) {
  const uint32_t bits = which ? pair & 0xffff0000 : pair << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// With g = l / 4 and t = 2 (l % 4), lane l holds, two elements a register: A[16][16] at (g, t), (g + 8, t),
// (g, t + 8), (g + 8, t + 8) and the next column; B[16][8] at (t, g), (t + 8, g) and the next row; and one a
// register: C[16][8] at (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1).
UNSEEN inline void multiply_warp(Fiber** lane) {
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
UNSEEN void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    std::array<float*, 4> d, std::array<A*, 4> a, std::array<B*, 2> b, std::array<float*, 4> c) {
  checking = false;
  for (int i = 0; i < 4; ++i) {
    *d[i] = *c[i];
    running->d[i] = (uint32_t*)d[i];
    running->a[i] = a[i];
  }
  running->b[0] = *b[0];
  running->b[1] = *b[1];
  together("in mma", multiply_warp);
  checking = true;
}

UNSEEN inline void ex2_approx_ftz_f32(float& y, float x) {
  y = std::exp2(x);
  if (y < 0x1p-126f) y = 0;
}

}  // namespace ptx

// ---- What else cuda.cu uses -------------------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  UNSEEN explicit __nv_bfloat16(float x) {  // to nearest even
    uint32_t wide;
    memcpy(&wide, &x, 4);
    bits = x == x ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fff;
  }
  UNSEEN explicit operator float() const { return ptx::bf16_at(bits, 0); }
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
inline cudaError_t last_error;  // it stays until it is asked for
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int bytes) {
  if ((size_t)bytes > emulator::MAX_SHARED) return last_error = cudaErrorInvalidValue;
  emulator::shared_allowed = bytes;
  return cudaSuccess;
}

// ---- The compiler's hooks ---------------------------------------------------------------------------------

#define HOOK(bytes)                                                                                     \
  extern "C" UNSEEN void __tsan_read##bytes(void* p) { emulator::touch(p, bytes, false); }           \
  extern "C" UNSEEN void __tsan_write##bytes(void* p) { emulator::touch(p, bytes, true); }              \
  extern "C" UNSEEN void __tsan_unaligned_read##bytes(void* p) { emulator::touch(p, bytes, false); }    \
  extern "C" UNSEEN void __tsan_unaligned_write##bytes(void* p) { emulator::touch(p, bytes, true); }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16)
extern "C" UNSEEN void __tsan_read_range(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) emulator::touch((char*)p + i, 1, false);
}
extern "C" UNSEEN void __tsan_write_range(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) emulator::touch((char*)p + i, 1, true);
}
extern "C" UNSEEN void __tsan_init() {}
extern "C" UNSEEN void __tsan_func_entry(void*) {}
extern "C" UNSEEN void __tsan_func_exit() {}
extern "C" UNSEEN void __tsan_vptr_update(void**, void*) {}
extern "C" UNSEEN void __tsan_vptr_read(void**) {}
