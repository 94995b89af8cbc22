// Floats to codes, and the search for their scales. A code is found by its float's cell (`Encoder`); cells are
// made so small that each holds one bound between levels, where that is possible.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>

#include "bindings_sets.h"
#include "bindings_threads.h"
#include "bindings_weight.h"

namespace kbit {
namespace {

std::unique_ptr<Encoder> make_encoder(const Tensor& codebook) {
  const Tensor book = as_contiguous(codebook);
  auto out = std::make_unique<Encoder>();
  const float* levels = book.const_data_ptr<float>();
  out->bounds = static_cast<int>(book.numel()) - 1;
  for (int i = 0; i < out->bounds; ++i) {
    const double middle = (static_cast<double>(levels[i + 1]) + levels[i]) / 2;
    float rounded = static_cast<float>(middle);
    if (rounded > middle) rounded = std::nextafter(rounded, -std::numeric_limits<float>::infinity());
    out->bound[i] = rounded;
  }
  const auto cell = [&](int i) { return cell_of(out->bound[i], out->cells); };
  for (out->cells = 256;; out->cells *= 2) {
    out->is_apart = true;
    for (int i = 0; i + 1 < out->bounds && out->is_apart; ++i) out->is_apart = cell(i) < cell(i + 1);
    if (out->is_apart || out->cells == Encoder::MOST_CELLS) break;
  }
  int next = 0;
  for (int at = 0; at <= out->cells; ++at) {
    out->base[at] = static_cast<uint8_t>(next);
    out->edge[at] = std::numeric_limits<float>::infinity();
    for (; next < out->bounds && cell(next) == at; ++next) out->edge[at] = out->bound[next];
  }
  out->base[out->cells + 1] = static_cast<uint8_t>(next);
  return out;
}

std::vector<int64_t> outlier_features(const OptTensor& index, int64_t cols) {
  if (!index.has_value()) return {};
  const Tensor all = as_contiguous(as_type(*index, Dtype::Long));
  const int64_t* at = all.const_data_ptr<int64_t>();
  check_features(at, all.numel(), cols);
  return {at, at + all.numel()};
}

Tensor encode(const Tensor& rows, const Tensor& scales, const OptTensor& zeros, const Tensor& codebook,
              const OptTensor& outlier_index, int64_t bits, int64_t block) {
  KBIT_CHECK(rows.dim() == 2 && is_float(rows) && rows.numel() > 0, "kbit::encode: expected a 2-D float "
             "weight, got ", rows.scalar_type(), " of shape ", text(rows));
  KBIT_CHECK(bits >= 2 && bits <= 8 && block >= 1, "kbit::encode: ", bits, " bits, block ", block);
  KBIT_CHECK(codebook.scalar_type() == Dtype::Float && codebook.dim() == 1 && codebook.numel() >= 1 &&
                 codebook.numel() <= (int64_t{1} << bits),
             "kbit::encode: the codebook is ", codebook.scalar_type(), " of shape ", text(codebook));
  const int64_t count = rows.size(0), cols = rows.size(1), blocks = (cols + block - 1) / block;
  const auto checked = [&](const Tensor& t, const char* name) {
    KBIT_CHECK(t.dim() == 2 && t.size(0) == count && t.size(1) == blocks, "kbit::encode: ", name, " have shape ",
               text(t), "; expected (", count, ", ", blocks, ")");
    return as_floats(t);
  };
  const Tensor plain_scales = checked(scales, "scales");
  OptTensor plain_zeros;
  if (zeros.has_value()) plain_zeros = checked(*zeros, "zeros");
  const std::vector<int64_t> outliers = outlier_features(outlier_index, cols);
  const std::unique_ptr<Encoder> encoder = make_encoder(codebook);
  const int64_t row_bytes = bits * ((cols + 7) / 8);
  const Tensor out = new_tensor({count, row_bytes}, Dtype::Byte);
  const float* scale = plain_scales.const_data_ptr<float>();
  const float* zero = zeros.has_value() ? plain_zeros->const_data_ptr<float>() : nullptr;
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const int64_t step = std::max(int64_t{16}, TILE / cols);
  for (int64_t first = 0; first < count; first += step) {
    const int64_t here = std::min(step, count - first);
    const Tensor tile = outliers.empty() ? as_floats(narrow_to(rows, 0, first, here)) : copy_rows(rows, first, here);
    for (const int64_t col : outliers) {
      for (int64_t r = 0; r < here; ++r) floats_of(tile)[r * cols + col] = 0.0f;
    }
    const float* from = tile.const_data_ptr<float>();
    over_rows(here, here * cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = first + r;
        kernels().encode(*encoder, from + r * cols, scale + at * blocks,
                         zero == nullptr ? nullptr : zero + at * blocks, cols, block, static_cast<int>(bits),
                         to + at * row_bytes);
      }
    });
  }
  return out;
}

// Scales (and zeros) by weighted squared error: (rows, blocks) each, the zeros empty without `zeros`.
std::tuple<Tensor, Tensor> search_scales(const Tensor& rows, const Tensor& importance, const Tensor& scales,
                                         const OptTensor& zeros, const Tensor& codebook, const Tensor& ratios,
                                         int64_t block, int64_t rounds) {
  KBIT_CHECK(rows.dim() == 2 && is_float(rows) && rows.numel() > 0 && block >= 1 && rounds >= 0,
             "kbit::search_scales: expected a 2-D float weight, got ", rows.scalar_type(), " of shape ", text(rows));
  const int64_t count = rows.size(0), cols = rows.size(1), blocks = (cols + block - 1) / block;
  KBIT_CHECK(importance.dim() == 2 && importance.size(1) == cols && importance.size(0) >= 1 &&
                 count % importance.size(0) == 0,
             "kbit::search_scales: importance has shape ", text(importance), "; expected (groups, ", cols,
             ") where groups divide ", count, " rows");
  const auto checked = [&](const Tensor& t, const char* name) {
    KBIT_CHECK(t.dim() == 2 && t.size(0) == count && t.size(1) == blocks, "kbit::search_scales: ", name,
               " have shape ", text(t), "; expected (", count, ", ", blocks, ")");
    return copy_rows(t, 0, count);
  };
  KBIT_CHECK(codebook.scalar_type() == Dtype::Float && codebook.dim() == 1 && codebook.numel() >= 1 &&
                 codebook.numel() <= 256 && ratios.scalar_type() == Dtype::Float && ratios.dim() == 1,
             "kbit::search_scales: codebook and ratios are 1-D and float32");
  const Tensor out = checked(scales, "scales");
  const Tensor middles = zeros.has_value() ? checked(*zeros, "zeros") : new_tensor({0}, Dtype::Float);
  const Tensor weight = as_floats(importance), levels = as_contiguous(codebook), tries = as_contiguous(ratios);
  const std::unique_ptr<Encoder> encoder = make_encoder(codebook);
  float* scale = floats_of(out);
  float* zero = zeros.has_value() ? floats_of(middles) : nullptr;
  const float* level = levels.const_data_ptr<float>();
  const float* ratio = tries.const_data_ptr<float>();
  const float* given = weight.const_data_ptr<float>();
  const int64_t per_group = count / importance.size(0), candidates = ratios.numel();
  const int64_t step = std::max(int64_t{16}, TILE / cols);
  for (int64_t first = 0; first < count; first += step) {
    const int64_t here = std::min(step, count - first);
    const Tensor tile = as_floats(narrow_to(rows, 0, first, here));
    const float* from = tile.const_data_ptr<float>();
    over_rows(here, 16 * here * cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = first + r;
        kernels().search(*encoder, level, from + r * cols, given + at / per_group * cols, cols, block, ratio, candidates,
                         static_cast<int>(rounds), scale + at * blocks, zero == nullptr ? nullptr : zero + at * blocks);
      }
    });
  }
  return {out, middles};
}

}  // namespace
}  // namespace kbit
