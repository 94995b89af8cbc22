#include "avx512.h"

#include "matmul_lanes.h"

namespace kbit {
namespace {

void gemm(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
          int64_t stride) {
  gemm_lanes(w, table, x, begin, end, out, stride);
}

}  // namespace
}  // namespace kbit

#include "decode.h"

namespace kbit {

const Kernels* avx512_kernels() {
  static const Kernels kernels = [] {
    Kernels set = set_named("avx512");
    add_avx512_gemv(set);
    add_avx512_rounding(set);
    return set;
  }();
  return &kernels;
}

}  // namespace kbit
