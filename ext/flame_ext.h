// The segment forest, its rule and its layout, and what kernels are asked to do. Shared by C++ and CUDA.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// Segments are numbered in preorder, so that the descendants of a segment, itself included, are a range.
struct Token { int32_t first, last, depth; };  // its segment's number, and that of its last descendant

// The rule: key k is visible to query q if and only if k's segment is q's segment or one of its ancestors,
// and depth(k) <= depth(q). `&` instead of `&&` lets SIMD loops in.
HOST_DEVICE inline bool visible(const Token& q, const Token& k) {
  return (k.first <= q.first) & (q.first <= k.last) & (k.depth <= q.depth);
}

// Queries are worked on in tiles of neighbours in preorder, because those share most ancestors. Tile t holds
// the packed tokens query[tile[t].query..tile[t + 1].query). The keys that they need are those of the runs
// tile[t].run..tile[t + 1].run; the first `common` of them are visible to all its queries.
struct Tile { int32_t query, run, common; };
struct Run { int32_t start, stop, before; };  // packed tokens start..stop; the tile's keys in earlier runs

struct Plan {
  int32_t tokens, tiles;
  const Token* token;    // [tokens] in packed order
  const int32_t* query;  // [tokens]
  const Tile* tile;      // [tiles + 1]
  const Run* run;
};

struct Forest {
  int32_t tokens = 0, tiles = 0, tile_size;
  std::vector<int32_t> buffer;  // the plan's arrays, one after the other

  // At most tile_size queries a tile. Throws std::invalid_argument.
  Forest(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents, int64_t tile_size);

  Plan plan(const int32_t* buffer) const {  // of this buffer or a copy of it on a GPU
    const auto* token = (const Token*)buffer;
    const auto* query = (const int32_t*)(token + tokens);
    const auto* tile = (const Tile*)(query + tokens);
    return {tokens, tiles, token, query, tile, (const Run*)(tile + tiles + 1)};
  }
};

// ---- Tasks: rows are tokens, strides count elements between them ------------------------------------------

enum Dtype { F32, BF16 };
constexpr int MAX_DIM = 512;  // largest head_dim

struct Attention {
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

// cpu.cpp
std::string simd(const std::string& name);  // "" asks for the instruction set in use; "": there is none
void cpu_attention(const Attention& a, Dtype dtype, const Forest& forest);
void cpu_rows(const Rope& r, Dtype dtype, int64_t rows);
void cpu_rows(const RmsNorm& r, Dtype dtype, int64_t rows);
void cpu_rows(const SwiGlu& g, Dtype dtype, int64_t rows);

// cuda.cu: bfloat16, rows at multiples of 16 bytes, on the current device. Throw std::invalid_argument where
// no kernel is made for the task, and std::runtime_error where CUDA fails.
#ifdef FLAME_CUDA
constexpr bool CUDA = true;
#else
constexpr bool CUDA = false;  // the functions are missing
#endif
void cuda_attention(const Attention& a, const Plan& plan, int tile_size, uintptr_t stream);
void cuda_rows(const Rope& r, int64_t rows, uintptr_t stream);
void cuda_rows(const RmsNorm& r, int64_t rows, uintptr_t stream);
void cuda_rows(const SwiGlu& g, int64_t rows, uintptr_t stream);
