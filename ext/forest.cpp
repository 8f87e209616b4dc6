// Layout of a segment forest: depths, preorder numbers, and the query tiles that attention works on.
#include "flame_ext.h"

#include <algorithm>

namespace {

struct Segment {
  int32_t start, stop, parent, depth;  // its packed tokens; depth of the first
  int32_t first = 0, last = 0;         // preorder numbers: its own, its last descendant's
  int32_t count = 1, free = 0;         // segments of its subtree; the next number for a child
  int32_t tile = -1;                   // the last that needed it
  int32_t length() const { return stop - start; }
};

std::vector<Segment> numbered(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents) {
  if (lengths.size() != parents.size()) throw std::invalid_argument("as many lengths as parents, please");
  std::vector<Segment> all;
  int64_t tokens = 0;
  for (int64_t s = 0; s < (int64_t)lengths.size(); ++s) {
    const int64_t parent = parents[s], start = tokens;
    if (lengths[s] < 0 || lengths[s] > INT32_MAX - tokens || parent < -1 || parent >= s)
      throw std::invalid_argument("segment " + std::to_string(s) + ": its length is negative or too large, "
                                  "or its parent is neither -1 nor an earlier segment");
    tokens += lengths[s];
    const int32_t depth = parent < 0 ? 0 : all[parent].depth + all[parent].length();
    all.push_back({(int32_t)start, (int32_t)tokens, (int32_t)parent, depth});
  }
  // Without recursion: subtree sizes from the back, then a child takes its parent's next free numbers.
  for (size_t s = all.size(); s-- > 0;)
    if (all[s].parent >= 0) all[all[s].parent].count += all[s].count;
  int32_t free_root = 0;
  for (Segment& s : all) {
    int32_t& free = s.parent < 0 ? free_root : all[s.parent].free;
    s.first = free;
    s.free = free + 1;
    free += s.count;
    s.last = free - 1;
  }
  return all;
}

// Appends the runs of a tile's keys, first of those that all queries see; returns how many keys these are.
// needed: the segments on the paths from the queries to their roots.
int32_t add_keys(std::vector<Segment>& needed, const std::vector<Token>& queries, std::vector<Run>& runs) {
  int32_t shallowest = INT32_MAX, deepest = 0, keys = 0, common = 0;
  for (const Token& q : queries) {
    shallowest = std::min(shallowest, q.depth);
    deepest = std::max(deepest, q.depth);
  }
  const auto down_to = [](const Segment& s, int32_t depth) {  // end of the keys that are no deeper
    return s.start + std::clamp(depth + 1 - s.depth, 0, s.length());
  };
  const auto seen_by_all = [&](const Segment& s) {
    const bool above = s.first <= queries.front().first && queries.back().first <= s.last;
    return above ? down_to(s, shallowest) : s.start;
  };
  std::sort(needed.begin(), needed.end(), [](auto& a, auto& b) { return a.first < b.first; });
  for (const bool all : {true, false}) {
    const size_t first_run = runs.size();
    for (const Segment& s : needed) {
      const int32_t start = all ? s.start : seen_by_all(s);
      const int32_t stop = all ? seen_by_all(s) : down_to(s, deepest);
      if (start >= stop) continue;
      if (runs.size() > first_run && runs.back().stop == start) runs.back().stop = stop;
      else runs.push_back({start, stop, keys});
      keys += stop - start;
    }
    if (all) common = keys;
  }
  return common;
}

}  // namespace

Forest::Forest(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents, int64_t tile64) {
  if (tile64 < 1) throw std::invalid_argument("tile must be at least 1 query");
  std::vector<Segment> segments = numbered(lengths, parents), needed;
  std::vector<Token> token, queries;  // queries: of the tile so far
  std::vector<int32_t> query, order(segments.size());
  std::vector<Tile> tile;
  std::vector<Run> run;
  for (size_t s = 0; s < segments.size(); ++s) order[segments[s].first] = (int32_t)s;
  for (const Segment& s : segments)
    for (int32_t i = 0; i < s.length(); ++i) token.push_back({s.first, s.last, s.depth + i});
  tokens = (int32_t)token.size();
  tile_size = (int32_t)std::min<int64_t>(tile64, std::max(1, tokens));

  const auto finish_tile = [&] {
    if (queries.empty()) return;
    tile.push_back({(int32_t)(query.size() - queries.size()), (int32_t)run.size(), 0});
    tile.back().common = add_keys(needed, queries, run);
    needed.clear();
    queries.clear();
  };
  for (int32_t s : order)
    for (int32_t t = segments[s].start; t < segments[s].stop;) {
      // A neighbour that would bring in more ancestor keys than a tile has queries is better off in its own.
      const auto missing = [&](int32_t a) { return a >= 0 && segments[a].tile != (int32_t)tile.size(); };
      int64_t foreign = 0;
      for (int32_t a = segments[s].parent; missing(a); a = segments[a].parent)
        foreign += segments[a].length();
      if ((int32_t)queries.size() == tile_size || foreign > tile_size) finish_tile();
      for (int32_t a = s; missing(a); a = segments[a].parent) {
        segments[a].tile = (int32_t)tile.size();
        needed.push_back(segments[a]);
      }
      for (; t < segments[s].stop && (int32_t)queries.size() < tile_size; ++t) {
        query.push_back(t);
        queries.push_back(token[t]);
      }
    }
  finish_tile();
  tiles = (int32_t)tile.size();
  tile.push_back({tokens, (int32_t)run.size(), 0});
  const auto append = [this](const auto& part) {
    buffer.insert(buffer.end(), (const int32_t*)part.data(), (const int32_t*)(part.data() + part.size()));
  };
  append(token);
  append(query);
  append(tile);
  append(run);
}
