// torch.ops.kbit.* on the CPU: checks of what was given, threads, and the choice of a kernel set.
//
// linear    one row of x: `gemv`; more: `gemm`; both on x quantized to 16 bits block by block. Blocks that
//           are not a multiple of 32 take the decoded rows and float32.
// the rest  rows decoded to float32, a tile at a time.
//
// Each bindings_*.h is a section of this one translation unit.
#include "bindings_encode.h"
#include "bindings_int8.h"
#include "bindings_linear.h"
#include "bindings_round.h"
#include "bindings_rows.h"
#include "bindings_sets.h"
#include "bindings_step.h"
#include "bindings_training.h"

STABLE_TORCH_LIBRARY_FRAGMENT(kbit, m) {
  m.def("cpu_kernels() -> str");
  m.def("use_cpu_kernels(str name) -> ()");
  m.def("work_alone() -> ()");
  m.def("build_step(Tensor?[] weights, int[] numbers, Tensor[] constants, int[] code, float[] floats) -> int");
  m.def("step_spent(int step) -> float[]");
  m.def("free_step(int step) -> ()");
  m.def(
      "run_step(int step, Tensor ids, Tensor positions, Tensor slots, int[] starts, int[] counts, int[] wanted, "
      "Tensor[] cache_codebooks, int[] cache_numbers) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kbit, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&kbit::cpu_kernels));
  m.impl("use_cpu_kernels", TORCH_BOX(&kbit::use_cpu_kernels));
  m.impl("work_alone", TORCH_BOX(&kbit::work_alone));
  m.impl("build_step", TORCH_BOX(&kbit::build_step));
  m.impl("step_spent", TORCH_BOX(&kbit::step_spent));
  m.impl("free_step", TORCH_BOX(&kbit::free_step));
  m.impl("run_step", TORCH_BOX(&kbit::run_step));
}

STABLE_TORCH_LIBRARY_IMPL(kbit, CPU, m) {
  m.impl("linear", TORCH_BOX(&kbit::linear));
  m.impl("linears", TORCH_BOX(&kbit::linears));
  m.impl("linear_int8", TORCH_BOX(&kbit::linear_int8));
  m.impl("input_grad", TORCH_BOX(&kbit::input_grad));
  m.impl("embedding", TORCH_BOX(&kbit::embedding));
  m.impl("grouped_linear", TORCH_BOX(&kbit::grouped_linear));
  m.impl("grouped_input_grad", TORCH_BOX(&kbit::grouped_input_grad));
  m.impl("dequantize", TORCH_BOX(&kbit::dequantize));
  m.impl("encode", TORCH_BOX(&kbit::encode));
  m.impl("search_scales", TORCH_BOX(&kbit::search_scales));
  m.impl("feed_back_strip", TORCH_BOX(&kbit::feed_back_strip));
  m.impl("descend_strip", TORCH_BOX(&kbit::descend_strip));
  m.impl("optimizer_step", TORCH_BOX(&kbit::optimizer_step));
  m.impl("update_squares", TORCH_BOX(&kbit::update_squares));
  m.impl("round_tensor", TORCH_BOX(&kbit::round_tensor));
}
