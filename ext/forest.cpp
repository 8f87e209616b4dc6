// Layout of a segment forest: depths, and the query tiles that attention works on.
#include "flame_ext.h"

#include <algorithm>

namespace {

struct Segment {
  int32_t number, last;                // its own, its last descendant's
  int32_t start, stop, parent, depth;  // its packed tokens; depth of the first
  int32_t tile = -1;                   // the last that needed it
  int32_t length() const { return stop - start; }
};

std::vector<Segment> numbered(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents) {
  if (lengths.size() != parents.size()) throw std::invalid_argument("as many lengths as parents, please");
  std::vector<Segment> all;
  int64_t tokens = 0;
  for (int32_t s = 0; s < (int32_t)lengths.size(); ++s) {
    int32_t parent = s - 1;  // or an ancestor of it: depth first, all others have got their last child
    for (; parent >= 0 && parent > parents[s]; parent = all[parent].parent) all[parent].last = s - 1;
    if (lengths[s] < 0 || lengths[s] > INT32_MAX - tokens || parent != parents[s])
      throw std::invalid_argument("segment " + std::to_string(s) + ": its length is negative or too large, "
                                  "or its parent is not -1, the segment before or an ancestor of that one");
    const int32_t start = (int32_t)tokens, depth = parent < 0 ? 0 : all[parent].depth + all[parent].length();
    tokens += lengths[s];
    all.push_back({s, s, start, (int32_t)tokens, parent, depth});
  }
  for (int32_t s = (int32_t)all.size() - 1; s >= 0; s = all[s].parent) all[s].last = (int32_t)all.size() - 1;
  return all;
}

// Appends the runs of a tile's keys, first of those that all queries see; returns how many keys these are.
// The queries are the tokens from `query` up to `end`, `needed` the segments from theirs up to their roots.
int32_t add_keys(std::vector<Segment>& needed, const Token* query, const Token* end, std::vector<Run>& runs) {
  const auto [shallowest, deepest] =
      std::minmax_element(query, end, [](auto& a, auto& b) { return a.depth < b.depth; });
  const auto down_to = [](const Segment& s, int32_t depth) {  // end of the keys that are no deeper
    return s.start + std::clamp(depth + 1 - s.depth, 0, s.length());
  };
  const auto seen_by_all = [&, depth = shallowest->depth](const Segment& s) {
    return s.number <= query->segment && end[-1].segment <= s.last ? down_to(s, depth) : s.start;
  };
  int32_t keys = 0, common = 0;
  std::sort(needed.begin(), needed.end(), [](auto& a, auto& b) { return a.number < b.number; });
  for (const bool all : {true, false}) {
    const size_t first_run = runs.size();
    for (const Segment& s : needed) {
      const int32_t start = all ? s.start : seen_by_all(s);
      const int32_t stop = all ? seen_by_all(s) : down_to(s, deepest->depth);
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

Forest::Forest(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents, int64_t size) {
  if (size < 1) throw std::invalid_argument("tile must be at least 1 query");
  std::vector<Segment> segments = numbered(lengths, parents), needed;
  std::vector<Token> token;
  std::vector<Tile> tile;
  std::vector<Run> run;
  for (const Segment& s : segments)
    for (int32_t i = 0; i < s.length(); ++i) token.push_back({s.number, s.last, s.depth + i});
  tokens = (int32_t)token.size();
  tile_size = (int32_t)std::min<int64_t>(size, std::max(1, tokens));

  int32_t first = 0;  // the tile's first query
  const auto end_tile = [&](int32_t stop) {
    if (first == stop) return;
    tile.push_back({first, (int32_t)run.size(), 0});
    tile.back().common = add_keys(needed, &token[first], token.data() + stop, run);
    needed.clear();
    first = stop;
  };
  for (Segment& s : segments)
    for (int32_t t = s.start; t < s.stop;) {
      // A neighbour that would bring in more ancestor keys than a tile has queries is better off in its own.
      const auto missing = [&](int32_t a) { return a >= 0 && segments[a].tile != (int32_t)tile.size(); };
      int64_t foreign = 0;
      for (int32_t a = s.parent; missing(a); a = segments[a].parent) foreign += segments[a].length();
      if (t - first == tile_size || foreign > tile_size) end_tile(t);
      for (int32_t a = s.number; missing(a); a = segments[a].parent) {
        segments[a].tile = (int32_t)tile.size();
        needed.push_back(segments[a]);
      }
      t += std::min(s.stop - t, tile_size - (t - first));
    }
  end_tile(tokens);
  tiles = (int32_t)tile.size();
  tile.push_back({tokens, (int32_t)run.size(), 0});
  const auto append = [this](const auto& part) {
    buffer.insert(buffer.end(), (const int32_t*)part.data(), (const int32_t*)(part.data() + part.size()));
  };
  append(token);
  append(tile);
  append(run);
}
