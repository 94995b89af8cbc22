// Rows of the weight as floats: those that ids name, or all of them, a tile at a time.
#pragma once

#include <algorithm>

#include "bindings_linear.h"

namespace kbit {
namespace {

Tensor embedding(const Tensor& ids, KBIT_WEIGHT, Dtype dtype) {
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  KBIT_CHECK(!is_float(ids) && ids.scalar_type() != Dtype::Bool, "kbit::embedding: ids are ",
             ids.scalar_type(), "; expected integers");
  const Tensor flat = as_contiguous(as_type(ids, Dtype::Long));
  const int64_t* at = flat.const_data_ptr<int64_t>();
  const int64_t count = flat.numel();
  for (int64_t i = 0; i < count; ++i) {
    KBIT_CHECK_INDEX(at[i] >= 0 && at[i] < w.rows, "kbit::embedding: an id is outside 0 ... ", w.rows - 1);
  }
  Sizes shape = shape_of(ids);
  shape.push_back(w.cols);
  const Tensor out = new_tensor(shape, Dtype::Float);
  float* to = floats_of(out);
  over_rows(count, count * w.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().decode(w, at[i], to + i * w.cols);
  });
  return as_type(out, dtype);
}

Tensor dequantize(KBIT_WEIGHT, Dtype dtype) {
  const Packed packed = KBIT_PACKED;
  Sizes shape = shape_of(planes);
  shape.back() = in_features;
  const Tensor out = new_tensor(shape, dtype);
  const Weight first = packed.expert(0);
  const Tensor flat = as_matrix(out);
  const int64_t step = std::max(int64_t{16}, TILE / first.cols);
  for (int64_t index = 0; index < packed.count(); ++index) {
    const Weight w = packed.expert(index);
    for (int64_t r = 0; r < w.rows; r += step) {
      const int64_t here = std::min(step, w.rows - r);
      copy_into(narrow_to(flat, 0, index * w.rows + r, here), dense_tile(w, r, here, Dtype::Float));
    }
  }
  return out;
}

}  // namespace
}  // namespace kbit
