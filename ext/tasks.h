// What kernels are asked to do, on the CPU and on CUDA. Rows are tokens.
#pragma once
#include "forest.h"

enum Dtype { F32, BF16 };

constexpr int MAX_DIM = 512;  // largest head_dim

struct Attention {  // strides count elements between tokens; heads and dim are contiguous
  const void *q, *k, *v;
  void* out;
  int64_t q_stride, k_stride, v_stride, out_stride;
  int heads, kv_heads, dim;
  float scale;
};

struct Rope {  // rotates the first `heads` heads of each row in place
  void* qkv;
  int64_t stride;
  int heads, dim;
  const float *cos, *sin;  // [rows, dim / 2]
};

struct RmsNorm {  // x += delta, out = x / sqrt(mean(x^2) + eps) * weight
  float* x;
  const void* delta;  // may be null
  const float* weight;
  void* out;
  int64_t width;
  float eps;
};

struct SwiGlu {  // out = silu(gate) * up
  const void* gate_up;  // [rows, 2 width]
  void* out;
  int64_t width;
};

// ---- cpu.cpp: on torch's threads --------------------------------------------------------------------------

std::string simd(const std::string& name);  // "" asks for the instruction set in use; "": there is none
void cpu_attention(const Attention& a, Dtype dtype, const Forest& forest);
void cpu_rows(const Rope& r, Dtype dtype, int64_t rows);
void cpu_rows(const RmsNorm& r, Dtype dtype, int64_t rows);
void cpu_rows(const SwiGlu& g, Dtype dtype, int64_t rows);

// ---- cuda.cu: bfloat16, on the current device, in the stream's turn ---------------------------------------

#ifdef FLAME_CUDA
constexpr bool CUDA = true;
#else
constexpr bool CUDA = false;  // the functions are missing
#endif
constexpr int CUDA_ROWS = 64;  // queries x grouped heads a tile, at most

// The plan lies on the device. Throw std::invalid_argument where no kernel is made for the task, and
// std::runtime_error where CUDA fails.
void cuda_attention(const Attention& a, const Plan& plan, int tile_size, uintptr_t stream);
void cuda_rows(const Rope& r, int64_t rows, uintptr_t stream);
void cuda_rows(const RmsNorm& r, int64_t rows, uintptr_t stream);
void cuda_rows(const SwiGlu& g, int64_t rows, uintptr_t stream);
