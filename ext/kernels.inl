// All CPU kernels. cpu.cpp includes this file once per instruction set, with ISA (namespace and name), TARGET
// (function attribute), WIDTH (floats in a vector; 16 implies bfloat16 dot products) and optionally AMX
// (matrix products in AMX tiles). This file has the vector helpers and the element-wise kernels.

namespace ISA {

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));
typedef float unaligned_vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t unaligned_halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

TARGET inline vec splat(float x) { return x - vec{}; }
TARGET inline vec load(const float* p) { return *(const unaligned_vec*)p; }
TARGET inline void store(float* p, vec x) { *(unaligned_vec*)p = x; }
TARGET inline vec load(const bf16* p) {
  return (vec)(__builtin_convertvector(*(const unaligned_halves*)p, uvec) << 16);
}
#if WIDTH == 16
TARGET inline void store(bf16* p, vec x) { *(__m256i_u*)p = (__m256i)_mm512_cvtneps_pbh((__m512)x); }
#else
TARGET inline void store(bf16* p, vec x) {  // round to nearest even; NaN stays NaN
  const uvec bits = (uvec)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  *(unaligned_halves*)p = __builtin_convertvector(x == x ? rounded : bits >> 16 | 0x40, unaligned_halves);
}
#endif

// Load the first min(n, WIDTH) elements; the others are zero.
template <class T>
TARGET inline vec get(const T* p, int64_t n) {
  if (__builtin_expect(n >= WIDTH, true)) return load(p);
  alignas(64) T x[WIDTH];
  for (int i = 0; i < WIDTH; ++i) x[i] = i < n ? p[i] : T{};  // memcpy may be a call, which spills registers
  return load(x);
}
template <class T>
TARGET inline void put(T* p, vec y, int64_t n) {
  if (__builtin_expect(n >= WIDTH, true)) return store(p, y);
  alignas(64) T x[WIDTH];
  store(x, y);
  for (int i = 0; i < n; ++i) p[i] = x[i];
}

// Return 2^x for x <= 0, and 0 below -126. 2^(x - round(x)) is a minimax polynomial with a relative error of
// 7.5e-5 if APPROX (bfloat16 rounds by 2e-3), otherwise 1.5e-7. Adding 1.5 * 2^23 rounds x and leaves the
// integer in the low bits; a shift then moves it into the exponent.
template <bool APPROX>
TARGET inline vec fast_exp2(vec x) {
  const vec shifted = x + 12582912.f, f = x - (shifted - 12582912.f);
  const vec approx = ((0.05517167f * f + 0.24261113f) * f + 0.69326097f) * f + 0.99992806f;
  const vec high = (0.0013276472f * f + 0.0096755410f) * f + 0.055507131f;
  const vec p = APPROX ? approx : ((high * f + 0.24022120f) * f + 0.69314694f) * f + 1.f;
  return x >= -126.f ? (vec)((uvec)p + ((uvec)shifted << 23)) : vec{};
}

template <class T>
TARGET void rope(const Rope& r, int64_t row) {
  const int half = r.head_dim / 2;
  for (int h = 0; h < r.heads; ++h) {
    T *x = (T*)r.qkv.data + row * r.qkv.stride + h * r.head_dim, *y = x + half;
    for (int i = 0; i < half; i += WIDTH) {
      const int n = half - i;
      const vec a = get(x + i, n), b = get(y + i, n);
      const vec cos = get(r.cos + row * half + i, n), sin = get(r.sin + row * half + i, n);
      put(x + i, a * cos - b * sin, n);
      put(y + i, b * cos + a * sin, n);
    }
  }
}

template <class T>
TARGET void rmsnorm(const RmsNorm& r, int64_t row) {
  const int64_t width = r.width;
  float* x = r.x + row * width;
  const T* delta = r.delta ? (const T*)r.delta + row * width : nullptr;
  T* out = (T*)r.out + row * width;
  vec squares{};
  for (int64_t i = 0; i < width; i += WIDTH) {
    vec value = get(x + i, width - i);
    if (delta) put(x + i, value += get(delta + i, width - i), width - i);
    squares += value * value;
  }
  float sum = 0;
  for (int i = 0; i < WIDTH; ++i) sum += squares[i];
  const vec scale = splat(1 / std::sqrt(sum / width + r.eps));
  for (int64_t i = 0; i < width; i += WIDTH)
    put(out + i, get(x + i, width - i) * scale * get(r.weight + i, width - i), width - i);
}

template <class T>
TARGET inline vec reciprocal(vec x) {
#if WIDTH == 16
  if (sizeof(T) == 2) return (vec)_mm512_rcp14_ps((__m512)x);  // 14 bits suffice for bfloat16's 8
#endif
  return 1.f / x;
}

template <class T>
TARGET void swiglu(const SwiGlu& g, int64_t row) {
  for (int64_t i = 0; i < g.width; i += WIDTH) {
    const int64_t n = g.width - i;
    const T* gate = (const T*)g.gate_up + 2 * row * g.width + i;
    const vec x = get(gate, n), zero{};
    const vec e = fast_exp2<sizeof(T) == 2>((x < zero ? x : -x) * 1.44269504f);  // e^-|x| never overflows
    const vec sigmoid = (x < zero ? e : splat(1)) * reciprocal<T>(1.f + e);
    put((T*)g.out + row * g.width + i, x * sigmoid * get(gate + g.width, n), n);
  }
}

#include "products.inl"
#include "attention.inl"

const Kernels kernels{NAME(ISA), {attention<float>, attention<bf16>}, {rope<float>, rope<bf16>},
                      {rmsnorm<float>, rmsnorm<bf16>}, {swiglu<float>, swiglu<bf16>}};

}  // namespace ISA

#undef ISA
#undef TARGET
#undef WIDTH
#undef AMX
