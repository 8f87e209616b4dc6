// Vectors of WIDTH floats: loads and stores that convert, and 2^x.

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));
typedef float vec_unaligned __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

TARGET inline vec load(const float* p) { return *(const vec_unaligned*)p; }
TARGET inline void store(float* p, vec x) { *(vec_unaligned*)p = x; }
TARGET inline vec splat(float x) { return x - vec{}; }

// ---- One element ------------------------------------------------------------------------------------------

template <class To, class From>
TARGET inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

TARGET inline float to_float(float x) { return x; }
TARGET inline float to_float(int8_t x) { return x; }
TARGET inline float to_float(bf16 x) { return bits_as<float>((uint32_t)x.bits << 16); }
TARGET inline float to_float(fp16 x) {
  // Infinities and NaN keep their exponent of ones, all else is scaled by 2^112, exactly.
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = special ? 0x7f800000u : 0u;
  const float scaled = bits_as<float>((x.bits & 0x7fffu) << 13) * 0x1p112f;
  return bits_as<float>(bits_as<uint32_t>(scaled) | sign | exponent);
}

TARGET inline void from_float(float& to, float x) { to = x; }
TARGET inline void from_float(bf16& to, float x) {  // to nearest even; a NaN stays one
  const uint32_t bits = bits_as<uint32_t>(x);
  to.bits = x == x ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : (uint16_t)0x7fc0;
}

// ---- WIDTH elements ---------------------------------------------------------------------------------------

template <class T>
TARGET inline vec get_whole(const T* p) {
  vec x;
  for (int i = 0; i < WIDTH; ++i) x[i] = to_float(p[i]);
  return x;
}
template <class T>
TARGET inline void put_whole(T* p, vec x) {
  for (int i = 0; i < WIDTH; ++i) from_float(p[i], x[i]);
}
TARGET inline vec get_whole(const float* p) { return load(p); }
TARGET inline void put_whole(float* p, vec x) { store(p, x); }

#if WIDTH == 16
TARGET inline vec get_whole(const bf16* p) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
TARGET inline vec get_whole(const fp16* p) {
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
TARGET inline vec get_whole(const int8_t* p) {
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
#endif
#ifdef BF16_DOT
TARGET inline void put_whole(bf16* p, vec x) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#endif

// The first n of WIDTH elements, zeros behind them; n may be more.
template <class T>
TARGET inline vec get(const T* p, int64_t n) {
  if (n >= WIDTH) return get_whole(p);
  alignas(64) float x[WIDTH] = {};
  for (int i = 0; i < n; ++i) x[i] = to_float(p[i]);
  return load(x);
}
template <class T>
TARGET inline void put(T* p, vec y, int64_t n) {
  if (n >= WIDTH) return put_whole(p, y);
  alignas(64) float x[WIDTH];
  store(x, y);
  for (int i = 0; i < n; ++i) from_float(p[i], x[i]);
}

// 2^x for x <= 0, 0 below -126. 2^(x - round(x)) is a minimax polynomial: relative error 7.5e-5 (far below
// bfloat16's 2e-3) or 1.5e-7. Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits,
// from where a shift moves it into the exponent.
template <bool ROUGH>
TARGET inline vec exp2_of(vec x) {
  const vec magic = splat(12582912.f);
  const vec shifted = x + magic;
  const vec f = x - (shifted - magic);
  const vec rough = ((0.05517167f * f + 0.24261113f) * f + 0.69326097f) * f + 0.99992806f;
  const vec half = (0.0013276472f * f + 0.0096755410f) * f + 0.055507131f;
  const vec fine = ((half * f + 0.24022120f) * f + 0.69314694f) * f + 1.f;
  const vec p = ROUGH ? rough : fine;
  const vec y = (vec)((uvec)p + ((uvec)shifted << 23));
  return x >= splat(-126.f) ? y : vec{};
}
