// Rows of a k-bit cache as floats: codes as kbitc/formats/bit_planes.py packs them, eight at a time.
#pragma once

#include "row_ops.h"
#include "scalar.h"
#include "vectors.h"

namespace kbit {
namespace {

constexpr int64_t WHOLE = 8 * W;  // columns of a chunk whose groups are vectors
constexpr int64_t WHOLE_MOST = 512;  // columns of a row that is read by vectors
constexpr int64_t BLOCKS_MOST = WHOLE_MOST / W;

inline I bytes_to_ints(const uint8_t* p) {
#if defined(__AVX2__)
  return reinterpret_cast<I>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  I out;
  for (int i = 0; i < W; ++i) out[i] = p[i];
  return out;
#endif
}

// Codes of K bits of eight lanes of one of a chunk's groups.
template <int K>
inline I eight_codes(const uint8_t* chunk, int64_t lanes, int group, int64_t lane) {
  I out{};
  int shift = 0;
  for (int width = 8; width >= 1; width /= 2) {
    if ((K & width) == 0) continue;
    const int per_byte = 8 / width;
    const I own = bytes_to_ints(chunk + group / per_byte * lanes + lane) >> (width * (group % per_byte));
    out |= (own & ((1 << width) - 1)) << shift;
    shift += width;
    chunk += width * lanes;
  }
  return out;
}

// What a code is in units of its block's scale: levels that are a step apart, at most sixteen, or any.
struct EvenLevels {
  V step, first;
  explicit EvenLevels(const RowFormat& f) : step(repeat(f.step)), first(repeat(f.first)) {}
  V operator()(I codes) const { return __builtin_convertvector(codes, V) * step + first; }
};
struct AnyLevels {
  const float* levels;
  explicit AnyLevels(const RowFormat& f) : levels(f.levels) {}
  V operator()(I codes) const {
    V out;
    for (int i = 0; i < W; ++i) out[i] = levels[codes[i]];
    return out;
  }
};
#if defined(__AVX2__)
struct FewLevels {
  __m256 low, high;
  explicit FewLevels(const RowFormat& f) : low(_mm256_loadu_ps(f.levels)), high(_mm256_loadu_ps(f.levels + W)) {}
  V operator()(I codes) const {
    const __m256i at = reinterpret_cast<__m256i>(codes);  // its lowest three bits count
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
    return reinterpret_cast<V>(
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at), upper));
  }
};
#else
using FewLevels = AnyLevels;
#endif

// A row whose blocks and lanes are whole vectors.
template <int K, bool HAS_ZEROS, class Levels>
inline void unpack_whole(const RowFormat& f, const Levels& levels, const uint8_t* planes, const uint16_t* scales,
                         const uint16_t* zeros, int64_t size, float* out) {
  float scale[BLOCKS_MOST], zero[BLOCKS_MOST];
  for (int64_t b = 0; b << f.block_shift < size; ++b) {
    scale[b] = half_to_float(scales[b]);
    if (HAS_ZEROS) zero[b] = half_to_float(zeros[b]);
  }
  for (int64_t at = 0; at < size; at += CHUNK, planes += K * (CHUNK / 8)) {
    const int64_t lanes = (size - at < CHUNK ? size - at : CHUNK) / 8;
    unroll<8>([&](auto group) INLINE_LAMBDA {
      for (int64_t lane = 0; lane < lanes; lane += W) {
        const int64_t column = at + group * lanes + lane, block = column >> f.block_shift;
        V v = levels(eight_codes<K>(planes, lanes, group, lane)) * repeat(scale[block]);
        if (HAS_ZEROS) v += repeat(zero[block]);
        store(out + column, v);
      }
    });
  }
}

// Any row.
inline void unpack_any(const RowFormat& f, const uint8_t* planes, const uint16_t* scales, const uint16_t* zeros,
                       int64_t size, float* out) {
  uint8_t codes[CHUNK];
  for (int64_t at = 0; at < size; at += CHUNK, planes += f.bits * (CHUNK / 8)) {
    const int64_t count = std::min(size - at, CHUNK);
    unpack_chunk(planes, count, f.bits, codes);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = (at + i) / f.block;
      const float value = f.levels[codes[i]] * half_to_float(scales[block]);
      out[at + i] = zeros == nullptr ? value : value + half_to_float(zeros[block]);
    }
  }
}

template <int K, bool HAS_ZEROS, class Levels>
void unpack_rows(const RowFormat& f, const CachedRows& from, int64_t row, int64_t apart, int64_t count, float* out) {
  const Levels levels(f);
  const int64_t row_bytes = K * (from.size / 8), blocks = (from.size + f.block - 1) / f.block;
  const uint8_t* planes = static_cast<const uint8_t*>(from.rows);
  for (int64_t i = 0; i < count; ++i, row += apart, out += from.size) {
    unpack_whole<K, HAS_ZEROS>(f, levels, planes + row * row_bytes, from.scales + row * blocks,
                               HAS_ZEROS ? from.zeros + row * blocks : nullptr, from.size, out);
  }
}

template <int K, bool HAS_ZEROS>
void unpack_bits(const RowFormat& f, const CachedRows& from, int64_t row, int64_t apart, int64_t count, float* out) {
  if (f.is_even) {
    unpack_rows<K, HAS_ZEROS, EvenLevels>(f, from, row, apart, count, out);
  } else if (K <= 4) {
    unpack_rows<K, HAS_ZEROS, FewLevels>(f, from, row, apart, count, out);
  } else {
    unpack_rows<K, HAS_ZEROS, AnyLevels>(f, from, row, apart, count, out);
  }
}

// `count` rows from `row` on, `apart` of them from one another, to (count, size) floats.
inline void unpack(const CachedRows& from, int64_t row, int64_t apart, int64_t count, float* out) {
  const RowFormat& f = *from.format;
  if (from.size % WHOLE == 0 && from.size <= WHOLE_MOST && f.block_shift >= 3) {
    if (from.zeros == nullptr) {
      KBIT_BY_BITS(f.bits, (unpack_bits<K, false>(f, from, row, apart, count, out)));
    } else {
      KBIT_BY_BITS(f.bits, (unpack_bits<K, true>(f, from, row, apart, count, out)));
    }
    return;
  }
  const int64_t row_bytes = f.bits * ((from.size + 7) / 8), blocks = (from.size + f.block - 1) / f.block;
  const uint8_t* planes = static_cast<const uint8_t*>(from.rows);
  for (int64_t i = 0; i < count; ++i, row += apart, out += from.size) {
    unpack_any(f, planes + row * row_bytes, from.scales + row * blocks,
               from.zeros == nullptr ? nullptr : from.zeros + row * blocks, from.size, out);
  }
}

}  // namespace
}  // namespace kbit
