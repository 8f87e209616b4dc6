// The segment forest, its visibility rule and its layout, and the arguments of the kernels. For C++ and CUDA.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

// Segments are numbered depth first, so that a segment and its descendants have consecutive numbers.
struct Token { int32_t segment, last_descendant, depth; };  // a leaf is its own last_descendant

// The rule: key k is visible to query q if and only if k's segment is q's segment or one of its ancestors,
// and depth(k) <= depth(q). `&` instead of `&&` lets loops vectorize; constexpr lets CUDA kernels call it.
constexpr bool visible(const Token& q, const Token& k) {
  return (k.segment <= q.segment) & (q.segment <= k.last_descendant) & (k.depth <= q.depth);
}

// A tile is a few consecutive queries, which share most of their ancestors. Tile t has the queries from
// tile[t].first_query up to, but not including, tile[t + 1].first_query. Its keys are likewise the key ranges
// from tile[t].first_range on. The first `unmasked` keys are visible to all its queries.
struct Tile { int32_t first_query, first_range, unmasked; };
struct KeyRange { int32_t start, stop, offset; };  // tokens start to stop - 1; offset: keys in earlier ranges

struct Plan {
  int32_t tokens, tiles, tile_size;  // tile_size: maximum number of queries per tile
  const Token* token;                // [tokens]
  const Tile* tile;                  // [tiles + 1]
  const KeyRange* range;
};

struct Forest {
  int32_t tokens = 0, tiles = 0, tile_size;
  std::vector<int32_t> buffer;  // the plan's arrays, concatenated

  Forest(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents, int64_t tile_size);
  Plan plan(const int32_t* buffer) const {  // buffer: this->buffer or a copy of it on a GPU
    const auto* token = (const Token*)buffer;
    const auto* tile = (const Tile*)(token + tokens);
    return {tokens, tiles, tile_size, token, tile, (const KeyRange*)(tile + tiles + 1)};
  }
};

// ---- Arguments of the kernels: a row is a token -----------------------------------------------------------

enum Dtype { F32, BF16 };
constexpr int MAX_HEAD_DIM = 512;

struct Rows { void* data; int64_t stride; };  // stride: elements from one row to the next

struct Attention {
  Rows q, k, v, out;
  int heads, kv_heads, head_dim;
  float scale;
  Plan plan;
};
struct Rope {  // rotates the first `heads` heads of each row in place
  Rows qkv;
  int heads, head_dim;
  const float *cos, *sin;  // [rows, head_dim / 2]
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

// cpu.cpp. simd selects an instruction set unless name is "", and returns the one in use ("" without AVX2).
std::string simd(const std::string& name);
void run_on_cpu(const Attention& a, Dtype dtype);
void run_on_cpu(const Rope& r, Dtype dtype);
void run_on_cpu(const RmsNorm& r, Dtype dtype);
void run_on_cpu(const SwiGlu& g, Dtype dtype);

// cuda.cu: bfloat16, 16-byte aligned rows, on the current device. Throws invalid_argument or runtime_error.
#ifdef FLAME_CUDA
constexpr bool CUDA = true;
#else
constexpr bool CUDA = false;  // run_on_cuda is not linked
#endif
void run_on_cuda(const Attention& a, uintptr_t stream);
void run_on_cuda(const Rope& r, uintptr_t stream);
void run_on_cuda(const RmsNorm& r, uintptr_t stream);
void run_on_cuda(const SwiGlu& g, uintptr_t stream);
