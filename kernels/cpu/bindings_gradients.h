// Gradients: the same as kernels/ops.py registers for other devices. Here, so that a call which needs no gradient
// passes this layer without Python.
#pragma once

#include <vector>

#include "bindings_weight.h"

namespace kbit {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

#define KBIT_TYPES                                                                                               \
  const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&,             \
      const OptTensor&, const OptTensor&, const OptTensor&, int64_t, int64_t, int64_t
#define KBIT_NAMES                                                                                               \
  planes, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean, outlier_values, outlier_index,      \
      in_features, bits, block

Tensor call_linear(const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
  static const auto op = find_op<Tensor(const Tensor&, KBIT_TYPES, const OptTensor&)>("kbit::linear");
  return op.call(x, KBIT_NAMES, bias);
}
Tensor call_input_grad(const Tensor& grad, KBIT_WEIGHT) {
  static const auto op = find_op<Tensor(const Tensor&, KBIT_TYPES)>("kbit::input_grad");
  return op.call(grad, KBIT_NAMES);
}
Tensor call_grouped_linear(const Tensor& x, KBIT_WEIGHT, const Tensor& offsets) {
  static const auto op = find_op<Tensor(const Tensor&, KBIT_TYPES, const Tensor&)>("kbit::grouped_linear");
  return op.call(x, KBIT_NAMES, offsets);
}
Tensor call_grouped_input_grad(const Tensor& grad, KBIT_WEIGHT, const Tensor& offsets) {
  static const auto op = find_op<Tensor(const Tensor&, KBIT_TYPES, const Tensor&)>("kbit::grouped_input_grad");
  return op.call(grad, KBIT_NAMES, offsets);
}

// A weight's operands, kept for the backward pass.
struct Saved {
  static constexpr size_t TENSORS = 9;
  static void put(AutogradContext* ctx, KBIT_WEIGHT, const Tensor& offsets) {
    const auto plain = [](const OptTensor& t) { return t.value_or(Tensor()); };
    ctx->save_for_backward({planes, scales, codebook, plain(zeros), plain(scale_codebook), plain(scale_absmax),
                            plain(scale_mean), plain(outlier_values), plain(outlier_index), offsets});
    ctx->saved_data["numbers"] = std::vector<int64_t>{in_features, bits, block};
  }
  template <class Call>
  static Tensor get(AutogradContext* ctx, const Call& call) {
    const variable_list t = ctx->get_saved_variables();
    const auto n = ctx->saved_data["numbers"].toIntVector();
    const auto maybe = [&](size_t i) { return t[i].defined() ? OptTensor(t[i]) : OptTensor(); };
    return call(t[0], t[1], t[2], maybe(3), maybe(4), maybe(5), maybe(6), maybe(7), maybe(8), n[0], n[1], n[2],
                t[TENSORS]);
  }
};

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
    Saved::put(ctx, KBIT_NAMES, Tensor());
    ctx->saved_data["bias"] = bias.has_value() ? static_cast<int64_t>(bias->scalar_type()) : int64_t{-1};
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_linear(x, KBIT_NAMES, bias);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(14);
    const Tensor& grad = grads[0];
    if (ctx->needs_input_grad(0)) {
      out[0] = Saved::get(ctx, [&](KBIT_WEIGHT, const Tensor&) { return call_input_grad(grad, KBIT_NAMES); });
    }
    const int64_t dtype = ctx->saved_data["bias"].toInt();
    if (dtype >= 0) out[13] = grad.reshape({-1, grad.size(-1)}).sum(0).to(static_cast<at::ScalarType>(dtype));
    return out;
  }
};

struct GroupedFunction : torch::autograd::Function<GroupedFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, KBIT_WEIGHT, const Tensor& offsets) {
    Saved::put(ctx, KBIT_NAMES, offsets);
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_grouped_linear(x, KBIT_NAMES, offsets);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(14);
    out[0] = Saved::get(ctx, [&](KBIT_WEIGHT, const Tensor& offsets) {
      return call_grouped_input_grad(grads[0], KBIT_NAMES, offsets);
    });
    return out;
  }
};

bool needs_grad(const Tensor& x, const OptTensor& bias) {
  return at::GradMode::is_enabled() && (x.requires_grad() || (bias.has_value() && bias->requires_grad()));
}

Tensor linear_autograd(const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
  if (needs_grad(x, bias)) return LinearFunction::apply(x, KBIT_NAMES, bias);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_linear(x, KBIT_NAMES, bias);
}

Tensor grouped_linear_autograd(const Tensor& x, KBIT_WEIGHT, const Tensor& offsets) {
  if (needs_grad(x, OptTensor())) return GroupedFunction::apply(x, KBIT_NAMES, offsets);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_grouped_linear(x, KBIT_NAMES, offsets);
}

}  // namespace
}  // namespace kbit
