// Attention in one kernel that reads every ancestor's keys and values in place, and the rest of a decoder
// block that is no matrix product; all in bfloat16. Cascade attention (a flash call a level, partial outputs
// merged) does the same flops, but its merge moves twice the bytes that one kernel reads of K and V.
#include "flame_ext.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define UNROLL _Pragma("unroll")  // or arrays that loops index leave the registers

namespace {

constexpr int ROWS = 64;  // queries x grouped heads a tile, at most; 16 a warp
constexpr int KEYS = 64;  // keys a block
constexpr int THREADS = 128;
static_assert(ROWS == KEYS, "Q lies in a buffer of K for a while");
constexpr uint32_t WARP = 0xffffffff;
using bf16 = __nv_bfloat16;

// Key number i of a tile, counted through its runs; -1 past the last.
__device__ int32_t key_at(const Tile* tile, const Run* runs, int32_t i) {
  int32_t low = tile[0].run, high = tile[1].run - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (runs[middle].before <= i) low = middle;
    else high = middle - 1;
  }
  const Run run = runs[low];
  const int32_t key = run.start + (i - run.before);
  return key < run.stop ? key : -1;
}

// ---- Tensor-core instructions and their data movement, one PTX instruction each ---------------------------

__device__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ void copy_16_bytes(void* shared, const void* global, bool valid) {  // zeros if not valid
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Four 8 x 8 matrices of bfloat16; lane l names row l % 8 of matrix l / 8.
__device__ void load_matrices(uint32_t (&m)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(shared)) : "memory");
}
__device__ void load_matrices_transposed(uint32_t (&m)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(shared)) : "memory");
}
// c[16 x 8] += a[16 x 16] b[16 x 8]; lane l holds c at rows l / 4 and l / 4 + 8, columns 2 (l % 4) and next.
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Attention for head_dim 64 or 128 ---------------------------------------------------------------------

template <int DIM>
struct Shared {
  // Two blocks of K and V: one is fetched while the other is read. Q comes through K's second one, so that at
  // head_dim 128 two tiles fit an A100's 164 KB. What is known of keys is also found one block ahead: three.
  bf16 k[2][KEYS * DIM], v[2][KEYS * DIM];
  int32_t key[3][KEYS];
  Token token[3][KEYS];
};
static_assert(sizeof(Shared<128>) <= 99 * 1024, "what a block may have on every GPU from capability 8.0 on");

// A 16-byte chunk of a row in shared memory. The exclusive or spreads a matrix's eight rows over all banks.
template <int DIM>
__device__ bf16* at(bf16* base, int row, int chunk) { return base + row * DIM + (chunk ^ (row & 7)) * 8; }

// A block of threads works on one tile and KV head: flash attention, where Q stays in registers, S and P
// never leave them, and K and V come in blocks of 64 keys gathered through the tile's runs.
template <int DIM>
struct Work {
  static constexpr int CHUNKS = DIM / 8;
  const Attention& a;
  Shared<DIM>& shared;
  const Tile* tile = a.plan.tile + blockIdx.x;
  const int kv_head = blockIdx.y, share = a.heads / a.kv_heads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int query = tile[0].query, rows = (tile[1].query - query) * share;
  Token token[2];  // of the lane's two rows
  uint32_t q[DIM / 16][4];
  float o[DIM / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};

  __device__ int row_of(int half) const { return warp * 16 + lane / 4 + 8 * half; }
  __device__ bf16* elements(const Rows& x, int row) const {  // of Q or of the result
    return (bf16*)x.at + (query + row / share) * x.stride + (kv_head * share + row % share) * DIM;
  }

  __device__ void begin() {
    for (int half : {0, 1})  // rows past the end repeat the last one; they are not stored
      token[half] = a.plan.token[query + min(row_of(half), rows - 1) / share];
    for (int i = thread; i < ROWS * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const bf16* from = elements(a.q, min(row, rows - 1)) + chunk * 8;
      copy_16_bytes(at<DIM>(shared.k[1], row, chunk), from, true);
    }
    commit_copies();
  }

  __device__ void find_keys(int block) {
    if (thread >= KEYS) return;
    const int32_t key = key_at(tile, a.plan.run, block * KEYS + thread);
    const Token past{INT32_MAX, 0, 0};  // visible to none
    shared.key[block % 3][thread] = key;
    shared.token[block % 3][thread] = key < 0 ? past : a.plan.token[key];
  }

  __device__ void fetch_keys(int block) {
    const auto* k = (const bf16*)a.k.at + kv_head * DIM;
    const auto* v = (const bf16*)a.v.at + kv_head * DIM;
    for (int i = thread; i < KEYS * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const int64_t key = shared.key[block % 3][row], safe = key < 0 ? 0 : key;
      copy_16_bytes(at<DIM>(shared.k[block % 2], row, chunk), k + safe * a.k.stride + chunk * 8, key >= 0);
      copy_16_bytes(at<DIM>(shared.v[block % 2], row, chunk), v + safe * a.v.stride + chunk * 8, key >= 0);
    }
    commit_copies();
  }

  __device__ void multiply_keys(float (&s)[KEYS / 8][4], int block) {  // S = Q K^T
    const int row = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
    UNROLL for (int d = 0; d < DIM / 16; ++d)
      UNROLL for (int n = 0; n < KEYS / 16; ++n) {
        uint32_t m[4];
        load_matrices(m, at<DIM>(shared.k[block % 2], n * 16 + row, d * 2 + chunk));
        multiply(s[2 * n], q[d], m[0], m[1]);
        multiply(s[2 * n + 1], q[d], m[2], m[3]);
      }
  }

  __device__ void hide(float (&s)[KEYS / 8][4], int block) {
    UNROLL for (int n = 0; n < KEYS / 8; ++n)
      UNROLL for (int i = 0; i < 4; ++i) {
        const Token& key = shared.token[block % 3][n * 8 + lane % 4 * 2 + i % 2];
        if (!visible(token[i / 2], key)) s[n][i] = -INFINITY;
      }
  }

  __device__ void softmax(float (&s)[KEYS / 8][4], int half) {  // online; four lanes share a row
    float top = maximum[half];
    UNROLL for (int n = 0; n < KEYS / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    for (int step : {1, 2}) top = fmaxf(top, __shfl_xor_sync(WARP, top, step));
    const float log2_scale = a.scale * 1.44269504f;
    const float base = top == -INFINITY ? 0 : top * log2_scale;  // nothing seen yet: keep -inf - -inf out
    const float factor = exp2_of(maximum[half] * log2_scale - base);
    float added = 0;
    UNROLL for (int n = 0; n < KEYS / 8; ++n)
      UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n][i] = exp2_of(s[n][i] * log2_scale - base);
        added += s[n][i];
      }
    maximum[half] = top;
    total[half] = total[half] * factor + added;
    UNROLL for (int n = 0; n < DIM / 8; ++n)
      UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) o[n][i] *= factor;
  }

  __device__ void multiply_values(const float (&p)[KEYS / 8][4], int block) {  // O += P V
    const int row = lane / 8 % 2 * 8 + lane % 8, chunk = lane / 16;
    UNROLL for (int j = 0; j < KEYS / 16; ++j) {
      const float(&a)[4] = p[2 * j], (&b)[4] = p[2 * j + 1];
      const uint32_t weights[4] = {pack(a[0], a[1]), pack(a[2], a[3]), pack(b[0], b[1]), pack(b[2], b[3])};
      UNROLL for (int n = 0; n < DIM / 16; ++n) {
        uint32_t m[4];
        load_matrices_transposed(m, at<DIM>(shared.v[block % 2], j * 16 + row, n * 2 + chunk));
        multiply(o[2 * n], weights, m[0], m[1]);
        multiply(o[2 * n + 1], weights, m[2], m[3]);
      }
    }
  }

  __device__ void end(int half) {
    for (int step : {1, 2}) total[half] += __shfl_xor_sync(WARP, total[half], step);
    const float scale = 1 / total[half];
    const int row = row_of(half);
    if (row >= rows) return;
    bf16* out = elements(a.out, row) + lane % 4 * 2;
    UNROLL for (int n = 0; n < DIM / 8; ++n)
      *reinterpret_cast<uint32_t*>(out + n * 8) = pack(o[n][2 * half] * scale, o[n][2 * half + 1] * scale);
  }
};

template <int DIM>
__global__ void __launch_bounds__(THREADS) attend(Attention a) {
  extern __shared__ __align__(128) unsigned char memory[];
  Work<DIM> work{a, *reinterpret_cast<Shared<DIM>*>(memory)};
  const Run last = a.plan.run[work.tile[1].run - 1];
  const int32_t blocks = (last.before + last.stop - last.start + KEYS - 1) / KEYS;
  work.begin();
  work.find_keys(0);
  work.find_keys(1);
  __syncthreads();  // the first keys are known
  work.fetch_keys(0);
  wait_for_copies<1>();
  __syncthreads();  // Q has arrived for all threads
  const int row = work.warp * 16 + work.lane % 16, chunk = work.lane / 16;
  UNROLL for (int d = 0; d < DIM / 16; ++d)
    load_matrices(work.q[d], at<DIM>(work.shared.k[1], row, d * 2 + chunk));
  for (int block = 0; block < blocks; ++block) {
    __syncthreads();  // the next keys are known, and no warp reads the other buffer any more
    if (block + 1 < blocks) work.fetch_keys(block + 1);
    if (block + 1 < blocks) wait_for_copies<1>();
    else wait_for_copies<0>();
    __syncthreads();  // this block has arrived for all threads
    work.find_keys(block + 2);
    float s[KEYS / 8][4] = {};
    work.multiply_keys(s, block);
    if ((block + 1) * KEYS > work.tile->common) work.hide(s, block);
    for (int half : {0, 1}) work.softmax(s, half);
    work.multiply_values(s, block);
  }
  for (int half : {0, 1}) work.end(half);
}

// ---- The element-wise parts of a decoder block: a block of threads a row, one pass over memory ------------

constexpr int N = 8;  // neighbours that a thread takes at once, 16 bytes of bfloat16

template <class T>
struct alignas(16) Some { T x[N]; };

template <class T>
__device__ void get(float (&x)[N], const T* p) {
  const Some<T> some = *(const Some<T>*)p;
  UNROLL for (int i = 0; i < N; ++i) x[i] = (float)some.x[i];
}
template <class T>
__device__ void put(T* p, const float (&x)[N]) {
  Some<T> some;
  UNROLL for (int i = 0; i < N; ++i) some.x[i] = (T)x[i];
  *(Some<T>*)p = some;
}

__global__ void __launch_bounds__(THREADS) rotate(Rope r) {
  const int half = r.dim / 2;
  const int64_t token = blockIdx.x;
  float x[N], y[N], cos[N], sin[N], turned[N];
  for (int i = threadIdx.x * N; i < r.heads * half; i += THREADS * N) {
    const int pair = i % half;
    bf16* at = (bf16*)r.qkv.at + token * r.qkv.stride + i / half * r.dim + pair;
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

__global__ void __launch_bounds__(THREADS) normalize(RmsNorm r) {
  extern __shared__ __align__(128) unsigned char memory[];
  float* row = (float*)memory;  // [width] waits for its scale; then come the warps' sums
  const int64_t at = blockIdx.x * r.width;
  float squares = 0, x[N], y[N];
  for (int64_t i = threadIdx.x * N; i < r.width; i += THREADS * N) {
    get(x, r.x + at + i);
    if (r.delta) {
      get(y, (const bf16*)r.delta + at + i);
      UNROLL for (int j = 0; j < N; ++j) x[j] += y[j];
      put(r.x + at + i, x);
    }
    put(row + i, x);
    UNROLL for (int j = 0; j < N; ++j) squares += x[j] * x[j];
  }
  float* sums = row + r.width;
  for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(WARP, squares, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
  __syncthreads();  // the warps' sums are there
  const float scale = 1 / sqrtf((sums[0] + sums[1] + sums[2] + sums[3]) / r.width + r.eps);
  for (int64_t i = threadIdx.x * N; i < r.width; i += THREADS * N) {
    get(x, row + i);
    get(y, r.weight + i);
    UNROLL for (int j = 0; j < N; ++j) x[j] *= scale * y[j];
    put((bf16*)r.out + at + i, x);
  }
}

__global__ void __launch_bounds__(THREADS) gate(SwiGlu g) {
  const bf16* row = (const bf16*)g.gate_up + blockIdx.x * 2 * g.width;
  float x[N], up[N];
  for (int64_t i = threadIdx.x * N; i < g.width; i += THREADS * N) {
    get(x, row + i);
    get(up, row + g.width + i);
    UNROLL for (int j = 0; j < N; ++j) x[j] = x[j] / (1 + expf(-x[j])) * up[j];
    put((bf16*)g.out + blockIdx.x * g.width + i, x);
  }
}

template <class Task>
void launch(void (*kernel)(Task), dim3 grid, int bytes, uintptr_t stream, const Task& task) {
  if (!grid.x || !grid.y) return;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess)
    kernel<<<grid, THREADS, bytes, (cudaStream_t)stream>>>(task);
  const cudaError_t error = cudaGetLastError();  // and forgets it, or our next launch would be told of it
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace

void run_on_cuda(const Attention& a, uintptr_t stream) {
  if (a.plan.tile_size * (a.heads / a.kv_heads) > ROWS || (a.dim != 64 && a.dim != 128))
    throw std::invalid_argument("on CUDA head_dim is 64 or 128, and tile at most 64 // (heads a KV head)");
  const dim3 grid(a.plan.tiles, a.kv_heads);
  if (a.dim == 64) launch(attend<64>, grid, sizeof(Shared<64>), stream, a);
  else launch(attend<128>, grid, sizeof(Shared<128>), stream, a);
}
void run_on_cuda(const Rope& r, uintptr_t stream) { launch(rotate, r.rows, 0, stream, r); }
void run_on_cuda(const RmsNorm& r, uintptr_t stream) {
  launch(normalize, r.rows, sizeof(float) * (r.width + THREADS / 32), stream, r);
}
void run_on_cuda(const SwiGlu& g, uintptr_t stream) { launch(gate, g.rows, 0, stream, g); }
