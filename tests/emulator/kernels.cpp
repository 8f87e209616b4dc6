// What the test calls, by ctypes, of cuda.cu on the emulator. Arrays are copied to device memory not a byte
// larger than they are.
#include CUDA_CPP

namespace {

struct OnDevice {  // a copy of n rows that lie `stride` bytes apart; written back at the end
  char* host;
  std::vector<char> memory;
  OnDevice(const void* host, int64_t n, int64_t stride, int64_t row)
      : host((char*)host), memory(n ? (n - 1) * stride + row : 0) {
    memcpy(memory.data(), host, memory.size());
    emulator::device_bytes[(uintptr_t)memory.data()].resize(memory.size());
  }
  ~OnDevice() {
    emulator::device_bytes.erase((uintptr_t)memory.data());
    memcpy(host, memory.data(), memory.size());
  }
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
    const OnDevice plan(forest.buffer.data(), forest.buffer.size(), 4, 4);
    const OnDevice dq(q, n, strides[0] * size, heads * dim * size);
    const OnDevice dk(k, n, strides[1] * size, kv_heads * dim * size);
    const OnDevice dv(v, n, strides[2] * size, kv_heads * dim * size);
    OnDevice to(out, n, strides[3] * size, heads * dim * size);
    const Attention a{dq.memory.data(), dk.memory.data(), dv.memory.data(), to.memory.data(),
                      strides[0], strides[1], strides[2], strides[3],
                      heads, kv_heads, dim, scale, bf16 ? BF16 : F32};
    cuda_attention(a, forest.plan((const int32_t*)plan.memory.data()), tile, 0, 0);
  });
}

extern "C" const char* mask(int segments, const int64_t* lengths, const int64_t* parents, void* out,
                            int64_t stride, unsigned seed) {
  return reported(seed, [&] {
    const Forest forest = forest_of(segments, lengths, parents, 64);
    const OnDevice plan(forest.buffer.data(), forest.buffer.size(), 4, 4);
    OnDevice to(out, forest.segment.size(), stride, forest.segment.size());
    cuda_mask(forest.plan((const int32_t*)plan.memory.data()), (uint8_t*)to.memory.data(), stride, 0, 0);
  });
}
