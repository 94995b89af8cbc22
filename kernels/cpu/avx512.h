// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): 64 codes at a time.
//
// A step is a pair of groups of 32 codes, one in each half of the register, chosen so that both are
// cut out of the packed bytes by the same shift. 16-bit table values come straight from `vpermw`
// (up to 32 levels), `vpermi2w` (64) or `vpermi2b` (128, and twice for 256), and `vpdpwssd` multiplies
// and adds; weights whose levels are evenly spaced need no table: `vpdpbusd` takes their codes. It also
// takes the bytes that four levels come close enough to being evenly spaced steps of.
#pragma once

#include <immintrin.h>

#include <cstdlib>
#include <type_traits>

#include "scalar.h"
#include "transpose.h"

namespace kbit {
namespace {

constexpr int LANES = 32;
constexpr int STEP = 64;
constexpr int STEPS = 4;
constexpr int ROLLED_FROM = 9;  // never, nor halves: tables of 256 levels fit
constexpr int HALF_FROM = 9;
constexpr bool TAKES_BYTES = true;  // four levels as bytes
constexpr bool PAST_END = true;  // the second half of a step is a later group
constexpr bool ROLLS_TAIL = false;
constexpr bool HAS_SHORT = false;  // masks read short chunks as they are
constexpr float AFFINE_MAX = 127 * 256 + 127;  // high * 256 + low, each within a signed byte

using Vec = __m512i;
using VecF = __m512;

INLINE Vec zero() { return _mm512_setzero_si512(); }
INLINE VecF zero_float() { return _mm512_setzero_ps(); }
INLINE Vec load(const int16_t* p) { return _mm512_load_si512(p); }
INLINE Vec mul_add(Vec acc, Vec a, Vec b) {  // not the intrinsic: with it gcc 12 copies every sum, every time
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "vm"(b));
  return acc;
}
INLINE VecF add_scaled(VecF sum, Vec acc, VecF scale) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), scale, sum);
}
INLINE VecF load_floats(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store_floats(float* p, VecF v) { _mm512_storeu_ps(p, v); }
INLINE VecF multiply(VecF a, VecF b) { return _mm512_mul_ps(a, b); }
INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
INLINE VecF add(VecF a, VecF b) { return _mm512_add_ps(a, b); }
INLINE VecF repeat_float(float value) { return _mm512_set1_ps(value); }
INLINE float sum_lanes(VecF v) { return _mm512_reduce_add_ps(v); }
INLINE __m256 to_eight(VecF v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
INLINE void store_half(uint8_t* p, Vec v, int half) {
  const __m256i part = half == 0 ? _mm512_castsi512_si256(v) : _mm512_extracti64x4_epi64(v, 1);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), part);
}

// The groups of 32 in the two halves of a step.
constexpr int group_of(int K, int step, int half) {
  return K <= 3 ? step + 4 * half : (step & 2) * 2 + (step & 1) + 2 * half;
}
constexpr int natural(int K, int step, int byte) { return group_of(K, step, byte / 32) * 32 + byte % 32; }

// Up to 64 levels a lane of 16 bits is looked up as it stands: even bytes first, then odd ones.
constexpr int place(int K, int lane) {
  return K <= 6 ? 2 * (lane % LANES) + lane / LANES
                : lane % LANES / 8 * 16 + lane / LANES * 8 + lane % 8;
}

INLINE Vec both(const uint8_t* p) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE Vec shift_high_half(Vec v, int by) {
  return _mm512_srlv_epi64(v, _mm512_set_epi64(by, by, by, by, 0, 0, 0, 0));
}
INLINE Vec pick_bits(Vec a, Vec b, int mask) {  // a's where the mask has ones, byte by byte
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(mask)), a, b, 0xca);
}
INLINE Vec merge(Vec low, Vec high, int low_bits) { return pick_bits(low, high, (1 << low_bits) - 1); }
INLINE Vec shift(Vec v, int right) {  // bits that cross a byte's border land where nobody looks
  return right == 0 ? v : (right > 0 ? _mm512_srli_epi16(v, right) : _mm512_slli_epi16(v, -right));
}

INLINE Vec load_once(const uint8_t* p) {  // gcc would load again for every shift
  Vec v = _mm512_loadu_si512(p);
  asm("" : "+v"(v));
  return v;
}

template <int K>
INLINE Vec codes(const uint8_t* p, int step) {
  const int pair = step >> 1;
  const int odd = step & 1;
  if constexpr (K == 2) {
    return shift(load_once(p), 2 * step);
  } else if constexpr (K == 3) {
    const Vec low = shift(load_once(p), 2 * step);
    return merge(low, shift(shift_high_half(both(p + 64), 4), step - 2), 2);
  } else if constexpr (K == 8) {
    const uint8_t* at = p + 32 * (4 * pair + odd);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 64)), 1);
  } else {
    const Vec low = shift(load_once(p + 64 * pair), 4 * odd);
    if constexpr (K == 4) return low;
    if constexpr (K == 5) {
      return merge(low, shift(shift_high_half(both(p + 128), 2), 4 * pair + odd - 4), 4);
    }
    if constexpr (K >= 6) {
      const Vec six = merge(low, shift(shift_high_half(both(p + 128 + 32 * pair), 4), 2 * odd - 4), 4);
      if constexpr (K == 6) return six;
      return merge(six, shift(shift_high_half(both(p + 192), 2), 4 * pair + odd - 6), 6);
    }
  }
}

template <int K>
INLINE Vec clean(Vec v) {
  return K == 8 ? v : _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>((1 << K) - 1)));
}

// 16-bit levels in registers.
template <int K>
struct Lut {
  static constexpr int COUNT = K <= 5 ? 1 : (K == 6 ? 2 : (K == 7 ? 4 : 8));
  Vec part[COUNT];
  explicit Lut(const Table& table) {
    alignas(64) int16_t words[64];
    alignas(64) uint8_t bytes[64];
    if constexpr (K <= 6) {  // levels repeat, so that dirty bits do no harm
      for (int i = 0; i < 64; ++i) words[i] = table.value[i & ((1 << K) - 1)];
      for (int i = 0; i < COUNT; ++i) part[i] = _mm512_load_si512(words + 32 * i);
    } else {
      for (int i = 0; i < COUNT; ++i) {  // low bytes of 64 levels each, then high bytes
        const int first = i % (COUNT / 2) * 64;
        const int by = i < COUNT / 2 ? 0 : 8;
        for (int j = 0; j < 64; ++j) bytes[j] = static_cast<uint8_t>(table.value[first + j] >> by);
        part[i] = _mm512_load_si512(bytes);
      }
    }
  }
};

// Levels of more than 6 bits, as low and high bytes.
struct LevelBytes {
  Vec low, high;
};
template <int K>
INLINE LevelBytes lookup_bytes(const Lut<K>& lut, Vec c) {
  constexpr int HIGH = Lut<K>::COUNT / 2;
  Vec low = _mm512_permutex2var_epi8(lut.part[0], c, lut.part[1]);
  Vec high = _mm512_permutex2var_epi8(lut.part[HIGH], c, lut.part[HIGH + 1]);
  if constexpr (K == 8) {
    const __mmask64 upper = _mm512_movepi8_mask(c);
    low = _mm512_mask_mov_epi8(low, upper, _mm512_permutex2var_epi8(lut.part[2], c, lut.part[3]));
    high = _mm512_mask_mov_epi8(high, upper, _mm512_permutex2var_epi8(lut.part[6], c, lut.part[7]));
  }
  return {low, high};
}

template <int K>
INLINE void lookup(const Lut<K>& lut, Vec c, Vec out[2]) {
  if constexpr (K <= 5) {
    out[0] = _mm512_permutexvar_epi16(c, lut.part[0]);
    out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(c, 8), lut.part[0]);
  } else if constexpr (K == 6) {
    out[0] = _mm512_permutex2var_epi16(lut.part[0], c, lut.part[1]);
    out[1] = _mm512_permutex2var_epi16(lut.part[0], _mm512_srli_epi16(c, 8), lut.part[1]);
  } else {
    const LevelBytes level = lookup_bytes(lut, c);
    out[0] = _mm512_unpacklo_epi8(level.low, level.high);
    out[1] = _mm512_unpackhi_epi8(level.low, level.high);
  }
}

// The same, of the even and the odd bytes of each 16-bit lane.
template <int K>
INLINE void lookup_lanes(const Lut<K>& lut, Vec c, Vec out[2]) {
  if constexpr (K <= 6) {
    lookup(lut, c, out);
  } else {
    const LevelBytes level = lookup_bytes(lut, c);
    const Vec even = _mm512_set1_epi16(0xff);  // 0xca: where it is set the second, else the third
    out[0] = _mm512_ternarylogic_epi32(even, level.low, _mm512_slli_epi16(level.high, 8), 0xca);
    out[1] = _mm512_ternarylogic_epi32(even, _mm512_srli_epi16(level.low, 8), level.high, 0xca);
  }
}

// The scales of the two halves of unit `u`: of its blocks of 64, or (G = 32) of its groups.
template <int K, int G>
INLINE VecF unit_scale(const float* scales, int u) {
  const int first = G == 64 ? group_of(K, 2 * u, 0) / 2 : group_of(K, u, 0);
  const int second = G == 64 ? group_of(K, 2 * u, 1) / 2 : group_of(K, u, 1);
  const VecF all =  // of the chunk
      G == 64 ? _mm512_castps128_ps512(_mm_loadu_ps(scales)) : _mm512_castps256_ps512(_mm256_loadu_ps(scales));
  const Vec pick = _mm512_mask_blend_epi32(0xff00, _mm512_set1_epi32(first), _mm512_set1_epi32(second));
  return _mm512_permutexvar_ps(pick, all);
}

// x as bytes: for each step 64 high ones, then 64 low ones.
INLINE void split_bytes(const int32_t* q, const uint8_t* from, int8_t* out) {
  for (int s = 0; s < STEPS; ++s) {
    for (int i = 0; i < STEP; ++i) {
      const int32_t value = q[from[s * STEP + i]];
      const int8_t low = static_cast<int8_t>(value & 0xff);
      out[2 * s * STEP + i] = static_cast<int8_t>((value - low) >> 8);
      out[2 * s * STEP + STEP + i] = low;
    }
  }
}

INLINE void find_peak(const float* x, int64_t count, float* peak, float* nan) {
  VecF largest = zero_float(), total = zero_float();
  for (int64_t i = 0; i < count; i += 16) {
    const VecF v = _mm512_loadu_ps(x + i);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
    total = _mm512_fmadd_ps(v, zero_float(), total);
  }
  *peak = _mm512_reduce_max_ps(largest);
  *nan = _mm512_reduce_add_ps(total);
}

INLINE float sum_sizes(const float* x, int64_t count) {
  VecF total = zero_float();
  for (int64_t i = 0; i < count; i += 16) total = _mm512_add_ps(total, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  return _mm512_reduce_add_ps(total);
}

INLINE void round_scaled(const float* x, int64_t count, float by, int32_t* out) {
  for (int64_t i = 0; i < count; i += 16) {
    _mm512_store_si512(out + i, _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(by))));
  }
}

INLINE __mmask16 lanes(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

// Sums of products, lane by lane.
INLINE VecF dot_lanes(const float* a, const float* b, int64_t count) {
  VecF sum = zero_float(), more = zero_float();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    more = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), more);
  }
  for (; i < count; i += 16) {
    const __mmask16 here = lanes(count - i);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(here, a + i), _mm512_maskz_loadu_ps(here, b + i), sum);
  }
  return _mm512_add_ps(sum, more);
}
INLINE float dot_floats(const float* a, const float* b, int64_t count) { return sum_lanes(dot_lanes(a, b, count)); }

inline void read_numbers(const void* data, Type type, int64_t at, int64_t count, float* out) {
  int64_t i = 0;
  if (type == Type::f16) {
    for (; i + 16 <= count; i += 16) {
      const void* from = static_cast<const uint16_t*>(data) + at + i;
      _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
    }
  }
  for (; i < count; i += 16) {
    const __mmask16 here = lanes(count - i);
    if (type == Type::f32) {
      _mm512_mask_storeu_ps(out + i, here, _mm512_maskz_loadu_ps(here, static_cast<const float*>(data) + at + i));
      continue;
    }
    const __m256i raw = _mm256_maskz_loadu_epi16(here, static_cast<const uint16_t*>(data) + at + i);
    const VecF value = type == Type::f16
                           ? _mm512_cvtph_ps(raw)
                           : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    _mm512_mask_storeu_ps(out + i, here, value);
  }
}

INLINE VecF halves(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE VecF halves(__mmask16 here, const uint16_t* p) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, p)); }

INLINE VecF dot_halves(const uint16_t* a, const float* b, int64_t count) {
  VecF sum = zero_float();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) sum = _mm512_fmadd_ps(halves(a + i), _mm512_loadu_ps(b + i), sum);
  if (i < count) {
    const __mmask16 here = lanes(count - i);
    sum = _mm512_fmadd_ps(halves(here, a + i), _mm512_maskz_loadu_ps(here, b + i), sum);
  }
  return sum;
}

INLINE void multiply_floats(const float* a, const float* b, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i)));
  }
  if (i < count) {
    const __mmask16 here = lanes(count - i);
    const VecF both = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, a + i), _mm512_maskz_loadu_ps(here, b + i));
    _mm512_mask_storeu_ps(out + i, here, both);
  }
}

// Double-quantized scales, looked up as 16-bit integers whose rounding is 2^-16 of the group's constant.
class ScaleTable {
 public:
  explicit ScaleTable(const Weight& w) : unit_(0.0f), lut_(table(w, &unit_)) {}
  // level * absmax + mean; writes up to a step beyond `count`, reads `safe` codes at most.
  INLINE void read(const uint8_t* codes, int64_t count, int64_t safe, float absmax, float mean, float* out) const {
    const __m256 by = _mm256_set1_ps(absmax * unit_), plus = _mm256_set1_ps(mean);
    for (int64_t i = 0; i < count; i += STEP) {
      const int64_t left = safe - i;
      const __mmask64 here = left >= 64 ? ~0ull : (1ull << left) - 1;
      Vec v[2];
      lookup(lut_, _mm512_maskz_loadu_epi8(here, codes + i), v);
      unroll<8>([&](auto part) INLINE_LAMBDA {
        const __m128i levels = _mm512_extracti32x4_epi32(v[part % 2], part / 2);
        const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(levels));
        _mm256_storeu_ps(out + i + 8 * part, _mm256_fmadd_ps(value, by, plus));
      });
    }
  }

 private:
  static Table table(const Weight& w, float* unit) {
    Table t{};
    if (w.scale_type != Type::code) return t;
    float largest = 0.0f;
    for (int i = 0; i < 256; ++i) largest = std::fmax(largest, std::fabs(w.scale_codebook[i]));
    *unit = largest / 32767.0f;
    for (int i = 0; i < 256 && largest > 0.0f; ++i) {
      t.value[i] = static_cast<int16_t>(std::lrintf(w.scale_codebook[i] / *unit));
    }
    return t;
  }
  float unit_;
  Lut<8> lut_;
};

// codebook[code] * scale (+ zero), rounded after each step as the reference does.
INLINE void scale_codes(const float* codebook, const uint8_t* codes, int64_t count, float scale, float zero,
                        bool has_zero, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 here = lanes(count - i);
    const Vec at = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, codes + i));
    VecF value = _mm512_mask_i32gather_ps(zero_float(), here, at, codebook, 4);
    value = _mm512_mul_ps(value, _mm512_set1_ps(scale));
    if (has_zero) value = _mm512_add_ps(value, _mm512_set1_ps(zero));
    _mm512_mask_storeu_ps(out + i, here, value);
  }
}

template <int K, int LANES_OF_CHUNK>
struct ShortCodes;  // `Tail` is as quick

// The last chunk of a row, shorter than the others: each plane's bytes are permuted so that lane n of
// a step belongs to code n, then a multishift cuts out that code's field.
template <int K>
struct Tail {
  struct Codes {
    Vec step[STEPS];
    INLINE Vec operator()(int s) const { return step[s]; }
  };
  static constexpr int PLANES = __builtin_popcount(K);
  int widths[3];
  int steps = 0;
  int64_t start[PLANES];  // of each plane, in bytes
  __mmask64 present[PLANES][2];  // which of its bytes exist, 64 at a time
  __mmask32 half[STEPS][2];  // K = 8: the same for the halves of each step
  Vec byte[STEPS][PLANES];
  Vec bit[STEPS][PLANES];

  explicit Tail(int64_t count) {
    plane_widths(K, widths);
    if (count == 0) return;
    const int64_t lanes = (count + 7) / 8;
    int64_t at = 0;
    for (int p = 0; p < PLANES; ++p) {
      const int64_t bytes = widths[p] * lanes;
      start[p] = at;
      present[p][0] = mask(bytes);
      present[p][1] = mask(bytes - 64);
      at += bytes;
    }
    for (int s = 0; s < STEPS; ++s) {
      if (natural(K, s, 0) < count || natural(K, s, 32) < count) steps = s + 1;
      for (int h = 0; h < 2; ++h) half[s][h] = static_cast<__mmask32>(mask(8 * lanes - natural(K, s, 32 * h)));
      for (int p = 0; p < PLANES; ++p) {
        alignas(64) uint8_t index[STEP], field[STEP];
        const int per_byte = 8 / widths[p];
        for (int i = 0; i < STEP; ++i) {
          const int code = natural(K, s, i);
          const int64_t group = code < 8 * lanes ? code / lanes : 0;
          const int64_t lane = code < 8 * lanes ? code % lanes : 0;
          index[i] = static_cast<uint8_t>(group / per_byte * lanes + lane);
          field[i] = static_cast<uint8_t>(8 * (i % 8) + widths[p] * (group % per_byte));
        }
        byte[s][p] = _mm512_load_si512(index);
        bit[s][p] = _mm512_load_si512(field);
      }
    }
  }

  static uint64_t mask(int64_t bytes) { return bytes >= 64 ? ~0ull : (bytes <= 0 ? 0 : (1ull << bytes) - 1); }

  INLINE Codes read(const uint8_t* packed) const {
    Codes out;
    if constexpr (K == 8) {
      for (int s = 0; s < steps; ++s) {
        const __m256i low = _mm256_maskz_loadu_epi8(half[s][0], packed + natural(K, s, 0));
        const __m256i high = _mm256_maskz_loadu_epi8(half[s][1], packed + natural(K, s, 32));
        out.step[s] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      }
      return out;
    }
    int below = 0;
    for (int p = 0; p < PLANES; ++p) {
      const Vec first = _mm512_maskz_loadu_epi8(present[p][0], packed + start[p]);
      const Vec second = _mm512_maskz_loadu_epi8(present[p][1], packed + start[p] + 64);
      const Vec low_bits = _mm512_set1_epi8(static_cast<char>((1 << widths[p]) - 1));
      for (int s = 0; s < steps; ++s) {
        Vec field = _mm512_permutex2var_epi8(first, byte[s][p], second);
        field = _mm512_and_si512(_mm512_multishift_epi64_epi8(bit[s][p], field), low_bits);
        out.step[s] = p == 0 ? field : _mm512_or_si512(out.step[s], _mm512_sll_epi16(field, _mm_cvtsi32_si128(below)));
      }
      below += widths[p];
    }
    return out;
  }
};

// Codes of a whole chunk.
template <int K>
struct PackedCodes {
  const uint8_t* at;
  INLINE Vec operator()(int step) const { return codes<K>(at, step); }
};

// LLM.int8(): `vpdpbusd` takes codes as they stand.
using Value = int8_t;
using ByteVec = Vec;
constexpr int BYTES = 64;
constexpr int INTS = 16;
constexpr int PANEL_COLS = 12;
constexpr bool MIDDLE_LATER = true;
#define HAS_PANELS
INLINE Vec codes_at(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE __m256i groups_at(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
INLINE Vec values_at(const Value* p) { return _mm512_loadu_si512(p); }
INLINE Vec add_products(Vec sum, Vec codes, Vec x) { return _mm512_dpbusd_epi32(sum, codes, x); }
INLINE Vec load_ints(const int32_t* p) { return _mm512_load_si512(p); }
INLINE Vec repeat_int(int32_t group) { return _mm512_set1_epi32(group); }
INLINE Vec subtract_int(Vec v, int32_t by) { return _mm512_sub_epi32(v, _mm512_set1_epi32(by)); }
INLINE VecF to_floats(Vec v) { return _mm512_cvtepi32_ps(v); }
INLINE int32_t sum_ints(Vec v) { return _mm512_reduce_add_epi32(v); }

// Several rows of x.
constexpr int ROWS = 16;
constexpr int COLS = 8;
constexpr int64_t PANEL_BYTES = 512 << 10;
INLINE void add_pairs(Vec& sum, Vec a, Vec b) { sum = mul_add(sum, a, b); }
INLINE void store_some(float* p, VecF v, int64_t count) { _mm512_mask_storeu_ps(p, lanes(count), v); }

// 8 words of 16 rows: out[j] has word j of every row.
INLINE void transpose_words(const uint8_t* const* rows, int64_t at, Vec* out) {
  Vec a[8], b[8];
  unroll<8>([&](auto r) INLINE_LAMBDA {
    const Vec low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + at)));
    a[r] = _mm512_inserti64x4(low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r + 8] + at)), 1);
  });
  unroll<4>([&](auto i) INLINE_LAMBDA {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  });
  unroll<2>([&](auto i) INLINE_LAMBDA {
    unroll<2>([&](auto j) INLINE_LAMBDA {
      a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + 2 + j]);
      a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + 2 + j]);
    });
  });
  unroll<4>([&](auto j) INLINE_LAMBDA {  // halves of 256 bits have words j of four rows, then words j + 4
    out[j] = _mm512_mask_permutex_epi64(a[j], 0xcc, a[j + 4], _MM_PERM_BABA);
    out[j + 4] = _mm512_mask_permutex_epi64(a[j + 4], 0x33, a[j], _MM_PERM_DCDC);
  });
}

}  // namespace
}  // namespace kbit
