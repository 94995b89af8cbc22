// AVX2 with FMA and F16C (Haswell, Zen and later): 32 codes, one group, at a time.
//
// 16-bit table values are built from bytes: `pshufb` gives the low and the high byte of sixteen
// levels. More levels take one pair of look-ups for every sixteen: `pshufb` answers 0 where bit 7 of
// the index is set, so after subtracting 16 t from the code only codes of table t or above answer,
// and with each table stored as its difference (xor) from the one before, the xor of all answers is
// the level. Weights whose levels are evenly spaced need no table: `pmaddubsw` takes their codes.
#pragma once

#include <immintrin.h>

#include <cstdlib>
#include <type_traits>

#include "scalar.h"
#include "transpose.h"

namespace kbit {
namespace {

constexpr int LANES = 16;
constexpr int STEP = 32;
constexpr int STEPS = 8;
constexpr int ROLLED_FROM = 7;  // bits from which a look-up is too long to repeat for every step
constexpr int HALF_FROM = 8;  // bits from which assembling a float beats looking it up
constexpr bool TAKES_BYTES = false;  // `pmaddubsw` would saturate
constexpr bool PAST_END = false;
constexpr bool ROLLS_TAIL = true;
constexpr bool HAS_SHORT = true;
constexpr float AFFINE_MAX = 64 * 128 - 1;  // high * 128 + low, |both| <= 64: `pmaddubsw` cannot saturate
constexpr int FEW_COLS = 4;  // rows of x whose sums fit in registers beside decoded values

using Vec = __m256i;
using VecF = __m256;

INLINE Vec zero() { return _mm256_setzero_si256(); }
INLINE VecF zero_float() { return _mm256_setzero_ps(); }
INLINE Vec load(const int16_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE Vec mul_add(Vec acc, Vec a, Vec b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
INLINE VecF add_scaled(VecF sum, Vec acc, VecF scale) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), scale, sum);
}
INLINE VecF load_floats(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store_floats(float* p, VecF v) { _mm256_storeu_ps(p, v); }
INLINE VecF multiply(VecF a, VecF b) { return _mm256_mul_ps(a, b); }
INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
INLINE VecF add(VecF a, VecF b) { return _mm256_add_ps(a, b); }
INLINE VecF repeat_float(float value) { return _mm256_set1_ps(value); }
INLINE float sum_lanes(VecF v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
INLINE __m256 to_eight(VecF v) { return v; }
INLINE void store_half(uint8_t* p, Vec v, int) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

constexpr int natural(int, int step, int byte) { return step * 32 + byte; }

// Interleaving low and high bytes works within halves of 16 bytes.
constexpr int place(int, int lane) { return lane % LANES / 8 * 16 + lane / LANES * 8 + lane % 8; }

INLINE Vec bytes_at(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE Vec all(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
INLINE Vec shift(Vec v, int right) {
  return right == 0 ? v : (right > 0 ? _mm256_srli_epi16(v, right) : _mm256_slli_epi16(v, -right));
}
// Group `group` of the plane of this width, moved to bit `to`.
INLINE Vec field(const uint8_t* plane, int width, int group, int to) {
  const int per_byte = 8 / width;
  const Vec bytes = shift(bytes_at(plane + group / per_byte * 32), width * (group % per_byte) - to);
  return width == 8 ? bytes : _mm256_and_si256(bytes, all(((1 << width) - 1) << to));
}

template <int K>
INLINE Vec codes(const uint8_t* p, int step) {
  if constexpr (K == 2 || K == 4 || K == 8) return field(p, K, step, 0);
  if constexpr (K == 3) return _mm256_or_si256(field(p, 2, step, 0), field(p + 64, 1, step, 2));
  if constexpr (K == 5) return _mm256_or_si256(field(p, 4, step, 0), field(p + 128, 1, step, 4));
  if constexpr (K >= 6) {
    const Vec six = _mm256_or_si256(field(p, 4, step, 0), field(p + 128, 2, step, 4));
    return K == 6 ? six : _mm256_or_si256(six, field(p + 192, 1, step, 6));
  }
}

// The same for a step that is not a constant.
INLINE Vec field_at(const uint8_t* plane, int width, int group, int to) {
  const int per_byte = 8 / width;
  const __m128i right = _mm_cvtsi32_si128(width * (group % per_byte));
  const Vec bits = _mm256_and_si256(_mm256_srl_epi16(bytes_at(plane + group / per_byte * 32), right), all((1 << width) - 1));
  return _mm256_slli_epi16(bits, to);
}
template <int K>
INLINE Vec codes_at(const uint8_t* p, int step) {
  if constexpr (K == 8) return bytes_at(p + step * STEP);
  const Vec six = _mm256_or_si256(field_at(p, 4, step, 0), field_at(p + 128, 2, step, 4));
  return _mm256_or_si256(six, field_at(p + 192, 1, step, 6));
}

template <int K>
INLINE Vec clean(Vec v) {
  return v;
}

template <int K>
struct Lut {
  static constexpr int COUNT = K <= 4 ? 1 : 1 << (K - 4);
  Vec low[COUNT], high[COUNT];
  Vec middle, keep;  // small floats: the code of 0, and the bits of a float16 that remain
  __m128i by;
  explicit Lut(const Table& table) {
    const int right = 5 - table.exponent;
    middle = all((1 << (K - 1)) - 1);
    keep = _mm256_set1_epi16(static_cast<int16_t>(0x8000 | (0x7fff >> right)));
    by = _mm_cvtsi32_si128(right);
    for (int t = 0; t < COUNT; ++t) {
      alignas(16) uint8_t bytes[2][16];
      for (int i = 0; i < 16; ++i) {
        uint16_t value = static_cast<uint16_t>(table.value[16 * t + i]);
        if (t % 8 != 0) value ^= static_cast<uint16_t>(table.value[16 * t + i - 16]);
        bytes[0][i] = static_cast<uint8_t>(value & 0xff);
        bytes[1][i] = static_cast<uint8_t>(value >> 8);
      }
      low[t] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0])));
      high[t] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1])));
    }
  }
};

// Levels of N vectors of codes: COUNT tables from FIRST on, for indices within [0, 128); 0 for those with
// bit 7 set. Every table is loaded once for all N.
template <int K, int FIRST, int COUNT, int N>
INLINE void lookup_half(const Lut<K>& lut, Vec* index, Vec* low, Vec* high) {
  unroll<COUNT>([&](auto t) INLINE_LAMBDA {
    unroll<N>([&](auto i) INLINE_LAMBDA {
      if (t > 0) index[i] = _mm256_subs_epi8(index[i], all(16));
      low[i] = _mm256_xor_si256(low[i], _mm256_shuffle_epi8(lut.low[FIRST + t], index[i]));
      high[i] = _mm256_xor_si256(high[i], _mm256_shuffle_epi8(lut.high[FIRST + t], index[i]));
    });
  });
}

// The low and the high bytes of levels.
template <int K, int N>
INLINE void lookup_bytes(const Lut<K>& lut, const Vec* c, Vec* low, Vec* high) {
  constexpr int COUNT = Lut<K>::COUNT;
  Vec index[N];
  unroll<N>([&](auto i) INLINE_LAMBDA {
    index[i] = c[i];
    low[i] = high[i] = zero();
  });
  lookup_half<K, 0, COUNT < 8 ? COUNT : 8, N>(lut, index, low, high);
  if constexpr (COUNT > 8) {
    unroll<N>([&](auto i) INLINE_LAMBDA { index[i] = _mm256_xor_si256(c[i], all(0x80)); });
    lookup_half<K, 8, 8, N>(lut, index, low, high);
  }
}

template <int K, int N>
INLINE void lookup_several(const Lut<K>& lut, const Vec* c, Vec (*out)[2]) {
  Vec low[N], high[N];
  lookup_bytes<K, N>(lut, c, low, high);
  unroll<N>([&](auto i) INLINE_LAMBDA {
    out[i][0] = _mm256_unpacklo_epi8(low[i], high[i]);
    out[i][1] = _mm256_unpackhi_epi8(low[i], high[i]);
  });
}

// Codes of a small float, sorted by value, count up from the most negative one: their distance from the
// code of 0 is sign and magnitude of a float, and becomes a float16 by moving to its place.
template <int K>
INLINE VecF multiply_halves(const Lut<K>& lut, Vec c, const float* x, VecF sum) {
  const Vec rank = _mm256_sub_epi8(c, lut.middle);
  const Vec size = _mm256_slli_epi16(_mm256_abs_epi8(rank), 8 - K);
  const Vec bytes = _mm256_or_si256(size, _mm256_and_si256(rank, all(0x80)));
  Vec v[2] = {_mm256_unpacklo_epi8(zero(), bytes), _mm256_unpackhi_epi8(zero(), bytes)};
  unroll<2>([&](auto i) INLINE_LAMBDA {
    const Vec half = _mm256_and_si256(_mm256_sra_epi16(v[i], lut.by), lut.keep);
    sum = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_loadu_ps(x + 8 * i), sum);
    sum = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), _mm256_loadu_ps(x + 16 + 8 * i), sum);
  });
  return sum;
}

template <int K, int G>
INLINE VecF unit_scale(const float* scales, int u) {
  return _mm256_broadcast_ss(scales + u);
}

// x as bytes: for each step 32 high ones, then 32 low ones.
INLINE void split_bytes(const int32_t* q, const uint8_t* from, int8_t* out) {
  for (int s = 0; s < STEPS; ++s) {
    for (int i = 0; i < STEP; ++i) {
      const int32_t value = q[from[s * STEP + i]];
      const int32_t high = (value + 64) >> 7;
      out[2 * s * STEP + i] = static_cast<int8_t>(high);
      out[2 * s * STEP + STEP + i] = static_cast<int8_t>(value - high * 128);
    }
  }
}

template <int K, int COUNT>
INLINE Vec affine_unit(Vec first, Vec second, const int8_t* x) {
  const auto at = [x](int i) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(x + i * STEP)); };
  const Vec ones = _mm256_set1_epi16(1), wide = _mm256_set1_epi16(128);
  Vec high = _mm256_maddubs_epi16(first, at(0));
  Vec low = _mm256_maddubs_epi16(first, at(1));
  if constexpr (COUNT == 1) return _mm256_add_epi32(_mm256_madd_epi16(high, wide), _mm256_madd_epi16(low, ones));
  const Vec more_high = _mm256_maddubs_epi16(second, at(2));
  const Vec more_low = _mm256_maddubs_epi16(second, at(3));
  if constexpr (K < 8) {  // 4 * 127 * 64 fits in 16 bits
    high = _mm256_add_epi16(high, more_high);
    low = _mm256_add_epi16(low, more_low);
    return _mm256_add_epi32(_mm256_madd_epi16(high, wide), _mm256_madd_epi16(low, ones));
  }
  const Vec highs = _mm256_add_epi32(_mm256_madd_epi16(high, wide), _mm256_madd_epi16(more_high, wide));
  const Vec lows = _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(more_low, ones));
  return _mm256_add_epi32(highs, lows);
}

INLINE void find_peak(const float* x, int64_t count, float* peak, float* nan) {
  const VecF sign = _mm256_set1_ps(-0.0f);
  VecF largest = zero_float(), total = zero_float();
  for (int64_t i = 0; i < count; i += 8) {
    const VecF v = _mm256_loadu_ps(x + i);
    largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, v));
    total = _mm256_fmadd_ps(v, zero_float(), total);
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, largest);
  float found = lanes[0];
  for (int i = 1; i < 8; ++i) found = lanes[i] > found ? lanes[i] : found;
  *peak = found;
  *nan = sum_lanes(total);
}

INLINE void round_scaled(const float* x, int64_t count, float by, int32_t* out) {
  for (int64_t i = 0; i < count; i += 8) {
    const VecF scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(by));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_cvtps_epi32(scaled));
  }
}

// Sums of products, lane by lane.
INLINE VecF dot_lanes(const float* a, const float* b, int64_t count) {
  VecF sum = zero_float(), more = zero_float();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sum);
    more = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), more);
  }
  for (; i + 8 <= count; i += 8) sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sum);
  float rest = 0.0f;
  for (; i < count; ++i) rest += a[i] * b[i];
  return _mm256_add_ps(_mm256_add_ps(sum, more), _mm256_set_ps(0, 0, 0, 0, 0, 0, 0, rest));
}
INLINE float dot_floats(const float* a, const float* b, int64_t count) { return sum_lanes(dot_lanes(a, b, count)); }

inline void read_numbers(const void* data, Type type, int64_t at, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    if (type == Type::f32) {
      _mm256_storeu_ps(out + i, _mm256_loadu_ps(static_cast<const float*>(data) + at + i));
      continue;
    }
    const void* from = static_cast<const uint16_t*>(data) + at + i;
    const __m128i raw = _mm_loadu_si128(static_cast<const __m128i*>(from));
    const VecF value = type == Type::f16
                           ? _mm256_cvtph_ps(raw)
                           : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    _mm256_storeu_ps(out + i, value);
  }
  for (; i < count; ++i) out[i] = read_number(data, type, at + i);
}

INLINE VecF halves(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

INLINE VecF dot_halves(const uint16_t* a, const float* b, int64_t count) {
  VecF sum = zero_float();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) sum = _mm256_fmadd_ps(halves(a + i), _mm256_loadu_ps(b + i), sum);
  float rest = 0.0f;
  for (; i < count; ++i) rest += from_half(a[i]) * b[i];
  return _mm256_add_ps(sum, _mm256_set_ps(0, 0, 0, 0, 0, 0, 0, rest));
}

INLINE void multiply_floats(const float* a, const float* b, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i)));
  }
  for (; i < count; ++i) out[i] = a[i] * b[i];
}

// Double-quantized scales, looked up one by one as bits, then scaled together.
class ScaleTable {
 public:
  explicit ScaleTable(const Weight& w) : levels_(w.scale_codebook) {}
  // level * absmax + mean.
  INLINE void read(const uint8_t* codes, int64_t count, int64_t, float absmax, float mean, float* out) const {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      unroll<8>([&](auto j) INLINE_LAMBDA { std::memcpy(out + i + j, levels_ + codes[i + j], 4); });
    }
    for (; i < count; ++i) out[i] = levels_[codes[i]];
    const VecF by = _mm256_set1_ps(absmax), plus = _mm256_set1_ps(mean);
    for (i = 0; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_fmadd_ps(_mm256_loadu_ps(out + i), by, plus));
    }
    for (; i < count; ++i) out[i] = __builtin_fmaf(out[i], absmax, mean);
  }

 private:
  const float* levels_;
};

// codebook[code] * scale (+ zero), rounded after each step as the reference does.
INLINE void scale_codes(const float* codebook, const uint8_t* codes, int64_t count, float scale, float zero,
                        bool has_zero, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
    VecF value = _mm256_i32gather_ps(codebook, _mm256_cvtepu8_epi32(raw), 4);
    value = _mm256_mul_ps(value, _mm256_set1_ps(scale));
    if (has_zero) value = _mm256_add_ps(value, _mm256_set1_ps(zero));
    _mm256_storeu_ps(out + i, value);
  }
  for (; i < count; ++i) {
    const float value = codebook[codes[i]] * scale;
    out[i] = has_zero ? value + zero : value;
  }
}

// A last chunk of LANES lanes, 8 or 16: a step is four groups of 8 bytes, or two of 16, and all of these are in one
// or two of a plane's rows, which go to every part of a register that needs them, and each shifts by its own phase.
template <int K, int LANES_OF_CHUNK>
struct ShortCodes {
  static constexpr int GROUPS = 32 / LANES_OF_CHUNK;  // of a step
  const uint8_t* at;

  INLINE Vec operator()(int step) const {
    const uint8_t* plane = at;
    Vec out = zero();
    int below = 0;
    unroll<4>([&](auto p) INLINE_LAMBDA {
      constexpr int WIDTH = 8 >> p;  // as `plane_widths` has them
      if constexpr ((K & WIDTH) != 0) {
        const Vec part = _mm256_slli_epi16(part_of(plane, WIDTH, step), below);
        out = _mm256_or_si256(out, part);
        plane += WIDTH * LANES_OF_CHUNK;
        below += WIDTH;
      }
    });
    return out;
  }

 private:
  static INLINE Vec part_of(const uint8_t* plane, int width, int step) {
    if (width == 8) return bytes_at(plane + step * STEP);
    const int per_byte = 8 / width, first = step * GROUPS;
    const uint8_t* row = plane + first / per_byte * LANES_OF_CHUNK;
    const int by = width * (first % per_byte);
    Vec v, right;
    if constexpr (LANES_OF_CHUNK == 16) {
      v = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
      right = _mm256_set_epi64x(by + width, by + width, by, by);
    } else if (width == 4) {
      const __m128i two = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
      v = _mm256_permute4x64_epi64(_mm256_castsi128_si256(two), 0x50);
      right = _mm256_set_epi64x(4, 0, 4, 0);
    } else {
      v = _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)));
      right = _mm256_set_epi64x(by + 3 * width, by + 2 * width, by + width, by);
    }
    return _mm256_and_si256(_mm256_srlv_epi64(v, right), all((1 << width) - 1));
  }
};

// The last chunk of a row, shorter than the others, as bytes in natural order.
template <int K>
struct Tail {
  struct Codes {
    alignas(32) uint8_t bytes[CHUNK];
    INLINE Vec operator()(int step) const {
      return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes + step * STEP));
    }
  };
  int64_t count;
  int steps;
  explicit Tail(int64_t rest) : count(rest), steps(static_cast<int>((rest + STEP - 1) / STEP)) {}

  INLINE Codes read(const uint8_t* packed) const {
    Codes out;
    for (int64_t i = count / STEP * STEP; i < CHUNK; i += STEP) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out.bytes + i), zero());
    }
    const int64_t lanes = (count + 7) / 8;
    if (lanes == 8) {
      unpack_eights(packed, out.bytes);
    } else {
      unpack_chunk(packed, count, K, out.bytes);
    }
    return out;
  }

  static INLINE void unpack_eights(const uint8_t* packed, uint8_t* out) {
    const ShortCodes<K, 8> codes{packed};
    for (int h = 0; h < 2; ++h) _mm256_store_si256(reinterpret_cast<__m256i*>(out + 32 * h), codes(h));
  }
};

// Codes of a whole chunk.
template <int K>
struct PackedCodes {
  const uint8_t* at;
  INLINE Vec operator()(int step) const { return codes<K>(at, step); }
};
template <int K>
struct RolledCodes {
  const uint8_t* at;
  INLINE Vec operator()(int step) const { return codes_at<K>(at, step); }
};

// LLM.int8(): `pmaddwd` of 16-bit integers, since `pmaddubsw` saturates.
using Value = int16_t;
using ByteVec = Vec;
constexpr int BYTES = 16;
constexpr int INTS = 8;
constexpr int PANEL_COLS = 4;
constexpr bool MIDDLE_LATER = false;
#define HAS_PANELS
INLINE Vec codes_at(const uint8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_sub_epi16(_mm256_cvtepu8_epi16(raw), _mm256_set1_epi16(MIDDLE));
}
INLINE __m256i groups_at(const uint8_t* p) { return codes_at(p); }
INLINE Vec values_at(const Value* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE Vec add_products(Vec sum, Vec codes, Vec x) { return mul_add(sum, codes, x); }
INLINE Vec load_ints(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE Vec repeat_int(int32_t group) { return _mm256_set1_epi32(group); }
INLINE Vec subtract_int(Vec v, int32_t by) { return _mm256_sub_epi32(v, _mm256_set1_epi32(by)); }
INLINE VecF to_floats(Vec v) { return _mm256_cvtepi32_ps(v); }
INLINE int32_t sum_ints(Vec v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// Several rows of x.
constexpr int ROWS = 8;
constexpr int COLS = 4;
constexpr int64_t PANEL_BYTES = 256 << 10;
INLINE void add_pairs(Vec& sum, Vec a, Vec b) {  // not `mul_add`: gcc 12 would keep one of eight sums in memory
  Vec product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
}

INLINE void transpose_words(const uint8_t* const* rows, int64_t at, Vec* out) {
  Vec v[8];
  unroll<8>([&](auto r) INLINE_LAMBDA { v[r] = bytes_at(rows[r] + at); });
  transpose_ints(v);
  unroll<8>([&](auto r) INLINE_LAMBDA { out[r] = v[r]; });
}

INLINE Vec merge(Vec low, Vec high, int low_bits) {
  const Vec of_low = all((1 << low_bits) - 1);
  return _mm256_or_si256(_mm256_and_si256(of_low, low), _mm256_andnot_si256(of_low, high));
}

template <int K>
INLINE void lookup_lanes(const Lut<K>& lut, Vec c, Vec out[2]) {
  const Vec even = _mm256_set1_epi16(0xff);
  const Vec index = _mm256_and_si256(c, all((1 << K) - 1));
  Vec low[1], high[1];
  lookup_bytes<K, 1>(lut, &index, low, high);
  out[0] = _mm256_or_si256(_mm256_and_si256(even, *low), _mm256_slli_epi16(*high, 8));
  out[1] = _mm256_or_si256(_mm256_srli_epi16(*low, 8), _mm256_andnot_si256(even, *high));
}

INLINE float sum_sizes(const float* x, int64_t count) {
  const VecF sign = _mm256_set1_ps(-0.0f);
  VecF total = zero_float();
  for (int64_t i = 0; i < count; i += 8) total = _mm256_add_ps(total, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
  return sum_lanes(total);
}

}  // namespace
}  // namespace kbit
