#include "avx512.h"

#include "bytes.h"
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
    Kernels set{};
    set.name = "avx512";
    set.is_fast = is_fast_weight;
    set.mode = mode;
    set.gemm = gemm;
    set.value_bytes = sizeof(Value);
    set.multiply_bytes = multiply_bytes;
    set.decode = decode;
    set.dot = dot_floats;
    add_avx512_gemv(set);
    add_avx512_rounding(set);
    return set;
  }();
  return &kernels;
}

}  // namespace kbit
