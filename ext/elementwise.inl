// The element-wise parts of a decoder block, and a store's vectors made unit vectors; each in one pass over
// memory.

TARGET inline float sum_of(const vec (&x)[4]) {
  alignas(64) float parts[WIDTH];
  store(parts, (x[0] + x[1]) + (x[2] + x[3]));
  float total = 0;
  for (float part : parts) total += part;
  return total;
}

template <class T>
TARGET void rope(const Rope& r, int64_t from, int64_t to) {
  const int half = r.dim / 2;
  for (int64_t t = from; t < to; ++t)
    for (int h = 0; h < r.heads; ++h) {
      T* x = (T*)r.qkv + t * r.stride + h * r.dim;
      T* y = x + half;
      for (int i = 0; i < half; i += WIDTH) {
        const int n = half - i;
        const vec a = get(x + i, n), b = get(y + i, n);
        const vec cos = get(r.cos + t * half + i, n), sin = get(r.sin + t * half + i, n);
        put(x + i, a * cos - b * sin, n);
        put(y + i, b * cos + a * sin, n);
      }
    }
}

template <class T>
TARGET void rmsnorm(const RmsNorm& r, int64_t from, int64_t to) {
  const int64_t width = r.width;
  for (int64_t t = from; t < to; ++t) {
    float* x = r.x + t * width;
    const T* delta = r.delta ? (const T*)r.delta + t * width : nullptr;
    T* out = (T*)r.out + t * width;
    vec squares[4] = {};
    for (int64_t i = 0, part = 0; i < width; i += WIDTH, part = (part + 1) % 4) {
      vec value = get(x + i, width - i);
      if (delta) value += get(delta + i, width - i);
      if (delta) put(x + i, value, width - i);
      squares[part] += value * value;
    }
    const vec scale = splat(1 / std::sqrt(sum_of(squares) / width + r.eps));
    for (int64_t i = 0; i < width; i += WIDTH)
      put(out + i, get(x + i, width - i) * scale * get(r.weight + i, width - i), width - i);
  }
}

TARGET inline vec reciprocal(vec x, float) { return 1.f / x; }
TARGET inline vec reciprocal(vec x, bf16) {  // 14 bits are enough for bfloat16's 8
#if WIDTH == 16
  return (vec)_mm512_rcp14_ps((__m512)x);
#else
  return 1.f / x;
#endif
}

template <class T>
TARGET void swiglu(const SwiGlu& g, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t)
    for (int64_t i = 0; i < g.width; i += WIDTH) {
      const int64_t n = g.width - i;
      const T* gate = (const T*)g.gate_up + 2 * t * g.width + i;
      const vec x = get(gate, n), zero{};
      const vec e = exp2_of<sizeof(T) == 2>((x < zero ? x : -x) * 1.44269504f);  // e^-|x| never overflows
      const vec sigmoid = (x < zero ? e : splat(1)) * reciprocal(1.f + e, T{});
      put((T*)g.out + t * g.width + i, x * sigmoid * get(gate + g.width, n), n);
    }
}

template <class T>
TARGET void unit_vectors(const UnitVectors& u, int64_t from, int64_t to) {
  constexpr bool SCALED = sizeof(T) == 1;
  const int64_t width = u.width;
  for (int64_t t = from; t < to; ++t) {
    const int64_t number = u.index[t];
    const T* x = (const T*)u.vectors + number * width;
    const float* mean = SCALED ? u.statistics + number % u.columns * width : nullptr;
    const float* deviation = SCALED ? mean + u.columns * width : nullptr;
    const float factor = SCALED ? u.scales[number] : 1;
    float* out = u.out + t * width;
    vec squares[4] = {};
    for (int64_t i = 0, part = 0; i < width; i += WIDTH, part = (part + 1) % 4) {
      vec value = get(x + i, width - i);
      if (SCALED) value = get(mean + i, width - i) + get(deviation + i, width - i) * (value * factor);
      put(out + i, value, width - i);
      squares[part] += value * value;
    }
    const vec scale = splat(1 / std::max(std::sqrt(sum_of(squares)), 1e-12f));
    for (int64_t i = 0; i < width; i += WIDTH) put(out + i, get(out + i, width - i) * scale, width - i);
  }
}
