// The layout of a segment forest: token depths, and the tiles of queries with their keys.
#include "flame_ext.h"

#include <algorithm>

namespace {

struct Segment {
  int32_t number, last_descendant;
  int32_t start, stop, parent, depth;  // tokens start to stop - 1; depth of the first one
  int32_t tile = -1;                   // the latest tile that needs its keys
  int32_t length() const { return stop - start; }
};

std::vector<Segment> make_segments(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents) {
  if (lengths.size() != parents.size()) throw std::invalid_argument("need as many lengths as parents");
  std::vector<Segment> all;
  int64_t tokens = 0;
  const auto close = [&](int32_t s) { all[s].last_descendant = (int32_t)all.size() - 1; };
  for (int32_t s = 0; s < (int32_t)lengths.size(); ++s) {
    int32_t parent = s - 1;  // go up to the parent; depth first, the segments on the way are complete
    for (; parent >= 0 && parent > parents[s]; parent = all[parent].parent) close(parent);
    if (lengths[s] < 0 || lengths[s] > INT32_MAX - tokens || parent != parents[s])
      throw std::invalid_argument("segment " + std::to_string(s) + ": its length is negative or too large, "
                                  "or its parent is not -1, the previous segment or an ancestor of that one");
    const int32_t start = (int32_t)tokens, depth = parent < 0 ? 0 : all[parent].depth + all[parent].length();
    tokens += lengths[s];
    all.push_back({s, s, start, (int32_t)tokens, parent, depth});
  }
  for (int32_t s = (int32_t)all.size() - 1; s >= 0; s = all[s].parent) close(s);
  return all;
}

// Append the key ranges of a tile. The keys that all its queries see come first; return the number of these.
// The queries are tokens `query` to `end` - 1. `needed` holds their segments and all ancestors of these.
int32_t append_key_ranges(std::vector<Segment>& needed, const Token* query, const Token* end,
                          std::vector<KeyRange>& ranges) {
  const auto [shallowest, deepest] =
      std::minmax_element(query, end, [](auto& a, auto& b) { return a.depth < b.depth; });
  const auto end_at = [](const Segment& s, int32_t depth) {  // end of its tokens up to this depth
    return s.start + std::clamp(depth + 1 - s.depth, 0, s.length());
  };
  const auto unmasked_end = [&, depth = shallowest->depth](const Segment& s) {
    return s.number <= query->segment && end[-1].segment <= s.last_descendant ? end_at(s, depth) : s.start;
  };
  int32_t keys = 0, unmasked_keys = 0;
  std::sort(needed.begin(), needed.end(), [](auto& a, auto& b) { return a.number < b.number; });
  for (const bool unmasked : {true, false}) {
    const size_t first_range = ranges.size();
    for (const Segment& s : needed) {
      const int32_t start = unmasked ? s.start : unmasked_end(s);
      const int32_t stop = unmasked ? unmasked_end(s) : end_at(s, deepest->depth);
      if (start >= stop) continue;
      if (ranges.size() > first_range && ranges.back().stop == start) ranges.back().stop = stop;
      else ranges.push_back({start, stop, keys});
      keys += stop - start;
    }
    if (unmasked) unmasked_keys = keys;
  }
  return unmasked_keys;
}

}  // namespace

Forest::Forest(const std::vector<int64_t>& lengths, const std::vector<int64_t>& parents, int64_t size) {
  if (size < 1) throw std::invalid_argument("tile must be at least 1 query");
  std::vector<Segment> segments = make_segments(lengths, parents), needed;
  std::vector<Token> token;
  std::vector<Tile> tile;
  std::vector<KeyRange> range;
  for (const Segment& s : segments)
    for (int32_t i = 0; i < s.length(); ++i) token.push_back({s.number, s.last_descendant, s.depth + i});
  tokens = (int32_t)token.size();
  tile_size = (int32_t)std::min<int64_t>(size, std::max(1, tokens));

  int32_t first_query = 0;
  const auto end_tile = [&](int32_t stop) {
    if (first_query == stop) return;
    tile.push_back({first_query, (int32_t)range.size(), 0});
    tile.back().unmasked = append_key_ranges(needed, &token[first_query], token.data() + stop, range);
    needed.clear();
    first_query = stop;
  };
  for (Segment& s : segments)
    for (int32_t t = s.start; t < s.stop;) {
      // Start a new tile if the ancestors add more than tile_size keys, because no earlier query sees these.
      const auto missing = [&](int32_t a) { return a >= 0 && segments[a].tile != (int32_t)tile.size(); };
      int64_t new_keys = 0;
      for (int32_t a = s.parent; missing(a); a = segments[a].parent) new_keys += segments[a].length();
      if (t - first_query == tile_size || new_keys > tile_size) end_tile(t);
      for (int32_t a = s.number; missing(a); a = segments[a].parent) {
        segments[a].tile = (int32_t)tile.size();
        needed.push_back(segments[a]);
      }
      t += std::min(s.stop - t, tile_size - (t - first_query));
    }
  end_tile(tokens);
  tiles = (int32_t)tile.size();
  tile.push_back({tokens, (int32_t)range.size(), 0});
  const auto append = [this](const auto& part) {
    buffer.insert(buffer.end(), (const int32_t*)part.data(), (const int32_t*)(part.data() + part.size()));
  };
  append(token);
  append(tile);
  append(range);
}
