// Layout of a segment forest: depths, preorder numbers, visible ranges, and the query tiles that both attention kernels work on.
#include "forest.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

namespace {
constexpr int64_t LIMIT = INT32_MAX;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

// Appends start..stop to a list of runs, joined to the last run where they touch; `from` is the list's first own run.
void add_run(std::vector<int32_t>& starts, std::vector<int32_t>& stops, size_t from, int32_t start, int32_t stop) {
  if (start >= stop) return;
  if (starts.size() > from && stops.back() == start) stops.back() = stop;
  else { starts.push_back(start); stops.push_back(stop); }
}
}  // namespace

Forest::Forest(const std::vector<int32_t>& lengths, const std::vector<int32_t>& parents) : length(lengths), parent(parents) {
  if (lengths.size() != parents.size())
    refuse("lengths has " + std::to_string(lengths.size()) + " segments, parents has " + std::to_string(parents.size()));
  const int32_t segments = (int32_t)lengths.size();
  std::vector<int32_t> base(segments), count(segments, 1), next(segments);
  int64_t total = 0;
  start.push_back(0);
  for (int32_t s = 0; s < segments; ++s) {
    const std::string name = "[" + std::to_string(s) + "] = ";
    if (length[s] < 0) refuse("lengths" + name + std::to_string(length[s]) + " is negative");
    if (parent[s] < -1 || parent[s] >= s)
      refuse("parents" + name + std::to_string(parent[s]) + ": a parent must be -1 (a root) or an earlier segment, which also rules out cycles");
    if ((total += length[s]) > LIMIT) refuse("lengths add up to more than 2^31 - 1 tokens");
    start.push_back((int32_t)total);
    base[s] = parent[s] < 0 ? 0 : base[parent[s]] + length[parent[s]];
  }

  // Preorder without recursion: subtree sizes from the back, then each child takes the next free stretch of its parent's numbers.
  for (int32_t s = segments - 1; s >= 0; --s)
    if (parent[s] >= 0) count[parent[s]] += count[s];
  segment_first.resize(segments), segment_last.resize(segments), preorder.resize(segments);
  int32_t next_root = 0;
  for (int32_t s = 0; s < segments; ++s) {
    int32_t& free = parent[s] < 0 ? next_root : next[parent[s]];
    segment_first[s] = free, segment_last[s] = free + count[s] - 1;
    free += count[s], next[s] = segment_first[s] + 1;
    preorder[segment_first[s]] = s;
  }

  segment.resize(total), depth.resize(total), first.resize(total), last.resize(total);
  range_ptr.push_back(0);
  for (int32_t s = 0; s < segments; ++s) {
    for (int32_t t = start[s]; t < start[s + 1]; ++t)
      segment[t] = s, depth[t] = base[s] + (t - start[s]), first[t] = segment_first[s], last[t] = segment_last[s];
    const size_t from = range_start.size();
    if (parent[s] >= 0)
      for (int32_t r = range_ptr[parent[s]]; r < range_ptr[parent[s] + 1]; ++r)
        add_run(range_start, range_stop, from, range_start[r], range_stop[r]);
    add_run(range_start, range_stop, from, start[s], start[s + 1]);
    if ((int64_t)range_start.size() > LIMIT) refuse("the segments' ancestors form more than 2^31 - 1 separate runs");
    range_ptr.push_back((int32_t)range_start.size());
  }
}

Tiles Forest::tiles(const std::vector<int64_t>* rows, int size) const {
  Tiles t;
  const int64_t queries = rows ? (int64_t)rows->size() : tokens();
  if (queries > LIMIT) refuse("rows has more than 2^31 - 1 entries");
  t.query.reserve(queries);
  if (rows) {
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t row = (*rows)[i];
      if (row < 0 || row >= tokens())
        refuse("rows[" + std::to_string(i) + "] = " + std::to_string(row) + " is outside the " + std::to_string(tokens()) + " packed tokens");
      t.query.push_back((int32_t)i);
    }
    const auto place = [&](int32_t i) { return std::make_tuple(first[(*rows)[i]], (*rows)[i], i); };
    std::sort(t.query.begin(), t.query.end(), [&](int32_t a, int32_t b) { return place(a) < place(b); });
    for (int32_t i : t.query) t.token.push_back((int32_t)(*rows)[i]);
  } else {
    for (int32_t s : preorder)
      for (int32_t i = start[s]; i < start[s + 1]; ++i) t.query.push_back(i);
    t.token = t.query;
  }

  std::vector<int32_t> tile_of(length.size(), -1), used;  // used: segments on the paths from the tile's queries to their roots
  for (int32_t number = 0, begin = 0; begin < queries; ++number) {
    used.clear();
    int32_t end = begin;
    while (end < queries && end - begin < size) {
      const int32_t s = segment[t.token[end]];
      // A neighbour that would bring in more ancestor keys than a tile has queries is better off in a tile of its own.
      int64_t foreign = 0;
      for (int32_t a = parent[s]; begin < end && a >= 0 && tile_of[a] != number && foreign <= size; a = parent[a]) foreign += length[a];
      if (foreign > size) break;
      for (int32_t a = s; a >= 0 && tile_of[a] != number; a = parent[a]) tile_of[a] = number, used.push_back(a);
      while (end < queries && end - begin < size && segment[t.token[end]] == s) ++end;
    }
    std::sort(used.begin(), used.end(), [&](int32_t a, int32_t b) { return segment_first[a] < segment_first[b]; });

    const int32_t lowest = first[t.token[begin]], highest = first[t.token[end - 1]];
    int32_t min_depth = INT32_MAX, max_depth = 0;
    for (int32_t i = begin; i < end; ++i) min_depth = std::min(min_depth, depth[t.token[i]]), max_depth = std::max(max_depth, depth[t.token[i]]);
    const size_t from = t.run_start.size();
    size_t partial_from = from;
    for (bool full : {true, false}) {
      for (int32_t a : used) {  // keys up to min_depth in segments that contain all queries below them are visible to all
        if (!length[a]) continue;
        const int32_t base = depth[start[a]];
        const bool common = segment_first[a] <= lowest && highest <= segment_last[a];
        const int32_t split = start[a] + (common ? std::clamp(min_depth + 1 - base, 0, length[a]) : 0);
        const int32_t stop = start[a] + std::clamp(max_depth + 1 - base, 0, length[a]);  // deeper keys are visible to none
        if (full) add_run(t.run_start, t.run_stop, partial_from, start[a], split);
        else add_run(t.run_start, t.run_stop, partial_from, split, stop);
      }
      if (full) partial_from = t.run_start.size(), t.full.push_back((int32_t)partial_from);
    }
    t.tile.push_back(end), t.run.push_back((int32_t)t.run_start.size());
    begin = end;
  }
  return t;
}

const Tiles& Forest::all_tiles(int size) const {
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [cached_size, tiles] : cached_)
    if (cached_size == size) return *tiles;
  cached_.emplace_back(size, std::make_unique<Tiles>(tiles(nullptr, size)));
  return *cached_.back().second;
}
