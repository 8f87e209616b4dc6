// The mask, and attention in one kernel that reads every ancestor's keys and values in place.
//
// Why not cascade attention (one varlen flash call a level, partial outputs merged by log-sum-exp)? Both do
// the same flops on the tensor cores, but with three levels at head_dim 128 the merge writes and re-reads 3 x
// 2 x 516 bytes a row, twice what one kernel reads of K and V (about 200 keys x 512 bytes for a tile of 64
// rows), and takes four launches for one.
#include "forest.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#define UNROLL _Pragma("unroll")  // or arrays that loops index leave the registers

namespace {

constexpr int ROWS = 64;      // rows (queries x grouped heads) a tile, 16 a warp
constexpr int KEYS = 64;      // keys a block
constexpr int THREADS = 128;
constexpr uint32_t WARP = 0xffffffff;

// ---- Keys -------------------------------------------------------------------------------------------------

__device__ int32_t number_of_keys(const Plan& plan, int32_t tile) {
  const int32_t run = plan.run[tile + 1] - 1;
  return plan.before[run] + plan.run_stop[run] - plan.run_start[run];
}

// Key number i of a tile, counted through its runs.
__device__ int32_t key_at(const Plan& plan, int32_t tile, int32_t i) {
  int32_t low = plan.run[tile], high = plan.run[tile + 1] - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (plan.before[middle] <= i) low = middle;
    else high = middle - 1;
  }
  return plan.run_start[low] + (i - plan.before[low]);
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
// c[16 x 8] += a[16 x 16] b[16 x 8]; a lane holds c at rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the
// next.
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

// ---- Attention for bfloat16 and head_dim 64 or 128 --------------------------------------------------------

template <int DIM>
struct Shared {
  // Two blocks of K and V: one is fetched while the other is read. Three of what is known of their keys: a
  // slow warp may still read those of the block before.
  __nv_bfloat16 q[ROWS * DIM], k[2][KEYS * DIM], v[2][KEYS * DIM];
  int32_t key[3][KEYS], first[3][KEYS], last[3][KEYS], depth[3][KEYS];
};

// A 16-byte chunk of a row in shared memory. The exclusive or spreads the eight rows of a matrix over all
// banks.
template <int DIM>
__device__ __nv_bfloat16* at(__nv_bfloat16* base, int row, int chunk) {
  return base + row * DIM + (chunk ^ (row & 7)) * 8;
}

// A block of threads works on one tile and KV head: flash attention, where Q stays in registers, S and P
// never leave them, and K and V come in blocks of 64 keys gathered through the tile's runs.
template <int DIM>
struct Work {
  static constexpr int CHUNKS = DIM / 8;
  const Attention& a;
  const Plan& plan;
  Shared<DIM>& shared;
  const int tile = blockIdx.x, kv_head = blockIdx.y, share = a.heads / a.kv_heads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int32_t* query = plan.query + plan.tile[tile];
  const int rows = (plan.tile[tile + 1] - plan.tile[tile]) * share;
  const int32_t keys = number_of_keys(plan, tile);
  int32_t q_first[2], q_depth[2];  // of the lane's two rows
  uint32_t q[DIM / 16][4];
  float o[DIM / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};

  __device__ int row_of(int half) const { return warp * 16 + lane / 4 + 8 * half; }
  __device__ int64_t offset(int row, int64_t stride) const {
    return query[row / share] * stride + (kv_head * share + row % share) * DIM;
  }

  __device__ void begin() {
    for (int half = 0; half < 2; ++half) {  // rows past the end repeat the last one; they are not stored
      const int32_t token = query[min(row_of(half), rows - 1) / share];
      q_first[half] = plan.first[token];
      q_depth[half] = plan.depth[token];
    }
    for (int i = thread; i < ROWS * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS, safe = row < rows ? row : 0;
      const auto* from = (const __nv_bfloat16*)a.q + offset(safe, a.q_stride) + chunk * 8;
      copy_16_bytes(at<DIM>(shared.q, row, chunk), from, row < rows);
    }
  }

  __device__ void find_keys(int block) {
    if (thread >= KEYS) return;
    const int buffer = block % 3;
    const int32_t i = block * KEYS + thread, key = i < keys ? key_at(plan, tile, i) : -1;
    shared.key[buffer][thread] = key;
    shared.first[buffer][thread] = key < 0 ? INT32_MAX : plan.first[key];  // padding is visible to none
    shared.last[buffer][thread] = key < 0 ? 0 : plan.last[key];
    shared.depth[buffer][thread] = key < 0 ? 0 : plan.depth[key];
  }

  __device__ void fetch_keys(int block) {
    const auto* k = (const __nv_bfloat16*)a.k + kv_head * DIM;
    const auto* v = (const __nv_bfloat16*)a.v + kv_head * DIM;
    for (int i = thread; i < KEYS * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const int64_t key = shared.key[block % 3][row], safe = key < 0 ? 0 : key;
      copy_16_bytes(at<DIM>(shared.k[block % 2], row, chunk), k + safe * a.k_stride + chunk * 8, key >= 0);
      copy_16_bytes(at<DIM>(shared.v[block % 2], row, chunk), v + safe * a.v_stride + chunk * 8, key >= 0);
    }
    commit_copies();
  }

  __device__ void load_queries() {
    UNROLL for (int d = 0; d < DIM / 16; ++d)
      load_matrices(q[d], at<DIM>(shared.q, warp * 16 + lane % 16, d * 2 + lane / 16));
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
    const int buffer = block % 3;
    const int32_t *first = shared.first[buffer], *last = shared.last[buffer], *depth = shared.depth[buffer];
    UNROLL for (int n = 0; n < KEYS / 8; ++n)
      UNROLL for (int i = 0; i < 4; ++i) {
        const int j = n * 8 + lane % 4 * 2 + i % 2;
        if (!visible(q_first[i / 2], q_depth[i / 2], first[j], last[j], depth[j])) s[n][i] = -INFINITY;
      }
  }

  __device__ void softmax(float (&s)[KEYS / 8][4], int half) {  // online; four lanes share a row
    float top = maximum[half];
    UNROLL for (int n = 0; n < KEYS / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(WARP, top, 1));
    top = fmaxf(top, __shfl_xor_sync(WARP, top, 2));
    const float log2_scale = a.scale * 1.44269504f;
    const float base = top == -INFINITY ? 0 : top * log2_scale;  // nothing seen yet: keep -inf - -inf out
    const float factor = exp2f(maximum[half] * log2_scale - base);
    float added = 0;
    UNROLL for (int n = 0; n < KEYS / 8; ++n)
      UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n][i] = exp2f(s[n][i] * log2_scale - base);
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
    total[half] += __shfl_xor_sync(WARP, total[half], 1);
    total[half] += __shfl_xor_sync(WARP, total[half], 2);
    const float scale = 1 / total[half];
    const int row = row_of(half);
    if (row >= rows) return;
    auto* out = (__nv_bfloat16*)a.out + offset(row, a.out_stride) + lane % 4 * 2;
    UNROLL for (int n = 0; n < DIM / 8; ++n)
      *reinterpret_cast<uint32_t*>(out + n * 8) = pack(o[n][2 * half] * scale, o[n][2 * half + 1] * scale);
  }
};

template <int DIM>
__global__ void __launch_bounds__(THREADS) attend(Attention a, Plan plan) {
  extern __shared__ __align__(128) unsigned char memory[];
  Work<DIM> work{a, plan, *reinterpret_cast<Shared<DIM>*>(memory)};
  const int32_t common = plan.common[blockIdx.x], blocks = (work.keys + KEYS - 1) / KEYS;
  work.begin();
  work.find_keys(0);
  __syncthreads();
  work.fetch_keys(0);
  for (int block = 0; block < blocks; ++block) {
    const bool more = block + 1 < blocks;
    if (more) work.find_keys(block + 1);
    __syncthreads();  // the next keys are known, and no warp reads the other buffer any more
    if (more) work.fetch_keys(block + 1);
    if (more) wait_for_copies<1>();
    else wait_for_copies<0>();
    __syncthreads();  // this block has arrived for all threads
    if (block == 0) work.load_queries();
    float s[KEYS / 8][4] = {};
    work.multiply_keys(s, block);
    if ((block + 1) * KEYS > common) work.hide(s, block);
    for (int half : {0, 1}) work.softmax(s, half);
    work.multiply_values(s, block);
  }
  for (int half : {0, 1}) work.end(half);
}

// ---- Attention for all else: plain, one warp a (query, head) ----------------------------------------------

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float& to, float x) { to = x; }
__device__ void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }

template <class T>
__global__ void attend_plain(Attention a, Plan plan) {
  const int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % 32;
  const int kv_head = head / (a.heads / a.kv_heads);
  const int32_t keys = number_of_keys(plan, tile);
  for (int32_t i = plan.tile[tile] + threadIdx.x / 32; i < plan.tile[tile + 1]; i += THREADS / 32) {
    const int64_t token = plan.query[i];
    const int32_t q_first = plan.first[token], q_depth = plan.depth[token];
    const T* q = (const T*)a.q + token * a.q_stride + head * a.dim;
    float o[MAX_DIM / 32] = {}, maximum = -INFINITY, total = 0;
    for (int32_t j = 0; j < keys; ++j) {
      const int64_t key = key_at(plan, tile, j);
      if (!visible(q_first, q_depth, plan.first[key], plan.last[key], plan.depth[key])) continue;
      const T* k = (const T*)a.k + key * a.k_stride + kv_head * a.dim;
      const T* v = (const T*)a.v + key * a.v_stride + kv_head * a.dim;
      float score = 0;
      for (int d = lane; d < a.dim; d += 32) score += to_float(q[d]) * to_float(k[d]);
      for (int step = 16; step; step /= 2) score += __shfl_xor_sync(WARP, score, step);
      score *= a.scale;
      const float top = fmaxf(maximum, score), factor = expf(maximum - top), weight = expf(score - top);
      maximum = top;
      total = total * factor + weight;
      UNROLL for (int d = 0; d < MAX_DIM / 32; ++d)
        if (d * 32 + lane < a.dim) o[d] = o[d] * factor + weight * to_float(v[d * 32 + lane]);
    }
    T* out = (T*)a.out + token * a.out_stride + head * a.dim;
    UNROLL for (int d = 0; d < MAX_DIM / 32; ++d)
      if (d * 32 + lane < a.dim) from_float(out[d * 32 + lane], o[d] * (1 / total));
  }
}

// ---- Mask, and launches -----------------------------------------------------------------------------------

__global__ void fill_mask(Plan plan, uint8_t* out, int64_t stride) {
  const int64_t q = blockIdx.x;
  for (int64_t k = threadIdx.x; k < plan.tokens; k += THREADS)
    out[q * stride + k] = visible(plan.first[q], plan.depth[q], plan.first[k], plan.last[k], plan.depth[k]);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(text("CUDA: ", what, " failed: ", cudaGetErrorString(error)));
}

struct DeviceGuard {
  int before = 0;
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before); }
};

template <int DIM>
void launch_attend(const Attention& a, const Plan& plan, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<DIM>);
  check(cudaFuncSetAttribute(attend<DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "attention");
  attend<DIM><<<dim3(plan.tiles, a.kv_heads), THREADS, bytes, stream>>>(a, plan);
}

bool aligned(const void* p, int64_t stride) { return (uintptr_t)p % 16 == 0 && stride % 8 == 0; }

}  // namespace

void cuda_attention(const Attention& a, const Plan& plan, int tile_size, int device, uintptr_t handle) {
  if (!plan.tiles) return;
  const DeviceGuard guard(device);
  const auto stream = (cudaStream_t)handle;
  const dim3 grid(plan.tiles, a.heads);
  const bool fast = a.dtype == BF16 && (int64_t)tile_size * (a.heads / a.kv_heads) <= ROWS &&
                    aligned(a.q, a.q_stride) && aligned(a.k, a.k_stride) && aligned(a.v, a.v_stride) &&
                    aligned(a.out, a.out_stride);
  if (fast && a.dim == 64) launch_attend<64>(a, plan, stream);
  else if (fast && a.dim == 128) launch_attend<128>(a, plan, stream);
  else if (a.dtype == BF16) attend_plain<__nv_bfloat16><<<grid, THREADS, 0, stream>>>(a, plan);
  else attend_plain<float><<<grid, THREADS, 0, stream>>>(a, plan);
  check(cudaGetLastError(), "attention");
}

void cuda_mask(const Plan& plan, uint8_t* out, int64_t stride, int device, uintptr_t stream) {
  if (!plan.tokens) return;
  const DeviceGuard guard(device);
  fill_mask<<<plan.tokens, THREADS, 0, (cudaStream_t)stream>>>(plan, out, stride);
  check(cudaGetLastError(), "mask");
}
