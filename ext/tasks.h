// What kernels are asked to do, on the CPU and on CUDA. Rows are tokens.
#pragma once
#include "forest.h"

#ifdef FLAME_CUDA
constexpr bool CUDA = true;
#else
constexpr bool CUDA = false;  // the functions at the end are missing
#endif

enum Dtype { F32, BF16 };

struct Attention {  // strides count elements between tokens; heads and dim are contiguous
  const void *q, *k, *v;
  void* out;
  int64_t q_stride, k_stride, v_stride, out_stride;
  int heads, kv_heads, dim;
  float scale;
  Dtype dtype;
};

constexpr int MAX_DIM = 512;  // largest head_dim
constexpr int CPU_TILE = 64;  // queries a tile

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

// ---- cuda.cu: all in the stream's turn. Errors throw std::runtime_error -----------------------------------

struct Gpu {
  int device;
  uintptr_t stream;  // a handle
};

// The plan lies on the device; tiles of 64 * kv_heads / heads queries are fast.
void cuda_attention(const Attention& a, const Plan& plan, int tile_size, Gpu gpu);
void cuda_mask(const Plan& plan, uint8_t* out, int64_t stride, Gpu gpu);
void cuda_rows(const Rope& r, Dtype dtype, int64_t rows, Gpu gpu);
void cuda_rows(const RmsNorm& r, Dtype dtype, int64_t rows, Gpu gpu);
void cuda_rows(const SwiGlu& g, Dtype dtype, int64_t rows, Gpu gpu);
