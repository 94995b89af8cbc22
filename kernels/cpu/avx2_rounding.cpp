// Floats to integers: x, and codes of weights. Plain loops, which the compiler makes vectors of.
#include "avx2.h"

#include "matmul_few.h"
#include "matmul_lanes.h"

namespace kbit {
namespace {

INLINE float largest_of_many(const Weight& w, const Activation& out, const float* x, float peak, int64_t count) {
  return out.rows > FEW_MOST ? largest_of_lane(w, x, count, peak) : largest_of_eight(w);
}

INLINE void put_values(const int32_t* q, const uint8_t* from, int64_t m, int64_t chunk, int64_t chunks,
                       Activation& out) {
  if (out.rows > FEW_MOST) return put_lanes(q, m, chunk, chunks, out.values);
  put_few(q, from, m, chunk, chunks, out.values);
}

}  // namespace
}  // namespace kbit

#include "prepare.h"

void kbit::add_avx2_rounding(Kernels& set) { add_rounding(set); }
