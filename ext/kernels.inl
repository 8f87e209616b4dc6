// The CPU kernels, included by cpu.cpp once per instruction set with ISA (a name), TARGET (the function attribute), WIDTH
// (floats in a vector) and perhaps BF16_DOT (there is an instruction for products of bfloat16 pairs) and AMX (and one for
// products of 16 x 16 tiles of them).
//
// Attention. A task is one tile of queries and one KV head; its rows are queries x query heads of that group, so that each
// loaded key serves them all. For GROUP rows and a block of keys it computes two products by one micro-kernel:
// S^T = K Q^T, lanes over rows, so that the softmax needs no horizontal step and keys are read where they lie; and
// O = alpha O + P V, lanes over head_dim. Softmax is online and in base 2. The operands' unit is 32 bits: one float32, or a
// pair of bfloat16, neighbours in the summed dimension, that BF16_DOT multiplies and adds at once.

namespace ISA {
namespace {

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));
typedef float vec_unaligned __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

constexpr int KEYS = 96;   // keys a block: with GROUP, a block's S and operands stay in the L1 cache
constexpr int GROUP = 48;  // rows a block
constexpr int STEP = 6;    // the micro-kernel's own rows: 6 x 4 accumulators and 4 loads fill the 32 registers of AVX-512
constexpr int TILE = 16;   // side of an AMX tile: 16 rows of 16 units
constexpr float LOWEST = -INFINITY;

TARGET inline vec load(const float* p) { return *(const vec_unaligned*)p; }
TARGET inline void store(float* p, vec x) { *(vec_unaligned*)p = x; }
TARGET inline vec splat(float x) { return x - vec{}; }

TARGET inline float to_float(float x) { return x; }
TARGET inline float to_float(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
TARGET inline void from_float(float& to, float x) { to = x; }
TARGET inline void from_float(bf16& to, float x) {  // to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to.bits = x == x ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : (uint16_t)0x7fc0;
}

TARGET inline float to_float(int8_t x) { return x; }
TARGET inline float to_float(fp16 x) {  // infinities and NaN keep their exponent of ones, all else is scaled by 2^112, exactly
  const uint32_t bits = (x.bits & 0x7fffu) << 13, rest = (x.bits & 0x8000u) << 16 | ((x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  uint32_t scaled;
  std::memcpy(&scaled, &value, 4);
  scaled |= rest;
  std::memcpy(&value, &scaled, 4);
  return value;
}

// n <= WIDTH elements as a vector, zeros behind them, and back.
template <class T>
TARGET inline vec get(const T* p, int64_t n) {
#ifdef BF16_DOT
  if (n >= WIDTH && std::is_same<T, bf16>::value) return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#endif
  if (n >= WIDTH && sizeof(T) == 4) return load((const float*)p);
#if WIDTH == 16
  if (n >= WIDTH && std::is_same<T, fp16>::value) return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  if (n >= WIDTH && std::is_same<T, int8_t>::value) return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#endif
  alignas(64) float x[WIDTH] = {};
  for (int i = 0; i < WIDTH && i < n; ++i) x[i] = to_float(p[i]);
  return load(x);
}
template <class T>
TARGET inline void put(T* p, vec y, int64_t n) {
#ifdef BF16_DOT
  if (n >= WIDTH && sizeof(T) == 2) return _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)y));
#endif
  if (n >= WIDTH && sizeof(T) == 4) return store((float*)p, y);
  alignas(64) float x[WIDTH];
  store(x, y);
  for (int i = 0; i < WIDTH && i < n; ++i) from_float(p[i], x[i]);
}

// 2^x for x <= 0, 0 below -126. 2^(x - round(x)) is a minimax polynomial: relative error 7.5e-5 (far below bfloat16's
// 2e-3) or 1.5e-7. Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits, from where a shift moves
// it into the exponent.
template <bool ROUGH>
TARGET inline vec exp2_of(vec x) {
  const vec magic = splat(12582912.f), shifted = x + magic, f = x - (shifted - magic);
  vec p;
  if (ROUGH) p = ((0.05517167f * f + 0.24261113f) * f + 0.69326097f) * f + 0.99992806f;
  else p = ((((0.0013276472f * f + 0.0096755410f) * f + 0.055507131f) * f + 0.24022120f) * f + 0.69314694f) * f + 1.f;
  const vec y = (vec)((uvec)p + ((uvec)shifted << 23));
  return x >= splat(-126.f) ? y : vec{};
}

// acc += a b, where a is one unit for all lanes.
template <bool DOT>
TARGET inline vec multiply_add(vec acc, const void* a, vec b) {
#ifdef BF16_DOT
  int pair;
  std::memcpy(&pair, a, 4);  // keys may lie at odd multiples of two bytes
  if (DOT) return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)_mm512_set1_epi32(pair));
#endif
  float value;
  std::memcpy(&value, a, 4);
  return acc + splat(value) * b;
}

// c[STEP][V * WIDTH] = alpha c + a b. Unit (row r, step s) of a is a[r * a_row + s * a_step]; a null alpha starts from 0.
template <bool DOT, int V>
TARGET inline void product_block(const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_step, int steps, float* c, int c_row, const float* alpha) {
  vec acc[STEP][V];
#pragma GCC unroll 8
  for (int r = 0; r < STEP; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) acc[r][j] = alpha ? splat(alpha[r]) * load(c + r * c_row + j * WIDTH) : vec{};
  for (int s = 0; s < steps; ++s) {
    vec column[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) column[j] = load((const float*)b + s * b_step + j * WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < STEP; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[r][j] = multiply_add<DOT>(acc[r][j], a + r * a_row + s * a_step, column[j]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < STEP; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) store(c + r * c_row + j * WIDTH, acc[r][j]);
}

// The same for `rows` rounded up to a multiple of STEP and `columns`, a multiple of 16.
template <bool DOT>
TARGET void product(int rows, int columns, const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_step, int steps, float* c, int c_row, const float* alpha) {
  constexpr int V = WIDTH == 16 ? 4 : 2;
  for (int j = 0; j < columns; j += V * WIDTH)
    for (int r = 0; r < rows; r += STEP) {
      const uint32_t* ar = a + r * a_row;
      float* cr = c + r * c_row + j;
      const float* al = alpha ? alpha + r : nullptr;
      const int left = (columns - j) / WIDTH;
      if (left >= V) product_block<DOT, V>(ar, a_row, a_step, b + j, b_step, steps, cr, c_row, al);
      else if (left == 3) product_block<DOT, 3>(ar, a_row, a_step, b + j, b_step, steps, cr, c_row, al);
      else if (left == 2) product_block<DOT, 2>(ar, a_row, a_step, b + j, b_step, steps, cr, c_row, al);
      else product_block<DOT, 1>(ar, a_row, a_step, b + j, b_step, steps, cr, c_row, al);
    }
}

#ifdef AMX
// c = a b, or c += a b, on tiles: rows, columns and steps are rounded up to multiples of TILE. Steps of a row of a are neighbours.
TARGET void product_tiles(int rows, int columns, const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_step, int steps, float* c, int c_row, bool add) {
  for (int r = 0; r < rows; r += TILE)
    for (int j = 0; j < columns; j += 2 * TILE) {
      float* to = c + r * c_row + j;
      const bool two = j + TILE < columns;
      if (add) _tile_loadd(0, to, c_row * 4); else _tile_zero(0);
      if (add && two) _tile_loadd(1, to + TILE, c_row * 4); else _tile_zero(1);
      for (int s = 0; s < steps; s += TILE) {
        _tile_loadd(2, a + r * a_row + s, a_row * 4);
        _tile_loadd(3, b + s * b_step + j, b_step * 4);
        _tile_dpbf16ps(0, 2, 3);
        if (!two) continue;
        _tile_loadd(4, b + s * b_step + j + TILE, b_step * 4);
        _tile_dpbf16ps(1, 2, 4);
      }
      _tile_stored(0, to, c_row * 4);
      if (two) _tile_stored(1, to + TILE, c_row * 4);
    }
}

// 16 vectors, as columns: to[r * row + i] = x[i][r].
TARGET inline void store_transposed(const __m512i* x, uint32_t* to, int64_t row) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)  // b[i + m]: rows 4 l + m of lane l, of vectors i..i + 3
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]), b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[m], b[4 + m], 0x44), high01 = _mm512_shuffle_i32x4(b[m], b[4 + m], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(b[8 + m], b[12 + m], 0x44), high23 = _mm512_shuffle_i32x4(b[8 + m], b[12 + m], 0xee);
    _mm512_storeu_si512(to + m * row, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + (4 + m) * row, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(to + (8 + m) * row, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + (12 + m) * row, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

struct TileConfig {
  alignas(64) uint8_t bytes[64] = {1};  // palette 1; then, from byte 16 on, bytes a row, and from 48 on, rows, of each tile
  TileConfig() {
    for (int t = 0; t < 8; ++t) bytes[16 + 2 * t] = 64, bytes[48 + t] = TILE;
  }
};
#endif

// A row of `dim` elements as units, zeros from there to `units`.
template <bool DOT, class T>
TARGET inline void to_units(const T* from, int dim, uint32_t* to, int units) {
  for (int i = DOT ? dim / 2 : dim; i < units; ++i) to[i] = 0;
  if (DOT) std::memcpy(to, from, sizeof(T) * dim);
  else
    for (int i = 0; i < dim; ++i) from_float(((float*)to)[i], to_float(from[i]));
}

// P as units of b: float32 itself, or two keys' values rounded to a bfloat16 pair (half up: they are not negative).
TARGET inline vec pair_of(vec even, vec odd) {
  return (vec)((((uvec)even + 0x8000) >> 16) | (((uvec)odd + 0x8000) & 0xffff0000));
}

// Scores of one key that a row may not see become -inf.
TARGET inline void hide(float* __restrict s, const int32_t* __restrict q_first, const int32_t* __restrict q_depth, int32_t k_first, int32_t k_last, int32_t k_depth) {
  for (int r = 0; r < GROUP; ++r) {
    const float x = s[r];
    s[r] = visible(q_first[r], q_depth[r], k_first, k_last, k_depth) ? x : LOWEST;
  }
}

// Asks for a row well before it is read: strided rows of a fused buffer escape the hardware's own prefetching.
template <class T>
TARGET inline void prefetch(const T* row, int dim) {
  for (int i = 0; i < dim; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

template <class T, bool DOT>
TARGET void attend(const Attention& a, const Forest& forest, const Tiles& tiles, int64_t tile, int kv_head, std::vector<float>& scratch) {
  constexpr int PER = DOT ? 2 : 1;  // elements a unit
#ifdef AMX
  constexpr bool AMX_TILES = DOT;
  static const TileConfig config;
  if (AMX_TILES) _tile_loadconfig(config.bytes);
#else
  constexpr bool AMX_TILES = false;
#endif
  constexpr int PAST = AMX_TILES ? TILE : STEP, ALIGN = AMX_TILES ? 2 * TILE : PER;  // keys read past a block; where groups begin
  constexpr int P_ROW = AMX_TILES ? KEYS / 2 : 1, P_STEP = AMX_TILES ? 1 : GROUP;    // strides of P
  const int share = a.heads / a.kv_heads, dim = a.dim, units = AMX_TILES ? (dim + 31) / 32 * 16 : (dim + PER - 1) / PER, width = (dim + 15) / 16 * 16;
  const int32_t* token = tiles.token.data() + tiles.tile[tile];
  const int32_t* query = tiles.query.data() + tiles.tile[tile];
  const int rows = (tiles.tile[tile + 1] - tiles.tile[tile]) * share, padded = (rows + GROUP - 1) / GROUP * GROUP;

  scratch.resize((size_t)padded * (units + width + 4) + (KEYS + PAST) * (units + width) + 2 * (KEYS + PAST) * GROUP + 256);
  float* free = (float*)(((uintptr_t)scratch.data() + 63) & ~(uintptr_t)63);
  const auto take = [&free](size_t floats) { float* part = free; free += (floats + 15) / 16 * 16; return part; };  // on cache lines
  float* s = take((KEYS + PAST) * GROUP);                           // [KEYS + PAST, GROUP]
  float* p = DOT ? take(KEYS / 2 * GROUP) : s;                      // [KEYS / PER, GROUP], for AMX [GROUP, KEYS / 2]
  uint32_t* k_copy = (uint32_t*)take((KEYS + PAST) * units);        // [KEYS + PAST, units], where keys can't be read in place
  uint32_t* v_copy = (uint32_t*)take(KEYS / PER * width);           // [KEYS / PER, width]
  uint32_t* q = (uint32_t*)take((size_t)units * padded);            // [units, padded]
  float* o = take((size_t)padded * width);                          // [padded, width]
  float *maximum = take(padded), *total = take(padded);            // [padded]
  int32_t *q_first = (int32_t*)take(padded), *q_depth = (int32_t*)take(padded);

  const auto q_row = [&](int r) { return (const T*)a.q + query[r / share] * a.q_stride + (kv_head * share + r % share) * dim; };
  bool q_done = false;
#ifdef AMX
  if ((q_done = AMX_TILES && dim % 32 == 0))
    for (int r = 0; r < padded; r += 16)
      for (int u = 0; u < units; u += 16) {
        __m512i x[16];
        for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(q_row(std::min(r + i, rows - 1)) + 2 * u);
        store_transposed(x, q + (size_t)u * padded + r, padded);
      }
#endif
  for (int r = 0; r < padded; ++r) {  // rows past the end repeat the last one
    const int i = std::min(r, rows - 1);
    if (!q_done) {
      prefetch(q_row(std::min(r + 16, rows - 1)), dim);
      uint32_t row[MAX_DIM];
      to_units<DOT>(q_row(i), dim, row, units);
      for (int u = 0; u < units; ++u) q[(size_t)u * padded + r] = row[u];
    }
    q_first[r] = forest.first[token[i / share]], q_depth[r] = forest.depth[token[i / share]];
    maximum[r] = LOWEST, total[r] = 0;
  }
  std::memset(o, 0, sizeof(float) * padded * width);

  const vec log2_scale = splat(a.scale * 1.44269504f);
  const bool k_in_place = DOT ? dim % (AMX_TILES ? 32 : 2) == 0 : sizeof(T) == 4, v_in_place = !DOT && sizeof(T) == 4 && dim == width;
  for (int32_t run = tiles.run[tile]; run < tiles.run[tile + 1]; ++run)
    for (int64_t start = tiles.run_start[run]; start < tiles.run_stop[run]; start += KEYS) {
      const int n = (int)std::min<int64_t>(KEYS, tiles.run_stop[run] - start);
      const bool masked = run >= tiles.full[tile];
      const int32_t *first = forest.first.data() + start, *last = forest.last.data() + start, *depth = forest.depth.data() + start;

      // The micro-kernel reads up to PAST - 1 keys past the block; at the end of the row there are none to read.
      const T *k_rows = (const T*)a.k + start * a.k_stride + kv_head * dim, *v_rows = (const T*)a.v + start * a.v_stride + kv_head * dim;
      const uint32_t *keys = (const uint32_t*)k_rows, *values = (const uint32_t*)v_rows;
      int64_t k_row = a.k_stride / PER, v_step = a.v_stride;
      if (!k_in_place || a.k_stride % PER || start + n + PAST > forest.tokens()) {
        for (int j = 0; j < n; ++j) to_units<DOT>(k_rows + j * a.k_stride, dim, k_copy + j * units, units);
        keys = k_copy, k_row = units;
      }
      if (!v_in_place) {
        values = v_copy, v_step = width;
        for (int j = 0; j < n; j += PER) {
          uint32_t* to = v_copy + j / PER * width;
          if (DOT) {
            const uint16_t *even = (const uint16_t*)v_rows + j * a.v_stride, *odd = even + a.v_stride;
            if (j + 1 < n)
              for (int i = 0; i < dim; ++i) to[i] = even[i] | (uint32_t)odd[i] << 16;
            else
              for (int i = 0; i < dim; ++i) to[i] = even[i];
            for (int i = dim; i < width; ++i) to[i] = 0;
          } else to_units<false>(v_rows + j * a.v_stride, dim, to, width);
        }
        if (AMX_TILES)  // zeros where a tile reads past the last key: 0 of P times what is left there could be NaN
          std::memset(v_copy + (n + 1) / 2 * width, 0, 4 * (size_t)((n + 31) / 32 * 16 - (n + 1) / 2) * width);
      }

      for (int r0 = 0; r0 < rows; r0 += GROUP) {
        const int lanes = std::min(GROUP, (rows - r0 + 15) / 16 * 16);
        int low = 0, high = n;
        if (masked) {  // skip keys that no row of the group sees
          const int32_t lowest = q_first[r0], highest = q_first[r0 + lanes - 1];
          int32_t deepest = 0;
          for (int r = r0; r < r0 + lanes; ++r) deepest = std::max(deepest, q_depth[r]);
          const auto needed = [&](int j) { return visible_to_some(lowest, highest, deepest, first[j], last[j], depth[j]); };
          while (high > 0 && !needed(high - 1)) --high;
          while (low < high && !needed(low)) ++low;
          if (low == high) continue;
          low -= low % ALIGN;
        }
#ifdef AMX
        if (AMX_TILES) product_tiles(high - low, lanes, keys + low * k_row, k_row, q + r0, padded, units, s + low * GROUP, GROUP, false);
        else
#endif
        product<DOT>(high - low, lanes, keys + low * k_row, k_row, 1, q + r0, padded, units, s + low * GROUP, GROUP, nullptr);
        if (masked)
          for (int j = low; j < high; ++j)
            hide(s + j * GROUP, q_first + r0, q_depth + r0, first[j], last[j], depth[j]);

        alignas(64) float alpha[GROUP];
        for (int r = 0; r < lanes; r += WIDTH) {
          const vec before = load(maximum + r0 + r);
          vec now = before, added{};
          for (int j = low; j < high; ++j) {
            const vec x = load(s + j * GROUP + r);
            now = x > now ? x : now;
          }
          const vec base = now == splat(LOWEST) ? vec{} : now * log2_scale;  // nothing seen yet: keep -inf - -inf out
#ifdef AMX
          if (AMX_TILES)
            for (int block = low; block < high; block += 2 * TILE) {
              __m512i pairs[TILE];
              for (int i = 0; i < TILE; ++i) {
                const int j = block + 2 * i;
                const vec even = j < high ? exp2_of<true>(load(s + j * GROUP + r) * log2_scale - base) : vec{};
                const vec odd = j + 1 < high ? exp2_of<true>(load(s + (j + 1) * GROUP + r) * log2_scale - base) : vec{};
                added += even + odd;
                pairs[i] = (__m512i)pair_of(even, odd);
              }
              store_transposed(pairs, (uint32_t*)p + r * P_ROW + block / 2, P_ROW);
            }
          else
#endif
          for (int j = low; j < high; j += PER) {
            const vec even = exp2_of<DOT>(load(s + j * GROUP + r) * log2_scale - base);
            added += even;
            if (DOT) {
              const vec odd = j + 1 < high ? exp2_of<DOT>(load(s + (j + 1) * GROUP + r) * log2_scale - base) : vec{};
              added += odd;
              store(p + j / 2 * GROUP + r, pair_of(even, odd));
            } else store(p + j * GROUP + r, even);
          }
          const vec factor = exp2_of<false>(before * log2_scale - base);
          store(alpha + r, factor), store(maximum + r0 + r, now);
          store(total + r0 + r, load(total + r0 + r) * factor + added);
        }
#ifdef AMX
        if (AMX_TILES) {
          for (int r = 0; r < lanes; ++r)
            for (int i = 0; i < width; i += WIDTH) store(o + (r0 + r) * width + i, load(o + (r0 + r) * width + i) * alpha[r]);
          product_tiles(lanes, width, (const uint32_t*)p + low / 2, P_ROW, values + low / 2 * v_step, v_step, (high - low + 1) / 2, o + r0 * width, width, true);
        } else
#endif
        product<DOT>(std::min(lanes, rows - r0), width, (const uint32_t*)p + low / PER * P_STEP, P_ROW, P_STEP, values + low / PER * v_step, v_step, (high - low + PER - 1) / PER,
                     o + r0 * width, width, alpha);
      }
    }

  for (int r = 0; r < rows; ++r) {
    T* out = (T*)a.out + query[r / share] * a.out_stride + (kv_head * share + r % share) * dim;
    const vec scale = splat(1 / total[r]);
    for (int i = 0; i < dim; i += WIDTH) put(out + i, load(o + r * width + i) * scale, dim - i);
  }
#ifdef AMX
  if (AMX_TILES) _tile_release();
#endif
}

TARGET void attend_any(const Attention& a, const Forest& forest, const Tiles& tiles, int64_t tile, int kv_head, std::vector<float>& scratch) {
#ifdef BF16_DOT
  constexpr bool DOT = true;
#else
  constexpr bool DOT = false;
#endif
  if (a.dtype == Dtype::f32) attend<float, false>(a, forest, tiles, tile, kv_head, scratch);
  else attend<bf16, DOT>(a, forest, tiles, tile, kv_head, scratch);
}

TARGET void mask(const Forest& forest, uint8_t* out, int32_t query) {
  const int32_t q_first = forest.first[query], q_depth = forest.depth[query];
  const int32_t *first = forest.first.data(), *last = forest.last.data(), *depth = forest.depth.data();
  for (int64_t k = 0, n = forest.tokens(); k < n; ++k) out[k] = visible(q_first, q_depth, first[k], last[k], depth[k]);
}

// ---- Element-wise parts of a decoder block ----------------------------------------------------------------------------

template <class T>
TARGET void rope(void* qkv, int64_t stride, int heads, int dim, const float* cos, const float* sin, int64_t from, int64_t to) {
  const int half = dim / 2;
  for (int64_t t = from; t < to; ++t)
    for (int h = 0; h < heads; ++h) {
      T *x = (T*)qkv + t * stride + h * dim, *y = x + half;
      for (int i = 0; i < half; i += WIDTH) {
        const int n = half - i;
        const vec a = get(x + i, n), b = get(y + i, n), c = get(cos + t * half + i, n), s = get(sin + t * half + i, n);
        put(x + i, a * c - b * s, n), put(y + i, b * c + a * s, n);
      }
    }
}

TARGET inline float sum(const vec (&x)[4]) {
  alignas(64) float parts[WIDTH];
  store(parts, (x[0] + x[1]) + (x[2] + x[3]));
  float total = 0;
  for (float part : parts) total += part;
  return total;
}

template <class D, class T>
TARGET void rmsnorm(float* x, const void* delta, const float* weight, void* out, int64_t width, float eps, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    float* row = x + t * width;
    const D* add = (const D*)delta + t * width;
    T* y = (T*)out + t * width;
    vec squares[4] = {};
    for (int64_t i = 0, part = 0; i < width; i += WIDTH, part = (part + 1) % 4) {
      vec v = get(row + i, width - i);
      if (delta) put(row + i, v += get(add + i, width - i), width - i);
      squares[part] += v * v;
    }
    const vec scale = splat(1 / std::sqrt(sum(squares) / width + eps));
    for (int64_t i = 0; i < width; i += WIDTH) put(y + i, get(row + i, width - i) * scale * get(weight + i, width - i), width - i);
  }
}

TARGET inline vec reciprocal(vec x, float) { return 1.f / x; }
TARGET inline vec reciprocal(vec x, bf16) {  // 14 bits are enough for bfloat16's 8
#ifdef BF16_DOT
  return (vec)_mm512_rcp14_ps((__m512)x);
#else
  return 1.f / x;
#endif
}

template <class T>
TARGET void swiglu(const void* gate_up, void* out, int64_t width, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t)
    for (int64_t i = 0; i < width; i += WIDTH) {
      const T* gate = (const T*)gate_up + 2 * t * width + i;
      const vec x = get(gate, width - i), zero{}, e = exp2_of<sizeof(T) == 2>((x < zero ? x : -x) * 1.44269504f);  // e^-|x| never overflows
      put((T*)out + t * width + i, x * (x < zero ? e : splat(1)) * reciprocal(1.f + e, T{}) * get(gate + width, width - i), width - i);
    }
}

// Vectors index[from..to) of a store -> float32 unit vectors. Statistics: the mean of each column and dimension, then the deviation.
template <class T>
TARGET void unit_vectors(const Store& store, const int64_t* index, float* out, int64_t from, int64_t to) {
  const int64_t width = store.width;
  for (int64_t t = from; t < to; ++t) {
    const T* x = (const T*)store.vectors + index[t] * width;
    const float *mean = nullptr, *deviation = nullptr;
    if (store.scales) mean = store.statistics + index[t] % store.columns * width, deviation = mean + store.columns * width;
    float* y = out + t * width;
    vec squares[4] = {};
    for (int64_t i = 0, part = 0; i < width; i += WIDTH, part = (part + 1) % 4) {
      vec v = get(x + i, width - i);
      if (mean) v = get(mean + i, width - i) + get(deviation + i, width - i) * (v * store.scales[index[t]]);
      put(y + i, v, width - i);
      squares[part] += v * v;
    }
    const vec scale = splat(1 / std::max(std::sqrt(sum(squares)), 1e-12f));
    for (int64_t i = 0; i < width; i += WIDTH) put(y + i, get(y + i, width - i) * scale, width - i);
  }
}

const Kernels kernels{NAME(ISA), attend_any, mask, {rope<float>, rope<bf16>},
                      {{rmsnorm<float, float>, rmsnorm<float, bf16>}, {rmsnorm<bf16, float>, rmsnorm<bf16, bf16>}},
                      {swiglu<float>, swiglu<bf16>}, {unit_vectors<fp16>, unit_vectors<int8_t>}};

}  // namespace
}  // namespace ISA

#undef ISA
#undef TARGET
#undef WIDTH
#undef BF16_DOT
#undef AMX
