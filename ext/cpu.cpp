// The CPU's kernels: threads, and the choice of an instruction set at run time; without AVX2 there are none.
#include "flame_ext.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

template <class Task>
using Kernel = void (*)(const Task&, int64_t item);  // an item: a row; of attention a tile and a KV head

struct Kernels {  // [2]: for float32, for bfloat16
  const char* name;
  Kernel<Attention> attention[2];
  Kernel<Rope> rope[2];
  Kernel<RmsNorm> rmsnorm[2];
  Kernel<SwiGlu> swiglu[2];
};

// Calls kernel(task, item) for all items, a thread for `chunk` of them in a row, on torch's OpenMP threads.
// They spin for a while after each operation: threads of our own would fight them for the cores.
// torch.set_num_threads holds here too. torch loads the pool for all to see; where there is none, one thread
// works. A kernel must not throw.
template <class Task>
void parallel(const Task& task, Kernel<Task> kernel, int64_t items, int64_t chunk = 32) {
  using Loop = const std::function<void()>;
  static const auto threads = (int (*)())dlsym(RTLD_DEFAULT, "omp_get_max_threads");
  static const auto pool = (void (*)(void (*)(void*), void*, unsigned, unsigned))dlsym(RTLD_DEFAULT,
                                                                                       "GOMP_parallel");
  std::atomic<int64_t> next{0};
  Loop loop = [&] {
    for (int64_t from; (from = next.fetch_add(chunk)) < items;)
      for (int64_t item = from; item < std::min(items, from + chunk); ++item) kernel(task, item);
  };
  const int64_t chunks = (items + chunk - 1) / chunk;
  const unsigned workers = threads && pool ? (unsigned)std::min<int64_t>(threads(), chunks) : 1;
  if (workers > 1) pool([](void* loop) { (*(Loop*)loop)(); }, (void*)&loop, workers, 0);
  else loop();
}

#define QUOTE(x) #x
#define NAME(x) QUOTE(x)
#define UNROLL _Pragma("GCC unroll 16")  // or sums leave the registers

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
#endif

std::vector<const Kernels*> usable() {  // best last; each needs what the one before needs
  std::vector<const Kernels*> list;
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return list;
  list.push_back(&avx2::kernels);
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512dq")) return list;
  list.push_back(&avx512_bf16::kernels);
  const int request_permission = 0x1023, tile_data = 18;  // Linux hands out AMX's state on request
  if (__builtin_cpu_supports("amx-bf16") && !syscall(SYS_arch_prctl, request_permission, tile_data))
    list.push_back(&avx512_amx::kernels);
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
  for (const Kernels* kernels : usable())
    if (name == kernels->name) chosen = kernels;
  const std::string used = chosen ? chosen.load()->name : "";
  if (!name.empty() && name != used) throw std::invalid_argument("this CPU has no " + name);
  return used;
}

void run_on_cpu(const Attention& a, Dtype dtype) {
  parallel(a, kernels().attention[dtype], (int64_t)a.plan.tiles * a.kv_heads, 1);
}
void run_on_cpu(const Rope& r, Dtype dtype) { parallel(r, kernels().rope[dtype], r.rows); }
void run_on_cpu(const RmsNorm& r, Dtype dtype) { parallel(r, kernels().rmsnorm[dtype], r.rows); }
void run_on_cpu(const SwiGlu& g, Dtype dtype) { parallel(g, kernels().swiglu[dtype], g.rows); }
