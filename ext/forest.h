// The segment forest: the visibility rule, and what carries a layout to the kernels. Shared by C++ and CUDA.
#pragma once
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// The rule: key k is visible to query q if and only if k's segment is q's segment or one of its ancestors,
// and depth(k) <= depth(q). Segments are numbered in preorder, so that the descendants of k's segment, itself
// included, are the numbers k_first..k_last, and "ancestor or same" is two comparisons. `&` instead of `&&`
// lets SIMD loops in.
HOST_DEVICE inline bool visible(int32_t q_first, int32_t q_depth, int32_t k_first, int32_t k_last,
                                int32_t k_depth) {
  return (k_first <= q_first) & (q_first <= k_last) & (k_depth <= q_depth);
}

// What the kernels read: arrays one after the other in one buffer, the forest's own or a copy of it on a GPU.
//
// Queries are worked on in tiles of neighbours in preorder, because those share most ancestors. Tile t holds
// the packed tokens query[tile[t]..tile[t + 1]). The keys that they need are the packed runs
// run_start[r]..run_stop[r], r in run[t]..run[t + 1]; before[r] of the tile's keys lie in earlier runs, and
// the first common[t] are visible to all its queries.
struct Plan {
  int32_t tokens, tiles;
  const int32_t *first, *last, *depth, *query;   // [tokens]
  const int32_t *tile, *run, *common;            // [tiles + 1] [tiles + 1] [tiles]
  const int32_t *run_start, *run_stop, *before;  // [runs]
};

struct Forest {
  std::vector<int32_t> lengths, parents, start;       // [S] [S] [S + 1]
  std::vector<int32_t> segment, depth, first, last;   // [tokens] first, last: preorder numbers of the token's
                                                      // segment and of its last descendant
  int32_t tile_size, tiles, runs;
  std::vector<int32_t> buffer;                        // the plan's arrays

  // At most tile_size queries a tile. Throws std::invalid_argument.
  Forest(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents, int64_t tile_size);

  Plan plan(const int32_t* buffer) const;  // of this buffer or a copy of it
};

// The parts of a message, joined.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}
