// What the bindings need of torch, through its stable C interface: one library serves every torch from 2.11 on, and
// compiles in seconds. What fails reaches Python as RuntimeError, or as IndexError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace kbit {
namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Dtype = torch::headeronly::ScalarType;
using Sizes = std::vector<int64_t>;

template <class Error, class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

#define KBIT_CHECK_AS(Error, condition, ...)             \
  do {                                                   \
    if (!(condition)) [[unlikely]] fail<Error>(__VA_ARGS__); \
  } while (false)
#define KBIT_CHECK(condition, ...) KBIT_CHECK_AS(std::runtime_error, condition, __VA_ARGS__)
#define KBIT_CHECK_INDEX(condition, ...) KBIT_CHECK_AS(std::out_of_range, condition, __VA_ARGS__)

inline Sizes shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline std::string text(const Sizes& shape) {
  std::ostringstream out;
  for (size_t i = 0; i < shape.size(); ++i) out << (i == 0 ? "[" : ", ") << shape[i];
  return shape.empty() ? "[]" : out.str() + "]";
}
inline std::string text(const Tensor& t) { return text(shape_of(t)); }

inline bool is_float(const Tensor& t) {
  switch (t.scalar_type()) {
    case Dtype::Float:
    case Dtype::Double:
    case Dtype::Half:
    case Dtype::BFloat16:
    case Dtype::Float8_e5m2:
    case Dtype::Float8_e4m3fn:
    case Dtype::Float8_e5m2fnuz:
    case Dtype::Float8_e4m3fnuz:
      return true;
    default:
      return false;
  }
}

// Without the dispatcher, which would look the operation up by its name.
inline Tensor new_tensor(const Sizes& shape, Dtype dtype) {
  Sizes strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max(shape[i], int64_t{1});
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), number, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}
inline Tensor as_type(const Tensor& t, Dtype dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
// Contiguous float32.
inline Tensor as_floats(const Tensor& t) { return as_contiguous(as_type(t, Dtype::Float)); }
inline float* floats_of(const Tensor& t) { return t.mutable_data_ptr<float>(); }

inline Tensor narrow_to(Tensor t, int64_t dim, int64_t first, int64_t count) {
  return torch::stable::narrow(t, dim, first, count);
}
inline void copy_into(Tensor to, const Tensor& from) { torch::stable::copy_(to, from); }

inline Tensor zero_tensor(const Sizes& shape, Dtype dtype) {
  Tensor out = new_tensor(shape, dtype);
  torch::stable::zero_(out);
  return out;
}
// Rows of floats that lie `stride` apart, seen as a matrix: good as long as these do.
inline Tensor view_floats(float* data, int64_t rows, int64_t cols, int64_t stride) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(data, {rows, cols}, {stride, 1}, cpu, Dtype::Float);
}
// a (m, k) times b (n, k), turned.
inline Tensor times_turned(const Tensor& a, const Tensor& b) {
  return torch::stable::matmul(a, torch::stable::transpose(b, 0, 1));
}

template <class Number>
void add_numbers(const Number* from, Number* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}
// A bias to `count` columns of every row of a matrix, from column `first` on.
template <class Number>
void add_bias(const Number* bias, int64_t count, int64_t first, int64_t rows, Number* to, int64_t width) {
  for (int64_t m = 0; m < rows; ++m) add_numbers(bias, to + m * width + first, count);
}
template <class Number>
void add_bias(const Tensor& bias, int64_t first, int64_t rows, Number* to, int64_t width) {
  constexpr Dtype dtype = sizeof(Number) == 8 ? Dtype::Double : Dtype::Float;
  const Tensor own = as_contiguous(as_type(bias, dtype));
  add_bias(own.const_data_ptr<Number>(), own.numel(), first, rows, to, width);
}

// `count` rows of a matrix from `first` on as contiguous float32, in memory of its own.
inline Tensor copy_rows(const Tensor& matrix, int64_t first, int64_t count) {
  const Tensor out = new_tensor({count, matrix.size(1)}, Dtype::Float);
  copy_into(out, narrow_to(matrix, 0, first, count));
  return out;
}

}  // namespace
}  // namespace kbit
