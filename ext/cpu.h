// The CPU's kernels: what each instruction set provides, and the threads to run it on.
#pragma once
#include "tasks.h"

#include <algorithm>
#include <functional>

struct UnitVectors {  // out[i] = stored vector number index[i], normalised
  const void* vectors;      // [N, columns, width] float16, or int8: mean + deviation * scale * integer
  const float* scales;      // [N, columns], null for float16
  const float* statistics;  // [2, columns, width]: means, then deviations
  int64_t columns, width;
  const int64_t* index;
  float* out;
};

struct Kernels {  // [2]: for float32, for bfloat16
  const char* name;
  size_t (*scratch[2])(const Attention&, int tile_size);  // floats that `attend` needs
  void (*attend[2])(const Attention&, const Plan&, int32_t tile, int kv_head, float* scratch);
  void (*rope[2])(const Rope&, int64_t from, int64_t to);
  void (*rmsnorm[2])(const RmsNorm&, int64_t from, int64_t to);
  void (*swiglu[2])(const SwiGlu&, int64_t from, int64_t to);
  void (*unit_vectors[2])(const UnitVectors&, int64_t from, int64_t to);  // for float16, for int8
};

const Kernels& cpu();                           // of the instruction set in use
std::string use_simd(const std::string& name);  // "" asks; throws std::invalid_argument
void cpu_attention(const Attention& a, const Forest& forest);
int threads();  // that torch would use

// Calls work(item, thread) for all items, on threads that are numbered below `threads`. It must not throw.
void parallel(int64_t items, int threads, const std::function<void(int64_t item, int thread)>& work);

// Calls part(from, to) for all rows, some at a time.
template <class Part>
void over_rows(int64_t rows, const Part& part) {
  constexpr int64_t CHUNK = 32;
  parallel((rows + CHUNK - 1) / CHUNK, threads(),
           [&](int64_t i, int) { part(i * CHUNK, std::min(rows, (i + 1) * CHUNK)); });
}
