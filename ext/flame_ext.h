// The segment forest, its rule and its layout, and what kernels are asked to do. Shared by C++ and CUDA.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

// Segments come depth first, so that the descendants of a segment, itself included, are a range.
struct Token { int32_t segment, last, depth; };  // its segment's number, and that of its last descendant

// The rule: key k is visible to query q if and only if k's segment is q's segment or one of its ancestors,
// and depth(k) <= depth(q). `&` instead of `&&` lets SIMD loops in; constexpr lets CUDA's kernels call it.
constexpr bool visible(const Token& q, const Token& k) {
  return (k.segment <= q.segment) & (q.segment <= k.last) & (k.depth <= q.depth);
}

// Queries are worked on in tiles of neighbours, because those share most ancestors. Tile t holds the packed
// tokens tile[t].query up to tile[t + 1].query. The keys that they need are those of the runs tile[t].run up
// to tile[t + 1].run; the first `common` of them are visible to all its queries.
struct Tile { int32_t query, run, common; };
struct Run { int32_t start, stop, before; };  // tokens from start up to stop; the tile's keys in earlier runs

struct Plan {
  int32_t tokens, tiles, tile_size;  // tile_size: queries a tile, at most
  const Token* token;                // [tokens]
  const Tile* tile;                  // [tiles + 1]
  const Run* run;
};

struct Forest {
  int32_t tokens = 0, tiles = 0, tile_size;
  std::vector<int32_t> buffer;  // the plan's arrays, one after the other

  // Throws std::invalid_argument.
  Forest(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents, int64_t tile_size);

  Plan plan(const int32_t* buffer) const {  // of this buffer or a copy of it on a GPU
    const auto* token = (const Token*)buffer;
    const auto* tile = (const Tile*)(token + tokens);
    return {tokens, tiles, tile_size, token, tile, (const Run*)(tile + tiles + 1)};
  }
};

// ---- Tasks: a row is a token ------------------------------------------------------------------------------

enum Dtype { F32, BF16 };
constexpr int MAX_DIM = 512;  // largest head_dim

struct Rows { void* at; int64_t stride; };  // stride: elements between the beginnings of two rows

struct Attention {
  Rows q, k, v, out;
  int heads, kv_heads, dim;
  float scale;
  Plan plan;
};
struct Rope {  // rotates the first `heads` heads of each row in place
  Rows qkv;
  int heads, dim;
  const float *cos, *sin;  // [rows, dim / 2]
  int64_t rows;
};
struct RmsNorm {  // x += delta, out = x / sqrt(mean(x^2) + eps) * weight
  float* x;
  const void* delta;  // may be null
  const float* weight;
  void* out;
  int64_t rows, width;
  float eps;
};
struct SwiGlu {  // out = silu(gate) * up
  const void* gate_up;  // [rows, 2 width]
  void* out;
  int64_t rows, width;
};

// cpu.cpp
std::string simd(const std::string& name);  // "" asks for the instruction set in use; "": there is none
void run_on_cpu(const Attention& a, Dtype dtype);
void run_on_cpu(const Rope& r, Dtype dtype);
void run_on_cpu(const RmsNorm& r, Dtype dtype);
void run_on_cpu(const SwiGlu& g, Dtype dtype);

// cuda.cu: bfloat16, rows at multiples of 16 bytes, on the current device. Throw std::invalid_argument where
// no kernel is made for the task, and std::runtime_error where CUDA fails.
#ifdef FLAME_CUDA
constexpr bool CUDA = true;
#else
constexpr bool CUDA = false;  // the functions are missing
#endif
void run_on_cuda(const Attention& a, uintptr_t stream);
void run_on_cuda(const Rope& r, uintptr_t stream);
void run_on_cuda(const RmsNorm& r, uintptr_t stream);
void run_on_cuda(const SwiGlu& g, uintptr_t stream);
