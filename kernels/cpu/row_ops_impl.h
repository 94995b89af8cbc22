// The loops of row_ops.h, for one instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "row_ops.h"
#include "vectors.h"

namespace kbit {
namespace {

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
  halves_to_floats(data, width, out);
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

constexpr RowKernels ROW_KERNELS = {unary,   binary,      mean,       rms_norm, layer_norm,
                                    to_half, turn,        attend_many, take_queries, attend_few, join, dense, to_floats};

}  // namespace
}  // namespace kbit
