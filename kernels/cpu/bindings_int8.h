// LLM.int8(): x in int8, one scale a row, times codes of `int8` with one scale a row, in integers; outlier
// features are no part of either scale and are multiplied as floats.
#pragma once

#include <vector>

#include "bindings_linear.h"

namespace kbit {
namespace {

Bytes to_bytes(const Weight& w, const float* x, int64_t rows) {
  Arena& arena = Lease::arena();
  Bytes out;
  out.rows = rows;
  out.cols = w.cols;
  out.apart = (w.cols + 3) / 4 * 4;
  out.values = arena.take<uint8_t>(rows * out.apart * kernels().value_bytes);
  out.sums = arena.take<int32_t>(rows);
  out.scales = arena.take<float>(rows);
  out.outliers = arena.take<float>(rows * w.outliers);
  over_rows(rows, rows * w.cols, [&](int64_t begin, int64_t end) {
    std::vector<float> rest(static_cast<size_t>(w.cols));
    for (int64_t m = begin; m < end; ++m) {
      split_outliers(w, x + m * w.cols, rest.data(), out.outliers + m * w.outliers);
      kernels().round_bytes(rest.data(), m, out);
    }
  });
  return out;
}

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
  const Lease lease;
  const Bytes bytes = to_bytes(w, input.const_data_ptr<float>(), count);
  const Tensor columns = w.outliers > 0 ? outlier_values->to(at::kFloat).contiguous() : Tensor();
  float* steps = Lease::arena().take<float>(w.rows);
  for (int64_t r = 0; r < w.rows; ++r) steps[r] = read_scale(w, r, 0) * table.step;
  const ByteRows rows = {steps, w.outliers > 0 ? columns.const_data_ptr<float>() : nullptr};
  float* to = out.mutable_data_ptr<float>();
  over_rows(w.rows, w.rows * w.cols * count, [&](int64_t begin, int64_t end) {
    kernels().multiply_bytes(w, rows, bytes, begin, end, to, w.rows);
  });
  if (bias.has_value()) out.add_(*bias);
  return out.to(x.scalar_type()).view(shape_like(x, w.rows));
}

}  // namespace
}  // namespace kbit
