// One row of x times a weight: the loops that the vector sets share. Included once by each of them, after its
// primitives:
//
//   LANES             16-bit lanes of a vector
//   STEP, STEPS       codes that are unpacked together, and how many of these make a chunk
//   Vec, VecF         a vector of integers, of floats
//   Lut<K>            the 16-bit table of a k-bit weight in registers
//   natural(K, s, b)  natural position, within a chunk, of byte b of step s
//   place(K, i)       byte of a step that becomes 16-bit lane i of its two vectors
//   codes<K>(p, s)    step s of a packed chunk, as bytes whose bits above k may be dirty
//   Levels<K, MODE>   what a product reads levels from
//   TOGETHER<K, MODE> how many rows of the weight it takes at once
//   multiply_unit     levels of one unit of these rows (the codes that share a scale) times x
//   FullCodes<K, M>   codes of a whole chunk of a row; Tail<K>: those of the last one, which is shorter
//   PAST_END          whether a step may take in granules past the end of a row, whose scales are then 0
//   ROLLS_TAIL        whether products with Tail's codes are a loop: they are rare, and unrolled compile for long
//   HAS_SHORT         whether ShortCodes<K, 8> and <K, 16> read last chunks of so many lanes in registers
//   TAKES_BYTES       whether 2-bit codebooks may be read as `Table::byte`
//   add_scaled(sum, acc, scales), multiply_add, sum_lanes, dot_lanes, load_floats, ...
//   to_eight          lanes that are summed later, of which eight remain
//
// Equations (row r, block b): out[r] = unit * sum_b scale[r, b] * xscale[b] * (sum_j T[code_j] * q_j)
//                                      + sum_b zero[r, b] * sum_{j in b} x_j + outliers
#pragma once

#include "transpose.h"
#include "weights.h"

namespace kbit {
namespace {

// sums += scale of each unit * (levels of its codes times x) over the first `steps` steps of a chunk of R rows.
template <int K, Mode MODE, int G, int R, class Codes, class Steps>
INLINE void multiply_codes(const Levels<K, MODE>& levels, const Codes* rows, Steps steps, const int16_t* x,
                           const float* const* scales, VecF* sums) {
  constexpr int PER_UNIT = G == 64 ? 2 : 1;
  constexpr bool IS_CONSTANT = !std::is_same_v<Steps, int>;
  const auto multiply = [&](auto u) INLINE_LAMBDA { multiply_unit<K, MODE, G, R>(levels, rows, u, x, scales, sums); };
  if constexpr ((K >= ROLLED_FROM && MODE == Mode::table) || (ROLLS_TAIL && !IS_CONSTANT)) {
    for (int u = 0; u * PER_UNIT < steps; ++u) multiply(u);
  } else if constexpr (IS_CONSTANT) {
    unroll<(Steps{} + PER_UNIT - 1) / PER_UNIT>(multiply);
  } else {
    unroll<STEPS / PER_UNIT>([&](auto u) INLINE_LAMBDA {
      if (u * PER_UNIT < steps) multiply(u);
    });
  }
}

// R rows of the weight, of which `spread` (R, stride) has the scales; `sums` are by lanes.
template <int K, Mode MODE, int G, int R>
INLINE void multiply_rows(const Weight& w, const Levels<K, MODE>& levels, const Tail<K>& tail, const Activation& x,
                          int64_t row, const float* spread, int64_t stride, VecF* sums) {
  constexpr int WIDTH = MODE == Mode::half ? 2 : 1;  // of a value of x, in 16-bit words
  constexpr int64_t BYTES_A_CHUNK = K * (CHUNK / 8);
  const int64_t full = w.cols / CHUNK;
  const int16_t* values = x.values;
  const uint8_t* packed[R];
  const float* scales[R];
  VecF sum[R];
  unroll<R>([&](auto r) INLINE_LAMBDA {
    packed[r] = w.planes + (row + r) * w.row_bytes;
    scales[r] = spread + r * stride;
    sum[r] = zero_float();
  });
  // In the order of memory, behind these rows: one stream is what the prefetchers of the machine like.
  const int64_t own = R == 1 ? 0 : R * w.row_bytes;
  const uint8_t* next = packed[0] + (own > AHEAD ? own : AHEAD);
  for (int64_t c = 0; c < full; ++c) {
    FullCodes<K, MODE> codes[R];
    unroll<R>([&](auto r) INLINE_LAMBDA { codes[r].at = packed[r]; });
    prefetch(next, R * BYTES_A_CHUNK);
    next += R * BYTES_A_CHUNK;
    multiply_codes<K, MODE, G, R>(levels, codes, Constant<STEPS>{}, values, scales, sum);
    unroll<R>([&](auto r) INLINE_LAMBDA {
      packed[r] += BYTES_A_CHUNK;
      scales[r] += CHUNK / G;
    });
    values += CHUNK * WIDTH;
  }
  const auto multiply_last = [&](const auto* codes, auto steps) INLINE_LAMBDA {
    prefetch(next, R * BYTES_A_CHUNK);
    multiply_codes<K, MODE, G, R>(levels, codes, steps, values, scales, sum);
  };
  const auto multiply_short = [&](auto lanes) INLINE_LAMBDA {
    if constexpr (HAS_SHORT) {
      ShortCodes<K, lanes> codes[R];
      unroll<R>([&](auto r) INLINE_LAMBDA { codes[r].at = packed[r]; });
      multiply_last(codes, Constant<lanes / 4>{});
    }
  };
  const int64_t lanes = (w.cols % CHUNK + 7) / 8;
  if (HAS_SHORT && lanes == 8) {
    multiply_short(Constant<8>{});
  } else if (HAS_SHORT && lanes == 16) {
    multiply_short(Constant<16>{});
  } else if (lanes > 0) {
    typename Tail<K>::Codes codes[R];
    unroll<R>([&](auto r) INLINE_LAMBDA { codes[r] = tail.read(packed[r]); });
    multiply_last(codes, tail.steps);
  }
  unroll<R>([&](auto r) INLINE_LAMBDA { sums[r] = sum[r]; });
}

constexpr int SUMMED = 8;  // rows whose lanes are summed together

// Lanes of `count` rows, at most SUMMED, from `row` on.
using MultiplySome = void (*)(const void* multiplier, const Weight& w, const Activation& x, int64_t row, int64_t count,
                              const float* spread, int64_t stride, VecF* sums);

// The only part of all this that depends on the width of codes.
template <int K, Mode MODE, int G>
struct RowMultiplier {
  const Levels<K, MODE> levels;
  const Tail<K> tail;

  static void multiply(const void* multiplier, const Weight& w, const Activation& x, int64_t row, int64_t count,
                       const float* spread, int64_t stride, VecF* sums) {
    constexpr int R = TOGETHER<K, MODE>;
    const auto& own = *static_cast<const RowMultiplier*>(multiplier);
    const Levels<K, MODE> levels = own.levels;
    const auto some = [&](int64_t i, auto rows) INLINE_LAMBDA {
      multiply_rows<K, MODE, G, rows>(w, levels, own.tail, x, row + i, spread + i * stride, stride, sums + i);
    };
    int64_t i = 0;
    for (; i + R <= count; i += R) some(i, Constant<R>{});
    if constexpr (R > 1) {
      for (; i < count; ++i) some(i, Constant<1>{});
    }
  }
};

void gemv_by(MultiplySome multiply_some, const void* multiplier, const Weight& w, const Table& table,
             const Activation& x, int64_t begin, int64_t end, float* out) {
  const bool has_first = x.mode == Mode::affine, has_rest = has_first || w.zero_type != Type::none;
  const bool is_direct = w.block == x.granule;  // each granule has a scale of its own
  const int64_t stride = (x.segments + SUMMED - 1) / SUMMED * SUMMED;
  const int64_t fitting = 2048 / (w.blocks + stride);  // rows whose scales stay in the L1 cache
  const int64_t batch = fitting < SUMMED ? SUMMED : (fitting > 32 ? 32 : fitting / SUMMED * SUMMED);
  const Scratch scratch(sizeof(VecF) * static_cast<size_t>(batch) +
                        sizeof(float) * static_cast<size_t>(batch * (w.blocks + stride) + 2 * STEP));
  VecF* rest = reinterpret_cast<VecF*>(scratch.data);  // (batch): what is not a product of codes
  float* spread = reinterpret_cast<float*>(rest + batch);  // (batch, stride) and a step
  float* scales = spread + batch * stride + STEP;  // (batch, blocks) and a step
  const ScaleReader reader(w);
  const VecF unit = repeat_float(has_first ? table.step : (x.mode == Mode::half ? table.half_unit : table.unit));
  const VecF level_0 = repeat_float(table.first);
  for (int64_t row = begin; row < end; row += batch) {
    const int64_t count = row + batch < end ? batch : end - row;
    reader.read(row, count, scales);
    for (int64_t r = 0; r < count; ++r) {
      const float* here = scales + r * w.blocks;
      if (is_direct) {
        multiply_whole(here, x.scales, w.blocks, spread + r * stride);
        for (int64_t j = w.blocks; PAST_END && j < x.segments; ++j) spread[r * stride + j] = 0.0f;
      } else {
        spread_scales(w, here, x.scales, x.granule, x.segments, spread + r * stride);
      }
      if (!has_rest) continue;
      rest[r] = has_first ? multiply(dot_lanes(here, x.sums, w.blocks), level_0) : zero_float();
      if (w.zero_type != Type::none) {
        rest[r] = add(rest[r], dot_numbers(w.zeros, w.zero_type, (row + r) * w.blocks, x.sums, w.blocks));
      }
    }
    for (int64_t r = 0; r < count; r += SUMMED) {
      __m256 sums[SUMMED] = {};
      VecF lanes[SUMMED];
      const int64_t here = count - r < SUMMED ? count - r : SUMMED;
      reader.fetch(row + batch + r, here);  // of the next batch, so that none waits for them
      multiply_some(multiplier, w, x, row + r, here, spread + r * stride, stride, lanes);
      for (int64_t i = 0; i < here; ++i) {
        const VecF scaled = multiply(lanes[i], unit);
        sums[i] = to_eight(has_rest ? add(scaled, rest[r + i]) : scaled);
      }
      put_sums(sums, here, out + row + r - begin);
    }
  }
  if (w.outliers > 0) add_outliers(w, x.outliers, begin, end, out);
}

template <int K, Mode MODE, int G>
void gemv_of(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out) {
  const RowMultiplier<K, MODE, G> multiplier{Levels<K, MODE>(table), Tail<K>(w.cols % CHUNK)};
  gemv_by(multiplier.multiply, &multiplier, w, table, x, begin, end, out);
}

template <int G>
void gemv_in(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out) {
  if (x.mode == Mode::affine) {
    KBIT_BY_BITS(w.bits, (gemv_of<K, Mode::affine, G>(w, table, x, begin, end, out)));
  } else if (x.mode == Mode::half) {
    KBIT_BY_BITS(w.bits, (gemv_of<K, K >= HALF_FROM ? Mode::half : Mode::table, G>(w, table, x, begin, end, out)));
  } else {
    KBIT_BY_BITS(w.bits, (gemv_of<K, Mode::table, G>(w, table, x, begin, end, out)));
  }
}

void gemv(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out) {
  if (x.granule == 64) {
    gemv_in<64>(w, table, x, begin, end, out);
  } else {
    gemv_in<32>(w, table, x, begin, end, out);
  }
}

}  // namespace
}  // namespace kbit
