#include "avx2.h"

#include "matmul_few.h"
#include "matmul_lanes.h"

namespace kbit {
namespace {

void gemm(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
          int64_t stride) {
  (x.rows > FEW_MOST ? gemm_lanes : gemm_few)(w, table, x, begin, end, out, stride);
}

}  // namespace
}  // namespace kbit

#include "decode.h"

namespace kbit {

const Kernels* avx2_kernels() {
  static const Kernels kernels = [] {
    Kernels set = set_named("avx2");
    add_avx2_gemv(set);
    add_avx2_rounding(set);
    return set;
  }();
  return &kernels;
}

}  // namespace kbit
