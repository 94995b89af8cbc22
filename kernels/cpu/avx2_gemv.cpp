// Products with one row of x, in a file of their own so that two processors compile the set.
#include "avx2.h"

namespace kbit {
namespace {

template <int K, Mode MODE>
using FullCodes = std::conditional_t<(K >= ROLLED_FROM && MODE == Mode::table), RolledCodes<K>, PackedCodes<K>>;

template <int K, Mode>
using Levels = Lut<K>;

template <int K, Mode>
constexpr int TOGETHER = 1;  // rows of the weight: more do not fit in sixteen registers

// sum += scale of unit `u` * (levels of its codes times x), for R = 1 row of the weight.
template <int K, Mode MODE, int G, int R, class Codes, class Unit>
INLINE void multiply_unit(const Lut<K>& lut, const Codes* rows, Unit u, const int16_t* x, const float* const* scales,
                          VecF* sums) {
  static_assert(R == 1);
  constexpr int COUNT = G == 64 ? 2 : 1;  // steps
  const int first = u * COUNT;
  const Codes& codes = *rows;
  const VecF scale = unit_scale<K, G>(*scales, u);
  if constexpr (MODE == Mode::half) {
    VecF part = zero_float();
    unroll<COUNT>([&](auto i) INLINE_LAMBDA {
      part = multiply_halves<K>(lut, codes(first + i), reinterpret_cast<const float*>(x) + (first + i) * STEP, part);
    });
    *sums = multiply_add(part, scale, *sums);
  } else if constexpr (MODE == Mode::affine) {
    const Vec second = COUNT == 2 ? codes(first + COUNT - 1) : zero();
    const int8_t* bytes = reinterpret_cast<const int8_t*>(x + first * STEP);
    *sums = add_scaled(*sums, affine_unit<K, COUNT>(codes(first), second, bytes), scale);
  } else {
    Vec acc = zero();
    Vec c[COUNT], v[COUNT][2];
    unroll<COUNT>([&](auto i) INLINE_LAMBDA { c[i] = codes(first + i); });
    lookup_several<K, COUNT>(lut, c, v);
    unroll<COUNT>([&](auto i) INLINE_LAMBDA {
      acc = mul_add(acc, v[i][0], load(x + (first + i) * STEP));
      acc = mul_add(acc, v[i][1], load(x + (first + i) * STEP + LANES));
    });
    *sums = add_scaled(*sums, acc, scale);
  }
}

}  // namespace
}  // namespace kbit

#include "gemv.h"

void kbit::add_avx2_gemv(Kernels& set) { set.gemv = gemv; }
