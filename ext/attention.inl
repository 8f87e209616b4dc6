// Attention over the forest. A work item is a tile and a KV head. Its rows are the tile's queries x the query
// heads of the KV head's group, so each loaded key serves the whole group. For each block of rows and keys:
//   S^T = K Q^T          SIMD lanes are rows, so softmax needs no horizontal reduction
//   O = alpha O + P V    SIMD lanes are elements of head_dim

// Convert a row of `dim` elements to `words` words (a multiple of 16), padded with zeros.
template <Math M, class T>
TARGET inline void to_words(const T* from, int dim, uint32_t* to, int words) {
  if (M == FP32)
    for (int i = 0; i < words; i += WIDTH) store((float*)to + i, get(from + i, dim - i));
  else std::fill(std::copy_n(from, dim, (T*)to), (T*)(to + words), T{});
}

// Convert the values of n keys to a right operand [keys / per_word, padded_dim], padded with zeros.
template <Math M, class T>
TARGET inline void values_to_words(const T* v, int64_t stride, int n, int dim, uint32_t* to, int padded_dim) {
  static const T zeros[MAX_HEAD_DIM] = {};
  const auto value = [&](int j) { return j < n ? v + j * stride : zeros; };
  for (int j = 0; j < round_up(n, key_multiple(M)); j += per_word(M), to += padded_dim) {
    const auto *even = (const uint16_t*)value(j), *odd = (const uint16_t*)value(j + 1);
    if (M == FP32) to_words<FP32>(value(j), dim, to, padded_dim);
    else for (int i = 0; i < padded_dim; ++i) to[i] = i < dim ? even[i] | (uint32_t)odd[i] << 16 : 0;
  }
}

// Run a step of online softmax, in base 2, for WIDTH rows. Convert the scores s of `keys` keys to words p of
// unnormalized probabilities, padded with zeros. Update row_max and row_sum. Set alpha, which rescales O.
template <Math M>
TARGET inline void softmax(const float* s, int keys, float scale, float* p, float* row_max, float* row_sum,
                           float* alpha) {
  const vec old_max = load(row_max);
  vec new_max = old_max, block_sum{};
  for (int j = 0; j < keys; ++j) {
    const vec x = load(s + j * ROW_BLOCK);
    new_max = x > new_max ? x : new_max;
  }
  const vec log2_scale = splat(scale * 1.44269504f);
  const vec base = new_max == splat(-INFINITY) ? vec{} : new_max * log2_scale;  // avoids -inf - -inf = NaN
  int j = 0;
  for (; j < keys; j += per_word(M), p += ROW_BLOCK) {
    const vec even = fast_exp2<M != FP32>(load(s + j * ROW_BLOCK) * log2_scale - base);
    const bool paired = M != FP32 && j + 1 < keys;
    const vec odd = paired ? fast_exp2<M != FP32>(load(s + (j + 1) * ROW_BLOCK) * log2_scale - base) : vec{};
    block_sum += even + odd;
    const uvec low = ((uvec)even + 0x8000) >> 16, high = ((uvec)odd + 0x8000) & 0xffff0000;  // rounds half up
    store(p, M == FP32 ? even : (vec)(low | high));
  }
  for (; j < round_up(keys, key_multiple(M)); j += per_word(M), p += ROW_BLOCK) store(p, vec{});
  const vec rescale = fast_exp2<false>(old_max * log2_scale - base);
  store(alpha, rescale);
  store(row_max, new_max);
  store(row_sum, load(row_sum) * rescale + block_sum);
}

template <class T>
struct TileAttention {
  static constexpr Math M = sizeof(T) == 4 ? FP32 : BF16_MATH;
  static constexpr int PER_WORD = per_word(M);
  const Attention& a;
  const Tile* tile;
  const int kv_head;
  float* const scratch;
  const int group_size = a.heads / a.kv_heads, rows = (tile[1].first_query - tile->first_query) * group_size;
  const int padded_rows = (int)round_up(rows, ROW_BLOCK);
  const int words = (int)round_up(a.head_dim, 16 * PER_WORD) / PER_WORD;  // per row of Q and K
  const int padded_dim = (int)round_up(a.head_dim, 16);                   // floats per row of O
  int64_t allocated = 0;                                                  // floats of scratch in use
  float* const s = allocate((KEY_BLOCK + OVERREAD) * ROW_BLOCK);                // [KEY_BLOCK + .., ROW_BLOCK]
  float* const p = M == FP32 ? s : allocate(KEY_BLOCK / PER_WORD * ROW_BLOCK);  // [.. / PER_WORD, ROW_BLOCK]
  float* const o = allocate((int64_t)padded_rows * padded_dim);                 // [padded_rows, padded_dim]
  float* const row_max = allocate(padded_rows);
  float* const row_sum = allocate(padded_rows);
  uint32_t* const q = (uint32_t*)allocate((int64_t)padded_rows * words);         // [words, padded_rows]
  uint32_t* const k_copy = (uint32_t*)allocate((KEY_BLOCK + OVERREAD) * words);  // [KEY_BLOCK + .., words]
  uint32_t* const v_copy = (uint32_t*)allocate(KEY_BLOCK / PER_WORD * padded_dim);  // [.. / .., padded_dim]
  int32_t* const q_segment = (int32_t*)allocate(padded_rows);
  int32_t* const q_depth = (int32_t*)allocate(padded_rows);

  float* allocate(int64_t floats) {  // aligned to cache lines
    const uintptr_t address = (uintptr_t)scratch + 4 * allocated;
    allocated += round_up(floats, 16);
    return (float*)address;
  }

  T* row_data(const Rows& x, int r) const {  // x: Q or the output
    const int head = kv_head * group_size + r % group_size;
    return (T*)x.data + (tile->first_query + r / group_size) * x.stride + head * a.head_dim;
  }

  TARGET void load_queries() {
    for (int r = 0; r < padded_rows; r += 16) {  // padding rows repeat the last row
      for (int i = 0; i < 16; ++i)
        to_words<M>(row_data(a.q, std::min(r + i, rows - 1)), a.head_dim, k_copy + i * words, words);
      for (int w = 0; w < words; w += 16)
        transpose(k_copy + w, words, q + (int64_t)w * padded_rows + r, padded_rows);
    }
    for (int r = 0; r < padded_rows; ++r) {
      const Token& token = a.plan.token[tile->first_query + std::min(r, rows - 1) / group_size];
      q_segment[r] = token.segment;
      q_depth[r] = token.depth;
      row_max[r] = -INFINITY;
      row_sum[r] = 0;
    }
    std::fill_n(o, padded_rows * padded_dim, 0.f);
  }

  // Attend from all rows to the n keys that start at token `start`.
  TARGET void add_keys(int64_t start, int n, bool masked) {
    const T* k = (const T*)a.k.data + start * a.k.stride + kv_head * a.head_dim;
    const T* v = (const T*)a.v.data + start * a.v.stride + kv_head * a.head_dim;
    const bool k_in_place =
        sizeof(T) * PER_WORD == 4 && a.head_dim == words * PER_WORD && a.k.stride % PER_WORD == 0;
    Matrix keys{(const uint32_t*)k, a.k.stride / PER_WORD, 1}, values{(const uint32_t*)v, a.v.stride, 1};
    if (!k_in_place || start + n + OVERREAD > a.plan.tokens) {  // copy if matmul would read past K's end
      for (int j = 0; j < n; ++j) to_words<M>(k + j * a.k.stride, a.head_dim, k_copy + j * words, words);
      keys = {k_copy, words, 1};
    }
    if (sizeof(T) == 2 || a.head_dim != padded_dim) {
      values_to_words<M>(v, a.v.stride, n, a.head_dim, v_copy, padded_dim);
      values = {v_copy, padded_dim, 1};
    }
    for (int r = 0; r < rows; r += ROW_BLOCK) {
      const Token* key = a.plan.token + start;
      int low = 0, high = n;
      if (masked) trim_keys(key, r, low, high);
      if (low < high)
        add_block(key + low, r, high - low, masked, {keys.data + low * keys.row_stride, keys.row_stride, 1},
                  {values.data + low / PER_WORD * values.row_stride, values.row_stride, 1});
    }
  }

  int block_rows(int r) const { return std::min(ROW_BLOCK, (int)round_up(rows - r, 16)); }

  // Drop the keys at both ends that no row of the block can see.
  TARGET void trim_keys(const Token* key, int r, int& low, int& high) const {
    const int32_t lowest = q_segment[r], highest = q_segment[r + block_rows(r) - 1];
    const int32_t deepest = *std::max_element(q_depth + r, q_depth + r + block_rows(r));
    const auto needed = [&](const Token& k) {
      return k.segment <= highest && lowest <= k.last_descendant && k.depth <= deepest;
    };
    while (low < high && !needed(key[high - 1])) --high;
    while (low < high && !needed(key[low])) ++low;
    low -= low % key_multiple(M);  // P V starts at a whole word or AMX tile
  }

  TARGET void add_block(const Token* key, int r, int n, bool masked, Matrix keys, Matrix values) {
    alignas(64) float alpha[ROW_BLOCK];
    matmul<M>(n, block_rows(r), keys, {q + r, padded_rows, 1}, words, s, ROW_BLOCK, nullptr);
    const int32_t *segment = q_segment + r, *depth = q_depth + r;
    float* score = s;
    for (int j = 0; masked && j < n; ++j, score += ROW_BLOCK)
      for (int i = 0; i < ROW_BLOCK; ++i)
        score[i] = visible({segment[i], 0, depth[i]}, key[j]) ? score[i] : -INFINITY;
    for (int i = 0; i < block_rows(r); i += WIDTH)
      softmax<M>(s + i, n, a.scale, p + i, row_max + r + i, row_sum + r + i, alpha + i);
    matmul<M>(std::min(block_rows(r), rows - r), padded_dim, {(const uint32_t*)p, 1, ROW_BLOCK}, values,
              (n + PER_WORD - 1) / PER_WORD, o + r * padded_dim, padded_dim, alpha);
  }

  TARGET void store_output() const {
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < a.head_dim; i += WIDTH)
        put(row_data(a.out, r) + i, load(o + r * padded_dim + i) * (1 / row_sum[r]), a.head_dim - i);
  }
};

template <class T>
TARGET void attention(const Attention& a, int64_t item) {
  struct alignas(64) CacheLine { float x[16]; };
  thread_local std::vector<CacheLine> scratch;
  const Tile* tile = a.plan.tile + item / a.kv_heads;
  const int kv_head = (int)(item % a.kv_heads);
  const size_t lines = TileAttention<T>{a, tile, kv_head, nullptr}.allocated / 16;
  if (scratch.size() < lines) scratch.resize(lines);
  TileAttention<T> attn{a, tile, kv_head, scratch[0].x};
#ifdef AMX
  alignas(64) uint8_t config[64] = {1};  // palette 1; byte 16 on: bytes per tile row; byte 48 on: rows
  for (int t = 0; t < 3; ++t) config[16 + 2 * t] = 4 * (config[48 + t] = AMX_TILE);
  _tile_loadconfig(config);
#endif
  attn.load_queries();
  for (const KeyRange* r = a.plan.range + tile[0].first_range; r < a.plan.range + tile[1].first_range; ++r)
    for (int64_t key = r->start; key < r->stop; key += KEY_BLOCK)
      attn.add_keys(key, (int)std::min<int64_t>(KEY_BLOCK, r->stop - key), r->offset >= tile->unmasked);
  attn.store_output();
#ifdef AMX
  _tile_release();
#endif
}
