// Products of small matrices. The operands' unit is 32 bits: one float32, or a pair of bfloat16, neighbours
// in the summed dimension, that are multiplied and added at once.

enum Math { FLOATS, PAIRS, TILES };  // how units are multiplied; TILES: 16 x 16 by 16 x 16 of them
#ifdef AMX
constexpr Math BF16_MATH = TILES;
#else
constexpr Math BF16_MATH = WIDTH == 16 ? PAIRS : FLOATS;
#endif

constexpr int KEYS = 96;   // keys a block: with GROUP, a block's scores and operands stay in the L1 cache
constexpr int GROUP = 48;  // rows a block
constexpr int STEP = 6;    // rows in registers: 6 x 4 sums and 4 loads fill the 32 registers of AVX-512
constexpr int TILE = 16;   // side of an AMX tile
constexpr int PAST = 16;   // rows that a product may read past its last: it rounds up to STEP or TILE

constexpr int per_unit(Math m) { return m == FLOATS ? 1 : 2; }             // elements
constexpr int key_block(Math m) { return m == TILES ? 32 : per_unit(m); }  // keys that P V takes at once

struct Units {  // of a left operand: (r, s) is at[r * row + s * step]; of a right one: (s, j), step is 1
  const uint32_t* at;
  int64_t row, step;
};

// sum += a b, where a is one unit for all lanes.
template <Math M>
TARGET inline vec multiply_add(vec sum, const uint32_t* a, vec b) {
#if WIDTH == 16
  if (M == PAIRS) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(*a));
#endif
  return sum + __builtin_bit_cast(float, *a) * b;
}

// c[STEP][V * WIDTH] = alpha c + a b; a null alpha starts from 0. Fewer vectors where fewer columns are left.
template <Math M, int V>
TARGET inline void product_block(int columns, Units a, Units b, int steps, float* c, int64_t c_row,
                                 const float* alpha) {
  if constexpr (V > 1)
    if (columns < V * WIDTH) return product_block<M, V - 1>(columns, a, b, steps, c, c_row, alpha);
  vec sum[STEP][V];
  UNROLL for (int r = 0; r < STEP; ++r)
    UNROLL for (int j = 0; j < V; ++j)
      sum[r][j] = alpha ? splat(alpha[r]) * load(c + r * c_row + j * WIDTH) : vec{};
  for (int s = 0; s < steps; ++s) {
    vec row[V];
    UNROLL for (int j = 0; j < V; ++j) row[j] = load((const float*)b.at + s * b.row + j * WIDTH);
    UNROLL for (int r = 0; r < STEP; ++r)
      UNROLL for (int j = 0; j < V; ++j)
        sum[r][j] = multiply_add<M>(sum[r][j], a.at + r * a.row + s * a.step, row[j]);
  }
  UNROLL for (int r = 0; r < STEP; ++r)
    UNROLL for (int j = 0; j < V; ++j) store(c + r * c_row + j * WIDTH, sum[r][j]);
}

// The same for `rows`, rounded up to a multiple of STEP, and `columns`, a multiple of 16.
template <Math M>
TARGET void product(int rows, int columns, Units a, Units b, int steps, float* c, int64_t c_row,
                    const float* alpha) {
  constexpr int V = WIDTH == 16 ? 4 : 2;
  for (int j = 0; j < columns; j += V * WIDTH)
    for (int r = 0; r < rows; r += STEP)
      product_block<M, V>(columns - j, {a.at + r * a.row, a.row, a.step}, {b.at + j, b.row, 1}, steps,
                          c + r * c_row + j, c_row, alpha ? alpha + r : nullptr);
}

// to[j * to_row + i] = from[i * from_row + j] for i, j below 16.
TARGET inline void transpose(const uint32_t* from, int64_t from_row, uint32_t* to, int64_t to_row) {
  for (int j = 0; WIDTH < 16 && j < 16; ++j)  // its shuffles would be slower
    for (int i = 0; i < 16; ++i) to[j * to_row + i] = from[i * from_row + j];
  if (WIDTH < 16) return;
  typedef int32_t row __attribute__((vector_size(64), aligned(4), may_alias));
  const row lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  row x[16];
  UNROLL for (int i = 0; i < 16; ++i) x[i] = *(const row*)(from + i * from_row);
  UNROLL for (int side = 8; side; side /= 2) {  // of a square's four quarters: two change places
    const row low = (lane & side) != 0 ? lane + 16 - side : lane;  // from 16 on: of the second operand
    const row high = (lane & side) != 0 ? lane + 16 : lane + side;
    UNROLL for (int i = 0; i < 16; ++i) {
      if (i & side) continue;
      const row above = x[i], below = x[i + side];
      x[i] = __builtin_shuffle(above, below, low);
      x[i + side] = __builtin_shuffle(above, below, high);
    }
  }
  UNROLL for (int i = 0; i < 16; ++i) *(row*)(to + i * to_row) = x[i];
}

#ifdef AMX
// Rows, columns and steps are rounded up to multiples of TILE.
template <>
TARGET void product<TILES>(int rows, int columns, Units a, Units b, int steps, float* c, int64_t c_row,
                           const float* alpha) {
  alignas(64) uint32_t turned[GROUP][KEYS / 2];
  if (a.step != 1) {  // a tile is loaded by rows
    for (int r = 0; r < rows; r += TILE)
      for (int s = 0; s < steps; s += TILE)
        transpose(a.at + r + s * a.step, a.step, &turned[r][s], KEYS / 2);
    a = {turned[0], KEYS / 2, 1};
  }
  for (int r = 0; alpha && r < rows; ++r)
    for (int j = 0; j < columns; j += WIDTH)
      store(c + r * c_row + j, splat(alpha[r]) * load(c + r * c_row + j));
  for (int r = 0; r < rows; r += TILE)
    for (int j = 0; j < columns; j += TILE) {
      if (alpha) _tile_loadd(0, c + r * c_row + j, c_row * 4);
      else _tile_zero(0);
      for (int s = 0; s < steps; s += TILE) {
        _tile_loadd(1, a.at + r * a.row + s, a.row * 4);
        _tile_loadd(2, b.at + s * b.row + j, b.row * 4);
        _tile_dpbf16ps(0, 1, 2);
      }
      _tile_stored(0, c + r * c_row + j, c_row * 4);
    }
}
#endif

