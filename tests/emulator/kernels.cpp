// What the test calls, by ctypes, of cuda.cu on the emulator. Arrays are copied to device memory not a byte
// larger than they are.
#include CUDA_CPP

namespace {

struct OnDevice {  // a copy of n rows that lie `stride` bytes apart; written back at the end
  char* host;
  mutable std::vector<char> memory;
  OnDevice(const void* host, int64_t n, int64_t stride, int64_t row)
      : host((char*)host), memory(n ? (n - 1) * stride + row : 0) {
    if (n) memcpy(memory.data(), host, memory.size());
    emulator::device_bytes[(uintptr_t)memory.data()].resize(memory.size());
  }
  OnDevice(const void* host, int64_t bytes) : OnDevice(host, bytes ? 1 : 0, 0, bytes) {}
  ~OnDevice() {
    emulator::device_bytes.erase((uintptr_t)memory.data());
    if (memory.size()) memcpy(host, memory.data(), memory.size());
  }
  template <class T>
  T* data() const { return (T*)memory.data(); }
};

template <class Work>
const char* reported(unsigned seed, const Work& work) {  // null or what went wrong
  emulator::error.clear();
  emulator::shared_words.assign(emulator::MAX_SHARED / 4, {});
  emulator::dice.seed(seed);
  try {
    work();
  } catch (const std::exception& e) {
    emulator::error = e.what();
  }
  return emulator::error.empty() ? nullptr : emulator::error.c_str();
}

Forest forest_of(int segments, const int64_t* lengths, const int64_t* parents, int tile) {
  return Forest({lengths, lengths + segments}, {parents, parents + segments}, tile);
}

}  // namespace

extern "C" const char* attention(int segments, const int64_t* lengths, const int64_t* parents, int tile,
                                 const void* q, const void* k, const void* v, void* out,
                                 const int64_t* strides, int heads, int kv_heads, int dim, float scale,
                                 bool bf16, unsigned seed) {
  return reported(seed, [&] {
    const Forest forest = forest_of(segments, lengths, parents, tile);
    const int64_t n = forest.segment.size(), size = bf16 ? 2 : 4;
    const OnDevice plan(forest.buffer.data(), forest.buffer.size() * 4);
    const OnDevice dq(q, n, strides[0] * size, heads * dim * size);
    const OnDevice dk(k, n, strides[1] * size, kv_heads * dim * size);
    const OnDevice dv(v, n, strides[2] * size, kv_heads * dim * size);
    const OnDevice to(out, n, strides[3] * size, heads * dim * size);
    const Attention a{dq.data<void>(), dk.data<void>(), dv.data<void>(), to.data<void>(),
                      strides[0], strides[1], strides[2], strides[3],
                      heads, kv_heads, dim, scale, bf16 ? BF16 : F32};
    cuda_attention(a, forest.plan(plan.data<int32_t>()), tile, {0, 0});
  });
}

extern "C" const char* mask(int segments, const int64_t* lengths, const int64_t* parents, void* out,
                            int64_t stride, unsigned seed) {
  return reported(seed, [&] {
    const Forest forest = forest_of(segments, lengths, parents, 64);
    const OnDevice plan(forest.buffer.data(), forest.buffer.size() * 4);
    const OnDevice to(out, forest.segment.size(), stride, forest.segment.size());
    cuda_mask(forest.plan(plan.data<int32_t>()), to.data<uint8_t>(), stride, {0, 0});
  });
}

extern "C" const char* rope(void* qkv, int64_t rows, int64_t stride, int64_t row, int heads, int dim,
                            const void* cos, const void* sin, bool bf16, unsigned seed) {
  return reported(seed, [&] {
    const int64_t size = bf16 ? 2 : 4;
    const OnDevice x(qkv, rows, stride * size, row * size);
    const OnDevice c(cos, rows * dim / 2 * 4), s(sin, rows * dim / 2 * 4);
    const Rope task{x.data<void>(), stride, heads, dim, c.data<float>(), s.data<float>()};
    cuda_rows(task, bf16 ? BF16 : F32, rows, {0, 0});
  });
}

extern "C" const char* rmsnorm(void* x, const void* weight, void* out, float eps, const void* delta,
                               int64_t rows, int64_t width, bool bf16, unsigned seed) {
  return reported(seed, [&] {
    const int64_t n = rows * width, size = bf16 ? 2 : 4;
    const OnDevice stream(x, n * 4), w(weight, width * 4), to(out, n * size), d(delta, delta ? n * size : 0);
    const RmsNorm task{stream.data<float>(), delta ? d.data<void>() : nullptr, w.data<float>(),
                       to.data<void>(), width, eps};
    cuda_rows(task, bf16 ? BF16 : F32, rows, {0, 0});
  });
}

extern "C" const char* swiglu(const void* gate_up, void* out, int64_t rows, int64_t width, bool bf16,
                              unsigned seed) {
  return reported(seed, [&] {
    const int64_t size = rows * width * (bf16 ? 2 : 4);
    const OnDevice from(gate_up, 2 * size), to(out, size);
    cuda_rows(SwiGlu{from.data<void>(), to.data<void>(), width}, bf16 ? BF16 : F32, rows, {0, 0});
  });
}

// Of a failed call whoever calls CUDA next must not hear.
extern "C" bool error_left() { return cudaGetLastError() != cudaSuccess; }
