// A few rows of x times a weight, row by row of the weight: products are summed across lanes. Decoded values stay in
// registers and meet C rows of x at once; a tile of the weight's rows shares the chunk of x that is in the L1 cache.
#pragma once

#include "weights.h"

namespace kbit {
namespace {

inline void put_few(const int32_t* q, const uint8_t* from, int64_t m, int64_t chunk, int64_t chunks, int16_t* values) {
  int16_t* out = values + (m * chunks + chunk) * CHUNK;
  for (int i = 0; i < CHUNK; ++i) out[i] = static_cast<int16_t>(q[from[i]]);
}

constexpr int FEW_MOST = 8;  // rows of x: for more, decoding to memory pays
constexpr int FEW_ROWS = 8;

template <int K, int G, int C, class Codes>
INLINE void multiply_few(const Lut<K>& lut, const Codes& codes, int steps, const int16_t* const* x, int64_t at,
                         const float* scales, const VecF* const* x_scales, VecF* sums) {
  constexpr int PER_UNIT = G == 64 ? 2 : 1;
  VecF sum[C];
  unroll<C>([&](auto m) INLINE_LAMBDA { sum[m] = sums[m]; });
  const auto multiply_unit = [&](auto u) INLINE_LAMBDA {
    const int first = u * PER_UNIT;
    if (first >= steps) return;
    Vec c[PER_UNIT], v[PER_UNIT][2];
    unroll<PER_UNIT>([&](auto i) INLINE_LAMBDA { c[i] = codes(first + i); });
    lookup_several<K, PER_UNIT>(lut, c, v);
    const VecF scale = unit_scale<K, G>(scales, u);
    unroll<C>([&](auto m) INLINE_LAMBDA {
      Vec acc = zero();
      unroll<2 * PER_UNIT>([&](auto i) INLINE_LAMBDA {
        acc = mul_add(acc, v[i / 2][i % 2], load(x[m] + at + first * STEP + i * LANES));
      });
      sum[m] = add_scaled(sum[m], acc, multiply(scale, x_scales[m][u]));
    });
  };
  if constexpr (K >= ROLLED_FROM) {
    for (int u = 0; u < STEPS / PER_UNIT; ++u) multiply_unit(u);
  } else {
    unroll<STEPS / PER_UNIT>(multiply_unit);
  }
  unroll<C>([&](auto m) INLINE_LAMBDA { sums[m] = sum[m]; });
}

template <int K, int G, int C>
void few_rows(const Weight& w, const Table& table, const Activation& x, int64_t first, int64_t count, int64_t begin,
              int64_t end, float* out, int64_t stride) {
  constexpr int UNITS = STEPS / (G == 64 ? 2 : 1);
  using Full = std::conditional_t<(K >= ROLLED_FROM), RolledCodes<K>, PackedCodes<K>>;
  const int64_t chunks = chunk_count(w);
  const int64_t full = w.cols / CHUNK;
  const size_t floats = static_cast<size_t>(FEW_ROWS * (x.segments + 2 * w.blocks) + STEP);
  const size_t vectors = static_cast<size_t>(C * (FEW_ROWS + chunks * UNITS));
  const Scratch scratch(vectors * sizeof(VecF) + floats * sizeof(float));
  VecF* sums = reinterpret_cast<VecF*>(scratch.data);  // (FEW_ROWS, C)
  VecF* x_units = sums + FEW_ROWS * C;  // (C, chunks, UNITS)
  float* spread = reinterpret_cast<float*>(x_units + C * chunks * UNITS);  // (FEW_ROWS, segments)
  float* scales = spread + FEW_ROWS * x.segments;  // (FEW_ROWS, blocks) and a step
  float* zeros = scales + FEW_ROWS * w.blocks + STEP;  // (FEW_ROWS, blocks)
  const int16_t* rows_of_x[C];
  int64_t at_row[C];  // past the end: the last one again, for nothing
  for (int m = 0; m < C; ++m) {
    at_row[m] = first + (m < count ? m : count - 1);
    rows_of_x[m] = x.values + at_row[m] * chunks * CHUNK;
    for (int64_t c = 0; c < chunks; ++c) {
      for (int u = 0; u < UNITS; ++u) {
        x_units[(m * chunks + c) * UNITS + u] =
            unit_scale<K, G>(x.scales + at_row[m] * x.segments + c * (CHUNK / G), u);
      }
    }
  }
  const ScaleReader reader(w);
  const Lut<K> lut(table);
  const Tail<K> tail(w.cols % CHUNK);
  for (int64_t row = begin; row < end; row += FEW_ROWS) {
    const int64_t here = row + FEW_ROWS < end ? FEW_ROWS : end - row;
    reader.read(row, here, scales);
    for (int64_t r = 0; r < here; ++r) {
      spread_scales(w, scales + r * w.blocks, nullptr, G, x.segments, spread + r * x.segments);
    }
    for (int64_t i = 0; i < here * C; ++i) sums[i] = zero_float();
    for (int64_t c = 0; c < chunks; ++c) {
      const VecF* x_scales[C];
      for (int m = 0; m < C; ++m) x_scales[m] = x_units + (m * chunks + c) * UNITS;
      for (int64_t r = 0; r < here; ++r) {
        const uint8_t* packed = w.planes + (row + r) * w.row_bytes + c * K * (CHUNK / 8);
        const float* unit_scales = spread + r * x.segments + c * (CHUNK / G);
        prefetch(packed + AHEAD, K * (CHUNK / 8));
        if (c < full) {
          multiply_few<K, G, C>(lut, Full{packed}, STEPS, rows_of_x, c * CHUNK, unit_scales, x_scales, sums + r * C);
        } else {
          multiply_few<K, G, C>(lut, tail.read(packed), tail.steps, rows_of_x, c * CHUNK, unit_scales, x_scales,
                                sums + r * C);
        }
      }
    }
    for (int64_t r = 0; r < here; ++r) {
      if (w.zero_type != Type::none) {
        read_numbers(w.zeros, w.zero_type, (row + r) * w.blocks, w.blocks, zeros);
      }
      for (int64_t m = 0; m < count; ++m) {
        float value = sum_lanes(sums[r * C + m]) * table.unit;
        if (w.zero_type != Type::none) value += dot_floats(zeros, x.sums + at_row[m] * w.blocks, w.blocks);
        out[m * stride + row + r - begin] = value;
      }
    }
  }
  for (int64_t m = 0; m < count && w.outliers > 0; ++m) {
    add_outliers(w, x.outliers + at_row[m] * w.outliers, begin, end, out + m * stride);
  }
}

template <int G>
void gemm_few_of(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  for (int64_t m = 0; m < x.rows; m += FEW_COLS) {
    const int64_t here = m + FEW_COLS < x.rows ? FEW_COLS : x.rows - m;
    KBIT_BY_BITS(w.bits, (few_rows<K, G, FEW_COLS>(w, table, x, m, here, begin, end, out + m * stride, stride)));
  }
}

void gemm_few(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
              int64_t stride) {
  if (x.granule == 64) {
    gemm_few_of<64>(w, table, x, begin, end, out, stride);
  } else {
    gemm_few_of<32>(w, table, x, begin, end, out, stride);
  }
}

}  // namespace
}  // namespace kbit
