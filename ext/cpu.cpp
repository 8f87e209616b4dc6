// CPU kernels: threads, and the choice of an instruction set at run time. They need x86-64 with AVX2.
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

template <class Params>
using Kernel = void (*)(const Params&, int64_t item);  // item: a row, or a (tile, KV head) pair of attention

struct Kernels {  // [2]: float32, bfloat16
  const char* name;
  Kernel<Attention> attention[2];
  Kernel<Rope> rope[2];
  Kernel<RmsNorm> rmsnorm[2];
  Kernel<SwiGlu> swiglu[2];
};

// Call kernel(params, item) for all items, in chunks, on torch's OpenMP threads. These spin for a while after
// each operation, so threads of our own would compete with them for cores. torch.set_num_threads applies.
// torch exports the OpenMP functions; if they are missing, one thread does the work. A kernel must not throw.
template <class Params>
void parallel_for(const Params& params, Kernel<Params> kernel, int64_t items, int64_t chunk = 32) {
  using Loop = const std::function<void()>;
  static const auto threads = (int (*)())dlsym(RTLD_DEFAULT, "omp_get_max_threads");
  static const auto pool = (void (*)(void (*)(void*), void*, unsigned, unsigned))dlsym(RTLD_DEFAULT,
                                                                                       "GOMP_parallel");
  std::atomic<int64_t> next{0};
  Loop loop = [&] {
    for (int64_t from; (from = next.fetch_add(chunk)) < items;)
      for (int64_t item = from; item < std::min(items, from + chunk); ++item) kernel(params, item);
  };
  const int64_t chunks = (items + chunk - 1) / chunk;
  const unsigned workers = threads && pool ? (unsigned)std::min<int64_t>(threads(), chunks) : 1;
  if (workers > 1) pool([](void* loop) { (*(Loop*)loop)(); }, (void*)&loop, workers, 0);
  else loop();
}

#define QUOTE(x) #x
#define NAME(x) QUOTE(x)
#define UNROLL _Pragma("GCC unroll 16")  // keeps accumulators in registers

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

std::vector<const Kernels*> supported() {  // fastest last; each needs the features of the one before
  std::vector<const Kernels*> list;
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return list;
  list.push_back(&avx2::kernels);
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512dq")) return list;
  list.push_back(&avx512_bf16::kernels);
  const int request_permission = 0x1023, tile_data = 18;  // Linux enables AMX per process, on request
  if (__builtin_cpu_supports("amx-bf16") && !syscall(SYS_arch_prctl, request_permission, tile_data))
    list.push_back(&avx512_amx::kernels);
#endif
  return list;
}

std::atomic<const Kernels*> active{supported().empty() ? nullptr : supported().back()};

const Kernels& active_kernels() {
  if (!active) throw std::invalid_argument("flame_ext needs a CPU with AVX2. Use the PyTorch kernels");
  return *active;
}

}  // namespace

std::string simd(const std::string& name) {
  for (const Kernels* kernels : supported())
    if (name == kernels->name) active = kernels;
  const std::string used = active ? active.load()->name : "";
  if (!name.empty() && name != used) throw std::invalid_argument("this CPU does not support " + name);
  return used;
}

void run_on_cpu(const Attention& a, Dtype dtype) {
  parallel_for(a, active_kernels().attention[dtype], (int64_t)a.plan.tiles * a.kv_heads, 1);
}
void run_on_cpu(const Rope& r, Dtype dtype) { parallel_for(r, active_kernels().rope[dtype], r.rows); }
void run_on_cpu(const RmsNorm& r, Dtype dtype) { parallel_for(r, active_kernels().rmsnorm[dtype], r.rows); }
void run_on_cpu(const SwiGlu& g, Dtype dtype) { parallel_for(g, active_kernels().swiglu[dtype], g.rows); }
