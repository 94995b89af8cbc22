// Eight vectors of eight 32-bit lanes, for the sets that have AVX2: transposed, and summed.
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

// The first `count` lanes, or all.
INLINE void store_some(float* p, __m256 v, int64_t count) {
  if (count >= 8) return _mm256_storeu_ps(p, v);
  float all[8];
  _mm256_storeu_ps(all, v);
  std::memcpy(p, all, static_cast<size_t>(count) * sizeof(float));
}

// The sums of the lanes of eight vectors, of which `count` are wanted.
INLINE void put_sums(const __m256* v, int64_t count, float* out) {
  __m256 pairs[4], fours[2];
  unroll<4>([&](auto i) INLINE_LAMBDA { pairs[i] = _mm256_hadd_ps(v[2 * i], v[2 * i + 1]); });
  unroll<2>([&](auto i) INLINE_LAMBDA { fours[i] = _mm256_hadd_ps(pairs[2 * i], pairs[2 * i + 1]); });
  const __m256 low = _mm256_permute2f128_ps(fours[0], fours[1], 0x20);
  store_some(out, _mm256_add_ps(low, _mm256_permute2f128_ps(fours[0], fours[1], 0x31)), count);
}

}  // namespace
}  // namespace kbit
