// The segment forest, shared by the C++ and the CUDA sources: the visibility rule, and the plain data that carries a layout to the kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// The rule: key k is visible to query q if and only if k's segment is q's segment or one of its ancestors, and
// depth(k) <= depth(q). Segments are numbered in preorder, so that the descendants of k's segment, itself included, are
// the numbers k_first..k_last, and "ancestor or same" is two comparisons. `&` instead of `&&` lets SIMD loops in.
HOST_DEVICE inline bool visible(int32_t q_number, int32_t q_depth, int32_t k_first, int32_t k_last, int32_t k_depth) {
  return (k_first <= q_number) & (q_number <= k_last) & (k_depth <= q_depth);
}

// The rule's outer bound for queries whose numbers span lowest..highest, none deeper than `deepest`: what it excludes is
// visible to none of them.
HOST_DEVICE inline bool visible_to_some(int32_t lowest, int32_t highest, int32_t deepest, int32_t k_first, int32_t k_last, int32_t k_depth) {
  return (k_first <= highest) & (lowest <= k_last) & (k_depth <= deepest);
}

// Which queries are worked on together, and which keys they need. Tile t holds the queries query[tile[t]..tile[t + 1])
// (token[] is their packed index), neighbours in preorder because those share most ancestors. Its keys are the packed
// runs run_start[r]..run_stop[r], r in run[t]..run[t + 1]; runs before full[t] are visible to every query of the tile.
struct Tiles {
  std::vector<int32_t> query, token, tile{0}, run{0}, full, run_start, run_stop;
};

struct Forest {
  std::vector<int32_t> length, parent, start, segment, depth;   // [S] [S] [S + 1] [T] [T]
  std::vector<int32_t> range_ptr, range_start, range_stop;      // [S + 1] [R] [R]
  std::vector<int32_t> first, last;                             // [T]: preorder numbers of the token's segment and of its last descendant
  std::vector<int32_t> segment_first, segment_last, preorder;   // [S] the same per segment; [S] segments in preorder

  int64_t tokens() const { return (int64_t)segment.size(); }

  Forest(const std::vector<int32_t>& lengths, const std::vector<int32_t>& parents);  // throws std::invalid_argument

  // rows == nullptr: query i is packed token i. At most `size` queries a tile.
  Tiles tiles(const std::vector<int64_t>* rows, int size) const;
  const Tiles& all_tiles(int size) const;  // of all tokens, made once

  // Device copies, one per CUDA device, made at first use and freed with the forest (cuda.cu).
  mutable std::vector<std::shared_ptr<void>> device_copies;
  mutable std::mutex mutex;

 private:
  mutable std::vector<std::pair<int, std::unique_ptr<Tiles>>> cached_;
};

enum class Dtype { f32, bf16 };

struct Attention {  // strides count elements between tokens; heads and dim are contiguous
  const void *q, *k, *v;
  void* out;
  int64_t q_stride, k_stride, v_stride, out_stride;
  int heads, kv_heads, dim;
  float scale;
  Dtype dtype;
};

struct Store {  // of embeddings: vectors [N, columns, width], float16, or int8 with scales [N, columns] and statistics [2, columns, width]
  const void* vectors;
  const float *scales, *statistics;  // null for float16
  int64_t columns, width;
};

// CPU (cpu.cpp)
void cpu_attention(const Attention& a, const Forest& forest, const Tiles& tiles);
void cpu_mask(const Forest& forest, uint8_t* out, int64_t stride);
void cpu_rope(void* qkv, Dtype dtype, int64_t tokens, int64_t stride, int heads, int dim, const float* cos, const float* sin);
void cpu_rmsnorm(float* x, const void* delta, Dtype delta_dtype, const float* weight, void* out, Dtype out_dtype, int64_t tokens, int64_t width, float eps);
void cpu_swiglu(const void* gate_up, void* out, Dtype dtype, int64_t tokens, int64_t width);
void cpu_unit_vectors(const Store& store, const int64_t* index, int64_t n, float* out);
std::string cpu_simd(const std::string& wanted);  // "" asks; throws std::invalid_argument
constexpr int CPU_TILE = 64;                      // queries a tile
constexpr int MAX_DIM = 512;                      // largest head_dim

// CUDA (cuda.cu); errors throw std::runtime_error
constexpr int cuda_tile(int share) { return share < 64 ? 64 / share : 1; }  // queries a tile, for `share` query heads a KV head
#ifdef FLAME_CUDA
void cuda_attention(const Attention& a, const Forest& forest, const Tiles* rows_tiles, int device, uintptr_t stream);
void cuda_mask(const Forest& forest, uint8_t* out, int64_t stride, int device, uintptr_t stream);
#endif
