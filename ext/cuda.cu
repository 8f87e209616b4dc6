// CUDA kernels in bfloat16: attention and the element-wise parts of a decoder layer. The attention kernel
// reads the keys and values of all ancestors in place. Cascade attention (one FlashAttention call per level,
// then a merge) does the same FLOPs, but its merge moves twice the bytes that this kernel reads of K and V.
#include "flame_ext.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define UNROLL _Pragma("unroll")  // keeps arrays that are indexed by loops in registers

namespace {

constexpr int ROW_BLOCK = 64;  // maximum rows of a tile: queries x query heads per KV head; 16 per warp
constexpr int KEY_BLOCK = 64;
constexpr int THREADS = 128;
static_assert(ROW_BLOCK == KEY_BLOCK, "Q is loaded through a buffer of K");
constexpr uint32_t FULL_MASK = 0xffffffff;
using bf16 = __nv_bfloat16;

// Return the packed token of the tile's i-th key, or -1 past the last key.
__device__ int32_t key_at(const Tile* tile, const KeyRange* ranges, int32_t i) {
  int32_t low = tile[0].first_range, high = tile[1].first_range - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (ranges[middle].offset <= i) low = middle;
    else high = middle - 1;
  }
  const KeyRange range = ranges[low];
  const int32_t key = range.start + (i - range.offset);
  return key < range.stop ? key : -1;
}

// ---- Wrappers of PTX instructions: asynchronous copies, ldmatrix, mma, ex2 --------------------------------

__device__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ void copy_16_bytes(void* shared, const void* global, bool valid) {  // zero-fills if not valid
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Load four 8 x 8 matrices of bfloat16. Lane l passes the address of row l % 8 of matrix l / 8.
__device__ void load_matrices(uint32_t (&m)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(shared)) : "memory");
}
__device__ void load_matrices_transposed(uint32_t (&m)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(shared)) : "memory");
}
// c[16, 8] += a[16, 16] b[16, 8]. Lane l has rows l / 4 and l / 4 + 8, columns 2 (l % 4) and 2 (l % 4) + 1.
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Attention for head_dim 64 or 128 ---------------------------------------------------------------------

template <int DIM>
struct SharedMemory {
  // K and V have two buffers: one is loaded while the other is read. Q is loaded through K's second one, so
  // that two tiles of head_dim 128 fit into an A100's 164 KB. Keys are located a block ahead: three buffers.
  bf16 k[2][KEY_BLOCK * DIM], v[2][KEY_BLOCK * DIM];
  int32_t key[3][KEY_BLOCK];
  Token token[3][KEY_BLOCK];
};
static_assert(sizeof(SharedMemory<128>) <= 99 * 1024, "limit of a thread block, capability >= 8.0");

// Return the address of a row's 16-byte chunk. The XOR swizzle avoids bank conflicts in ldmatrix.
template <int DIM>
__device__ bf16* swizzled(bf16* p, int row, int chunk) { return p + row * DIM + (chunk ^ (row & 7)) * 8; }

// A thread block computes a tile and a KV head, as in FlashAttention-2: Q, S, P and O stay in registers, and
// blocks of 64 keys are gathered from the tile's key ranges. A row is a query and a query head of the group.
template <int DIM>
struct TileAttention {
  static constexpr int CHUNKS = DIM / 8;
  const Attention& a;
  SharedMemory<DIM>& shared;
  const Tile* tile = a.plan.tile + blockIdx.x;
  const int kv_head = blockIdx.y, group_size = a.heads / a.kv_heads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first_query = tile->first_query, rows = (tile[1].first_query - first_query) * group_size;
  Token token[2];  // a lane holds two rows, which are indexed by `half`
  uint32_t q[DIM / 16][4];
  float o[DIM / 8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0};

  __device__ int row_of(int half) const { return warp * 16 + lane / 4 + 8 * half; }
  __device__ bf16* row_data(const Rows& x, int row) const {  // x: Q or the output
    const int query = first_query + row / group_size, head = kv_head * group_size + row % group_size;
    return (bf16*)x.data + query * x.stride + head * DIM;
  }

  __device__ void load_queries() {
    for (int half : {0, 1})  // padding rows repeat the last row and are not stored
      token[half] = a.plan.token[first_query + min(row_of(half), rows - 1) / group_size];
    for (int i = thread; i < ROW_BLOCK * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const bf16* from = row_data(a.q, min(row, rows - 1)) + chunk * 8;
      copy_16_bytes(swizzled<DIM>(shared.k[1], row, chunk), from, true);
    }
    commit_copies();
  }

  __device__ void locate_keys(int block) {
    if (thread >= KEY_BLOCK) return;
    const int32_t key = key_at(tile, a.plan.range, block * KEY_BLOCK + thread);
    const Token padding{INT32_MAX, 0, 0};  // visible to no query
    shared.key[block % 3][thread] = key;
    shared.token[block % 3][thread] = key < 0 ? padding : a.plan.token[key];
  }

  __device__ void load_keys(int block) {
    const bf16 *k = (bf16*)a.k.data + kv_head * DIM, *v = (bf16*)a.v.data + kv_head * DIM;
    for (int i = thread; i < KEY_BLOCK * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const int64_t key = shared.key[block % 3][row], safe = key < 0 ? 0 : key;
      const bf16 *from_k = k + safe * a.k.stride + chunk * 8, *from_v = v + safe * a.v.stride + chunk * 8;
      copy_16_bytes(swizzled<DIM>(shared.k[block % 2], row, chunk), from_k, key >= 0);
      copy_16_bytes(swizzled<DIM>(shared.v[block % 2], row, chunk), from_v, key >= 0);
    }
    commit_copies();
  }

  __device__ void compute_scores(float (&s)[KEY_BLOCK / 8][4], int block) {  // S = Q K^T
    const int row = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
    UNROLL for (int d = 0; d < DIM / 16; ++d)
      UNROLL for (int n = 0; n < KEY_BLOCK / 16; ++n) {
        uint32_t m[4];
        load_matrices(m, swizzled<DIM>(shared.k[block % 2], n * 16 + row, d * 2 + chunk));
        mma(s[2 * n], q[d], m[0], m[1]);
        mma(s[2 * n + 1], q[d], m[2], m[3]);
      }
  }

  __device__ void apply_mask(float (&s)[KEY_BLOCK / 8][4], int block) {
    UNROLL for (int n = 0; n < KEY_BLOCK / 8; ++n)
      UNROLL for (int i = 0; i < 4; ++i) {
        const Token& key = shared.token[block % 3][n * 8 + lane % 4 * 2 + i % 2];
        if (!visible(token[i / 2], key)) s[n][i] = -INFINITY;
      }
  }

  __device__ void softmax(float (&s)[KEY_BLOCK / 8][4], int half) {  // online; four lanes share a row
    float new_max = row_max[half];
    UNROLL for (int n = 0; n < KEY_BLOCK / 8; ++n)
      new_max = fmaxf(new_max, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    for (int step : {1, 2}) new_max = fmaxf(new_max, __shfl_xor_sync(FULL_MASK, new_max, step));
    const float log2_scale = a.scale * 1.44269504f;
    const float base = new_max == -INFINITY ? 0 : new_max * log2_scale;  // avoids -inf - -inf
    const float alpha = fast_exp2(row_max[half] * log2_scale - base);
    float block_sum = 0;
    UNROLL for (int n = 0; n < KEY_BLOCK / 8; ++n)
      UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n][i] = fast_exp2(s[n][i] * log2_scale - base);
        block_sum += s[n][i];
      }
    row_max[half] = new_max;
    row_sum[half] = row_sum[half] * alpha + block_sum;
    UNROLL for (int n = 0; n < DIM / 8; ++n)
      UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) o[n][i] *= alpha;
  }

  __device__ void accumulate_output(const float (&p)[KEY_BLOCK / 8][4], int block) {  // O += P V
    const int row = lane / 8 % 2 * 8 + lane % 8, chunk = lane / 16;
    UNROLL for (int j = 0; j < KEY_BLOCK / 16; ++j) {
      const float(&a)[4] = p[2 * j], (&b)[4] = p[2 * j + 1];
      const uint32_t weights[4] = {pack(a[0], a[1]), pack(a[2], a[3]), pack(b[0], b[1]), pack(b[2], b[3])};
      UNROLL for (int n = 0; n < DIM / 16; ++n) {
        uint32_t m[4];
        load_matrices_transposed(m, swizzled<DIM>(shared.v[block % 2], j * 16 + row, n * 2 + chunk));
        mma(o[2 * n], weights, m[0], m[1]);
        mma(o[2 * n + 1], weights, m[2], m[3]);
      }
    }
  }

  __device__ void store_output(int half) {
    for (int step : {1, 2}) row_sum[half] += __shfl_xor_sync(FULL_MASK, row_sum[half], step);
    const float scale = 1 / row_sum[half];
    const int row = row_of(half);
    if (row >= rows) return;
    bf16* out = row_data(a.out, row) + lane % 4 * 2;
    UNROLL for (int n = 0; n < DIM / 8; ++n)
      *reinterpret_cast<uint32_t*>(out + n * 8) = pack(o[n][2 * half] * scale, o[n][2 * half + 1] * scale);
  }
};

template <int DIM>
__global__ void __launch_bounds__(THREADS) attention_kernel(Attention a) {
  extern __shared__ __align__(128) unsigned char memory[];
  TileAttention<DIM> attn{a, *reinterpret_cast<SharedMemory<DIM>*>(memory)};
  const KeyRange last = a.plan.range[attn.tile[1].first_range - 1];
  const int32_t blocks = (last.offset + last.stop - last.start + KEY_BLOCK - 1) / KEY_BLOCK;
  attn.load_queries();
  attn.locate_keys(0);
  attn.locate_keys(1);
  __syncthreads();  // the first keys have been located
  attn.load_keys(0);
  wait_for_copies<1>();
  __syncthreads();  // Q has been loaded by all threads
  const int row = attn.warp * 16 + attn.lane % 16, chunk = attn.lane / 16;
  UNROLL for (int d = 0; d < DIM / 16; ++d)
    load_matrices(attn.q[d], swizzled<DIM>(attn.shared.k[1], row, d * 2 + chunk));
  for (int block = 0; block < blocks; ++block) {
    __syncthreads();  // the next keys have been located, and no warp still reads the other buffer
    if (block + 1 < blocks) attn.load_keys(block + 1);
    if (block + 1 < blocks) wait_for_copies<1>();
    else wait_for_copies<0>();
    __syncthreads();  // this block has been loaded by all threads
    attn.locate_keys(block + 2);
    float s[KEY_BLOCK / 8][4] = {};
    attn.compute_scores(s, block);
    if ((block + 1) * KEY_BLOCK > attn.tile->unmasked) attn.apply_mask(s, block);
    for (int half : {0, 1}) attn.softmax(s, half);
    attn.accumulate_output(s, block);
  }
  for (int half : {0, 1}) attn.store_output(half);
}

// ---- Element-wise operations of a decoder layer: one thread block per row, one pass over memory -----------

constexpr int N = 8;  // elements per load or store of a thread: 16 bytes of bfloat16

template <class T>
struct alignas(16) Packed { T x[N]; };

template <class T>
__device__ void get(float (&x)[N], const T* p) {
  const Packed<T> packed = *(const Packed<T>*)p;
  UNROLL for (int i = 0; i < N; ++i) x[i] = (float)packed.x[i];
}
template <class T>
__device__ void put(T* p, const float (&x)[N]) {
  Packed<T> packed;
  UNROLL for (int i = 0; i < N; ++i) packed.x[i] = (T)x[i];
  *(Packed<T>*)p = packed;
}

__global__ void __launch_bounds__(THREADS) rope_kernel(Rope r) {
  const int half = r.head_dim / 2;
  const int64_t token = blockIdx.x;
  float x[N], y[N], cos[N], sin[N], turned[N];
  for (int i = threadIdx.x * N; i < r.heads * half; i += THREADS * N) {
    const int pair = i % half;
    bf16* at = (bf16*)r.qkv.data + token * r.qkv.stride + i / half * r.head_dim + pair;
    get(x, at);
    get(y, at + half);
    get(cos, r.cos + token * half + pair);
    get(sin, r.sin + token * half + pair);
    UNROLL for (int j = 0; j < N; ++j) turned[j] = x[j] * cos[j] - y[j] * sin[j];
    put(at, turned);
    UNROLL for (int j = 0; j < N; ++j) turned[j] = y[j] * cos[j] + x[j] * sin[j];
    put(at + half, turned);
  }
}

__global__ void __launch_bounds__(THREADS) rmsnorm_kernel(RmsNorm r) {
  extern __shared__ __align__(128) unsigned char memory[];
  float* row = (float*)memory;  // [width], kept until the norm is known; then one sum per warp
  const int64_t start = blockIdx.x * r.width;
  float squares = 0, x[N], y[N];
  for (int64_t i = threadIdx.x * N; i < r.width; i += THREADS * N) {
    get(x, r.x + start + i);
    if (r.delta) {
      get(y, (const bf16*)r.delta + start + i);
      UNROLL for (int j = 0; j < N; ++j) x[j] += y[j];
      put(r.x + start + i, x);
    }
    put(row + i, x);
    UNROLL for (int j = 0; j < N; ++j) squares += x[j] * x[j];
  }
  float* sums = row + r.width;
  for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(FULL_MASK, squares, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
  __syncthreads();  // the warps' sums have been written
  const float scale = 1 / sqrtf((sums[0] + sums[1] + sums[2] + sums[3]) / r.width + r.eps);
  for (int64_t i = threadIdx.x * N; i < r.width; i += THREADS * N) {
    get(x, row + i);
    get(y, r.weight + i);
    UNROLL for (int j = 0; j < N; ++j) x[j] *= scale * y[j];
    put((bf16*)r.out + start + i, x);
  }
}

__global__ void __launch_bounds__(THREADS) swiglu_kernel(SwiGlu g) {
  const bf16* row = (const bf16*)g.gate_up + blockIdx.x * 2 * g.width;
  float x[N], up[N];
  for (int64_t i = threadIdx.x * N; i < g.width; i += THREADS * N) {
    get(x, row + i);
    get(up, row + g.width + i);
    UNROLL for (int j = 0; j < N; ++j) x[j] = x[j] / (1 + expf(-x[j])) * up[j];
    put((bf16*)g.out + blockIdx.x * g.width + i, x);
  }
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int bytes, uintptr_t stream, const Params& params) {
  if (!grid.x || !grid.y) return;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess)
    kernel<<<grid, THREADS, bytes, (cudaStream_t)stream>>>(params);
  const cudaError_t error = cudaGetLastError();  // also resets it, so that later calls don't report it
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace

void run_on_cuda(const Attention& a, uintptr_t stream) {
  if (a.plan.tile_size * (a.heads / a.kv_heads) > ROW_BLOCK || (a.head_dim != 64 && a.head_dim != 128))
    throw std::invalid_argument("on CUDA head_dim is 64 or 128, and tile at most 64 // (heads per KV head)");
  const dim3 grid(a.plan.tiles, a.kv_heads);
  if (a.head_dim == 64) launch(attention_kernel<64>, grid, sizeof(SharedMemory<64>), stream, a);
  else launch(attention_kernel<128>, grid, sizeof(SharedMemory<128>), stream, a);
}
void run_on_cuda(const Rope& r, uintptr_t stream) { launch(rope_kernel, r.rows, 0, stream, r); }
void run_on_cuda(const RmsNorm& r, uintptr_t stream) {
  launch(rmsnorm_kernel, r.rows, sizeof(float) * (r.width + THREADS / 32), stream, r);
}
void run_on_cuda(const SwiGlu& g, uintptr_t stream) { launch(swiglu_kernel, g.rows, 0, stream, g); }
