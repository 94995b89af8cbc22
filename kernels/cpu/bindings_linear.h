// x times a weight, several weights, a stack of experts; and back to the gradient of x. x is quantized once for
// neighbouring weights that agree on how (`Prepared`); float64, and what no kernel is fast for, takes decoded rows.
// What integers do not hold of x, spikes and extreme rows, is multiplied apart.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "bindings_activation.h"
#include "bindings_sets.h"
#include "bindings_threads.h"
#include "bindings_weight.h"

namespace kbit {
namespace {

// Rows [begin, end) of a weight times every row of x, into out[m * stride + r].
void multiply(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
              int64_t stride) {
  if (x.rows == 1) {
    kernels().gemv(w, table, x, begin, end, out + begin);
    return;
  }
  kernels().gemm(w, table, x, begin, end, out + begin, stride);
}

// Any block size, any number of rows: float32 all the way.
void multiply_decoded(const Weight& w, const float* x, int64_t count, float* out, int64_t stride) {
  if (count <= 16) {
    over_rows(w.rows, w.rows * w.cols, [&](int64_t begin, int64_t end) {
      std::vector<float> row(static_cast<size_t>(w.cols));
      for (int64_t r = begin; r < end; ++r) {
        kernels().decode(w, r, row.data());
        for (int64_t m = 0; m < count; ++m) out[m * stride + r] = kernels().dot(row.data(), x + m * w.cols, w.cols);
      }
    });
    return;
  }
  const int64_t step = std::max(int64_t{16}, TILE / w.cols);
  Tensor tile = at::empty({std::min(step, w.rows), w.cols}, at::kFloat);
  const Tensor input = at::from_blob(const_cast<float*>(x), {count, w.cols}, at::kFloat);
  Tensor result = at::from_blob(out, {count, w.rows}, {stride, 1}, at::kFloat);
  for (int64_t first = 0; first < w.rows; first += step) {
    const int64_t here = std::min(step, w.rows - first);
    float* data = tile.mutable_data_ptr<float>();
    over_rows(here, here * w.cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) kernels().decode(w, first + r, data + r * w.cols);
    });
    result.narrow(1, first, here).copy_(at::mm(input, tile.narrow(0, 0, here).t()));
  }
}

Tensor dense_tile(const Weight& w, int64_t first, int64_t count, at::ScalarType dtype) {
  Tensor tile = at::empty({count, w.cols}, at::kFloat);
  float* data = tile.mutable_data_ptr<float>();
  over_rows(count, count * w.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernels().decode(w, first + r, data + r * w.cols);
  });
  return dtype == at::kFloat ? tile : tile.to(dtype);
}

Tensor checked_input(const char* name, const Tensor& x, int64_t features) {
  TORCH_CHECK(x.is_floating_point() && x.dim() > 0 && x.size(-1) == features, "kbit::", name,
              ": expected a float input whose last dimension is ", features, ", got ", x.scalar_type(), " of shape ",
              x.sizes());
  return x.reshape({-1, features});
}

struct Part {
  const Weight* weight;
  const Table* table;
  const Tensor* bias;
  int64_t first;  // column of the output
};

void multiply_extreme(const float* from, const Part& part, const Activation& x, float* to, int64_t width);

// Adds the spikes' share of a weight's products.
void add_spikes(const Weight& w, const std::vector<Spike>& spikes, float* to, int64_t width) {
  const int64_t count = static_cast<int64_t>(spikes.size());
  if (count == 0) return;
  std::vector<int64_t> cols;
  for (const Spike& spike : spikes) cols.push_back(spike.col);
  std::sort(cols.begin(), cols.end());
  cols.erase(std::unique(cols.begin(), cols.end()), cols.end());
  const bool is_whole = 16 * static_cast<int64_t>(cols.size()) > w.cols;  // then a vector set decodes faster
  over_rows(w.rows, w.rows * (is_whole ? w.cols : 16 * count), [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(w.cols));
    for (int64_t r = begin; r < end; ++r) {
      if (is_whole) kernels().decode(w, r, row.data());
      for (const int64_t col : cols) row[col] = is_whole ? row[col] : weight_at(w, r, col);
      for (const Spike& spike : spikes) to[spike.row * width + r] += spike.value * row[spike.col];
    }
  });
}

// The first packed rows from row `begin` of some parts on, on their way into the caches.
void fetch_parts(const std::vector<Part>& parts, int64_t begin) {
  constexpr int64_t BYTES = 8192;  // as far as products themselves fetch ahead, and a little more
  for (const Part& part : parts) {
    const Weight& w = *part.weight;
    if (begin < part.first || begin >= part.first + w.rows) continue;
    const uint8_t* first = w.planes + (begin - part.first) * w.row_bytes;
    const int64_t bytes = std::min(BYTES, (w.rows - (begin - part.first)) * w.row_bytes);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(first + at, 0, 2);
  }
}

// `count` rows of x times every part, side by side: part i in the columns from its first on of `to` (count, width).
//   next: what the same threads multiply next, if that is known
void multiply_floats(const float* from, int64_t count, const std::vector<Part>& parts, float* to, int64_t width,
                     const std::vector<Part>* next = nullptr) {
  std::vector<Prepared> prepared(parts.size());
  int64_t work = 0;
  const Prepared* last = nullptr;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Weight& w = *parts[i].weight;
    if (!kernels().is_fast(w)) {
      multiply_decoded(w, from, count, to + parts[i].first, width);
      continue;
    }
    const Mode mode = mode_of(w, *parts[i].table, count);
    prepared[i] = last != nullptr && last->fits(w, mode) ? *last : prepare(w, *parts[i].table, from, count);
    last = &prepared[i];
    work += w.rows * w.cols * count;
  }
  if (work == 0) return;
  over_rows(width, work, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < parts.size(); ++i) {
      if (prepared[i].x.rows == 0) continue;
      const int64_t first = parts[i].first;
      const int64_t low = std::max(begin, first) - first;
      const int64_t high = std::min(end, first + parts[i].weight->rows) - first;
      if (low < high) multiply(*parts[i].weight, *parts[i].table, prepared[i].x, low, high, to + first, width);
    }
    if (next != nullptr) {  // its share of them begins about there
      const int64_t rows = next->back().first + next->back().weight->rows;
      fetch_parts(*next, begin * rows / width / ROWS_AT_ONCE * ROWS_AT_ONCE);
    }
  });
  for (size_t i = 0; i < parts.size(); ++i) {
    if (prepared[i].x.rows == 0) continue;
    add_spikes(*parts[i].weight, prepared[i].spikes, to + parts[i].first, width);
    multiply_extreme(from, parts[i], prepared[i].x, to + parts[i].first, width);
  }
}

// Anew, rows of x that are not finite, in floats, and those that are very large or small, scaled by a power of two.
void multiply_extreme(const float* from, const Part& part, const Activation& x, float* to, int64_t width) {
  const Weight& w = *part.weight;
  for (int64_t m = 0; m < x.rows; ++m) {
    if (x.unusual[m] != Activation::EXTREME) continue;
    std::vector<float> row(static_cast<size_t>(w.cols)), out(static_cast<size_t>(w.rows));
    std::copy(from + m * w.cols, from + (m + 1) * w.cols, row.begin());
    if (std::any_of(row.begin(), row.end(), [](float value) { return std::isnan(value); })) continue;  // so is `to`
    float peak = 0.0f;
    for (const float value : row) peak = std::max(peak, std::abs(value));
    if (std::isinf(peak)) {
      multiply_decoded(w, row.data(), 1, to + m * width, width);
      continue;
    }
    if (peak >= 0x1p-64f && peak <= 0x1p64f) continue;  // of an outlier feature: beside it the rest is nothing
    const int exponent = std::ilogb(peak);
    for (float& value : row) value = std::ldexp(value, -exponent);
    multiply_floats(row.data(), 1, {{&w, part.table, nullptr, 0}}, out.data(), w.rows);
    for (int64_t r = 0; r < w.rows; ++r) to[m * width + r] = std::ldexp(out[r], exponent);
  }
}

// x (rows, cols) times every part, side by side.
Tensor multiply_parts(const Tensor& x, const std::vector<Part>& parts, int64_t width) {
  const int64_t count = x.size(0);
  if (x.scalar_type() == at::kDouble) {
    std::vector<Tensor> each;
    for (const Part& part : parts) {
      Tensor y = at::empty({count, part.weight->rows}, x.options());
      const int64_t step = std::max(int64_t{16}, TILE / part.weight->cols);
      for (int64_t r = 0; r < part.weight->rows; r += step) {
        const int64_t here = std::min(step, part.weight->rows - r);
        y.narrow(1, r, here).copy_(at::mm(x, dense_tile(*part.weight, r, here, at::kDouble).t()));
      }
      each.push_back(part.bias == nullptr ? y : y + *part.bias);
    }
    return each.size() == 1 ? each[0] : at::cat(each, 1);
  }
  const Tensor input = x.to(at::kFloat).contiguous();
  Tensor out = at::empty({count, width}, at::kFloat);
  if (count == 0 || width == 0) return out.to(x.scalar_type());
  const Lease lease;
  multiply_floats(input.const_data_ptr<float>(), count, parts, out.mutable_data_ptr<float>(), width);
  for (const Part& part : parts) {
    if (part.bias != nullptr) out.narrow(1, part.first, part.weight->rows).add_(*part.bias);
  }
  return out.to(x.scalar_type());
}

at::DimVector shape_like(const Tensor& x, int64_t last) {
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return shape;
}

void check_bias(const OptTensor& bias, int64_t rows) {
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == rows), "kbit::linear: a bias of shape ",
              bias.has_value() ? bias->sizes() : at::IntArrayRef(), "; expected (", rows, ")");
}

Tensor linear(const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
  const Tensor flat = checked_input("linear", x, in_features);
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  check_bias(bias, w.rows);
  const std::vector<Part> parts = {{&w, &packed.table(), bias.has_value() ? &*bias : nullptr, 0}};
  return multiply_parts(flat, parts, w.rows).view(shape_like(x, w.rows));
}

Tensor linears(const Tensor& x, const c10::List<OptTensor>& weights, at::IntArrayRef numbers,
               const c10::List<OptTensor>& biases) {
  constexpr size_t TENSORS = 9;
  const size_t count = numbers.size() / 3;
  TORCH_CHECK(count > 0 && numbers.size() == 3 * count && weights.size() == TENSORS * count && biases.size() == count,
              "kbit::linears: expected ", TENSORS, " tensors, 3 numbers and a bias for each weight, got ",
              weights.size(), ", ", numbers.size(), " and ", biases.size());
  const Tensor flat = checked_input("linears", x, numbers[0]);
  std::vector<std::unique_ptr<Packed>> packed;
  std::vector<Tensor> kept;
  kept.reserve(count);
  std::vector<Part> parts;
  int64_t width = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto at = [&](size_t j) -> OptTensor { return weights.get(TENSORS * i + j); };
    TORCH_CHECK(at(0).has_value() && at(1).has_value() && at(2).has_value(), "kbit::linears: weight ", i,
                " lacks planes, scales or codebook");
    packed.push_back(std::make_unique<Packed>(Operands{*at(0), *at(1), *at(2), at(3), at(4), at(5), at(6), at(7), at(8),
                                                       numbers[3 * i], numbers[3 * i + 1], numbers[3 * i + 2]}));
    const Weight& w = packed.back()->matrix();
    TORCH_CHECK(w.cols == numbers[0], "kbit::linears: weight ", i, " takes ", w.cols, " features, not ", numbers[0]);
    const OptTensor bias = biases.get(i);
    check_bias(bias, w.rows);
    if (bias.has_value()) kept.push_back(*bias);
    parts.push_back({&w, &packed.back()->table(), bias.has_value() ? &kept.back() : nullptr, width});
    width += w.rows;
  }
  return multiply_parts(flat, parts, width).view(shape_like(x, width));
}

// grad (count, rows) @ W (rows, cols), a tile of rows at a time.
void add_input_grad(const Weight& w, const Tensor& grad, Tensor out) {
  const int64_t step = std::max(int64_t{16}, TILE / w.cols);
  for (int64_t r = 0; r < w.rows; r += step) {
    const int64_t here = std::min(step, w.rows - r);
    out.addmm_(grad.narrow(1, r, here), dense_tile(w, r, here, grad.scalar_type()));
  }
}

at::ScalarType wide(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor input_grad(const Tensor& grad, KBIT_WEIGHT) {
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  const Tensor flat = checked_input("input_grad", grad, w.rows).to(wide(grad));
  Tensor out = at::zeros({flat.size(0), w.cols}, flat.options());
  add_input_grad(w, flat, out);
  return out.to(grad.scalar_type()).view(shape_like(grad, w.cols));
}

std::vector<int64_t> group_ends(const Tensor& offsets, int64_t experts, int64_t tokens) {
  TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == experts && !offsets.is_floating_point(),
              "kbit: offsets need one integer for each of ", experts, " experts, got ", offsets.scalar_type(),
              " of shape ", offsets.sizes());
  const Tensor ends = offsets.to(at::kLong).cpu().contiguous();
  std::vector<int64_t> out(ends.const_data_ptr<int64_t>(), ends.const_data_ptr<int64_t>() + experts);
  int64_t last = 0;
  for (const int64_t end : out) {
    TORCH_CHECK(end >= last && end <= tokens, "kbit: offsets must rise from 0 to ", tokens, ", got ", out);
    last = end;
  }
  return out;
}

const Packed& grouped(const Packed& packed) {
  TORCH_CHECK(packed.dim() == 3, "kbit: a grouped matmul needs a 3-D weight");
  return packed;
}

Tensor grouped_linear(const Tensor& x, KBIT_WEIGHT, const Tensor& offsets) {
  const Tensor flat = checked_input("grouped_linear", x, in_features);
  const Packed packed = KBIT_PACKED;
  const int64_t rows = grouped(packed).expert(0).rows;
  Tensor out = at::zeros({flat.size(0), rows}, x.options());
  int64_t start = 0, index = 0;
  for (const int64_t end : group_ends(offsets, packed.count(), flat.size(0))) {
    if (end > start) {
      const Weight w = packed.expert(index);
      const std::vector<Part> parts = {{&w, &packed.table(), nullptr, 0}};
      out.narrow(0, start, end - start).copy_(multiply_parts(flat.narrow(0, start, end - start), parts, rows));
    }
    start = end;
    ++index;
  }
  return out;
}

Tensor grouped_input_grad(const Tensor& grad, KBIT_WEIGHT, const Tensor& offsets) {
  const Packed packed = KBIT_PACKED;
  const Tensor flat = checked_input("grouped_input_grad", grad, grouped(packed).expert(0).rows).to(wide(grad));
  Tensor out = at::zeros({flat.size(0), in_features}, flat.options());
  int64_t start = 0, index = 0;
  for (const int64_t end : group_ends(offsets, packed.count(), flat.size(0))) {
    if (end > start) {
      add_input_grad(packed.expert(index), flat.narrow(0, start, end - start), out.narrow(0, start, end - start));
    }
    start = end;
    ++index;
  }
  return out.to(grad.scalar_type());
}

}  // namespace
}  // namespace kbit
