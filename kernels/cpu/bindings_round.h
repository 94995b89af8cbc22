// A strip of columns that get their codes one after another: kbit::feed_back_strip and kbit::descend_strip. One
// thread does the work; callers share out rows. Included after torch's headers.
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
      const Tensor &codebook, const Tensor &bounds, at::ScalarType kept

Tensor checked_floats(const Tensor& t, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.sizes() == shape, "kbit: a strip's ", name, " are ", t.scalar_type(),
              " of shape ", t.sizes(), "; expected float32 of shape ", shape);
  return t.contiguous();
}

Type type_kept(at::ScalarType kept) {
  TORCH_CHECK(kept == at::kHalf || kept == at::kBFloat16 || kept == at::kFloat, "kbit: a strip keeps columns as ",
              kept, "; expected float16, bfloat16 or float32");
  return kept == at::kHalf ? Type::f16 : kept == at::kBFloat16 ? Type::bf16 : Type::f32;
}

Rounded round_strip(const Tensor& given, const OptTensor& start, const Tensor& passes, KBIT_LEVELS) {
  TORCH_CHECK(given.dim() == 2, "kbit: a strip has shape ", given.sizes(), "; expected (columns, rows)");
  const int64_t columns = given.size(0), rows = given.size(1);
  TORCH_CHECK(scales.dim() == 2 && blocks.scalar_type() == at::kLong && blocks.sizes() == at::IntArrayRef{columns},
              "kbit: a strip's blocks are ", blocks.scalar_type(), " of shape ", blocks.sizes(), "; expected int64, one a column");
  TORCH_CHECK(codebook.dim() == 1 && codebook.numel() >= 1 && codebook.numel() <= 256, "kbit: the codebook has shape ",
              codebook.sizes());
  const std::array<int64_t, 2> of_blocks = {scales.size(0), rows};
  const Tensor block = blocks.contiguous(), given_here = checked_floats(given, given.sizes(), "columns");
  const Tensor scale = checked_floats(scales, of_blocks, "scales"), reciprocal = checked_floats(inverse, of_blocks, "inverse");
  const Tensor zero = zeros.has_value() ? checked_floats(*zeros, of_blocks, "zeros") : Tensor();
  const Tensor before = start.has_value() ? checked_floats(*start, given.sizes(), "values") : Tensor();
  const Tensor pass = checked_floats(passes, {columns, columns}, "moments").t().contiguous();
  const Tensor book = checked_floats(codebook, codebook.sizes(), "levels");
  const Tensor bound = checked_floats(bounds, {codebook.numel() - 1}, "bounds");
  Strip s = {};
  s.given = given_here.const_data_ptr<float>();
  s.start = start.has_value() ? before.const_data_ptr<float>() : nullptr;
  s.passes = pass.const_data_ptr<float>();
  s.block = block.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < columns; ++i) {
    TORCH_CHECK_INDEX(s.block[i] >= -1 && s.block[i] < scales.size(0), "kbit: a strip's block is outside 0 ... ",
                      scales.size(0) - 1);
  }
  s.scales = scale.const_data_ptr<float>();
  s.inverse = reciprocal.const_data_ptr<float>();
  s.zeros = zeros.has_value() ? zero.const_data_ptr<float>() : nullptr;
  s.codebook = book.const_data_ptr<float>();
  s.bounds = static_cast<int>(bound.numel());
  std::fill(std::begin(s.bound), std::end(s.bound), std::numeric_limits<float>::infinity());
  std::copy_n(bound.const_data_ptr<float>(), s.bounds, s.bound);
  s.kept = type_kept(kept);
  s.columns = columns;
  s.rows = rows;
  const Tensor codes = at::empty({columns, rows}, at::kByte), values = at::empty({columns, rows}, at::kFloat);
  const Tensor changes = at::empty_like(values);
  s.codes = codes.mutable_data_ptr<uint8_t>();
  s.values = values.mutable_data_ptr<float>();
  s.changes = changes.mutable_data_ptr<float>();
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
