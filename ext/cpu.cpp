// CPU side: the thread pool, and the choice of SIMD width at run time. The kernels themselves are in kernels.inl, compiled once per instruction set.
#include "forest.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <thread>
#include <type_traits>
#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// ---- Threads ----------------------------------------------------------------------------------------------------------
// torch's OpenMP threads spin for a while after each operation. Threads of our own would fight them for the cores, so we
// find the OpenMP library that is already loaded and run on its pool, which also makes torch.set_num_threads hold here.

namespace {
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
};

OpenMP find_openmp() {
  OpenMP found;
#ifdef __linux__
  // numpy-world wheels each bring a libgomp of their own: torch's comes first, then any.
  std::vector<std::string> paths;
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void* list) {
    const std::string path = info->dlpi_name ? info->dlpi_name : "", name = path.substr(path.rfind('/') + 1);
    auto& paths = *(std::vector<std::string>*)list;
    if (name.rfind("libgomp", 0) == 0 || name.rfind("libiomp", 0) == 0 || name.rfind("libomp", 0) == 0)
      paths.insert(path.find("/torch/") != std::string::npos ? paths.begin() : paths.end(), path);
    return 0;
  }, &paths);
  for (const std::string& path : paths) {
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!library) continue;
    found.parallel = (decltype(found.parallel))dlsym(library, "GOMP_parallel");
    found.max_threads = (decltype(found.max_threads))dlsym(library, "omp_get_max_threads");
    if (found.parallel && found.max_threads) return found;
  }
#endif
  return OpenMP{};
}

// Calls work(next) once per thread; next() hands out 0..items-1 in order, then -1. An exception in any thread is rethrown here.
void run_parallel(int64_t items, const std::function<void(const std::function<int64_t()>&)>& work) {
  static OpenMP openmp;  // asked again until found: torch may be imported after us
  static std::mutex mutex;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (!openmp.parallel) openmp = find_openmp();
  }
  struct Job {
    const std::function<void(const std::function<int64_t()>&)>& work;
    int64_t items;
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex mutex;
  } job{work, items};
  const auto body = [](void* data) {
    Job& job = *(Job*)data;
    try {
      job.work([&job] { const int64_t i = job.next.fetch_add(1, std::memory_order_relaxed); return i < job.items ? i : -1; });
    } catch (...) {
      std::lock_guard<std::mutex> lock(job.mutex);
      job.error = std::current_exception();
    }
  };
  const int64_t wanted = openmp.parallel ? openmp.max_threads() : std::thread::hardware_concurrency();
  const unsigned threads = (unsigned)std::clamp<int64_t>(wanted, 1, std::max<int64_t>(items, 1));
  if (threads == 1) body(&job);
  else if (openmp.parallel) openmp.parallel(body, &job, threads, 0);
  else {
    std::vector<std::thread> pool;
    for (unsigned i = 1; i < threads; ++i) pool.emplace_back(body, &job);
    body(&job);
    for (auto& thread : pool) thread.join();
  }
  if (job.error) std::rethrow_exception(job.error);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// What an instruction set provides. Rows are token rows; the callers below split them over threads.
struct Kernels {
  const char* name;
  void (*attend)(const Attention&, const Forest&, const Tiles&, int64_t tile, int kv_head, std::vector<float>& scratch);
  void (*mask)(const Forest&, uint8_t* out, int32_t query);
  void (*rope[2])(void* qkv, int64_t stride, int heads, int dim, const float* cos, const float* sin, int64_t from, int64_t to);
  void (*rmsnorm[2][2])(float* x, const void* delta, const float* weight, void* out, int64_t width, float eps, int64_t from, int64_t to);
  void (*swiglu[2])(const void* gate_up, void* out, int64_t width, int64_t from, int64_t to);
  void (*unit_vectors[2])(const Store& store, const int64_t* index, float* out, int64_t from, int64_t to);  // float16, int8
};
}  // namespace

// ---- Instruction sets -------------------------------------------------------------------------------------------------

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
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#include "kernels.inl"
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define WIDTH 16
#include "kernels.inl"
#define ISA avx512_bf16
#define TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define WIDTH 16
#define BF16_DOT
#include "kernels.inl"
#if defined(__linux__) && __GNUC__ >= 11
#define HAVE_AMX
#define ISA avx512_amx
#define TARGET __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define WIDTH 16
#define BF16_DOT
#define AMX
#include "kernels.inl"
#endif
#endif

namespace {
std::vector<const Kernels*> usable() {  // best last
  std::vector<const Kernels*> list{&plain::kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(&avx2::kernels);
  if (avx512) list.push_back(&avx512::kernels);
  if (avx512 && __builtin_cpu_supports("avx512bf16")) list.push_back(&avx512_bf16::kernels);
#ifdef HAVE_AMX
  unsigned a, b, c, d;  // leaf 7: bit 22 of edx is AMX-BF16, bit 24 AMX-TILE; the kernel hands out the tiles' state on request
  const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 && d >> 24 & 1;
  if (amx && list.back() == &avx512_bf16::kernels && !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */)) list.push_back(&avx512_amx::kernels);
#endif
#endif
  return list;
}

std::atomic<const Kernels*> chosen{usable().back()};
}  // namespace

std::string cpu_simd(const std::string& wanted) {
  std::string names;
  for (const Kernels* kernels : usable()) {
    if (wanted == kernels->name) chosen = kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  if (!wanted.empty() && wanted != chosen.load()->name) throw std::invalid_argument("name is '" + wanted + "'; this machine has " + names);
  return chosen.load()->name;
}

void cpu_attention(const Attention& a, const Forest& forest, const Tiles& tiles) {
  const Kernels& kernels = *chosen;
  const int64_t items = (int64_t)(tiles.tile.size() - 1) * a.kv_heads;
  run_parallel(items, [&](const auto& next) {
    std::vector<float> scratch;
    for (int64_t i; (i = next()) >= 0;) kernels.attend(a, forest, tiles, i / a.kv_heads, (int)(i % a.kv_heads), scratch);
  });
}

// Calls part(from, to) for chunks of rows from all threads.
template <class Part>
static void over_rows(int64_t rows, int64_t chunk, const Part& part) {
  run_parallel(ceil_div(rows, chunk), [&](const auto& next) {
    for (int64_t i; (i = next()) >= 0;) part(i * chunk, std::min(rows, (i + 1) * chunk));
  });
}

void cpu_mask(const Forest& forest, uint8_t* out, int64_t stride) {
  over_rows(forest.tokens(), 64, [&](int64_t from, int64_t to) {
    for (int64_t q = from; q < to; ++q) chosen.load()->mask(forest, out + q * stride, (int32_t)q);
  });
}

void cpu_rope(void* qkv, Dtype dtype, int64_t tokens, int64_t stride, int heads, int dim, const float* cos, const float* sin) {
  over_rows(tokens, 64, [&](int64_t from, int64_t to) { chosen.load()->rope[(int)dtype](qkv, stride, heads, dim, cos, sin, from, to); });
}

void cpu_rmsnorm(float* x, const void* delta, Dtype delta_dtype, const float* weight, void* out, Dtype out_dtype, int64_t tokens, int64_t width, float eps) {
  over_rows(tokens, 64, [&](int64_t from, int64_t to) { chosen.load()->rmsnorm[(int)delta_dtype][(int)out_dtype](x, delta, weight, out, width, eps, from, to); });
}

void cpu_swiglu(const void* gate_up, void* out, Dtype dtype, int64_t tokens, int64_t width) {
  over_rows(tokens, 32, [&](int64_t from, int64_t to) { chosen.load()->swiglu[(int)dtype](gate_up, out, width, from, to); });
}

void cpu_unit_vectors(const Store& store, const int64_t* index, int64_t n, float* out) {
  over_rows(n, 16, [&](int64_t from, int64_t to) { chosen.load()->unit_vectors[store.scales != nullptr](store, index, out, from, to); });
}
