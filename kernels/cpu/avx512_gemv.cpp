// Products with one row of x, in a file of their own so that two processors compile the set.
#include "avx512.h"

namespace kbit {
namespace {

template <int K, Mode>
using FullCodes = PackedCodes<K>;

// Codes of 2 or 3 bits are looked up where they lie. `vpermw` reads the five low bits of a lane, `vpermb` the six
// of a byte; tables that repeat over the bits around a code spare the shift that would bring it down to bit 0.
constexpr int LOW_BITS_AT[] = {0, 2, 4, 3};  // places in an index: of the two low bits of a code,
constexpr int HIGH_BIT_AT[] = {2, 1, 2, 0};  // and of the third one

template <int K>
constexpr int code_in(int index, int place) {
  const int low = index >> LOW_BITS_AT[place] & 3;
  return K == 2 ? low : low | (index >> HIGH_BIT_AT[place] & 1) << 2;
}
template <int K, bool IN_BYTES>
constexpr int place_of(int step) {
  return IN_BYTES ? (K == 2 && step == 3 ? 1 : step) : step & 1;
}

// The plane of high bits, both halves alike: bit `to` + s of each byte belongs to step s.
INLINE Vec high_bits(const uint8_t* plane, int to) {
  const int low = to & 63, high = (to - 4) & 63;
  return _mm512_rolv_epi64(both(plane), _mm512_set_epi64(high, high, high, high, low, low, low, low));
}

template <int K, bool IN_BYTES>
INLINE Vec index_of(const uint8_t* p, int step) {
  const Vec low = load_once(p);
  if constexpr (K == 2) return step < (IN_BYTES ? 3 : 2) ? low : shift(low, 4);
  if (step == 0) return pick_bits(low, high_bits(p + 64, 2), 0x03);
  if (step == 1) return pick_bits(low, high_bits(p + 64, 0), 0x0c);
  if constexpr (IN_BYTES) {
    if (step == 2) return pick_bits(low, high_bits(p + 64, 0), 0x30);
    return shift(pick_bits(low, high_bits(p + 64, 0), 0xc0), 3);
  }
  if (step == 2) return pick_bits(shift(low, 4), high_bits(p + 64, 0), 0x03);
  return pick_bits(shift(low, 4), high_bits(p + 64, -2), 0x0c);
}

// Levels of a step's codes: two vectors of 16-bit lanes, or one of bytes.
template <int K, bool IN_BYTES>
class FieldLevels {
 public:
  explicit FieldLevels(const Table& table) {
    for (int place = 0; place < PLACES; ++place) {
      alignas(64) int16_t words[32];
      alignas(64) uint8_t bytes[64];
      for (int i = 0; i < 32; ++i) words[i] = table.value[code_in<K>(i, place)];
      for (int i = 0; i < 64; ++i) bytes[i] = table.byte[code_in<K>(i, place)];
      part_[place] = IN_BYTES ? _mm512_load_si512(bytes) : _mm512_load_si512(words);
    }
  }
  INLINE void read(const PackedCodes<K>& codes, int step, Vec* out) const {
    look_up(index_of<K, IN_BYTES>(codes.at, step), place_of<K, IN_BYTES>(step), out);
  }
  INLINE void read(const typename Tail<K>::Codes& codes, int step, Vec* out) const { look_up(codes(step), 0, out); }

 private:
  static constexpr int PLACES = IN_BYTES ? 4 : 2;
  INLINE void look_up(Vec index, int place, Vec* out) const {
    if constexpr (IN_BYTES) {
      out[0] = _mm512_permutexvar_epi8(index, part_[place]);
    } else {
      out[0] = _mm512_permutexvar_epi16(index, part_[place]);
      out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 8), part_[place]);
    }
  }
  Vec part_[PLACES];
};

template <int K>
class TableLevels {
 public:
  explicit TableLevels(const Table& table) : lut_(table) {}
  template <class Codes>
  INLINE void read(const Codes& codes, int step, Vec* out) const {
    lookup(lut_, codes(step), out);
  }

 private:
  Lut<K> lut_;
};

template <int K>
struct CodeLevels {
  explicit CodeLevels(const Table&) {}
  template <class Codes>
  INLINE void read(const Codes& codes, int step, Vec* out) const {
    out[0] = clean<K>(codes(step));
  }
};

template <int K, Mode MODE>
using Levels = std::conditional_t<(K <= 3), FieldLevels<K, MODE == Mode::affine>,
                                  std::conditional_t<MODE == Mode::affine, CodeLevels<K>, TableLevels<K>>>;

// Rows of the weight that share what is loaded of x. Measured: it pays where unpacking takes longer than reading
// from memory, and costs up to 5 % where it does not.
template <int K, Mode MODE>
constexpr int TOGETHER = K <= 3 || (MODE == Mode::table && (K == 5 || K == 6)) ? 4 : 1;

// sums += scale of unit `u` * (levels of its codes times x), for R rows of the weight.
template <int K, Mode MODE, int G, int R, class Codes, class Unit>
INLINE void multiply_unit(const Levels<K, MODE>& levels, const Codes* rows, Unit u, const int16_t* x,
                          const float* const* scales, VecF* sums) {
  constexpr int COUNT = G == 64 ? 2 : 1;  // steps
  const int first = u * COUNT;
  const auto load_x = [&](int at) INLINE_LAMBDA {
    Vec v = load(x + first * STEP + at);
    if (R > 1) asm("" : "+v"(v));  // gcc would load it again for every row
    return v;
  };
  Vec level[R][COUNT][2], acc[R];
  unroll<R>([&](auto r) INLINE_LAMBDA {
    acc[r] = zero();
    unroll<COUNT>([&](auto i) INLINE_LAMBDA { levels.read(rows[r], first + i, level[r][i]); });
  });
  unroll<2>([&](auto half) INLINE_LAMBDA {
    if constexpr (MODE == Mode::affine) {  // first the high bytes of x
      if (half == 1) unroll<R>([&](auto r) INLINE_LAMBDA { acc[r] = _mm512_slli_epi32(acc[r], 8); });
      unroll<COUNT>([&](auto i) INLINE_LAMBDA {
        const Vec q = load_x(i * STEP + half * LANES);
        unroll<R>([&](auto r) INLINE_LAMBDA { acc[r] = _mm512_dpbusd_epi32(acc[r], level[r][i][0], q); });
      });
    } else if constexpr (half < COUNT) {
      unroll<2>([&](auto part) INLINE_LAMBDA {
        const Vec q = load_x(half * STEP + part * LANES);
        unroll<R>([&](auto r) INLINE_LAMBDA { acc[r] = mul_add(acc[r], level[r][half][part], q); });
      });
    }
  });
  unroll<R>([&](auto r) INLINE_LAMBDA {
    sums[r] = add_scaled(sums[r], acc[r], unit_scale<K, G>(scales[r], u));
  });
}

}  // namespace
}  // namespace kbit

#include "gemv.h"

void kbit::add_avx512_gemv(Kernels& set) { set.gemv = gemv; }
