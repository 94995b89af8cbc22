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

// Throws unless x in int8 can meet a weight's codes.
void check_int8(const Weight& w, const Table& table) {
  const bool is_centred = table.is_affine && w.levels == 2 * MIDDLE + 1 && w.codebook[MIDDLE] == 0.0f;
  KBIT_CHECK(w.bits == 8 && w.blocks == 1 && is_centred && w.zero_type == Type::none,
             "kbit::linear_int8: needs evenly spaced 8-bit levels around 0 and one scale a row, without zero points: "
             "int8 with a block of at least in_features");
  KBIT_CHECK(w.cols <= BYTES_MOST, "kbit::linear_int8: ", w.cols, " features do not fit int32 sums");
}

// What multiplies the codes of each row.
std::vector<float> steps_of(const Weight& w, const Table& table) {
  std::vector<float> steps;
  for (int64_t r = 0; r < w.rows; ++r) steps.push_back(read_scale(w, r, 0) * table.step);
  return steps;
}

// `count` rows of x times a weight that `check_int8` has seen.
//   columns: the weight's `outlier_columns`
void multiply_int8(const Weight& w, const std::vector<float>& steps, const OptTensor& columns, const float* from,
                   int64_t count, float* to, int64_t width) {
  const Bytes bytes = to_bytes(w, from, count);
  const ByteRows rows = {steps.data(), w.outliers > 0 ? columns->const_data_ptr<float>() : nullptr};
  over_rows(w.rows, w.rows * w.cols * count, [&](int64_t begin, int64_t end) {
    kernels().multiply_bytes(w, rows, bytes, begin, end, to, width);
  });
}

Tensor linear_int8(const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
  check_input("linear_int8", x, in_features);
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  check_bias(bias, w.rows);
  check_int8(w, packed.table());
  const Tensor input = as_floats(x), out = new_tensor(shape_like(x, w.rows), Dtype::Float);
  const int64_t count = x.numel() / in_features;
  const Lease lease;
  multiply_int8(w, steps_of(w, packed.table()), packed.outlier_columns(), input.const_data_ptr<float>(), count,
                floats_of(out), w.rows);
  if (bias.has_value()) add_bias(*bias, 0, count, floats_of(out), w.rows);
  return as_type(out, x.scalar_type());
}

}  // namespace
}  // namespace kbit
