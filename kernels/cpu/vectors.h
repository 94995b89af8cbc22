// Vectors of floats as the compiler has them, so that one text serves all instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace kbit {
namespace {

constexpr int W = 8;  // floats of a vector
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V repeat(float x) { return V{x, x, x, x, x, x, x, x}; }
// Sums of four vectors.
inline void store_sums(const V* v, float* out) {
  V pair[2];
  for (int i = 0; i < 2; ++i) {
    const V a = v[2 * i], b = v[2 * i + 1];
    pair[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
              __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  const V four = __builtin_shufflevector(pair[0], pair[1], 0, 1, 8, 9, 4, 5, 12, 13) +
                 __builtin_shufflevector(pair[0], pair[1], 2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) out[i] = four[i] + four[i + 4];
}
inline float sum(V v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

inline float half_to_float(uint16_t h) {
  _Float16 value;
  std::memcpy(&value, &h, sizeof value);
  return static_cast<float>(value);
}
inline V load(const uint16_t* p) {
#if defined(__F16C__)
  return reinterpret_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  V v;
  for (int i = 0; i < W; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}
inline void halves_to_floats(const uint16_t* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load(x + i));
  for (; i < count; ++i) out[i] = half_to_float(x[i]);
}
inline float one(const float* p) { return *p; }
inline float one(const uint16_t* p) { return half_to_float(*p); }

// e^x to 2e-7 of itself; below -87 it is 0 or nearly so, NaN stays NaN.
inline V exponential(V x) {
  const V most = repeat(88.0f), least = repeat(-87.0f);
  x = x > most ? most : x;
  x = x < least ? least : x;
  const V magic = repeat(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  const V shifted = x * repeat(1.44269504089f) + magic;
  const V n = shifted - magic;
  const V r = (x - n * repeat(0.693145751953125f)) - n * repeat(1.42860682030941723e-6f);
  V p = repeat(1.9875691500e-4f);
  p = p * r + repeat(1.3981999507e-3f);
  p = p * r + repeat(8.3334519073e-3f);
  p = p * r + repeat(4.1665795894e-2f);
  p = p * r + repeat(1.6666665459e-1f);
  p = p * r + repeat(5.0000001201e-1f);
  p = p * r * r + r + repeat(1.0f);
  const I exponent = (reinterpret_cast<I>(shifted) - reinterpret_cast<I>(magic)) << 23;
  return reinterpret_cast<V>(reinterpret_cast<I>(p) + exponent);
}
inline V hyperbolic(V x) {  // tanh
  const V e = exponential(x + x);
  const V far = repeat(1.0f) - repeat(2.0f) / (e + repeat(1.0f));
  const V square = x * x;  // near 0 the difference above loses what is small
  V p = repeat(-5.70498872745e-3f);
  p = p * square + repeat(2.06390887954e-2f);
  p = p * square + repeat(-5.37397155531e-2f);
  p = p * square + repeat(1.33314422036e-1f);
  p = p * square + repeat(-3.33332819422e-1f);
  const V near = p * square * x + x;
  return square < repeat(0.390625f) ? near : far;  // 0.625^2
}
inline V error_function(V x) {  // Abramowitz and Stegun 7.1.26: to 1.5e-7
  const V zero = repeat(0.0f), size = x < zero ? -x : x;
  const V t = repeat(1.0f) / (repeat(1.0f) + repeat(0.3275911f) * size);
  V p = repeat(1.061405429f);
  p = p * t + repeat(-1.453152027f);
  p = p * t + repeat(1.421413741f);
  p = p * t + repeat(-0.284496736f);
  p = p * t + repeat(0.254829592f);
  const V y = repeat(1.0f) - p * t * exponential(-(x * x));
  return x < zero ? -y : y;
}

// W elements, or the last few, of an operand.
inline V read(const float* p, int64_t stride, int64_t count) {
  if (stride == 0) return repeat(*p);
  if (stride == 1 && count >= W) return load(p);
  V v = repeat(1.0f);
  for (int64_t i = 0; i < count && i < W; ++i) v[i] = p[i * stride];
  return v;
}
inline void write(float* p, V v, int64_t count) {
  if (count >= W) {
    store(p, v);
  } else {
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
  }
}
inline void write(float* p, int64_t stride, V v, int64_t count) {
  if (stride == 1) {
    write(p, v, count);
  } else {
    for (int64_t i = 0; i < count && i < W; ++i) p[i * stride] = v[i];
  }
}

// sum of f(x[i], y[i]) over the row: eight sums, and the last few apart.
template <class T, class F>
inline float reduce(const float* x, const T* y, int64_t width, const F& f) {
  V a = repeat(0.0f), b = repeat(0.0f);
  int64_t i = 0;
  for (; i + 2 * W <= width; i += 2 * W) {
    a = f(a, load(x + i), load(y + i));
    b = f(b, load(x + i + W), load(y + i + W));
  }
  for (; i + W <= width; i += W) a = f(a, load(x + i), load(y + i));
  float total = sum(a + b);
  for (; i < width; ++i) total = f(repeat(total), repeat(x[i]), repeat(one(y + i)))[0];
  return total;
}
template <class T>
inline float dot(const float* x, const T* y, int64_t width) {
  return reduce(x, y, width, [](V acc, V a, V b) { return acc + a * b; });
}
inline float total(const float* x, int64_t width) {
  return reduce(x, x, width, [](V acc, V a, V) { return acc + a; });
}

}  // namespace
}  // namespace kbit
