// torch.ops.kbit.* on the CPU: checks of what was given, threads, and the choice of a kernel set.
//
// linear    one row of x: `gemv`; more: `gemm`; both on x quantized to 16 bits block by block. Blocks that
//           are not a multiple of 32 take the decoded rows and float32.
// the rest  rows decoded to float32, a tile at a time.
//
// Each bindings_*.h is a section of this one translation unit: torch's headers take most of a minute to compile.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "bindings_encode.h"
#include "bindings_gradients.h"
#include "bindings_int8.h"
#include "bindings_linear.h"
#include "bindings_round.h"
#include "bindings_rows.h"
#include "bindings_sets.h"
#include "bindings_step.h"

TORCH_LIBRARY_FRAGMENT(kbit, m) {
  m.def("cpu_kernels() -> str", kbit::cpu_kernels);
  m.def("use_cpu_kernels(str name) -> ()", kbit::use_cpu_kernels);
  m.def("work_alone() -> ()", kbit::work_alone);
  m.def("build_step(Tensor?[] weights, int[] numbers, Tensor[] constants, int[] code, float[] floats) -> int",
        kbit::build_step);
  m.def("step_spent(int step) -> float[]", kbit::step_spent);
  m.def("free_step(int step) -> ()", kbit::free_step);
  m.def(
      "run_step(int step, Tensor ids, Tensor positions, Tensor slots, int[] starts, int[] counts, int[] wanted, "
      "bool is_half) -> Tensor",
      kbit::run_step);
}

TORCH_LIBRARY_IMPL(kbit, CPU, m) {
  m.impl("linear", kbit::linear);
  m.impl("linears", kbit::linears);
  m.impl("linear_int8", kbit::linear_int8);
  m.impl("input_grad", kbit::input_grad);
  m.impl("embedding", kbit::embedding);
  m.impl("grouped_linear", kbit::grouped_linear);
  m.impl("grouped_input_grad", kbit::grouped_input_grad);
  m.impl("dequantize", kbit::dequantize);
  m.impl("encode", kbit::encode);
  m.impl("search_scales", kbit::search_scales);
  m.impl("feed_back_strip", kbit::feed_back_strip);
  m.impl("descend_strip", kbit::descend_strip);
}

TORCH_LIBRARY_IMPL(kbit, AutogradCPU, m) {
  m.impl("linear", kbit::linear_autograd);
  m.impl("grouped_linear", kbit::grouped_linear_autograd);
}
