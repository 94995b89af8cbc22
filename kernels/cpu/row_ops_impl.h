// The loops of row_ops.h, for one instruction set: vectors are the compiler's own, so that one text serves all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "row_ops.h"

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
// Sums of eight vectors.
inline V sums_of(const V* v) {
  V pair[4], four[2];
  for (int i = 0; i < 4; ++i) {
    const V a = v[2 * i], b = v[2 * i + 1];
    pair[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
              __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const V a = pair[2 * i], b = pair[2 * i + 1];
    four[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
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

// Elementwise ----------------------------------------------------------------------------------

template <Unary KIND>
inline V apply(V x) {
  const V unit = repeat(1.0f), half = repeat(0.5f);
  if constexpr (KIND == Unary::copy) return x;
  if constexpr (KIND == Unary::neg) return -x;
  if constexpr (KIND == Unary::square) return x * x;
  if constexpr (KIND == Unary::silu) return x / (unit + exponential(-x));
  if constexpr (KIND == Unary::sigmoid) return unit / (unit + exponential(-x));
  if constexpr (KIND == Unary::gelu) return half * x * (unit + error_function(x * repeat(0.70710678118654752f)));
  if constexpr (KIND == Unary::gelu_tanh) {
    const V inner = repeat(0.79788456080286536f) * (x + repeat(0.044715f) * x * x * x);
    return half * x * (unit + hyperbolic(inner));
  }
  if constexpr (KIND == Unary::tanh) return hyperbolic(x);
  if constexpr (KIND == Unary::relu) return x < repeat(0.0f) ? repeat(0.0f) : x;
  if constexpr (KIND == Unary::exp) return exponential(x);
  V out;
  for (int i = 0; i < W; ++i) {
    if constexpr (KIND == Unary::rsqrt) out[i] = 1.0f / std::sqrt(x[i]);
    if constexpr (KIND == Unary::sqrt) out[i] = std::sqrt(x[i]);
    if constexpr (KIND == Unary::cos) out[i] = std::cos(x[i]);
    if constexpr (KIND == Unary::sin) out[i] = std::sin(x[i]);
  }
  return out;
}

template <Binary KIND>
inline V apply(V a, V b) {
  if constexpr (KIND == Binary::add) return a + b;
  if constexpr (KIND == Binary::sub) return a - b;
  if constexpr (KIND == Binary::mul) return a * b;
  return a / b;
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

// `row(where the operands' rows start, where the output's does)` for every row of a shape.
template <int N, class F>
inline void over_rows_of(const Shape& shape, const Strided* const (&operands)[N], float* out, const F& row) {
  for (int64_t i = 0; i < shape.size[0]; ++i) {
    for (int64_t j = 0; j < shape.size[1]; ++j) {
      for (int64_t k = 0; k < shape.size[2]; ++k) {
        const float* data[N];
        for (int n = 0; n < N; ++n) {
          const int64_t* s = operands[n]->stride;
          data[n] = operands[n]->data + i * s[0] + j * s[1] + k * s[2];
        }
        row(data, out + i * shape.out[0] + j * shape.out[1] + k * shape.out[2]);
      }
    }
  }
}

template <Unary KIND>
void unary_of(const Shape& shape, const Strided& x, float* out) {
  const int64_t width = shape.size[DIMS - 1], stride = x.stride[DIMS - 1], apart = shape.out[DIMS - 1];
  over_rows_of<1>(shape, {&x}, out, [&](const float* const* data, float* to) {
    for (int64_t i = 0; i < width; i += W) {
      write(to + i * apart, apart, apply<KIND>(read(data[0] + i * stride, stride, width - i)), width - i);
    }
  });
}

template <Binary KIND>
void binary_of(const Shape& shape, const Strided& a, const Strided& b, float* out) {
  const int64_t width = shape.size[DIMS - 1], of_a = a.stride[DIMS - 1], of_b = b.stride[DIMS - 1];
  const int64_t apart = shape.out[DIMS - 1];
  over_rows_of<2>(shape, {&a, &b}, out, [&](const float* const* data, float* to) {
    for (int64_t i = 0; i < width; i += W) {
      const V x = read(data[0] + i * of_a, of_a, width - i), y = read(data[1] + i * of_b, of_b, width - i);
      write(to + i * apart, apart, apply<KIND>(x, y), width - i);
    }
  });
}

void unary(Unary kind, const Shape& shape, const Strided& x, float* out) {
#define KBIT_UNARY(name) \
  case Unary::name:      \
    unary_of<Unary::name>(shape, x, out); \
    break;
  switch (kind) {
    KBIT_UNARY(copy) KBIT_UNARY(neg) KBIT_UNARY(square) KBIT_UNARY(rsqrt) KBIT_UNARY(silu) KBIT_UNARY(gelu)
    KBIT_UNARY(gelu_tanh) KBIT_UNARY(tanh) KBIT_UNARY(relu) KBIT_UNARY(sigmoid) KBIT_UNARY(cos) KBIT_UNARY(sin)
    KBIT_UNARY(exp) KBIT_UNARY(sqrt)
  }
#undef KBIT_UNARY
}

void binary(Binary kind, const Shape& shape, const Strided& a, const Strided& b, float* out) {
  switch (kind) {
    case Binary::add: binary_of<Binary::add>(shape, a, b, out); break;
    case Binary::sub: binary_of<Binary::sub>(shape, a, b, out); break;
    case Binary::mul: binary_of<Binary::mul>(shape, a, b, out); break;
    case Binary::div: binary_of<Binary::div>(shape, a, b, out); break;
  }
}

// Norms ----------------------------------------------------------------------------------------

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

void mean(const float* x, int64_t count, int64_t apart, int64_t width, float* out) {
  for (int64_t r = 0; r < count; ++r) out[r] = total(x + r * apart, width) / static_cast<float>(width);
}

void rms_norm(const float* x, int64_t count, int64_t width, const float* weight, float eps, float* out) {
  for (int64_t r = 0; r < count; ++r, x += width, out += width) {
    const float factor = 1.0f / std::sqrt(dot(x, x, width) / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; i += W) {
      V v = read(x + i, 1, width - i) * repeat(factor);
      if (weight != nullptr) v = v * read(weight + i, 1, width - i);
      write(out + i, v, width - i);
    }
  }
}

void layer_norm(const float* x, int64_t count, int64_t width, const float* weight, const float* bias, float eps,
                float* out) {
  for (int64_t r = 0; r < count; ++r, x += width, out += width) {
    const float middle = total(x, width) / static_cast<float>(width);
    const float variance = reduce(x, x, width, [&](V acc, V a, V) {
                             const V off = a - repeat(middle);
                             return acc + off * off;
                           }) / static_cast<float>(width);
    const float factor = 1.0f / std::sqrt(variance + eps);
    for (int64_t i = 0; i < width; i += W) {
      V v = (read(x + i, 1, width - i) - repeat(middle)) * repeat(factor);
      if (weight != nullptr) v = v * read(weight + i, 1, width - i);
      if (bias != nullptr) v = v + read(bias + i, 1, width - i);
      write(out + i, v, width - i);
    }
  }
}

constexpr float MOST_HALF = 65504.0f;

void to_half(const float* x, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + W <= count; i += W) {
    V v = load(x + i);
    v = v > repeat(MOST_HALF) ? repeat(MOST_HALF) : v;
    v = v < repeat(-MOST_HALF) ? repeat(-MOST_HALF) : v;
    const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
  }
#endif
  for (; i < count; ++i) {
    const float kept = x[i] > MOST_HALF ? MOST_HALF : (x[i] < -MOST_HALF ? -MOST_HALF : x[i]);
    const _Float16 value = static_cast<_Float16>(kept);
    std::memcpy(out + i, &value, sizeof value);
  }
}

// Products -------------------------------------------------------------------------------------

// c (R, 16 or 8) (+)= a (R, depth) b (depth, 16 or 8), in registers.
template <int R, int N, class T>
inline void micro(const float* a, int64_t a_apart, const T* b, int64_t b_apart, int64_t depth, float* c,
                  int64_t c_apart, bool adds) {
  V acc[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) acc[r][n] = adds ? load(c + r * c_apart + n * W) : repeat(0.0f);
  }
  for (int64_t d = 0; d < depth; ++d) {
    V v[N];
    for (int n = 0; n < N; ++n) v[n] = load(b + d * b_apart + n * W);
    for (int r = 0; r < R; ++r) {
      const V x = repeat(a[r * a_apart + d]);
      for (int n = 0; n < N; ++n) acc[r][n] += x * v[n];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) store(c + r * c_apart + n * W, acc[r][n]);
  }
}

template <int R, class T>
inline void micro_rows(const float* a, int64_t a_apart, const T* b, int64_t b_apart, int64_t depth, int64_t width,
                       float* c, int64_t c_apart, bool adds) {
  int64_t n = 0;
  if constexpr (R == 1) {  // long stretches of b's rows, which lie far apart
    for (; n + 8 * W <= width; n += 8 * W) micro<R, 8>(a, a_apart, b + n, b_apart, depth, c + n, c_apart, adds);
    for (; n + 4 * W <= width; n += 4 * W) micro<R, 4>(a, a_apart, b + n, b_apart, depth, c + n, c_apart, adds);
  }
  for (; n + 2 * W <= width; n += 2 * W) micro<R, 2>(a, a_apart, b + n, b_apart, depth, c + n, c_apart, adds);
  for (; n + W <= width; n += W) micro<R, 1>(a, a_apart, b + n, b_apart, depth, c + n, c_apart, adds);
  for (; n < width; ++n) {
    for (int r = 0; r < R; ++r) {
      float value = adds ? c[r * c_apart + n] : 0.0f;
      for (int64_t d = 0; d < depth; ++d) value += a[r * a_apart + d] * one(b + d * b_apart + n);
      c[r * c_apart + n] = value;
    }
  }
}

// c (rows, width) (+)= a (rows, depth) b (depth, width).
template <class T>
inline void multiply(const float* a, int64_t rows, int64_t a_apart, const T* b, int64_t b_apart, int64_t depth,
                     int64_t width, float* c, int64_t c_apart, bool adds) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) {
    micro_rows<6>(a + r * a_apart, a_apart, b, b_apart, depth, width, c + r * c_apart, c_apart, adds);
  }
  for (; r + 2 <= rows; r += 2) {
    micro_rows<2>(a + r * a_apart, a_apart, b, b_apart, depth, width, c + r * c_apart, c_apart, adds);
  }
  for (; r < rows; ++r) {
    micro_rows<1>(a + r * a_apart, a_apart, b, b_apart, depth, width, c + r * c_apart, c_apart, adds);
  }
}

void to_floats(const Dense& from, int64_t row, int64_t width, float* out) {
  if (from.type == Dense::Type::f32) {
    std::copy_n(static_cast<const float*>(from.data) + row * width, width, out);
    return;
  }
  const uint16_t* data = static_cast<const uint16_t*>(from.data) + row * width;
  if (from.type == Dense::Type::bf16) {
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t bits = static_cast<uint32_t>(data[i]) << 16;
      std::memcpy(out + i, &bits, sizeof bits);
    }
    return;
  }
  int64_t i = 0;
  for (; i + W <= width; i += W) store(out + i, load(data + i));
  for (; i < width; ++i) out[i] = one(data + i);
}

void dense(const float* a, int64_t m, int64_t a_apart, const Dense& b, int64_t first, int64_t n, int64_t k, float* row,
           float* out, int64_t out_apart) {
  for (int64_t j = 0; j < n; ++j) {
    const float* own = static_cast<const float*>(b.data) + (first + j) * k;
    if (b.type != Dense::Type::f32) {
      to_floats(b, first + j, k, row);
      own = row;
    }
    for (int64_t i = 0; i < m; ++i) out[i * out_apart + j] = dot(a + i * a_apart, own, k);
  }
}

// Attention ------------------------------------------------------------------------------------

inline V capped(V x, float cap) { return cap > 0.0f ? repeat(cap) * hyperbolic(x / repeat(cap)) : x; }

// The first key that a token at a position sees.
inline int64_t first_seen(const Attention& a, int64_t position) {
  return a.window > 0 && position - a.window + 1 > 0 ? position - a.window + 1 : 0;
}

// scores (of keys first + [0, count)) of a query at a position to weights: e^(score - peak), 0 where it sees nothing.
// Returns their sum; `peak` is the larger of what it was and the largest score.
inline float soften(const Attention& a, float* scores, int64_t first, int64_t count, int64_t position, float* peak) {
  const int64_t low = std::max(first_seen(a, position), first) - first;
  const int64_t high = std::min(position + 1, first + count) - first;
  if (low >= high) {
    std::fill(scores, scores + count, 0.0f);
    return 0.0f;
  }
  std::fill(scores, scores + low, 0.0f);
  std::fill(scores + high, scores + count, 0.0f);
  const int64_t width = high - low;
  float* own = scores + low;
  float largest = *peak;
  V most = repeat(largest);
  for (int64_t i = 0; i < width; i += W) {
    V v = read(own + i, 1, width - i);
    if (a.cap > 0.0f) {
      v = capped(v, a.cap);
      write(own + i, v, width - i);
    }
    if (width - i >= W) {
      most = v > most ? v : most;
    } else {
      for (int64_t j = 0; i + j < width; ++j) largest = v[j] > largest ? v[j] : largest;
    }
  }
  for (int j = 0; j < W; ++j) largest = most[j] > largest ? most[j] : largest;
  *peak = largest;
  V sums = repeat(0.0f);
  float rest = 0.0f;
  for (int64_t i = 0; i < width; i += W) {
    const V v = exponential(read(own + i, 1, width - i) - repeat(largest));
    write(own + i, v, width - i);
    if (width - i >= W) {
      sums += v;
    } else {
      for (int64_t j = 0; i + j < width; ++j) rest += v[j];
    }
  }
  return sum(sums) + rest;
}

// What will be read soon, on its way into the caches.
template <class T>
inline void fetch(const T* p, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(p);
  for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(bytes + at);
}

// x times each of eight rows; the width is a multiple of W.
template <class T>
inline V eight_dots(const float* x, const T* rows, int64_t apart, int64_t width) {
  V acc[8];
  for (int k = 0; k < 8; ++k) acc[k] = repeat(0.0f);
  for (int64_t i = 0; i < width; i += W) {
    const V v = load(x + i);
    for (int k = 0; k < 8; ++k) acc[k] += v * load(rows + k * apart + i);
  }
  return sums_of(acc);
}

template <class T>
void few(const Attention& a, const AttentionPart& part, float* partial, float* scratch) {
  const int64_t group = a.heads / a.key_heads, rows = a.tokens * group, count = part.last - part.first;
  const int64_t key_apart = a.key_heads * a.size, value_apart = a.key_heads * a.value_size;
  const T* keys = static_cast<const T*>(a.keys) + part.first * key_apart + part.key_head * a.size;
  const T* values = static_cast<const T*>(a.values) + part.first * value_apart + part.key_head * a.value_size;
  float* query = scratch;  // (rows, size), scaled
  float* scores = query + rows * a.size;  // (rows, count)
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = a.query + r / group * a.query_token + (part.key_head * group + r % group) * a.query_head;
    for (int64_t i = 0; i < a.size; ++i) query[r * a.size + i] = from[i] * a.scale;
  }
  int64_t k = 0;
  if (a.size % W == 0) {
    for (; k + 8 <= count; k += 8) {
      const int64_t here = std::min(count - 1, k + 16);
      for (int64_t ahead = std::min(count - 1, k + 8); ahead < here; ++ahead) {
        fetch(keys + ahead * key_apart, a.size);
      }
      for (int64_t ahead = k; ahead < k + 8; ++ahead) fetch(values + ahead * value_apart, a.value_size);
      for (int64_t r = 0; r < rows; ++r) {
        store(scores + r * count + k, eight_dots(query + r * a.size, keys + k * key_apart, key_apart, a.size));
      }
    }
  }
  for (; k < count; ++k) {
    for (int64_t r = 0; r < rows; ++r) scores[r * count + k] = dot(query + r * a.size, keys + k * key_apart, a.size);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* own = partial + r * (a.value_size + 2);
    own[0] = -std::numeric_limits<float>::infinity();
    own[1] = soften(a, scores + r * count, part.first, count, a.start + r / group, own);
  }
  for (int64_t r = 0; r < rows; ++r) {
    micro_rows<1>(scores + r * count, count, values, value_apart, count, a.value_size,
                  partial + r * (a.value_size + 2) + 2, a.value_size + 2, false);
  }
}

void attend_few(const Attention& a, const AttentionPart& part, float* partial, float* scratch) {
  if (a.is_half) {
    few<uint16_t>(a, part, partial, scratch);
  } else {
    few<float>(a, part, partial, scratch);
  }
}

void join(const Attention& a, int64_t key_head, const float* partial, int64_t segments, int64_t apart) {
  const int64_t group = a.heads / a.key_heads, width = a.value_size + 2;
  for (int64_t r = 0; r < a.tokens * group; ++r) {
    float peak = -std::numeric_limits<float>::infinity();
    for (int64_t s = 0; s < segments; ++s) peak = std::max(peak, partial[s * apart + r * width]);
    float sums = 0.0f;
    float* out = a.out + r / group * a.out_token + (key_head * group + r % group) * a.value_size;
    std::fill(out, out + a.value_size, 0.0f);
    for (int64_t s = 0; s < segments; ++s) {
      const float* own = partial + s * apart + r * width;
      if (own[1] == 0.0f) continue;  // nothing seen there
      const float factor = std::exp(own[0] - peak);
      sums += factor * own[1];
      for (int64_t i = 0; i < a.value_size; ++i) out[i] += factor * own[2 + i];
    }
    for (int64_t i = 0; i < a.value_size; ++i) out[i] /= sums;
  }
}

template <class T>
void many(const Attention& a, const AttentionPart& part, float* scratch) {
  const int64_t group = a.heads / a.key_heads, tokens = part.last - part.first, rows = tokens * group;
  const int64_t key_apart = a.key_heads * a.size, value_apart = a.key_heads * a.value_size;
  float* query = scratch;  // (rows, size), scaled
  float* sums = query + rows * a.size;  // (rows, value_size)
  float* scores = sums + rows * a.value_size;  // (rows, KEYS_AT_ONCE)
  float* peaks = scores + rows * KEYS_AT_ONCE;  // (rows)
  float* totals = peaks + rows;  // (rows)
  float* turned = totals + rows;  // (size, KEYS_AT_ONCE)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = part.key_head * group + r % group;
    const float* from = a.query + (part.first + r / group) * a.query_token + head * a.query_head;
    for (int64_t i = 0; i < a.size; ++i) query[r * a.size + i] = from[i] * a.scale;
    peaks[r] = -std::numeric_limits<float>::infinity();
    totals[r] = 0.0f;
  }
  std::fill(sums, sums + rows * a.value_size, 0.0f);
  const int64_t begin = first_seen(a, a.start + part.first) / KEYS_AT_ONCE * KEYS_AT_ONCE;
  const int64_t end = a.start + part.last;
  for (int64_t first = begin; first < end; first += KEYS_AT_ONCE) {
    const int64_t count = std::min(KEYS_AT_ONCE, end - first);
    const T* keys = static_cast<const T*>(a.keys) + first * key_apart + part.key_head * a.size;
    const T* values = static_cast<const T*>(a.values) + first * value_apart + part.key_head * a.value_size;
    for (int64_t k = 0; k < KEYS_AT_ONCE; ++k) {
      for (int64_t i = 0; i < a.size; ++i) {
        turned[i * KEYS_AT_ONCE + k] = k < count ? one(keys + k * key_apart + i) : 0.0f;
      }
    }
    multiply(query, rows, a.size, turned, KEYS_AT_ONCE, a.size, KEYS_AT_ONCE, scores, KEYS_AT_ONCE, false);
    for (int64_t r = 0; r < rows; ++r) {
      const float before = peaks[r];
      const float own =
          soften(a, scores + r * KEYS_AT_ONCE, first, count, a.start + part.first + r / group, peaks + r);
      if (peaks[r] > before && totals[r] > 0.0f) {
        const float factor = std::exp(before - peaks[r]);
        totals[r] *= factor;
        for (int64_t i = 0; i < a.value_size; ++i) sums[r * a.value_size + i] *= factor;
      }
      totals[r] += own;
    }
    multiply(scores, rows, KEYS_AT_ONCE, values, value_apart, count, a.value_size, sums, a.value_size, true);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = part.key_head * group + r % group;
    float* out = a.out + (part.first + r / group) * a.out_token + head * a.value_size;
    for (int64_t i = 0; i < a.value_size; ++i) out[i] = sums[r * a.value_size + i] / totals[r];
  }
}

void attend_many(const Attention& a, const AttentionPart& part, float* scratch) {
  if (a.is_half) {
    many<uint16_t>(a, part, scratch);
  } else {
    many<float>(a, part, scratch);
  }
}

constexpr RowKernels ROW_KERNELS = {unary,   binary,      mean,       rms_norm, layer_norm,
                                    to_half, attend_many, attend_few, join,     dense,    to_floats};

}  // namespace
}  // namespace kbit
