// A few rows of x times a weight, row by row of the weight: products are summed across lanes. Decoded values stay in
// registers and meet FEW_COLS rows of x at once; a tile of the weight's rows shares the chunk of x that is in the L1 cache.
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

// A chunk of x's rows, and what else its products with a chunk of the weight need.
struct FewChunk {
  const int16_t* values[FEW_COLS];
  const VecF* scales[FEW_COLS];  // of x, of each unit
};

// sums (FEW_COLS) += scales of the weight's units * x's * (levels times x); the last chunk of a row where not `is_full`.
using MultiplyFew = void (*)(const void* multiplier, const uint8_t* packed, bool is_full, const FewChunk& x,
                             const float* scales, VecF* sums);

// The only part of all this that depends on the width of codes.
template <int K, int G>
struct FewMultiplier {
  static constexpr int PER_UNIT = G == 64 ? 2 : 1;
  using Full = std::conditional_t<(K >= ROLLED_FROM), RolledCodes<K>, PackedCodes<K>>;
  const Lut<K> lut;
  const Tail<K> tail;

  static void multiply(const void* multiplier, const uint8_t* packed, bool is_full, const FewChunk& x,
                       const float* scales, VecF* sums) {
    const auto& [lut, tail] = *static_cast<const FewMultiplier*>(multiplier);
    if (is_full) {
      add(lut, Full{packed}, STEPS, x, scales, sums);
    } else {
      add(lut, tail.read(packed), tail.steps, x, scales, sums);
    }
  }

 private:
  template <class Codes>
  static INLINE void add(const Lut<K>& lut, const Codes& codes, int steps, const FewChunk& x, const float* scales,
                         VecF* sums) {
    VecF sum[FEW_COLS];
    unroll<FEW_COLS>([&](auto m) INLINE_LAMBDA { sum[m] = sums[m]; });
    const auto multiply_unit = [&](auto u) INLINE_LAMBDA {
      const int first = u * PER_UNIT;
      Vec c[PER_UNIT], v[PER_UNIT][2];
      unroll<PER_UNIT>([&](auto i) INLINE_LAMBDA { c[i] = codes(first + i); });
      lookup_several<K, PER_UNIT>(lut, c, v);
      const VecF scale = unit_scale<K, G>(scales, u);
      unroll<FEW_COLS>([&](auto m) INLINE_LAMBDA {
        Vec acc = zero();
        unroll<2 * PER_UNIT>([&](auto i) INLINE_LAMBDA {
          acc = mul_add(acc, v[i / 2][i % 2], load(x.values[m] + first * STEP + i * LANES));
        });
        sum[m] = add_scaled(sum[m], acc, kbit::multiply(scale, x.scales[m][u]));
      });
    };
    if constexpr (std::is_same_v<Codes, PackedCodes<K>>) {
      unroll<STEPS / PER_UNIT>(multiply_unit);
    } else {
      for (int u = 0; u * PER_UNIT < steps; ++u) multiply_unit(u);
    }
    unroll<FEW_COLS>([&](auto m) INLINE_LAMBDA { sums[m] = sum[m]; });
  }
};

// `count` rows of x from `first` on.
template <int G>
void few_rows(MultiplyFew multiply, const void* multiplier, const Weight& w, const Table& table, const Activation& x,
              int64_t first, int64_t count, int64_t begin, int64_t end, float* out, int64_t stride) {
  constexpr int UNITS = STEPS / (G == 64 ? 2 : 1), C = FEW_COLS;
  const int64_t chunks = chunk_count(w), full = w.cols / CHUNK, of_chunk = w.bits * (CHUNK / 8);
  const size_t floats = static_cast<size_t>(FEW_ROWS * (x.segments + 2 * w.blocks) + STEP);
  const size_t vectors = static_cast<size_t>(C * (FEW_ROWS + chunks * UNITS));
  const Scratch scratch(vectors * sizeof(VecF) + floats * sizeof(float));
  VecF* sums = reinterpret_cast<VecF*>(scratch.data);  // (FEW_ROWS, C)
  VecF* x_units = sums + FEW_ROWS * C;  // (C, chunks, UNITS)
  float* spread = reinterpret_cast<float*>(x_units + C * chunks * UNITS);  // (FEW_ROWS, segments)
  float* scales = spread + FEW_ROWS * x.segments;  // (FEW_ROWS, blocks) and a step
  float* zeros = scales + FEW_ROWS * w.blocks + STEP;  // (FEW_ROWS, blocks)
  int64_t at_row[C];  // past the end: the last one again, for nothing
  for (int m = 0; m < C; ++m) {
    at_row[m] = first + (m < count ? m : count - 1);
    const float* x_scales = x.scales + at_row[m] * x.segments;
    for (int64_t u = 0; u < chunks * UNITS; ++u) {
      x_units[m * chunks * UNITS + u] = repeat_float(x_scales[u]);
    }
  }
  const ScaleReader reader(w);
  for (int64_t row = begin; row < end; row += FEW_ROWS) {
    const int64_t here = row + FEW_ROWS < end ? FEW_ROWS : end - row;
    reader.read(row, here, scales);
    for (int64_t r = 0; r < here; ++r) {
      spread_scales(w, scales + r * w.blocks, nullptr, G, x.segments, spread + r * x.segments);
    }
    for (int64_t i = 0; i < here * C; ++i) sums[i] = zero_float();
    for (int64_t c = 0; c < chunks; ++c) {
      FewChunk chunk;
      for (int m = 0; m < C; ++m) {
        chunk.values[m] = x.values + (at_row[m] * chunks + c) * CHUNK;
        chunk.scales[m] = x_units + (m * chunks + c) * UNITS;
      }
      for (int64_t r = 0; r < here; ++r) {
        const uint8_t* packed = w.planes + (row + r) * w.row_bytes + c * of_chunk;
        prefetch(packed + AHEAD, of_chunk);
        multiply(multiplier, packed, c < full, chunk, spread + r * x.segments + c * (CHUNK / G), sums + r * C);
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

template <int K, int G>
void gemm_few_of(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  const FewMultiplier<K, G> multiplier{Lut<K>(table), Tail<K>(w.cols % CHUNK)};
  for (int64_t m = 0; m < x.rows; m += FEW_COLS) {
    const int64_t here = m + FEW_COLS < x.rows ? FEW_COLS : x.rows - m;
    few_rows<G>(multiplier.multiply, &multiplier, w, table, x, m, here, begin, end, out + m * stride, stride);
  }
}

void gemm_few(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
              int64_t stride) {
  if (x.granule == 64) {
    KBIT_BY_BITS(w.bits, (gemm_few_of<K, 64>(w, table, x, begin, end, out, stride)));
  } else {
    KBIT_BY_BITS(w.bits, (gemm_few_of<K, 32>(w, table, x, begin, end, out, stride)));
  }
}

}  // namespace
}  // namespace kbit
