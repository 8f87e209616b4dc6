// Products of small matrices. Operands consist of 32-bit words: one float32, or a pair of bfloat16 that are
// adjacent along the inner dimension. One instruction multiplies and adds both elements of a pair.

enum Math { FP32, BF16_DOT, BF16_AMX };  // instructions: FMA, vdpbf16ps, tdpbf16ps
#ifdef AMX
constexpr Math BF16_MATH = BF16_AMX;
#else
constexpr Math BF16_MATH = WIDTH == 16 ? BF16_DOT : FP32;
#endif

constexpr int KEY_BLOCK = 96;     // with ROW_BLOCK: a block's scores and operands fit into the L1 cache
constexpr int ROW_BLOCK = 48;
constexpr int REGISTER_ROWS = 6;  // 6 x 4 accumulators and 4 loads fit into AVX-512's 32 registers
constexpr int AMX_TILE = 16;      // rows, and words per row
constexpr int OVERREAD = 16;      // rows past the last one that matmul may read, as it rounds rows up

constexpr int per_word(Math m) { return m == FP32 ? 1 : 2; }                     // elements in a word
constexpr int key_multiple(Math m) { return m == BF16_AMX ? 32 : per_word(m); }  // P V rounds keys up to it

// The word in row i, column j is data[i * row_stride + j * column_stride]. The left operand is [rows, inner],
// the right one [inner, columns] with a column_stride of 1.
struct Matrix { const uint32_t* data; int64_t row_stride, column_stride; };

// Return sum + a b, where all lanes share the word a.
template <Math M>
TARGET inline vec multiply_add(vec sum, const uint32_t* a, vec b) {
#if WIDTH == 16
  if (M == BF16_DOT) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(*a));
#endif
  return sum + __builtin_bit_cast(float, *a) * b;
}

// c[REGISTER_ROWS, V * WIDTH] = alpha c + a b, or a b if alpha is null. Uses fewer vectors at the right edge.
template <Math M, int V>
TARGET inline void matmul_block(int columns, Matrix a, Matrix b, int inner, float* c, int64_t c_stride,
                                const float* alpha) {
  if constexpr (V > 1)
    if (columns < V * WIDTH) return matmul_block<M, V - 1>(columns, a, b, inner, c, c_stride, alpha);
  vec sum[REGISTER_ROWS][V];
  UNROLL for (int r = 0; r < REGISTER_ROWS; ++r)
    UNROLL for (int j = 0; j < V; ++j)
      sum[r][j] = alpha ? splat(alpha[r]) * load(c + r * c_stride + j * WIDTH) : vec{};
  for (int i = 0; i < inner; ++i) {
    vec row[V];
    UNROLL for (int j = 0; j < V; ++j) row[j] = load((const float*)b.data + i * b.row_stride + j * WIDTH);
    UNROLL for (int r = 0; r < REGISTER_ROWS; ++r)
      UNROLL for (int j = 0; j < V; ++j)
        sum[r][j] = multiply_add<M>(sum[r][j], a.data + r * a.row_stride + i * a.column_stride, row[j]);
  }
  UNROLL for (int r = 0; r < REGISTER_ROWS; ++r)
    UNROLL for (int j = 0; j < V; ++j) store(c + r * c_stride + j * WIDTH, sum[r][j]);
}

// c[rows, columns] = alpha c + a b. rows are rounded up to REGISTER_ROWS; columns are a multiple of 16.
template <Math M>
TARGET void matmul(int rows, int columns, Matrix a, Matrix b, int inner, float* c, int64_t c_stride,
                   const float* alpha) {
  constexpr int V = WIDTH == 16 ? 4 : 2;
  for (int j = 0; j < columns; j += V * WIDTH)
    for (int r = 0; r < rows; r += REGISTER_ROWS)
      matmul_block<M, V>(columns - j, {a.data + r * a.row_stride, a.row_stride, a.column_stride},
                         {b.data + j, b.row_stride, 1}, inner, c + r * c_stride + j, c_stride,
                         alpha ? alpha + r : nullptr);
}

// Transpose a 16 x 16 block: to[j * to_stride + i] = from[i * from_stride + j].
TARGET inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  for (int j = 0; WIDTH < 16 && j < 16; ++j)  // shuffles are slower than this loop on AVX2
    for (int i = 0; i < 16; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  if (WIDTH < 16) return;
  typedef int32_t row __attribute__((vector_size(64), aligned(4), may_alias));
  const row lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  row x[16];
  UNROLL for (int i = 0; i < 16; ++i) x[i] = *(const row*)(from + i * from_stride);
  UNROLL for (int side = 8; side; side /= 2) {  // swap off-diagonal quarters of blocks
    const row low = (lane & side) != 0 ? lane + 16 - side : lane;  // indices >= 16: the second operand
    const row high = (lane & side) != 0 ? lane + 16 : lane + side;
    UNROLL for (int i = 0; i < 16; ++i) {
      if (i & side) continue;
      const row above = x[i], below = x[i + side];
      x[i] = __builtin_shuffle(above, below, low);
      x[i + side] = __builtin_shuffle(above, below, high);
    }
  }
  UNROLL for (int i = 0; i < 16; ++i) *(row*)(to + i * to_stride) = x[i];
}

#ifdef AMX
// Rows, columns and the inner dimension are rounded up to AMX_TILE.
template <>
TARGET void matmul<BF16_AMX>(int rows, int columns, Matrix a, Matrix b, int inner, float* c, int64_t c_stride,
                             const float* alpha) {
  alignas(64) uint32_t a_rows[ROW_BLOCK][KEY_BLOCK / 2];
  if (a.column_stride != 1) {  // AMX loads tiles row by row
    for (int r = 0; r < rows; r += AMX_TILE)
      for (int i = 0; i < inner; i += AMX_TILE)
        transpose(a.data + r + i * a.column_stride, a.column_stride, &a_rows[r][i], KEY_BLOCK / 2);
    a = {a_rows[0], KEY_BLOCK / 2, 1};
  }
  for (int r = 0; alpha && r < rows; ++r)
    for (int j = 0; j < columns; j += WIDTH)
      store(c + r * c_stride + j, splat(alpha[r]) * load(c + r * c_stride + j));
  for (int r = 0; r < rows; r += AMX_TILE)
    for (int j = 0; j < columns; j += AMX_TILE) {
      if (alpha) _tile_loadd(0, c + r * c_stride + j, c_stride * 4);
      else _tile_zero(0);
      for (int i = 0; i < inner; i += AMX_TILE) {
        _tile_loadd(1, a.data + r * a.row_stride + i, a.row_stride * 4);
        _tile_loadd(2, b.data + i * b.row_stride + j, b.row_stride * 4);
        _tile_dpbf16ps(0, 1, 2);
      }
      _tile_stored(0, c + r * c_stride + j, c_stride * 4);
    }
}
#endif
