// CUDA side: the mask, and attention over the forest in one kernel that reads every ancestor's keys and values in place.
//
// Why not cascade attention (one varlen flash call a level, partial outputs merged by log-sum-exp)? Both do the same flops
// on the tensor cores, but with three levels at head_dim 128 the merge writes and re-reads 3 x 2 x 516 bytes a row, twice
// what one kernel reads of K and V (about 200 keys x 512 bytes for a tile of 64 rows), and takes four launches for one.
#include "forest.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

namespace {

constexpr int ROWS = 64;      // rows (queries x grouped heads) a tile, 16 a warp
constexpr int KEYS = 64;      // keys a block
constexpr int THREADS = 128;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error));
}

struct DeviceGuard {
  int before = 0;
  explicit DeviceGuard(int device) { check(cudaGetDevice(&before), "cudaGetDevice"), check(cudaSetDevice(device), "cudaSetDevice"); }
  ~DeviceGuard() { cudaSetDevice(before); }
};

// ---- What the kernels read --------------------------------------------------------------------------------------------

struct ForestArrays { const int32_t *first, *last, *depth; };  // [T], as in Forest

// As in Tiles; keys_before[r] counts the tile's keys in the runs before r, and tile t has keys[t], of which the first
// common[t] are visible to all its queries.
struct TileArrays { const int32_t *query, *token, *tile, *run, *run_start, *keys_before, *keys, *common; };

std::vector<int32_t> flatten(const Tiles& t) {
  const size_t tiles = t.tile.size() - 1;
  std::vector<int32_t> before(t.run_start.size()), keys(tiles), common(tiles), flat;
  for (size_t i = 0; i < tiles; ++i)
    for (int32_t r = t.run[i]; r < t.run[i + 1]; ++r) {
      const int32_t length = t.run_stop[r] - t.run_start[r];
      before[r] = keys[i];
      keys[i] += length;
      if (r < t.full[i]) common[i] += length;
    }
  for (const auto* part : {&t.query, &t.token, &t.tile, &t.run, &t.run_start, (const std::vector<int32_t>*)&before, (const std::vector<int32_t>*)&keys, (const std::vector<int32_t>*)&common})
    flat.insert(flat.end(), part->begin(), part->end());
  return flat;
}

TileArrays unflatten(const int32_t* at, const Tiles& t) {
  const auto take = [&at](size_t n) { const int32_t* part = at; at += n; return part; };
  const size_t queries = t.query.size(), tiles = t.tile.size() - 1, runs = t.run_start.size();
  TileArrays d;
  d.query = take(queries), d.token = take(queries), d.tile = take(tiles + 1), d.run = take(tiles + 1);
  d.run_start = take(runs), d.keys_before = take(runs), d.keys = take(tiles), d.common = take(tiles);
  return d;
}

// ---- Attention --------------------------------------------------------------------------------------------------------

// Key number i of a tile, counted through its runs.
__device__ int32_t key_at(const TileArrays& tiles, int32_t tile, int32_t i) {
  int32_t low = tiles.run[tile], high = tiles.run[tile + 1] - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (tiles.keys_before[middle] <= i) low = middle;
    else high = middle - 1;
  }
  return tiles.run_start[low] + (i - tiles.keys_before[low]);
}

// Tensor-core instructions and their data movement, one PTX instruction each.
__device__ void copy_16_bytes(void* shared, const void* global, bool valid) {  // zeros if not valid
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Four 8 x 8 matrices of bfloat16; lane l names row l % 8 of matrix l / 8.
__device__ void load_matrices(uint32_t (&m)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"((uint32_t)__cvta_generic_to_shared(shared)) : "memory");
}
__device__ void load_matrices_transposed(uint32_t (&m)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"((uint32_t)__cvta_generic_to_shared(shared)) : "memory");
}
// c[16 x 8] += a[16 x 16] b[16 x 8]; a lane holds c at rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Address of 16-byte chunk `chunk` of row `row` in shared memory. The exclusive or spreads the eight rows of a matrix over
// all banks.
template <int DIM>
__device__ __nv_bfloat16* at(__nv_bfloat16* base, int row, int chunk) { return base + row * DIM + ((chunk ^ (row & 7)) << 3); }

template <int DIM>
struct Shared {
  __nv_bfloat16 q[ROWS * DIM], k[2][KEYS * DIM], v[2][KEYS * DIM];
  int32_t key[3][KEYS], first[3][KEYS], last[3][KEYS], depth[3][KEYS];  // three: the next is written while slower warps read the one before
};

// One block of threads a (tile, KV head). Flash attention: Q stays in registers, S and P never leave them, K and V come in
// double-buffered blocks of 64 keys gathered through the tile's runs.
template <int DIM>
__global__ void __launch_bounds__(THREADS) attend(Attention a, ForestArrays forest, TileArrays tiles) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared<DIM>& shared = *reinterpret_cast<Shared<DIM>*>(memory);
  constexpr int CHUNKS = DIM / 8;
  const int tile = blockIdx.x, kv_head = blockIdx.y, share = a.heads / a.kv_heads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int32_t begin = tiles.tile[tile];
  const int rows = (tiles.tile[tile + 1] - begin) * share;
  const int32_t n_keys = tiles.keys[tile], common = tiles.common[tile], blocks = (n_keys + KEYS - 1) / KEYS;
  const auto *q = (const __nv_bfloat16*)a.q, *k = (const __nv_bfloat16*)a.k + kv_head * DIM, *v = (const __nv_bfloat16*)a.v + kv_head * DIM;

  for (int i = thread; i < ROWS * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS, safe = row < rows ? row : 0;
    copy_16_bytes(at<DIM>(shared.q, row, chunk), q + tiles.query[begin + safe / share] * a.q_stride + (kv_head * share + safe % share) * DIM + chunk * 8, row < rows);
  }

  const auto find_keys = [&](int block) {
    if (thread >= KEYS) return;
    const int32_t i = block * KEYS + thread, key = i < n_keys ? key_at(tiles, tile, i) : -1;
    shared.key[block % 3][thread] = key;
    shared.first[block % 3][thread] = key < 0 ? INT32_MAX : forest.first[key];  // padding is visible to none
    shared.last[block % 3][thread] = key < 0 ? 0 : forest.last[key];
    shared.depth[block % 3][thread] = key < 0 ? 0 : forest.depth[key];
  };
  const auto fetch = [&](int block) {
    for (int i = thread; i < KEYS * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const int64_t key = shared.key[block % 3][row], safe = key < 0 ? 0 : key;
      copy_16_bytes(at<DIM>(shared.k[block & 1], row, chunk), k + safe * a.k_stride + chunk * 8, key >= 0);
      copy_16_bytes(at<DIM>(shared.v[block & 1], row, chunk), v + safe * a.v_stride + chunk * 8, key >= 0);
    }
    commit_copies();
  };

  // This lane's two rows. Rows past the end repeat the last one's rights; they are not stored.
  int32_t q_first[2], q_depth[2];
  for (int half = 0; half < 2; ++half) {
    const int row = min(warp * 16 + lane / 4 + 8 * half, rows - 1);
    const int32_t token = tiles.token[begin + row / share];
    q_first[half] = forest.first[token], q_depth[half] = forest.depth[token];
  }

  float o[DIM / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  uint32_t q_part[DIM / 16][4];
  const float log2_scale = a.scale * 1.44269504f;

  find_keys(0);
  __syncthreads();
  fetch(0);
  for (int block = 0; block < blocks; ++block) {
    const bool more = block + 1 < blocks;
    if (more) find_keys(block + 1);
    __syncthreads();  // the next keys are known, and no warp reads the other buffer any more
    if (more) fetch(block + 1), wait_for_copies<1>();
    else wait_for_copies<0>();
    __syncthreads();  // this block has arrived for all threads
    __nv_bfloat16 *kb = shared.k[block & 1], *vb = shared.v[block & 1];

    if (block == 0)
#pragma unroll
      for (int d = 0; d < DIM / 16; ++d) load_matrices(q_part[d], at<DIM>(shared.q, warp * 16 + lane % 16, d * 2 + lane / 16));

    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int d = 0; d < DIM / 16; ++d)
#pragma unroll
      for (int n = 0; n < KEYS / 16; ++n) {
        uint32_t m[4];
        load_matrices(m, at<DIM>(kb, n * 16 + lane / 16 * 8 + lane % 8, d * 2 + lane / 8 % 2));
        multiply(s[2 * n], q_part[d], m[0], m[1]);
        multiply(s[2 * n + 1], q_part[d], m[2], m[3]);
      }

    if ((block + 1) * KEYS > common)
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = n * 8 + lane % 4 * 2 + i % 2;
          if (!visible(q_first[i / 2], q_depth[i / 2], shared.first[block % 3][j], shared.last[block % 3][j], shared.depth[block % 3][j])) s[n][i] = -INFINITY;
        }

#pragma unroll
    for (int half = 0; half < 2; ++half) {  // online softmax of the lane's two rows; four lanes share a row
      float top = maximum[half];
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float base = top == -INFINITY ? 0 : top * log2_scale;  // nothing seen yet: keep -inf - -inf out
      const float factor = exp2f(maximum[half] * log2_scale - base);
      maximum[half] = top;
      float added = 0;
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) added += s[n][i] = exp2f(s[n][i] * log2_scale - base);
      total[half] = total[half] * factor + added;
#pragma unroll
      for (int n = 0; n < DIM / 8; ++n) o[n][2 * half] *= factor, o[n][2 * half + 1] *= factor;
    }

#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
      const uint32_t p[4] = {pack(s[2 * j][0], s[2 * j][1]), pack(s[2 * j][2], s[2 * j][3]), pack(s[2 * j + 1][0], s[2 * j + 1][1]), pack(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
      for (int n = 0; n < DIM / 16; ++n) {
        uint32_t m[4];
        load_matrices_transposed(m, at<DIM>(vb, j * 16 + lane / 8 % 2 * 8 + lane % 8, n * 2 + lane / 16));
        multiply(o[2 * n], p, m[0], m[1]);
        multiply(o[2 * n + 1], p, m[2], m[3]);
      }
    }
  }

  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    const int row = warp * 16 + lane / 4 + 8 * half;
    if (row >= rows) continue;
    auto* out = (__nv_bfloat16*)a.out + tiles.query[begin + row / share] * a.out_stride + (kv_head * share + row % share) * DIM + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < DIM / 8; ++n) *reinterpret_cast<uint32_t*>(out + n * 8) = pack(o[n][2 * half] / total[half], o[n][2 * half + 1] / total[half]);
  }
}

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float& to, float x) { to = x; }
__device__ void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }

// Any head_dim and float32: plain, one warp a (query, head), for what the kernel above does not take.
template <class T>
__global__ void attend_plain(Attention a, ForestArrays forest, TileArrays tiles) {
  const int tile = blockIdx.x, share = a.heads / a.kv_heads, head = blockIdx.y, lane = threadIdx.x % 32;
  for (int32_t i = tiles.tile[tile] + threadIdx.x / 32; i < tiles.tile[tile + 1]; i += THREADS / 32) {
    const int32_t token = tiles.token[i], q_first = forest.first[token], q_depth = forest.depth[token];
    const T* q = (const T*)a.q + tiles.query[i] * a.q_stride + head * a.dim;
    float o[MAX_DIM / 32] = {}, maximum = -INFINITY, total = 0;
    for (int32_t j = 0; j < tiles.keys[tile]; ++j) {
      const int64_t key = key_at(tiles, tile, j);
      if (!visible(q_first, q_depth, forest.first[key], forest.last[key], forest.depth[key])) continue;
      const T *k = (const T*)a.k + key * a.k_stride + head / share * a.dim, *v = (const T*)a.v + key * a.v_stride + head / share * a.dim;
      float score = 0;
      for (int d = lane; d < a.dim; d += 32) score += to_float(q[d]) * to_float(k[d]);
      for (int step = 16; step; step /= 2) score += __shfl_xor_sync(0xffffffffu, score, step);
      score *= a.scale;
      const float top = fmaxf(maximum, score), factor = expf(maximum - top), weight = expf(score - top);
      maximum = top, total = total * factor + weight;
#pragma unroll
      for (int d = 0; d < MAX_DIM / 32; ++d)
        if (d * 32 + lane < a.dim) o[d] = o[d] * factor + weight * to_float(v[d * 32 + lane]);
    }
    T* out = (T*)a.out + tiles.query[i] * a.out_stride + head * a.dim;
#pragma unroll
    for (int d = 0; d < MAX_DIM / 32; ++d)
      if (d * 32 + lane < a.dim) from_float(out[d * 32 + lane], o[d] / total);
  }
}

// ---- Mask -------------------------------------------------------------------------------------------------------------

constexpr int MASK_KEYS = 16, MASK_ROWS = 32;  // a thread keeps 16 keys in registers for 32 queries

__global__ void fill_mask(ForestArrays forest, int32_t tokens, uint8_t* out, int64_t stride) {
  const int64_t k0 = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * MASK_KEYS;
  if (k0 >= tokens) return;
  int32_t first[MASK_KEYS], last[MASK_KEYS], depth[MASK_KEYS];
#pragma unroll
  for (int j = 0; j < MASK_KEYS; ++j) {
    const int64_t k = k0 + j < tokens ? k0 + j : tokens - 1;
    first[j] = forest.first[k], last[j] = forest.last[k], depth[j] = forest.depth[k];
  }
  for (int64_t q = (int64_t)blockIdx.y * MASK_ROWS; q < tokens; q += (int64_t)gridDim.y * MASK_ROWS)
    for (int64_t i = q; i < q + MASK_ROWS && i < tokens; ++i) {
      const int32_t q_first = forest.first[i], q_depth = forest.depth[i];
      uint8_t* to = out + i * stride + k0;
      __align__(16) uint8_t bytes[MASK_KEYS];
#pragma unroll
      for (int j = 0; j < MASK_KEYS; ++j) bytes[j] = visible(q_first, q_depth, first[j], last[j], depth[j]);
      if (k0 + MASK_KEYS <= tokens && (uintptr_t)to % 16 == 0) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4*>(bytes);
      else
        for (int j = 0; j < MASK_KEYS && k0 + j < tokens; ++j) to[j] = bytes[j];
    }
}

// ---- Copies on the device, and launches -------------------------------------------------------------------------------

struct DeviceCopy {  // of a forest and its tiles of all tokens, for one device and tile size
  int device, size;
  int32_t* memory = nullptr;
  ForestArrays forest;
  TileArrays tiles;
  DeviceCopy() = default;
  DeviceCopy(const DeviceCopy&) = delete;
  ~DeviceCopy() {  // waits for kernels that still read it; at interpreter exit the context may be gone, which frees it too
    int before = 0;
    if (memory && cudaGetDevice(&before) == cudaSuccess) cudaSetDevice(device), cudaFree(memory), cudaSetDevice(before);
  }
};

const DeviceCopy& device_copy(const Forest& forest, int device, int size, cudaStream_t stream) {
  const Tiles& tiles = forest.all_tiles(size);
  std::lock_guard<std::mutex> lock(forest.mutex);
  for (const auto& copy : forest.device_copies)
    if (const auto& c = *(const DeviceCopy*)copy.get(); c.device == device && c.size == size) return c;
  auto copy = std::make_shared<DeviceCopy>();
  copy->device = device, copy->size = size;
  std::vector<int32_t> flat;
  for (const auto* part : {&forest.first, &forest.last, &forest.depth}) flat.insert(flat.end(), part->begin(), part->end());
  const std::vector<int32_t> more = flatten(tiles);
  flat.insert(flat.end(), more.begin(), more.end());
  check(cudaMalloc(&copy->memory, flat.size() * sizeof(int32_t)), "allocating the layout");
  check(cudaMemcpyAsync(copy->memory, flat.data(), flat.size() * sizeof(int32_t), cudaMemcpyHostToDevice, stream), "copying the layout");
  check(cudaStreamSynchronize(stream), "copying the layout");  // so that any stream may read it from now on
  const int64_t tokens = forest.tokens();
  copy->forest = {copy->memory, copy->memory + tokens, copy->memory + 2 * tokens};
  copy->tiles = unflatten(copy->memory + 3 * tokens, tiles);
  forest.device_copies.push_back(copy);
  return *copy;
}

template <int DIM>
void launch_attend(const Attention& a, const ForestArrays& forest, const TileArrays& tiles, unsigned n_tiles, cudaStream_t stream) {
  check(cudaFuncSetAttribute(attend<DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(Shared<DIM>)), "reserving shared memory");
  attend<DIM><<<dim3(n_tiles, a.kv_heads), THREADS, sizeof(Shared<DIM>), stream>>>(a, forest, tiles);
}

}  // namespace

void cuda_attention(const Attention& a, const Forest& forest, const Tiles* row_tiles, int device, uintptr_t stream_handle) {
  const auto stream = (cudaStream_t)stream_handle;
  const DeviceGuard guard(device);
  const int size = cuda_tile(a.heads / a.kv_heads);
  const DeviceCopy& copy = device_copy(forest, device, size, stream);
  TileArrays tiles = copy.tiles;
  const unsigned n_tiles = (unsigned)(row_tiles ? row_tiles->tile.size() : forest.all_tiles(size).tile.size()) - 1;
  if (!n_tiles) return;
  int32_t* memory = nullptr;
  if (row_tiles) {
    const std::vector<int32_t> flat = flatten(*row_tiles);
    check(cudaMallocAsync(&memory, flat.size() * sizeof(int32_t), stream), "allocating rows");
    check(cudaMemcpyAsync(memory, flat.data(), flat.size() * sizeof(int32_t), cudaMemcpyHostToDevice, stream), "copying rows");  // staged before it returns
    tiles = unflatten(memory, *row_tiles);
  }
  const auto aligned = [](const void* p, int64_t stride) { return (uintptr_t)p % 16 == 0 && stride % 8 == 0; };
  const bool fast = a.dtype == Dtype::bf16 && (a.dim == 64 || a.dim == 128) && a.heads / a.kv_heads <= ROWS && aligned(a.q, a.q_stride) && aligned(a.k, a.k_stride) &&
                    aligned(a.v, a.v_stride) && aligned(a.out, a.out_stride);
  if (fast && a.dim == 64) launch_attend<64>(a, copy.forest, tiles, n_tiles, stream);
  else if (fast) launch_attend<128>(a, copy.forest, tiles, n_tiles, stream);
  else if (a.dtype == Dtype::bf16) attend_plain<__nv_bfloat16><<<dim3(n_tiles, a.heads), THREADS, 0, stream>>>(a, copy.forest, tiles);
  else attend_plain<float><<<dim3(n_tiles, a.heads), THREADS, 0, stream>>>(a, copy.forest, tiles);
  check(cudaGetLastError(), "attention");
  if (memory) check(cudaFreeAsync(memory, stream), "freeing rows");
}

void cuda_mask(const Forest& forest, uint8_t* out, int64_t stride, int device, uintptr_t stream_handle) {
  if (!forest.tokens()) return;
  const auto stream = (cudaStream_t)stream_handle;
  const DeviceGuard guard(device);
  const DeviceCopy& copy = device_copy(forest, device, cuda_tile(1), stream);
  const int64_t tokens = forest.tokens(), columns = (tokens + MASK_KEYS - 1) / MASK_KEYS;
  const dim3 grid((unsigned)((columns + THREADS - 1) / THREADS), (unsigned)std::min<int64_t>((tokens + MASK_ROWS - 1) / MASK_ROWS, 65535));
  fill_mask<<<grid, THREADS, 0, stream>>>(copy.forest, (int32_t)tokens, out, stride);
  check(cudaGetLastError(), "mask");
}
