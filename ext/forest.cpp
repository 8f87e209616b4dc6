// Layout of a segment forest: depths, preorder numbers, and the query tiles that both attention kernels work
// on.
#include "forest.h"

#include <algorithm>
#include <stdexcept>

namespace {

using Ints = std::vector<int32_t>;
constexpr int64_t LIMIT = INT32_MAX;

void check(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents, int64_t tile_size) {
  const auto need = [](bool right, const auto&... parts) {
    if (!right) throw std::invalid_argument(text(parts...));
  };
  need(lengths.size() == parents.size(), "lengths has ", lengths.size(), " segments, parents has ",
       parents.size());
  need(tile_size >= 1, "tile is ", tile_size, ", expected at least 1 query");
  int64_t tokens = 0;
  for (int64_t s = 0; s < (int64_t)lengths.size(); ++s) {
    need(lengths[s] >= 0 && lengths[s] <= LIMIT - tokens, "lengths[", s, "] = ", lengths[s],
         " is negative or makes more than 2^31 - 1 tokens");
    need(parents[s] >= -1 && parents[s] < s, "parents[", s, "] = ", parents[s],
         " is neither -1 (a root) nor an earlier segment");
    tokens += lengths[s];
  }
}

struct Preorder {
  Ints first, last, order;  // [S] a segment's number and its last descendant's; [S] segments by number
};

// Without recursion: subtree sizes from the back, then a child takes the next free stretch of its parent's
// numbers.
Preorder number_segments(const Ints& parents) {
  const int32_t segments = (int32_t)parents.size();
  Preorder p{Ints(segments), Ints(segments), Ints(segments)};
  Ints count(segments, 1), next(segments);
  int32_t next_root = 0;
  for (int32_t s = segments - 1; s >= 0; --s)
    if (parents[s] >= 0) count[parents[s]] += count[s];
  for (int32_t s = 0; s < segments; ++s) {
    int32_t& free = parents[s] < 0 ? next_root : next[parents[s]];
    p.first[s] = free;
    p.last[s] = free + count[s] - 1;
    p.order[free] = s;
    next[s] = free + 1;
    free += count[s];
  }
  return p;
}

// The arrays of a Plan, grown tile by tile.
struct Tiling {
  const Forest& forest;
  const Preorder& preorder;
  Ints query, tile{0}, run{0}, common, run_start, run_stop, before;
  Ints owner;        // [S] the last tile that needed the segment
  Ints needed;       // segments on the paths from this tile's queries to their roots
  int32_t keys = 0;  // of this tile so far

  Tiling(const Forest& f, const Preorder& p) : forest(f), preorder(p), owner(f.lengths.size(), -1) {
    for (int32_t s : p.order)
      for (int32_t t = f.start[s]; t < f.start[s + 1]; ++t) query.push_back(t);
    while (tile.back() < (int32_t)query.size()) add_tile();
  }

  // A neighbour that would bring in more ancestor keys than a tile has queries is better off in a tile of its
  // own.
  bool too_foreign(int32_t segment, int32_t number) const {
    int64_t foreign = 0;
    for (int32_t a = forest.parents[segment]; a >= 0 && owner[a] != number; a = forest.parents[a]) {
      foreign += forest.lengths[a];
      if (foreign > forest.tile_size) return true;
    }
    return false;
  }

  void add_tile() {
    const int32_t number = (int32_t)common.size(), begin = tile.back();
    const int64_t limit = std::min<int64_t>(query.size(), (int64_t)begin + forest.tile_size);
    int64_t end = begin;
    needed.clear();
    while (end < limit) {
      const int32_t segment = forest.segment[query[end]];
      if (end > begin && too_foreign(segment, number)) break;
      for (int32_t a = segment; a >= 0 && owner[a] != number; a = forest.parents[a]) {
        owner[a] = number;
        needed.push_back(a);
      }
      end = std::min<int64_t>(limit, end + forest.start[segment + 1] - query[end]);
    }
    const auto earlier = [&](int32_t a, int32_t b) { return preorder.first[a] < preorder.first[b]; };
    std::sort(needed.begin(), needed.end(), earlier);
    tile.push_back((int32_t)end);
    add_keys(begin, (int32_t)end);
  }

  void add_keys(int32_t begin, int32_t end) {
    const int32_t lowest = forest.first[query[begin]], highest = forest.first[query[end - 1]];
    int32_t shallowest = INT32_MAX, deepest = 0;
    for (int32_t i = begin; i < end; ++i) {
      shallowest = std::min(shallowest, forest.depth[query[i]]);
      deepest = std::max(deepest, forest.depth[query[i]]);
    }
    const auto down_to = [&](int32_t a, int32_t depth) {  // end of segment a's keys that are no deeper
      const int32_t base = forest.lengths[a] ? forest.depth[forest.start[a]] : 0;
      return forest.start[a] + std::clamp(depth + 1 - base, 0, forest.lengths[a]);
    };
    const auto seen_by_all = [&](int32_t a) {
      const bool above = preorder.first[a] <= lowest && highest <= preorder.last[a];
      return above ? down_to(a, shallowest) : forest.start[a];
    };
    keys = 0;
    size_t first_run = before.size();
    for (int32_t a : needed) add_run(first_run, forest.start[a], seen_by_all(a));
    common.push_back(keys);
    first_run = before.size();
    for (int32_t a : needed) add_run(first_run, seen_by_all(a), down_to(a, deepest));
    run.push_back((int32_t)before.size());
  }

  // Appends start..stop, joined to the run before where they touch, if that is first_run or later.
  void add_run(size_t first_run, int32_t start, int32_t stop) {
    if (start >= stop) return;
    if (before.size() > first_run && run_stop.back() == start) {
      run_stop.back() = stop;
    } else {
      run_start.push_back(start);
      run_stop.push_back(stop);
      before.push_back(keys);
    }
    keys += stop - start;
  }
};

}  // namespace

Forest::Forest(const std::vector<int64_t>& lengths64, const std::vector<int64_t>& parents64, int64_t tile64) {
  check(lengths64, parents64, tile64);
  lengths.assign(lengths64.begin(), lengths64.end());
  parents.assign(parents64.begin(), parents64.end());

  const Preorder preorder = number_segments(parents);
  Ints base;  // depth of each segment's first token
  start.push_back(0);
  for (int32_t s = 0; s < (int32_t)lengths.size(); ++s) {
    base.push_back(parents[s] < 0 ? 0 : base[parents[s]] + lengths[parents[s]]);
    start.push_back(start[s] + lengths[s]);
    segment.insert(segment.end(), lengths[s], s);
    first.insert(first.end(), lengths[s], preorder.first[s]);
    last.insert(last.end(), lengths[s], preorder.last[s]);
    for (int32_t i = 0; i < lengths[s]; ++i) depth.push_back(base[s] + i);
  }

  tile_size = (int32_t)std::min<int64_t>(tile64, std::max<size_t>(1, segment.size()));
  const Tiling t(*this, preorder);
  tiles = (int32_t)t.common.size();
  runs = (int32_t)t.before.size();
  for (const Ints& part : {first, last, depth, t.query, t.tile, t.run, t.common, t.run_start, t.run_stop,
                           t.before})
    buffer.insert(buffer.end(), part.begin(), part.end());
}

Plan Forest::plan(const int32_t* at) const {
  const auto take = [&at](size_t n) {
    const int32_t* part = at;
    at += n;
    return part;
  };
  const size_t tokens = segment.size();
  return {(int32_t)tokens, tiles,  // braces: in this order
          take(tokens), take(tokens), take(tokens), take(tokens),
          take(tiles + 1), take(tiles + 1), take(tiles),
          take(runs), take(runs), take(runs)};
}
