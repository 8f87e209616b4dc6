// The functions of cuda.cu on the emulator, for the tests to call with ctypes. Arrays are copied to device
// memory of exactly their size, so that any access past their end is found.
#include CUDA_CPP

namespace {

struct GpuCopy {  // of n rows, `stride` bytes apart; the destructor copies it back
  char* host;
  mutable std::vector<char> memory;
  GpuCopy(const void* host, int64_t n, int64_t stride, int64_t row)
      : host((char*)host), memory(n ? (n - 1) * stride + row : 0) {
    if (n) memcpy(memory.data(), host, memory.size());
    emulator::device_bytes[(uintptr_t)memory.data()].resize(memory.size());
  }
  GpuCopy(const void* host, int64_t bytes) : GpuCopy(host, bytes ? 1 : 0, 0, bytes) {}
  ~GpuCopy() {
    emulator::device_bytes.erase((uintptr_t)memory.data());
    if (memory.size()) memcpy(host, memory.data(), memory.size());
  }
  template <class T>
  T* data() const { return (T*)memory.data(); }
};

template <class Work>
const char* run(unsigned seed, const Work& work) {  // returns an error message or null
  emulator::error.clear();
  emulator::shared_words.assign(emulator::MAX_SHARED / 4, {});
  emulator::rng.seed(seed);
  try {
    work();
  } catch (const std::exception& e) {
    emulator::error = e.what();
  }
  return emulator::error.empty() ? nullptr : emulator::error.c_str();
}

}  // namespace

extern "C" const char* attention(int segments, const int64_t* lengths, const int64_t* parents, int tile,
                                 const void* q, const void* k, const void* v, void* out,
                                 const int64_t* strides, int heads, int kv_heads, int dim, float scale,
                                 unsigned seed) {
  return run(seed, [&] {
    const Forest forest({lengths, lengths + segments}, {parents, parents + segments}, tile);
    const int64_t n = forest.tokens;
    const GpuCopy plan(forest.buffer.data(), forest.buffer.size() * 4);
    const GpuCopy dq(q, n, strides[0] * 2, heads * dim * 2), dk(k, n, strides[1] * 2, kv_heads * dim * 2);
    const GpuCopy dv(v, n, strides[2] * 2, kv_heads * dim * 2), to(out, n, strides[3] * 2, heads * dim * 2);
    const Attention a{{dq.data<void>(), strides[0]}, {dk.data<void>(), strides[1]},
                      {dv.data<void>(), strides[2]}, {to.data<void>(), strides[3]},
                      heads, kv_heads, dim, scale, forest.plan(plan.data<int32_t>())};
    run_on_cuda(a, 0);
  });
}

extern "C" const char* rope(void* qkv, int64_t rows, int64_t stride, int64_t row, int heads, int dim,
                            const void* cos, const void* sin, unsigned seed) {
  return run(seed, [&] {
    const GpuCopy x(qkv, rows, stride * 2, row * 2);
    const GpuCopy c(cos, rows * dim / 2 * 4), s(sin, rows * dim / 2 * 4);
    run_on_cuda(Rope{{x.data<void>(), stride}, heads, dim, c.data<float>(), s.data<float>(), rows}, 0);
  });
}

extern "C" const char* rmsnorm(void* x, const void* weight, void* out, float eps, const void* delta,
                               int64_t rows, int64_t width, unsigned seed) {
  return run(seed, [&] {
    const int64_t n = rows * width;
    const GpuCopy stream(x, n * 4), w(weight, width * 4), to(out, n * 2), d(delta, delta ? n * 2 : 0);
    const RmsNorm task{stream.data<float>(), delta ? d.data<void>() : nullptr, w.data<float>(),
                       to.data<void>(), rows, width, eps};
    run_on_cuda(task, 0);
  });
}

extern "C" const char* swiglu(const void* gate_up, void* out, int64_t rows, int64_t width, unsigned seed) {
  return run(seed, [&] {
    const GpuCopy from(gate_up, rows * width * 4), to(out, rows * width * 2);
    run_on_cuda(SwiGlu{from.data<void>(), to.data<void>(), rows, width}, 0);
  });
}

// Whether a failed call left an error, which the next CUDA call would report.
extern "C" bool has_cuda_error() { return cudaGetLastError() != cudaSuccess; }
