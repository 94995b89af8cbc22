// Rows of the weight as floats: those that ids name, or all of them, a tile at a time.
#pragma once

#include <algorithm>

#include "bindings_linear.h"

namespace kbit {
namespace {

Tensor embedding(const Tensor& ids, KBIT_WEIGHT, at::ScalarType dtype) {
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  TORCH_CHECK(!ids.is_floating_point() && ids.scalar_type() != at::kBool, "kbit::embedding: ids are ",
              ids.scalar_type(), "; expected integers");
  const Tensor flat = ids.to(at::kLong).contiguous().view({-1});
  const int64_t* at = flat.const_data_ptr<int64_t>();
  const int64_t count = flat.size(0);
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(at[i] >= 0 && at[i] < w.rows, "kbit::embedding: an id is outside 0 ... ", w.rows - 1);
  }
  Tensor out = at::empty({count, w.cols}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  over_rows(count, count * w.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().decode(w, at[i], to + i * w.cols);
  });
  at::DimVector shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(w.cols);
  return out.to(dtype).view(shape);
}

Tensor dequantize(KBIT_WEIGHT, at::ScalarType dtype) {
  const Packed packed = KBIT_PACKED;
  at::DimVector shape(planes.sizes().begin(), planes.sizes().end());
  shape.back() = in_features;
  Tensor out = at::empty(shape, at::TensorOptions().dtype(dtype));
  const Weight first = packed.expert(0);
  Tensor flat = out.view({-1, first.cols});
  const int64_t step = std::max(int64_t{16}, TILE / first.cols);
  for (int64_t index = 0; index < packed.count(); ++index) {
    const Weight w = packed.expert(index);
    for (int64_t r = 0; r < w.rows; r += step) {
      const int64_t here = std::min(step, w.rows - r);
      flat.narrow(0, index * w.rows + r, here).copy_(dense_tile(w, r, here, at::kFloat));
    }
  }
  return out;
}

}  // namespace
}  // namespace kbit
