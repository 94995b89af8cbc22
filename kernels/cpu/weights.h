// What products with a weight share in a vector set: scratch memory, its scales, its outlier columns.
// Included after the set's primitives (gemv.h lists them).
#pragma once

#include "scalar.h"

namespace kbit {
namespace {

inline int64_t chunk_count(const Weight& w) { return (w.cols + CHUNK - 1) / CHUNK; }

inline bool is_fast_weight(const Weight& w) { return w.block % 32 == 0; }

// The largest integer of x of which 8 products with levels fit in 31 bits.
inline float largest_of_eight(const Weight& w) {
  return static_cast<float>(std::min((int64_t{1} << 31) / 8 / w.most, VALUE_MAX));
}

// Scales ---------------------------------------------------------------------------------------

// Scales of consecutive rows as floats. Several rows at a time, so that what is written has left the
// store buffer when the dot products read it.
class ScaleReader {
 public:
  explicit ScaleReader(const Weight& weight) : w_(weight), table_(weight) {}

  INLINE void fetch(int64_t row, int64_t count) const {
    const int64_t size = w_.scale_type == Type::code ? 1 : (w_.scale_type == Type::f32 ? 4 : 2);
    prefetch(static_cast<const char*>(w_.scales) + row * w_.blocks * size, count * w_.blocks * size);
  }

  // `out` needs room for (count, blocks) floats and a step more.
  NOINLINE void read(int64_t row, int64_t count, float* out) const {
    const int64_t at = row * w_.blocks;
    const int64_t total = count * w_.blocks;
    if (w_.scale_type != Type::code) {
      read_numbers(w_.scales, w_.scale_type, at, total, out);
      return;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(w_.scales) + at;
    const int64_t first = w_.first_scale + at;
    const int64_t safe = w_.rows * w_.blocks - at;  // bytes from `codes` to the end
    for (int64_t i = 0; i < total;) {
      const int64_t group = (first + i) / SCALE_GROUP;
      const int64_t end = (group + 1) * SCALE_GROUP - first;
      const int64_t stop = end < total ? end : total;
      table_.read(codes + i, stop - i, safe - i, w_.scale_absmax[group], w_.scale_mean, out + i);
      i = stop;
    }
  }

 private:
  const Weight& w_;
  const ScaleTable table_;
};

// out = a * b in whole vectors: reads and writes past `count`, by less than a vector.
INLINE void multiply_whole(const float* a, const float* b, int64_t count, float* out) {
  constexpr int64_t FLOATS = sizeof(VecF) / sizeof(float);
  for (int64_t i = 0; i < count; i += FLOATS) store_floats(out + i, multiply(load_floats(a + i), load_floats(b + i)));
}

// The scale of each granule of one row of the weight, times `x` where given; zero past the end.
NOINLINE void spread_scales(const Weight& w, const float* scales, const float* x, int64_t granule,
                          int64_t segments, float* out) {
  const int64_t valid = (w.cols + granule - 1) / granule;
  const int64_t ratio = w.block / granule;
  if (ratio == 1 && x != nullptr) {
    multiply_floats(scales, x, valid, out);
  } else if (ratio == 2 && x != nullptr) {
    const int64_t pairs = valid / 2;
    for (int64_t b = 0; b < pairs; ++b) {
      out[2 * b] = scales[b] * x[2 * b];
      out[2 * b + 1] = scales[b] * x[2 * b + 1];
    }
    if (valid % 2 != 0) out[valid - 1] = scales[pairs] * x[valid - 1];
  } else {
    for (int64_t b = 0, j = 0; b < w.blocks; ++b) {
      const int64_t stop = j + ratio < valid ? j + ratio : valid;
      for (; j < stop; ++j) out[j] = x == nullptr ? scales[b] : scales[b] * x[j];
    }
  }
  for (int64_t j = valid; j < segments; ++j) out[j] = 0.0f;
}

// Products of stored 16- or 32-bit numbers with floats, summed lane by lane.
NOINLINE VecF dot_numbers(const void* data, Type type, int64_t at, const float* x, int64_t count) {
  if (type == Type::f16) return dot_halves(static_cast<const uint16_t*>(data) + at, x, count);
  float values[256];
  VecF total = zero_float();
  for (int64_t i = 0; i < count; i += 256) {
    const int64_t here = count - i < 256 ? count - i : 256;
    read_numbers(data, type, at + i, here, values);
    total = add(total, dot_lanes(values, x + i, here));
  }
  return total;
}

NOINLINE void add_outliers(const Weight& w, const float* x, int64_t begin, int64_t end, float* out) {
  for (int64_t row = begin; row < end; ++row) {
    out[row - begin] += sum_lanes(dot_numbers(w.outlier_values, w.outlier_type, row * w.outliers, x, w.outliers));
  }
}

}  // namespace
}  // namespace kbit
