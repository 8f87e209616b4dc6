// Attention over the forest. A piece of work is a tile of queries and a KV head; its rows are the queries x
// the query heads of that KV head, so that each loaded key serves them all. For a group of rows and a block
// of keys there are two products:
//   S^T = K Q^T          lanes over rows: no horizontal step in the softmax
//   O = alpha O + P V    lanes over head_dim
// The softmax is online and in base 2.

// A row of `dim` elements as units, zeros from there to `units`, a multiple of 16.
template <Math M, class T>
TARGET inline void to_units(const T* from, int dim, uint32_t* to, int units) {
  if (M == FLOATS)
    for (int i = 0; i < units; i += WIDTH) store((float*)to + i, get(from + i, dim - i));
  else std::fill(std::copy_n(from, dim, (T*)to), (T*)(to + units), T{});
}

// Values of n keys as a right operand [keys / per_unit, width], zeros behind them.
template <Math M, class T>
TARGET inline void to_value_units(const T* from, int64_t stride, int n, int dim, uint32_t* to, int width) {
  static const T zeros[MAX_DIM] = {};
  const auto key = [&](int j) { return j < n ? from + j * stride : zeros; };
  for (int j = 0; j < round_up(n, key_block(M)); j += per_unit(M), to += width) {
    const auto *even = (const uint16_t*)key(j), *odd = (const uint16_t*)key(j + 1);
    if (M == FLOATS) to_units<FLOATS>(key(j), dim, to, width);
    else for (int i = 0; i < width; ++i) to[i] = i < dim ? even[i] | (uint32_t)odd[i] << 16 : 0;
  }
}

// A step for WIDTH rows: scores s of `keys` keys -> units p of their weights, zeros behind them. maximum and
// total are the rows' so far; alpha gets what earlier sums are to be multiplied by.
template <Math M>
TARGET inline void softmax(const float* s, int keys, float scale, float* p, float* maximum, float* total,
                           float* alpha) {
  const vec before = load(maximum);
  vec now = before, added{};
  for (int j = 0; j < keys; ++j) {
    const vec x = load(s + j * GROUP);
    now = x > now ? x : now;
  }
  const vec log2_scale = splat(scale * 1.44269504f);
  const vec base = now == splat(-INFINITY) ? vec{} : now * log2_scale;  // nothing seen yet: no -inf - -inf
  int j = 0;
  for (; j < keys; j += per_unit(M), p += GROUP) {
    const vec even = exp2_of<M != FLOATS>(load(s + j * GROUP) * log2_scale - base);
    const bool paired = M != FLOATS && j + 1 < keys;
    const vec odd = paired ? exp2_of<M != FLOATS>(load(s + (j + 1) * GROUP) * log2_scale - base) : vec{};
    added += even + odd;
    const uvec low = ((uvec)even + 0x8000) >> 16, high = ((uvec)odd + 0x8000) & 0xffff0000;  // rounds half up
    store(p, M == FLOATS ? even : (vec)(low | high));
  }
  for (; j < round_up(keys, key_block(M)); j += per_unit(M), p += GROUP) store(p, vec{});
  const vec factor = exp2_of<false>(before * log2_scale - base);
  store(alpha, factor);
  store(maximum, now);
  store(total, load(total) * factor + added);
}

template <class T>
struct Work {
  static constexpr Math M = sizeof(T) == 4 ? FLOATS : BF16_MATH;
  static constexpr int PER = per_unit(M);
  const Attention& a;
  const Tile* tile;
  const int kv_head;
  float* const scratch;
  const int share = a.heads / a.kv_heads, rows = (tile[1].query - tile[0].query) * share;
  const int padded = (int)round_up(rows, GROUP);
  const int units = (int)round_up(a.dim, 16 * PER) / PER;  // of a row of Q or K
  const int width = (int)round_up(a.dim, 16);              // of a row of O
  int64_t floats = 0;                                      // of scratch
  float* const s = take((KEYS + PAST) * GROUP);                     // [KEYS + PAST, GROUP]
  float* const p = M == FLOATS ? s : take(KEYS / PER * GROUP);      // [KEYS / PER, GROUP]
  float* const o = take((int64_t)padded * width);                   // [padded, width]
  float* const maximum = take(padded);
  float* const total = take(padded);
  uint32_t* const q = (uint32_t*)take((int64_t)padded * units);     // [units, padded]
  uint32_t* const k_copy = (uint32_t*)take((KEYS + PAST) * units);  // [KEYS + PAST, units]
  uint32_t* const v_copy = (uint32_t*)take(KEYS / PER * width);     // [KEYS / PER, width]
  int32_t* const q_segment = (int32_t*)take(padded);
  int32_t* const q_depth = (int32_t*)take(padded);

  float* take(int64_t n) {  // on cache lines
    const uintptr_t part = (uintptr_t)scratch + 4 * floats;
    floats += round_up(n, 16);
    return (float*)part;
  }

  T* elements(const Rows& x, int r) const {  // of Q or of the result
    return (T*)x.at + (tile->query + r / share) * x.stride + (kv_head * share + r % share) * a.dim;
  }

  TARGET void begin() {
    for (int r = 0; r < padded; r += 16) {  // rows past the end repeat the last one
      for (int i = 0; i < 16; ++i)
        to_units<M>(elements(a.q, std::min(r + i, rows - 1)), a.dim, k_copy + i * units, units);
      for (int u = 0; u < units; u += 16) transpose(k_copy + u, units, q + (int64_t)u * padded + r, padded);
    }
    for (int r = 0; r < padded; ++r) {
      const Token& token = a.plan.token[tile->query + std::min(r, rows - 1) / share];
      q_segment[r] = token.segment;
      q_depth[r] = token.depth;
      maximum[r] = -INFINITY;
      total[r] = 0;
    }
    std::fill_n(o, padded * width, 0.f);
  }

  // All rows take in the n keys from packed token `start` on.
  TARGET void take_in(int64_t start, int n, bool masked) {
    const T* k = (const T*)a.k.at + start * a.k.stride + kv_head * a.dim;
    const T* v = (const T*)a.v.at + start * a.v.stride + kv_head * a.dim;
    const bool k_in_place = sizeof(T) * PER == 4 && a.dim == units * PER && a.k.stride % PER == 0;
    Units keys{(const uint32_t*)k, a.k.stride / PER, 1}, values{(const uint32_t*)v, a.v.stride, 1};
    if (!k_in_place || start + n + PAST > a.plan.tokens) {  // past the packed row's end there is no memory
      for (int j = 0; j < n; ++j) to_units<M>(k + j * a.k.stride, a.dim, k_copy + j * units, units);
      keys = {k_copy, units, 1};
    }
    if (sizeof(T) == 2 || a.dim != width) {
      to_value_units<M>(v, a.v.stride, n, a.dim, v_copy, width);
      values = {v_copy, width, 1};
    }
    for (int r = 0; r < rows; r += GROUP) {
      const Token* key = a.plan.token + start;
      int low = 0, high = n;
      if (masked) trim(key, r, low, high);
      if (low < high)
        take_in_group(key + low, r, high - low, masked, {keys.at + low * keys.row, keys.row, 1},
                      {values.at + low / PER * values.row, values.row, 1});
    }
  }

  int lanes(int r) const { return std::min(GROUP, (int)round_up(rows - r, 16)); }

  // Leaves out keys at both ends that no row of the group sees.
  TARGET void trim(const Token* key, int r, int& low, int& high) const {
    const int32_t lowest = q_segment[r], highest = q_segment[r + lanes(r) - 1];
    const int32_t deepest = *std::max_element(q_depth + r, q_depth + r + lanes(r));
    const auto needed = [&](const Token& k) {
      return k.segment <= highest && lowest <= k.last && k.depth <= deepest;
    };
    while (low < high && !needed(key[high - 1])) --high;
    while (low < high && !needed(key[low])) ++low;
    low -= low % key_block(M);
  }

  TARGET void take_in_group(const Token* key, int r, int n, bool masked, Units keys, Units values) {
    alignas(64) float alpha[GROUP];
    product<M>(n, lanes(r), keys, {q + r, padded, 1}, units, s, GROUP, nullptr);
    const int32_t *segment = q_segment + r, *depth = q_depth + r;
    float* score = s;
    for (int j = 0; masked && j < n; ++j, score += GROUP)
      for (int i = 0; i < GROUP; ++i)
        score[i] = visible({segment[i], 0, depth[i]}, key[j]) ? score[i] : -INFINITY;
    for (int i = 0; i < lanes(r); i += WIDTH)
      softmax<M>(s + i, n, a.scale, p + i, maximum + r + i, total + r + i, alpha + i);
    product<M>(std::min(lanes(r), rows - r), width, {(const uint32_t*)p, 1, GROUP}, values,
               (n + PER - 1) / PER, o + r * width, width, alpha);
  }

  TARGET void end() const {
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < a.dim; i += WIDTH)
        put(elements(a.out, r) + i, load(o + r * width + i) * (1 / total[r]), a.dim - i);
  }
};

template <class T>
TARGET void attention(const Attention& a, int64_t item) {
  struct alignas(64) Line { float x[16]; };
  thread_local std::vector<Line> scratch;
  const Tile* tile = a.plan.tile + item / a.kv_heads;
  const int kv_head = (int)(item % a.kv_heads);
  const size_t lines = Work<T>{a, tile, kv_head, nullptr}.floats / 16;
  if (scratch.size() < lines) scratch.resize(lines);
  Work<T> work{a, tile, kv_head, scratch[0].x};
#ifdef AMX
  alignas(64) uint8_t config[64] = {1};  // palette 1; a tile's bytes a row from 16 on, its rows from 48 on
  for (int t = 0; t < 3; ++t) config[16 + 2 * t] = 4 * (config[48 + t] = TILE);
  _tile_loadconfig(config);
#endif
  work.begin();
  for (const Run* run = a.plan.run + tile[0].run; run < a.plan.run + tile[1].run; ++run)
    for (int64_t key = run->start; key < run->stop; key += KEYS)
      work.take_in(key, (int)std::min<int64_t>(KEYS, run->stop - key), run->before >= tile->common);
  work.end();
#ifdef AMX
  _tile_release();
#endif
}
