// LLM.int8(): x in int8, one scale a row, times codes of `int8` with one scale a row, in integers; outlier
// features are no part of either scale and are multiplied as floats.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings_linear.h"

namespace kbit {
namespace {

struct Int8Rows {
  std::vector<int8_t> values;
  std::vector<int32_t> sums;
  std::vector<float> scales, outliers;

  Int8Rows(const Weight& w, const float* x, int64_t rows)
      : values(static_cast<size_t>(rows * w.cols)), sums(static_cast<size_t>(rows)),
        scales(static_cast<size_t>(rows)), outliers(static_cast<size_t>(rows * w.outliers)) {
    over_rows(rows, rows * w.cols, [&](int64_t begin, int64_t end) {
      std::vector<float> rest(static_cast<size_t>(w.cols));
      for (int64_t m = begin; m < end; ++m) {
        split_outliers(w, x + m * w.cols, rest.data(), outliers.data() + m * w.outliers);
        quantize(rest, values.data() + m * w.cols, m);
      }
    });
  }

 private:
  void quantize(const std::vector<float>& x, int8_t* to, int64_t m) {
    float largest = 0.0f, bad = 0.0f;
    for (const float value : x) {
      largest = std::max(largest, std::abs(value));
      bad += value * 0.0f;  // NaN for what is not finite, which must not come out as a number
    }
    const float inverse = largest > 0.0f ? MIDDLE / largest : 0.0f;
    // An absmax below 4e-37 has no finite inverse: such a row is nothing but sub-normals, and becomes 0.
    const float factor = std::isfinite(inverse) && bad == 0.0f ? inverse : 0.0f;
    int32_t sum = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const float scaled = bad == 0.0f ? x[i] * factor : 0.0f;
      to[i] = static_cast<int8_t>(std::nearbyint(scaled));
      sum += to[i];
    }
    sums[m] = sum;
    scales[m] = largest / MIDDLE + bad;
  }
};

Tensor linear_int8(const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
  const Tensor flat = checked_input("linear_int8", x, in_features);
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  const Table& table = packed.table();
  check_bias(bias, w.rows);
  const bool is_centred = table.is_affine && w.levels == 2 * MIDDLE + 1 && w.codebook[MIDDLE] == 0.0f;
  TORCH_CHECK(w.bits == 8 && w.blocks == 1 && is_centred && w.zero_type == Type::none,
              "kbit::linear_int8: needs evenly spaced 8-bit levels around 0 and one scale a row, without zero points: "
              "int8 with a block of at least in_features");
  TORCH_CHECK(w.cols <= BYTES_MOST, "kbit::linear_int8: ", w.cols, " features do not fit int32 sums");
  const Tensor input = flat.to(at::kFloat).contiguous();
  const int64_t count = input.size(0);
  Tensor out = at::empty({count, w.rows}, at::kFloat);
  const Int8Rows rows(w, input.const_data_ptr<float>(), count);
  const Bytes bytes = {rows.values.data(), rows.sums.data(), count, w.cols};
  const Tensor columns = w.outliers > 0 ? outlier_values->to(at::kFloat).contiguous() : Tensor();
  const float* kept = w.outliers > 0 ? columns.const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  over_rows(w.rows, w.rows * w.cols * count, [&](int64_t begin, int64_t end) {
    constexpr int64_t STEP = 64;  // rows whose sums wait in the cache
    std::vector<int32_t> sums(static_cast<size_t>(STEP * count));
    for (int64_t first = begin; first < end; first += STEP) {
      const int64_t here = std::min(STEP, end - first);
      kernels().multiply_bytes(w, bytes, first, first + here, sums.data(), STEP);
      for (int64_t m = 0; m < count; ++m) {
        const float* outliers = rows.outliers.data() + m * w.outliers;
        for (int64_t r = first; r < first + here; ++r) {
          const float scale = rows.scales[m] * (read_scale(w, r, 0) * table.step);
          float value = static_cast<float>(sums[m * STEP + r - first]) * scale;
          if (kept != nullptr) value += kernels().dot(kept + r * w.outliers, outliers, w.outliers);
          to[m * w.rows + r] = value;
        }
      }
    }
  });
  if (bias.has_value()) out.add_(*bias);
  return out.to(x.scalar_type()).view(shape_like(x, w.rows));
}

}  // namespace
}  // namespace kbit
