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

// Rows of a weight, decoded.
Tensor dense_tile(const Weight& w, int64_t first, int64_t count, Dtype dtype) {
  const Tensor tile = new_tensor({count, w.cols}, Dtype::Float);
  float* data = floats_of(tile);
  over_rows(count, count * w.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernels().decode(w, first + r, data + r * w.cols);
  });
  return as_type(tile, dtype);
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
  const Tensor input = view_floats(const_cast<float*>(x), count, w.cols, w.cols);
  for (int64_t first = 0; first < w.rows; first += step) {
    const int64_t here = std::min(step, w.rows - first);
    const Tensor part = times_turned(input, dense_tile(w, first, here, Dtype::Float));
    copy_into(view_floats(out + first, count, here, stride), part);
  }
}

void check_input(const char* name, const Tensor& x, int64_t features) {
  KBIT_CHECK(is_float(x) && x.dim() > 0 && x.size(x.dim() - 1) == features, "kbit::", name,
            ": expected a float input whose last dimension is ", features, ", got ", x.scalar_type(), " of shape ",
            text(x));
}

Tensor as_matrix(const Tensor& x) {
  if (x.dim() == 2) return x;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return torch::stable::reshape(x, {rows, x.size(x.dim() - 1)});
}

Sizes shape_like(const Tensor& x, int64_t last) {
  Sizes shape = shape_of(x);
  shape.back() = last;
  return shape;
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

// x (..., features) times every part, side by side: (..., width).
Tensor multiply_parts(const Tensor& x, int64_t features, const std::vector<Part>& parts, int64_t width) {
  const int64_t count = x.numel() / features;
  const bool is_double = x.scalar_type() == Dtype::Double;
  const Tensor out = new_tensor(shape_like(x, width), is_double ? Dtype::Double : Dtype::Float);
  if (is_double) {
    const Tensor matrix = as_matrix(x), to = as_matrix(out);
    for (const Part& part : parts) {
      const int64_t step = std::max(int64_t{16}, TILE / part.weight->cols);
      for (int64_t r = 0; r < part.weight->rows; r += step) {
        const int64_t here = std::min(step, part.weight->rows - r);
        const Tensor y = times_turned(matrix, dense_tile(*part.weight, r, here, Dtype::Double));
        copy_into(narrow_to(to, 1, part.first + r, here), y);
      }
      if (part.bias != nullptr) add_bias(*part.bias, part.first, count, out.mutable_data_ptr<double>(), width);
    }
    return out;
  }
  if (count > 0 && width > 0) {
    const Tensor input = as_floats(x);
    const Lease lease;
    multiply_floats(input.const_data_ptr<float>(), count, parts, floats_of(out), width);
    for (const Part& part : parts) {
      if (part.bias != nullptr) add_bias(*part.bias, part.first, count, floats_of(out), width);
    }
  }
  return as_type(out, x.scalar_type());
}

void check_bias(const OptTensor& bias, int64_t rows) {
  KBIT_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == rows), "kbit::linear: a bias of shape ",
             text(*bias), "; expected (", rows, ")");
}

Tensor linear(const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
  check_input("linear", x, in_features);
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  check_bias(bias, w.rows);
  const std::vector<Part> parts = {{&w, &packed.table(), bias.has_value() ? &*bias : nullptr, 0}};
  return multiply_parts(x, in_features, parts, w.rows);
}

Tensor linears(const Tensor& x, const std::vector<OptTensor>& weights, const std::vector<int64_t>& numbers,
               const std::vector<OptTensor>& biases) {
  constexpr size_t TENSORS = 9;
  const size_t count = numbers.size() / 3;
  KBIT_CHECK(count > 0 && numbers.size() == 3 * count && weights.size() == TENSORS * count && biases.size() == count,
             "kbit::linears: expected ", TENSORS, " tensors, 3 numbers and a bias for each weight, got ",
             weights.size(), ", ", numbers.size(), " and ", biases.size());
  check_input("linears", x, numbers[0]);
  std::vector<std::unique_ptr<Packed>> packed;
  std::vector<Part> parts;
  int64_t width = 0;
  for (size_t i = 0; i < count; ++i) {
    const OptTensor* at = &weights[TENSORS * i];
    KBIT_CHECK(at[0].has_value() && at[1].has_value() && at[2].has_value(), "kbit::linears: weight ", i,
               " lacks planes, scales or codebook");
    packed.push_back(std::make_unique<Packed>(Operands{*at[0], *at[1], *at[2], at[3], at[4], at[5], at[6], at[7], at[8],
                                                       numbers[3 * i], numbers[3 * i + 1], numbers[3 * i + 2]}));
    const Weight& w = packed.back()->matrix();
    KBIT_CHECK(w.cols == numbers[0], "kbit::linears: weight ", i, " takes ", w.cols, " features, not ", numbers[0]);
    const OptTensor& bias = biases[i];
    check_bias(bias, w.rows);
    parts.push_back({&w, &packed.back()->table(), bias.has_value() ? &*bias : nullptr, width});
    width += w.rows;
  }
  return multiply_parts(x, numbers[0], parts, width);
}

// grad (count, rows) @ W (rows, cols), a tile of rows at a time; float32 or float64.
Tensor find_input_grad(const Weight& w, const Tensor& grad) {
  const int64_t step = std::max(int64_t{16}, TILE / w.cols);
  const Tensor out = zero_tensor({grad.size(0), w.cols}, grad.scalar_type());
  for (int64_t r = 0; r < w.rows; r += step) {
    const int64_t here = std::min(step, w.rows - r);
    const Tensor part = torch::stable::matmul(narrow_to(grad, 1, r, here), dense_tile(w, r, here, grad.scalar_type()));
    if (out.scalar_type() == Dtype::Double) {
      add_numbers(part.const_data_ptr<double>(), out.mutable_data_ptr<double>(), out.numel());
    } else {
      add_numbers(part.const_data_ptr<float>(), floats_of(out), out.numel());
    }
  }
  return out;
}

Dtype wide(const Tensor& x) { return x.scalar_type() == Dtype::Double ? Dtype::Double : Dtype::Float; }

Tensor input_grad(const Tensor& grad, KBIT_WEIGHT) {
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  check_input("input_grad", grad, w.rows);
  const Tensor out = find_input_grad(w, as_matrix(as_type(grad, wide(grad))));
  return torch::stable::view(as_type(out, grad.scalar_type()), shape_like(grad, w.cols));
}

std::vector<int64_t> group_ends(const Tensor& offsets, int64_t experts, int64_t tokens) {
  KBIT_CHECK(offsets.dim() == 1 && offsets.size(0) == experts && !is_float(offsets) && offsets.is_cpu(),
             "kbit: offsets need one integer for each of ", experts, " experts, got ", offsets.scalar_type(),
             " of shape ", text(offsets));
  const Tensor ends = as_contiguous(as_type(offsets, Dtype::Long));
  std::vector<int64_t> out(ends.const_data_ptr<int64_t>(), ends.const_data_ptr<int64_t>() + experts);
  int64_t last = 0;
  for (const int64_t end : out) {
    KBIT_CHECK(end >= last && end <= tokens, "kbit: offsets must rise from 0 to ", tokens, ", got ", text(out));
    last = end;
  }
  return out;
}

const Packed& grouped(const Packed& packed) {
  KBIT_CHECK(packed.dim() == 3, "kbit: a grouped matmul needs a 3-D weight");
  return packed;
}

Tensor grouped_linear(const Tensor& x, KBIT_WEIGHT, const Tensor& offsets) {
  check_input("grouped_linear", x, in_features);
  const Tensor flat = as_matrix(x);
  const Packed packed = KBIT_PACKED;
  const int64_t rows = grouped(packed).expert(0).rows;
  const Tensor out = zero_tensor({flat.size(0), rows}, x.scalar_type());
  int64_t start = 0, index = 0;
  for (const int64_t end : group_ends(offsets, packed.count(), flat.size(0))) {
    if (end > start) {
      const Weight w = packed.expert(index);
      const std::vector<Part> parts = {{&w, &packed.table(), nullptr, 0}};
      const Tensor own = narrow_to(flat, 0, start, end - start);
      copy_into(narrow_to(out, 0, start, end - start), multiply_parts(own, in_features, parts, rows));
    }
    start = end;
    ++index;
  }
  return out;
}

Tensor grouped_input_grad(const Tensor& grad, KBIT_WEIGHT, const Tensor& offsets) {
  const Packed packed = KBIT_PACKED;
  const int64_t rows = grouped(packed).expert(0).rows;
  check_input("grouped_input_grad", grad, rows);
  const Tensor flat = as_matrix(as_type(grad, wide(grad)));
  const Tensor out = zero_tensor({flat.size(0), in_features}, flat.scalar_type());
  int64_t start = 0, index = 0;
  for (const int64_t end : group_ends(offsets, packed.count(), flat.size(0))) {
    if (end > start) {
      const Tensor own = narrow_to(flat, 0, start, end - start);
      copy_into(narrow_to(out, 0, start, end - start), find_input_grad(packed.expert(index), own));
    }
    start = end;
    ++index;
  }
  return as_type(out, grad.scalar_type());
}

}  // namespace
}  // namespace kbit
