// A strip of columns that get their codes one after another: kbit::feed_back_strip and kbit::descend_strip. One
// thread does the work; callers share out rows.
#pragma once

#include <limits>
#include <string>
#include <tuple>

#include "bindings_sets.h"
#include "bindings_threads.h"
#include "bindings_weight.h"

namespace kbit {
namespace {

using Rounded = std::tuple<Tensor, Tensor, Tensor>;

#define KBIT_LEVELS                                                                                               \
  const Tensor &blocks, const Tensor &scales, const Tensor &inverse, const OptTensor &zeros,                      \
      const Tensor &codebook, const Tensor &bounds, Dtype kept

Tensor checked_floats(const Tensor& t, const Sizes& shape, const char* name) {
  KBIT_CHECK(t.scalar_type() == Dtype::Float && shape_of(t) == shape, "kbit: a strip's ", name, " are ", t.scalar_type(),
             " of shape ", text(t), "; expected float32 of shape ", text(shape));
  return as_contiguous(t);
}

Type type_kept(Dtype kept) {
  KBIT_CHECK(kept == Dtype::Half || kept == Dtype::BFloat16 || kept == Dtype::Float, "kbit: a strip keeps columns as ",
             kept, "; expected float16, bfloat16 or float32");
  return kept == Dtype::Half ? Type::f16 : kept == Dtype::BFloat16 ? Type::bf16 : Type::f32;
}

Rounded round_strip(const Tensor& given, const OptTensor& start, const Tensor& passes, KBIT_LEVELS) {
  KBIT_CHECK(given.dim() == 2, "kbit: a strip has shape ", text(given), "; expected (columns, rows)");
  const int64_t columns = given.size(0), rows = given.size(1);
  KBIT_CHECK(scales.dim() == 2 && blocks.scalar_type() == Dtype::Long && blocks.dim() == 1 && blocks.size(0) == columns,
             "kbit: a strip's blocks are ", blocks.scalar_type(), " of shape ", text(blocks), "; expected int64, one a column");
  KBIT_CHECK(codebook.dim() == 1 && codebook.numel() >= 1 && codebook.numel() <= 256, "kbit: the codebook has shape ",
             text(codebook));
  const Sizes of_blocks = {scales.size(0), rows}, of_strip = {columns, rows};
  const Tensor block = as_contiguous(blocks), given_here = checked_floats(given, of_strip, "columns");
  const Tensor scale = checked_floats(scales, of_blocks, "scales"), reciprocal = checked_floats(inverse, of_blocks, "inverse");
  OptTensor zero, before;
  if (zeros.has_value()) zero = checked_floats(*zeros, of_blocks, "zeros");
  if (start.has_value()) before = checked_floats(*start, of_strip, "values");
  const Tensor pass = as_contiguous(torch::stable::transpose(checked_floats(passes, {columns, columns}, "moments"), 0, 1));
  const Tensor book = checked_floats(codebook, {codebook.numel()}, "levels");
  const Tensor bound = checked_floats(bounds, {codebook.numel() - 1}, "bounds");
  Strip s = {};
  s.given = given_here.const_data_ptr<float>();
  s.start = start.has_value() ? before->const_data_ptr<float>() : nullptr;
  s.passes = pass.const_data_ptr<float>();
  s.block = block.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < columns; ++i) {
    KBIT_CHECK_INDEX(s.block[i] >= -1 && s.block[i] < scales.size(0), "kbit: a strip's block is outside 0 ... ",
                     scales.size(0) - 1);
  }
  s.scales = scale.const_data_ptr<float>();
  s.inverse = reciprocal.const_data_ptr<float>();
  s.zeros = zeros.has_value() ? zero->const_data_ptr<float>() : nullptr;
  s.codebook = book.const_data_ptr<float>();
  s.bounds = static_cast<int>(bound.numel());
  std::fill(std::begin(s.bound), std::end(s.bound), std::numeric_limits<float>::infinity());
  std::copy_n(bound.const_data_ptr<float>(), s.bounds, s.bound);
  s.kept = type_kept(kept);
  s.columns = columns;
  s.rows = rows;
  const Tensor codes = new_tensor(of_strip, Dtype::Byte), values = new_tensor(of_strip, Dtype::Float);
  const Tensor changes = new_tensor(of_strip, Dtype::Float);
  s.codes = codes.mutable_data_ptr<uint8_t>();
  s.values = floats_of(values);
  s.changes = floats_of(changes);
  Lease lease;
  kernels().round_strip(s, Lease::arena().take<float>(columns * STRIP_ROWS_MOST));
  return {codes, values, changes};
}

Rounded feed_back_strip(const Tensor& wanted, const Tensor& factor, KBIT_LEVELS) {
  return round_strip(wanted, std::nullopt, factor, blocks, scales, inverse, zeros, codebook, bounds, kept);
}

Rounded descend_strip(const Tensor& slope, const Tensor& start, const Tensor& moments, KBIT_LEVELS) {
  return round_strip(slope, start, moments, blocks, scales, inverse, zeros, codebook, bounds, kept);
}

}  // namespace
}  // namespace kbit
