// Several rows of x times a weight, a row of the weight to a lane: scales, sums and results need no work
// across lanes. Packed bytes are transposed on their way in, 32 bits at a time (a word of a plane's 32 bytes
// has codes of four neighbouring columns; the words of ROWS rows make a vector), and their levels become a tile
// in the L1 cache, which meets COLS rows of x at a time.
//
//   tile of levels  (CHUNK / 2, R) vectors of pairs: two columns of each of ROWS rows of the weight
//   values of x     (rows / X_ROWS, chunks, CHUNK / 2, X_ROWS) of the same pairs
//
// The pairs of four neighbouring columns are 0 with 2 and 1 with 3: the even and the odd bytes of a word.
//
// Each set defines, before it includes this, ROWS (of the weight: 32-bit lanes of a vector), COLS (rows of x whose
// sums fit in registers: a divisor of X_ROWS), PANEL_BYTES (of x, which stays in the L2 cache while the weight
// passes), `transpose_words` (8 words of ROWS rows: out[j] has word j of every row), `lookup_lanes` (of words of
// codes, whose bits above K may be dirty, the even and the odd bytes' levels), `add_pairs` (products of pairs to 32-bit
// sums), `merge`, `shift`, `sum_sizes` and `store_some`.
#pragma once

#include "weights.h"

namespace kbit {
namespace {

constexpr int WORDS = 8;  // of a group of 32 codes
constexpr int GROUPS = CHUNK / 32;
constexpr int PAIRS = CHUNK / 2;

// A 32-bit lane sums the products of a whole granule: what it holds over the largest level bounds the sum of
// their sizes (128: each may be rounded up, and `peak / total` as well).
INLINE float largest_of_lane(const Weight& w, const float* x, int64_t count, float peak) {
  const float most = static_cast<float>((int64_t{1} << 31) / w.most - 128);
  const float total = sum_sizes(x, count);
  const float largest = total > 0.0f ? most * (peak / total) : 1.0f;
  return largest < VALUE_MAX ? largest : VALUE_MAX;
}

inline void put_lanes(const int32_t* q, int64_t m, int64_t chunk, int64_t chunks, int16_t* values) {
  int16_t* out = values + ((m / X_ROWS * chunks + chunk) * PAIRS * X_ROWS + m % X_ROWS) * 2;
  for (int i = 0; i < CHUNK; i += 4) {
    for (int odd = 0; odd < 2; ++odd) {
      out[(i / 2 + odd) * X_ROWS * 2] = static_cast<int16_t>(q[i + odd]);
      out[(i / 2 + odd) * X_ROWS * 2 + 1] = static_cast<int16_t>(q[i + odd + 2]);
    }
  }
}

// Codes of a word of group `g`, from the transposed words of the planes, 8 for each 32 bytes of them; bits above K
// may be dirty.
template <int WIDTH, int FIRST>
INLINE Vec field_of(const Vec* words, int g, int to) {
  return shift(words[(FIRST + g * WIDTH / 8) * WORDS], WIDTH * g % 8 - to);
}
template <int K>
INLINE Vec code_words(const Vec* words, int g) {
  if constexpr (K == 2 || K == 4 || K == 8) return field_of<K, 0>(words, g, 0);
  if constexpr (K == 3) return merge(field_of<2, 0>(words, g, 0), field_of<1, 2>(words, g, 2), 2);
  if constexpr (K == 5) return merge(field_of<4, 0>(words, g, 0), field_of<1, 4>(words, g, 4), 4);
  if constexpr (K >= 6) {
    const Vec six = merge(field_of<4, 0>(words, g, 0), field_of<2, 4>(words, g, 4), 4);
    return K == 6 ? six : merge(six, field_of<1, 6>(words, g, 6), 6);
  }
}

// One chunk of ROWS rows to levels: PAIRS vectors, each `apart` behind the one before.
using DecodeWords = void (*)(const void* decoder, const uint8_t* const* rows, int64_t at, bool is_full, Vec* tile,
                             int64_t apart);

// The only part of all this that depends on the width of codes.
template <int K>
struct WordDecoder {
  const Lut<K> lut;
  const Tail<K> tail;

  static void decode(const void* decoder, const uint8_t* const* rows, int64_t at, bool is_full, Vec* tile,
                     int64_t apart) {
    const auto& [lut, tail] = *static_cast<const WordDecoder*>(decoder);
    const auto put = [&](int g, int j, Vec codes) INLINE_LAMBDA {
      Vec levels[2];
      lookup_lanes(lut, codes, levels);
      tile[(g * 2 * WORDS + 2 * j) * apart] = levels[0];
      tile[(g * 2 * WORDS + 2 * j + 1) * apart] = levels[1];
    };
    if (is_full) {
      Vec words[K * WORDS];
      for (int i = 0; i < K; ++i) transpose_words(rows, at + 32 * i, words + i * WORDS);
      for (int j = 0; j < WORDS; ++j) {
        unroll<GROUPS>([&](auto g) INLINE_LAMBDA { put(g, j, code_words<K>(words + j, g)); });
      }
      return;
    }
    alignas(64) uint8_t bytes[ROWS][CHUNK];
    const uint8_t* codes[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      const auto steps = tail.read(rows[r] + at);
      codes[r] = bytes[r];
      for (int s = 0; s < tail.steps; ++s) {
        for (int half = 0; half < STEP / 32; ++half) store_half(bytes[r] + natural(K, s, 32 * half), steps(s), half);
      }
    }
    for (int g = 0; g < GROUPS; ++g) {
      Vec words[WORDS];
      transpose_words(codes, 32 * g, words);
      for (int j = 0; j < WORDS; ++j) put(g, j, words[j]);
    }
  }
};

// sums (C, R) += scale * x's scale * (levels times x) over the granules of a chunk.
template <int R, int C>
__attribute__((noinline)) void multiply_tile(const Vec* tile, const int16_t* x, const float* x_scales, int64_t segments,
                          const VecF* const* scales, const int* block, int granules, VecF* sums) {
  const int pairs = PAIRS / granules;
  for (int s = 0; s < granules; ++s) {
    Vec acc[C * R];
    unroll<C * R>([&](auto i) INLINE_LAMBDA { acc[i] = zero(); });
    for (int i = s * pairs; i < (s + 1) * pairs; ++i) {
      Vec v[R];
      unroll<R>([&](auto r) INLINE_LAMBDA { v[r] = tile[i * R + r]; });
      unroll<C>([&](auto m) INLINE_LAMBDA {
        int32_t pair;
        std::memcpy(&pair, x + (i * X_ROWS + m) * 2, 4);
        const Vec q = repeat_int(pair);
        unroll<R>([&](auto r) INLINE_LAMBDA { add_pairs(acc[m * R + r], v[r], q); });
      });
    }
    unroll<C>([&](auto m) INLINE_LAMBDA {
      const VecF x_scale = repeat_float(x_scales[m * segments + s]);
      unroll<R>([&](auto r) INLINE_LAMBDA {
        sums[m * R + r] = add_scaled(sums[m * R + r], acc[m * R + r], multiply(scales[r][block[s]], x_scale));
      });
    });
  }
}

// (count, blocks) numbers of rows to vectors of ROWS rows, one for each block; what lies behind them is read too.
inline void across_rows(const float* numbers, int64_t count, int64_t blocks, VecF* out) {
  const uint8_t* rows[ROWS];
  for (int r = 0; r < ROWS; ++r) rows[r] = reinterpret_cast<const uint8_t*>(numbers + (r < count ? r : 0) * blocks);
  for (int64_t b = 0; b < blocks; b += WORDS) transpose_words(rows, 4 * b, reinterpret_cast<Vec*>(out + b));
}

// What a call works with: its scratch memory, and what all its tiles share.
struct Lanes {
  const Weight& w;
  const Table& table;
  const Activation& x;
  const DecodeWords decode;
  const void* decoder;
  const ScaleReader reader;
  const int64_t padded;  // blocks, up to a whole transposition
  const Scratch scratch;
  Vec* tile;  // (PAIRS, 2)
  VecF* sums;  // (rows of x, 2)
  VecF* scales;  // (2, padded)
  VecF* zeros;  // (2, padded)
  float* numbers;  // (ROWS, blocks), and what a reader may write behind it

  Lanes(const Weight& weight, const Table& levels, const Activation& input, int64_t count, DecodeWords words,
        const void* of_words)
      : w(weight),
        table(levels),
        x(input),
        decode(words),
        decoder(of_words),
        reader(weight),
        padded((weight.blocks + WORDS - 1) / WORDS * WORDS),
        scratch(sizeof(Vec) * static_cast<size_t>(2 * PAIRS + 2 * count + 4 * padded) +
                sizeof(float) * static_cast<size_t>(ROWS * weight.blocks + STEP)),
        tile(reinterpret_cast<Vec*>(scratch.data)),
        sums(reinterpret_cast<VecF*>(tile + 2 * PAIRS)),
        scales(sums + 2 * count),
        zeros(scales + 2 * padded),
        numbers(reinterpret_cast<float*>(zeros + 2 * padded)) {}
};

// `body` with the constant nearest to `count`, from 1 to MOST.
template <int MOST, class Body>
INLINE void up_to(int64_t count, const Body& body) {
  if (MOST == 1 || count >= MOST) return body(Constant<MOST>{});
  if constexpr (MOST > 1) up_to<MOST - 1>(count, body);
}

// R times ROWS rows of the weight, of which `valid` exist, times `count` rows of x from `first` on.
template <int R>
void lanes_tile(Lanes& at, int64_t first, int64_t count, int64_t row, int64_t valid, float* out, int64_t stride) {
  const Weight& w = at.w;
  const Activation& x = at.x;
  const int64_t chunks = chunk_count(w), full = w.cols / CHUNK;
  const int granules = static_cast<int>(CHUNK / x.granule);
  const int64_t ratio = w.block / x.granule;
  const uint8_t* rows[R * ROWS];  // past the end: the last one again, for nothing
  const VecF* scales[R];
  for (int r = 0; r < R * ROWS; ++r) rows[r] = w.planes + (row + (r < valid ? r : valid - 1)) * w.row_bytes;
  for (int r = 0; r < R; ++r) {
    const int64_t here = valid - r * ROWS < ROWS ? valid - r * ROWS : ROWS;
    at.reader.read(row + r * ROWS, here, at.numbers);
    across_rows(at.numbers, here, w.blocks, at.scales + r * at.padded);
    scales[r] = at.scales + r * at.padded;
    if (w.zero_type != Type::none) {
      read_numbers(w.zeros, w.zero_type, (row + r * ROWS) * w.blocks, here * w.blocks, at.numbers);
      across_rows(at.numbers, here, w.blocks, at.zeros + r * at.padded);
    }
  }
  for (int64_t i = 0; i < count * R; ++i) at.sums[i] = zero_float();
  const int64_t of_row = w.bits * (CHUNK / 8), bytes = R * ROWS * of_row;
  const uint8_t* next = rows[0] + R * ROWS * w.row_bytes;
  for (int64_t c = 0; c < chunks; ++c) {
    prefetch(next + c * bytes, bytes);
    for (int r = 0; r < R; ++r) {
      at.decode(at.decoder, rows + r * ROWS, c * of_row, c < full, at.tile + r, R);
    }
    int block[GROUPS];
    for (int s = 0; s < granules; ++s) {
      const int64_t b = (c * granules + s) / ratio;
      block[s] = static_cast<int>(b < w.blocks ? b : w.blocks - 1);
    }
    for (int64_t m = 0; m < count; m += COLS) {
      const int64_t group = (first + m) / X_ROWS * chunks + c;
      const int16_t* values = x.values + (group * PAIRS * X_ROWS + (first + m) % X_ROWS) * 2;
      const float* x_scales = x.scales + (first + m) * x.segments + c * granules;
      up_to<COLS>(count - m, [&](auto cols) INLINE_LAMBDA {
        multiply_tile<R, cols>(at.tile, values, x_scales, x.segments, scales, block, granules, at.sums + m * R);
      });
    }
  }
  for (int64_t m = 0; m < count; ++m) {
    const float* x_sums = x.sums + (first + m) * w.blocks;
    for (int r = 0; r < R; ++r) {
      VecF total = multiply(at.sums[m * R + r], repeat_float(at.table.unit));
      if (w.zero_type != Type::none) {
        const VecF* zeros = at.zeros + r * at.padded;
        for (int64_t b = 0; b < w.blocks; ++b) total = multiply_add(zeros[b], repeat_float(x_sums[b]), total);
      }
      store_some(out + m * stride + r * ROWS, total, valid - r * ROWS);
    }
    if (w.outliers > 0) add_outliers(w, x.outliers + (first + m) * w.outliers, row, row + valid, out + m * stride);
  }
}

void gemm_lanes_by(DecodeWords decode, const void* decoder, const Weight& w, const Table& table, const Activation& x,
                   int64_t begin, int64_t end, float* out, int64_t stride) {
  const int64_t fitting = PANEL_BYTES / (chunk_count(w) * CHUNK * 2) / X_ROWS * X_ROWS;
  const int64_t panel = fitting < 4 * X_ROWS ? 4 * X_ROWS : fitting;
  Lanes at(w, table, x, panel < x.rows ? panel : x.rows, decode, decoder);
  for (int64_t first = 0; first < x.rows; first += panel) {
    const int64_t count = first + panel < x.rows ? panel : x.rows - first;
    for (int64_t row = begin; row < end; row += 2 * ROWS) {
      const int64_t valid = end - row;
      float* to = out + first * stride + row - begin;
      if (valid > ROWS) {
        lanes_tile<2>(at, first, count, row, valid < 2 * ROWS ? valid : 2 * ROWS, to, stride);
      } else {
        lanes_tile<1>(at, first, count, row, valid, to, stride);
      }
    }
  }
}

template <int K>
void gemm_lanes_of(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
                   int64_t stride) {
  const WordDecoder<K> decoder{Lut<K>(table), Tail<K>(w.cols % CHUNK)};
  gemm_lanes_by(WordDecoder<K>::decode, &decoder, w, table, x, begin, end, out, stride);
}

void gemm_lanes(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
                int64_t stride) {
  KBIT_BY_BITS(w.bits, gemm_lanes_of<K>(w, table, x, begin, end, out, stride));
}

}  // namespace
}  // namespace kbit
