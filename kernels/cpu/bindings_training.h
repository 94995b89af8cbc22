// Optimizer steps, and whole weights to int8: kbit::optimizer_step, update_squares and round_tensor.
#pragma once

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "bindings_sets.h"
#include "bindings_threads.h"
#include "training.h"

namespace kbit {
namespace {

constexpr int64_t CELLS = 1 << 16;
constexpr int64_t STEP_WORK = 16;  // multiplications that the step of one number is worth

Type float_type(const Tensor& t, const char* what, size_t index) {
  switch (t.scalar_type()) {
    case Dtype::Float:
      return Type::f32;
    case Dtype::Half:
      return Type::f16;
    case Dtype::BFloat16:
      return Type::bf16;
    default:
      KBIT_CHECK(false, "kbit: ", what, " ", index, " is ", t.scalar_type(), "; expected float32, bfloat16 or float16");
  }
}

// What codes of each state stand for, (states, 2^bits), and cells of (states, CELLS).
struct StepLevels {
  StepLevels(const Tensor& levels, const Tensor& cells, int64_t bits) : levels_(levels), cells_(cells) {
    KBIT_CHECK(bits == 4 || bits == 8 || bits == 32, "kbit: states of ", bits, " bits; expected 4, 8 or 32");
    if (bits == 32) return;
    width_ = int64_t{1} << bits;
    const int64_t states = levels.dim() == 2 ? levels.size(0) : 0;
    KBIT_CHECK(levels.scalar_type() == Dtype::Float && levels.dim() == 2 && levels.size(1) == width_ &&
                   levels.is_contiguous(), "kbit: levels of states have shape ", text(levels),
               "; expected contiguous float32 of (states, ", width_, ")");
    KBIT_CHECK(cells.scalar_type() == Dtype::Int && shape_of(cells) == Sizes({states, CELLS}) && cells.is_contiguous(),
               "kbit: cells of states have shape ", text(cells), "; expected contiguous int32 of (", states, ", ", CELLS,
               ")");
  }

  StateLevels of(int64_t state) const {
    if (width_ == 0) return {};
    KBIT_CHECK(state < levels_.size(0), "kbit: no levels for state ", state);
    const int32_t* cells = cells_.const_data_ptr<int32_t>() + state * CELLS;
    return {levels_.const_data_ptr<float>() + state * width_, reinterpret_cast<const uint32_t*>(cells)};
  }

 private:
  const Tensor &levels_, &cells_;
  int64_t width_ = 0;
};

State checked_state(const Tensor& codes, const Tensor& scales, const StateLevels& levels, const Update& u, size_t index) {
  const Dtype dtype = u.bits == 32 ? Dtype::Float : Dtype::Byte;
  const int64_t wanted = u.bits == 4 ? (u.count + 1) / 2 : u.count;
  const int64_t blocks = u.bits == 32 ? 0 : (u.count + u.block - 1) / u.block;
  KBIT_CHECK(codes.scalar_type() == dtype && codes.numel() == wanted && codes.is_contiguous(), "kbit: state ", index,
             " is ", codes.scalar_type(), " of shape ", text(codes), "; expected ", wanted, " contiguous ", dtype);
  KBIT_CHECK(scales.scalar_type() == Dtype::Float && scales.numel() == blocks && scales.is_contiguous(),
             "kbit: scales of state ", index, " are ", scales.scalar_type(), " of shape ", text(scales), "; expected ",
             blocks, " contiguous float32");
  return {codes.mutable_data_ptr(), scales.mutable_data_ptr<float>(), levels};
}

int64_t checked_block(int64_t block) {
  KBIT_CHECK(block >= 2 && block % 2 == 0 && block <= STATE_BLOCK_MOST, "kbit: a block of ", block,
             " numbers; expected an even number up to ", STATE_BLOCK_MOST);
  return block;
}

StepNumbers step_numbers(const double* from) {
  float n[STEP_NUMBERS];
  for (int64_t i = 0; i < STEP_NUMBERS; ++i) n[i] = static_cast<float>(from[i]);
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
}

void check_gradient(const Tensor& grad, int64_t count, size_t index) {
  KBIT_CHECK(grad.numel() == count && grad.is_contiguous(), "kbit: gradient ", index, " has shape ", text(grad),
             "; expected ", count, " contiguous numbers");
}

// states: for each parameter codes and scales of its first state, and of its second if the rule has one.
void optimizer_step(const Tensor& levels, const Tensor& cells, const std::vector<Tensor>& params,
                    const std::vector<Tensor>& grads, const std::vector<Tensor>& states,
                    const std::vector<double>& numbers, int64_t rule, int64_t bits, int64_t block) {
  KBIT_CHECK(rule >= 0 && rule <= 2, "kbit::optimizer_step: no rule ", rule);
  const size_t fields = static_cast<Rule>(rule) == Rule::adam ? 4 : 2, count = params.size();
  KBIT_CHECK(grads.size() == count && states.size() == fields * count && numbers.size() == count * STEP_NUMBERS,
             "kbit::optimizer_step: expected a gradient, ", fields, " states and ", STEP_NUMBERS,
             " numbers a parameter, got ", grads.size(), ", ", states.size(), " and ", numbers.size(), " of ", count);
  const StepLevels all(levels, cells, bits);
  std::vector<Update> updates;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = params[i];
    KBIT_CHECK(param.is_contiguous(), "kbit::optimizer_step: parameter ", i, " is not contiguous");
    check_gradient(grads[i], param.numel(), i);
    Update u = {};
    u.param = param.mutable_data_ptr();
    u.grad = grads[i].const_data_ptr();
    u.param_type = float_type(param, "parameter", i);
    u.grad_type = float_type(grads[i], "gradient", i);
    u.count = param.numel();
    u.block = checked_block(block);
    u.bits = static_cast<int>(bits);
    const Tensor* own = &states[i * fields];
    u.first = checked_state(own[0], own[1], all.of(0), u, i);
    if (fields == 4) u.second = checked_state(own[2], own[3], all.of(1), u, i);
    u.numbers = step_numbers(&numbers[i * STEP_NUMBERS]);
    updates.push_back(u);
  }
  for (const Update& u : updates) {  // after all checks, so that an error leaves everything as it was
    over_rows((u.count + block - 1) / block, u.count * STEP_WORK, [&](int64_t begin, int64_t end) {
      training_kernels().step(u, static_cast<Rule>(rule), begin, end);
    });
  }
}

Tensor update_squares(const Tensor& levels, const Tensor& cells, const Tensor& grad,
                      const Tensor& codes, const Tensor& scales, const std::vector<double>& numbers, int64_t bits,
                      int64_t block) {
  KBIT_CHECK(numbers.size() == STEP_NUMBERS, "kbit::update_squares: expected ", STEP_NUMBERS, " numbers");
  check_gradient(grad, grad.numel(), 0);
  Update u = {};
  u.grad = grad.const_data_ptr();
  u.grad_type = float_type(grad, "gradient", 0);
  u.count = grad.numel();
  u.block = checked_block(block);
  u.bits = static_cast<int>(bits);
  const StepLevels all(levels, cells, bits);
  u.second = checked_state(codes, scales, all.of(1), u, 0);
  u.numbers = step_numbers(numbers.data());
  const int64_t blocks = (u.count + block - 1) / block;
  std::vector<double> sums(static_cast<size_t>(blocks));
  over_rows(blocks, u.count * STEP_WORK, [&](int64_t begin, int64_t end) {
    training_kernels().squares(u, begin, end, sums.data() + begin);
  });
  double total = 0.0;  // in their order, however many threads there were
  for (const double sum : sums) total += sum;
  const Tensor out = new_tensor({}, Dtype::Double);
  *out.mutable_data_ptr<double>() = total;
  return out;
}

float largest_of(const Tensor& t, Type type) {
  constexpr int64_t STEP = 1 << 14;
  const int64_t count = t.numel(), steps = (count + STEP - 1) / STEP;
  std::vector<uint32_t> tops(static_cast<size_t>(steps));
  over_rows(steps, count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      tops[i] = training_kernels().largest(t.const_data_ptr(), type, i * STEP, std::min(count, (i + 1) * STEP));
    }
  });
  uint32_t top = 0;
  for (const uint32_t one : tops) top = std::max(top, one);
  float value;
  std::memcpy(&value, &top, 4);
  return value;
}

// (codes, turned, scale), as `linear_int8` takes weights: codes of weight / scale * 127 + 127.
std::tuple<Tensor, Tensor, Tensor> round_tensor(const Tensor& weight) {
  KBIT_CHECK(weight.dim() == 2, "kbit::round_tensor: a weight of shape ", text(weight), "; expected a matrix");
  const Tensor own = as_contiguous(weight);
  const auto bytes = [](int64_t count) { return (count + 7) / 8 * 8; };
  Rounding r = {};
  r.from = own.const_data_ptr();
  r.type = float_type(own, "weight", 0);
  r.rows = own.size(0);
  r.cols = own.size(1);
  r.apart = bytes(r.cols);
  r.turned_apart = bytes(r.rows);
  const float largest = largest_of(own, r.type), inverse = MIDDLE / largest;
  // Of an absmax so small that it has no finite inverse, all codes are 0; and of one that is no number.
  const bool is_usable = std::isfinite(largest) && std::isfinite(inverse);
  const auto blank = [&](int64_t rows, int64_t apart, bool is_whole) {
    return is_usable && is_whole ? new_tensor({rows, apart}, Dtype::Byte) : zero_tensor({rows, apart}, Dtype::Byte);
  };
  const Tensor codes = blank(r.rows, r.apart, r.apart == r.cols);
  const Tensor turned = blank(r.cols, r.turned_apart, r.turned_apart == r.rows);
  const Tensor scale = new_tensor({1}, Dtype::Float);
  *floats_of(scale) = is_usable ? largest : std::isfinite(largest) ? 0.0f : std::nanf("");
  if (is_usable) {
    r.factor = inverse;
    r.codes = codes.mutable_data_ptr<uint8_t>();
    r.turned = turned.mutable_data_ptr<uint8_t>();
    const int64_t tiles = (r.rows + ROUND_TILE - 1) / ROUND_TILE;
    over_rows(tiles, r.rows * r.cols, [&](int64_t begin, int64_t end) {
      training_kernels().round_tiles(r, begin * ROUND_TILE, std::min(r.rows, end * ROUND_TILE));
    });
  }
  return {codes, turned, scale};
}

}  // namespace
}  // namespace kbit
