// Eight vectors of eight 32-bit lanes, for the sets that have AVX2.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace kbit {
namespace {

// Lane j of vector i becomes lane i of vector j.
INLINE void transpose_ints(__m256i* v) {
  __m256i pairs[8], fours[8];
  unroll<4>([&](auto i) INLINE_LAMBDA {
    pairs[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  });
  unroll<2>([&](auto i) INLINE_LAMBDA {
    fours[4 * i] = _mm256_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 1] = _mm256_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 2] = _mm256_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    fours[4 * i + 3] = _mm256_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
  });
  unroll<4>([&](auto i) INLINE_LAMBDA {
    v[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
    v[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
  });
}

}  // namespace
}  // namespace kbit
