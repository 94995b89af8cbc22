// Floats to integers: x, and codes of weights. Plain loops, which the compiler makes vectors of.
#include "avx512.h"

#include "matmul_lanes.h"

namespace kbit {
namespace {

INLINE float largest_of_many(const Weight& w, const Activation&, const float* x, float peak, int64_t count) {
  return largest_of_lane(w, x, count, peak);
}

INLINE void put_values(const int32_t* q, const uint8_t*, int64_t m, int64_t chunk, int64_t chunks, Activation& out) {
  put_lanes(q, m, chunk, chunks, out.values);
}

}  // namespace
}  // namespace kbit

#include "prepare.h"

void kbit::add_avx512_rounding(Kernels& set) { add_rounding(set); }
