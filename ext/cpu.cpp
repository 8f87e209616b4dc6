// Threads, and the choice of an instruction set at run time. The kernels are compiled once per set.
#include "cpu.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <thread>
#ifdef __linux__
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// ---- Threads ----------------------------------------------------------------------------------------------
// torch's OpenMP threads spin for a while after each operation. Threads of our own would fight them for the
// cores, so we run on torch's pool, which also makes torch.set_num_threads hold here. torch loads it for all
// to see.

namespace {

using Parallel = void(void (*work)(void*), void* data, unsigned threads, unsigned flags);
using MaxThreads = int();

// One of the pool's functions; null where there is no torch.
template <class Function>
Function* openmp([[maybe_unused]] const char* name) {
#ifdef __linux__
  return (Function*)dlsym(RTLD_DEFAULT, name);
#else
  return nullptr;
#endif
}

struct Job {
  const std::function<void(int64_t item, int thread)>& work;
  int64_t items;
  std::atomic<int64_t> next_item{0};
  std::atomic<int> next_thread{0};
};

void run(void* data) {
  Job& job = *(Job*)data;
  const int thread = job.next_thread++;
  for (int64_t item; (item = job.next_item++) < job.items;) job.work(item, thread);
}

}  // namespace

int threads() {
  const auto max_threads = openmp<MaxThreads>("omp_get_max_threads");
  return std::max(1, max_threads ? max_threads() : (int)std::thread::hardware_concurrency());
}

void parallel(int64_t items, int threads, const std::function<void(int64_t item, int thread)>& work) {
  Job job{work, items};
  threads = (int)std::min<int64_t>(threads, items);
  if (threads < 2) return run(&job);
  const auto pool = openmp<Parallel>("GOMP_parallel");
  if (pool) return pool(run, &job, (unsigned)threads, 0);
  std::vector<std::thread> own;
  own.reserve(threads);
  try {
    for (int i = 1; i < threads; ++i) own.emplace_back(run, &job);
  } catch (const std::system_error&) {  // no more to be had: fewer will do
  }
  run(&job);
  for (std::thread& thread : own) thread.join();
}

// ---- Instruction sets -------------------------------------------------------------------------------------

namespace {
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
}  // namespace

#define QUOTE(x) #x
#define NAME(x) QUOTE(x)

#define ISA plain
#define TARGET
#define WIDTH 4
#include "kernels.inl"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define ISA avx2
#define AVX2 "avx2,fma"
#define TARGET __attribute__((target(AVX2)))
#define WIDTH 8
#include "kernels.inl"

#define ISA avx512
#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq," AVX2
#define TARGET __attribute__((target(AVX512)))
#define WIDTH 16
#include "kernels.inl"

#define ISA avx512_bf16
#define TARGET __attribute__((target("avx512bf16," AVX512)))
#define WIDTH 16
#define BF16_DOT
#include "kernels.inl"

#if defined(__linux__) && __GNUC__ >= 11
#define HAVE_AMX
#define ISA avx512_amx
#define TARGET __attribute__((target("amx-tile,amx-bf16,avx512bf16," AVX512)))
#define WIDTH 16
#define BF16_DOT
#define AMX
#include "kernels.inl"
#endif
#endif

namespace {

#ifdef HAVE_AMX
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16_tiles = d >> 22 & 1, tiles = d >> 24 & 1;
  const int request_permission = 0x1023, tile_data = 18;  // the kernel hands out the tiles' state on request
  return bf16_tiles && tiles && !syscall(SYS_arch_prctl, request_permission, tile_data);
}
#endif

std::vector<const Kernels*> usable() {  // best last; each needs what the one before needs
  std::vector<const Kernels*> list{&plain::kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return list;
  list.push_back(&avx2::kernels);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return list;
  if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) return list;
  list.push_back(&avx512::kernels);
  if (!__builtin_cpu_supports("avx512bf16")) return list;
  list.push_back(&avx512_bf16::kernels);
#ifdef HAVE_AMX
  if (has_amx()) list.push_back(&avx512_amx::kernels);
#endif
#endif
  return list;
}

std::atomic<const Kernels*> chosen{usable().back()};

}  // namespace

const Kernels& cpu() { return *chosen; }

std::string use_simd(const std::string& name) {
  std::string names;
  for (const Kernels* kernels : usable()) {
    names += text(names.empty() ? "" : ", ", kernels->name);
    if (name == kernels->name) chosen = kernels;
  }
  if (!name.empty() && name != cpu().name)
    throw std::invalid_argument("name is '" + name + "'; this machine has " + names);
  return cpu().name;
}

void cpu_attention(const Attention& a, const Forest& forest) {
  struct alignas(64) Line { float x[16]; };
  const Kernels& kernels = cpu();
  const Plan plan = forest.plan(forest.buffer.data());
  const int64_t items = (int64_t)plan.tiles * a.kv_heads;
  const int workers = (int)std::min<int64_t>(threads(), items);
  const size_t lines = kernels.scratch[a.dtype](a, forest.tile_size) / 16;
  const std::unique_ptr<Line[]> scratch(new Line[workers * lines]);
  parallel(items, workers, [&](int64_t item, int thread) {
    const int32_t tile = (int32_t)(item / a.kv_heads), kv_head = (int32_t)(item % a.kv_heads);
    kernels.attend[a.dtype](a, plan, tile, kv_head, scratch[thread * lines].x);
  });
}
