// The CPU's kernels: threads, and the choice of an instruction set at run time. The kernels are compiled once
// per set; machines that have none of them have no kernels.
#include "tasks.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// ---- Threads ----------------------------------------------------------------------------------------------
// torch's OpenMP threads spin for a while after each operation. Threads of our own would fight them for the
// cores, so we run on torch's pool, which also makes torch.set_num_threads hold here. torch loads it for all
// to see; where there is no torch, one thread works.

struct Job {
  const std::function<void(int64_t item, int thread)>& work;
  const int64_t items;
  std::atomic<int64_t> next_item{0};
  std::atomic<int> next_thread{0};
};

void run(void* data) {
  Job& job = *(Job*)data;
  const int thread = job.next_thread++;
  for (int64_t item; (item = job.next_item++) < job.items;) job.work(item, thread);
}

int threads() {
  static const auto max_threads = (int (*)())dlsym(RTLD_DEFAULT, "omp_get_max_threads");
  return max_threads ? max_threads() : 1;
}

// Calls work(item, thread) for all items, on threads that are numbered below `threads`. It must not throw.
void parallel(int64_t items, int threads, const std::function<void(int64_t item, int thread)>& work) {
  using Pool = void(void (*work)(void*), void* data, unsigned threads, unsigned flags);
  static const auto pool = (Pool*)dlsym(RTLD_DEFAULT, "GOMP_parallel");
  Job job{work, items};
  if (pool && threads > 1 && items > 1) pool(run, &job, (unsigned)std::min<int64_t>(threads, items), 0);
  else run(&job);
}

template <class Task>
using RowKernel = void (*)(const Task&, int64_t from, int64_t to);

struct Kernels {  // [2]: for float32, for bfloat16
  const char* name;
  void (*attention[2])(const Attention&, const Forest&);
  RowKernel<Rope> rope[2];
  RowKernel<RmsNorm> rmsnorm[2];
  RowKernel<SwiGlu> swiglu[2];
};

template <class Task>
void over_rows(const Task& task, RowKernel<Task> kernel, int64_t rows) {
  constexpr int64_t CHUNK = 32;
  parallel((rows + CHUNK - 1) / CHUNK, threads(),
           [&](int64_t i, int) { kernel(task, i * CHUNK, std::min(rows, (i + 1) * CHUNK)); });
}

// ---- Instruction sets -------------------------------------------------------------------------------------

#define QUOTE(x) #x
#define NAME(x) QUOTE(x)

struct bf16 { uint16_t bits; };
int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

#if defined(__x86_64__)
#define ISA avx2
#define AVX2 "avx2,fma"
#define TARGET __attribute__((target(AVX2)))
#define WIDTH 8
#include "kernels.inl"

#define ISA avx512_bf16
#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16," AVX2
#define TARGET __attribute__((target(AVX512)))
#define WIDTH 16
#include "kernels.inl"

#define ISA avx512_amx
#define TARGET __attribute__((target("amx-tile,amx-bf16," AVX512)))
#define WIDTH 16
#define AMX
#include "kernels.inl"

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16_tiles = d >> 22 & 1, tiles = d >> 24 & 1;
  const int request_permission = 0x1023, tile_data = 18;  // Linux hands out the tiles' state on request
  return bf16_tiles && tiles && !syscall(SYS_arch_prctl, request_permission, tile_data);
}
#endif

std::vector<const Kernels*> usable() {  // best last; each needs what the one before needs
  std::vector<const Kernels*> list;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return list;
  list.push_back(&avx2::kernels);
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512dq")) return list;
  list.push_back(&avx512_bf16::kernels);
  if (has_amx()) list.push_back(&avx512_amx::kernels);
#endif
  return list;
}

std::atomic<const Kernels*> chosen{usable().empty() ? nullptr : usable().back()};

const Kernels& kernels() {
  if (!chosen) throw std::invalid_argument("flame_ext has no kernels for this CPU: it lacks AVX2");
  return *chosen;
}

}  // namespace

std::string simd(const std::string& name) {
  std::string names;
  for (const Kernels* kernels : usable()) {
    names += text(" ", kernels->name);
    if (name == kernels->name) chosen = kernels;
  }
  const std::string used = chosen ? chosen.load()->name : "";
  if (!name.empty() && name != used) throw std::invalid_argument("no " + name + "; there are:" + names);
  return used;
}

void cpu_attention(const Attention& a, Dtype dtype, const Forest& forest) {
  kernels().attention[dtype](a, forest);
}
void cpu_rows(const Rope& r, Dtype dtype, int64_t rows) { over_rows(r, kernels().rope[dtype], rows); }
void cpu_rows(const RmsNorm& r, Dtype dtype, int64_t rows) { over_rows(r, kernels().rmsnorm[dtype], rows); }
void cpu_rows(const SwiGlu& g, Dtype dtype, int64_t rows) { over_rows(g, kernels().swiglu[dtype], rows); }
