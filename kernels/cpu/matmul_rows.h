// Several rows of x times a weight, row by row of the weight: products are summed across lanes.
#pragma once

#include "weights.h"

namespace kbit {
namespace {

constexpr int64_t PANEL = 32;  // rows of x for which the weight is decoded once

INLINE float largest_of_many(const Weight& w, const float*, int64_t, float) { return largest_of_eight(w); }

inline void put_values(const int32_t* q, const uint8_t* from, int64_t m, int64_t chunk, int64_t chunks,
                       int16_t* values) {
  int16_t* out = values + (m * chunks + chunk) * CHUNK;
  for (int i = 0; i < CHUNK; ++i) out[i] = static_cast<int16_t>(q[from[i]]);
}

// Many rows of x -------------------------------------------------------------------------------

// Codes of one chunk to 16-bit values, in kernel order.
template <int K>
INLINE void decode_chunk(const Lut<K>& lut, const Tail<K>& tail, const uint8_t* packed, bool is_full, int16_t* out) {
  const auto write = [&](const auto& codes, int s) INLINE_LAMBDA {
    Vec v[2];
    lookup(lut, codes(s), v);
    store(out + s * STEP, v[0]);
    store(out + s * STEP + LANES, v[1]);
  };
  if (is_full && K >= ROLLED_FROM) {
    if constexpr (K >= ROLLED_FROM) {
      for (int s = 0; s < STEPS; ++s) write(RolledCodes<K>{packed}, s);
    }
  } else if (is_full) {
    unroll<STEPS>([&](auto s) INLINE_LAMBDA { write(PackedCodes<K>{packed}, s); });
  } else {
    const auto codes = tail.read(packed);
    for (int s = 0; s < tail.steps; ++s) write(codes, s);
  }
}

// R rows of decoded values times C rows of x, over the first `steps` steps of a chunk.
//   sums (C, stride of TILE_ROWS) += unit scales of the weight (R, units) * of x * integer products
template <int K, int G, int R, int C>
INLINE void multiply_chunk(const int16_t* values, int steps, const int16_t* x, int64_t x_stride, const float* x_scales,
                           int64_t segments, const VecF* scales, VecF* sums) {
  constexpr int PER_UNIT = G == 64 ? 2 : 1;
  constexpr int UNITS = STEPS / PER_UNIT;
  VecF sum[C * R];
  unroll<C * R>([&](auto i) INLINE_LAMBDA { sum[i] = sums[i / R * TILE_ROWS + i % R]; });
  for (int u = 0; u < UNITS; ++u) {
    if (u * PER_UNIT >= steps) break;
    Vec acc[C * R];
    unroll<C * R>([&](auto i) INLINE_LAMBDA { acc[i] = zero(); });
    unroll<2 * PER_UNIT>([&](auto i) INLINE_LAMBDA {
      const int at = u * PER_UNIT * STEP + i * LANES;
      Vec q[C];
      unroll<C>([&](auto m) INLINE_LAMBDA { q[m] = load(x + m * x_stride + at); });
      unroll<R>([&](auto r) INLINE_LAMBDA {
        const Vec v = load(values + r * CHUNK + at);
        unroll<C>([&](auto m) INLINE_LAMBDA { acc[m * R + r] = mul_add(acc[m * R + r], v, q[m]); });
      });
    });
    unroll<C>([&](auto m) INLINE_LAMBDA {
      const VecF x_scale = unit_scale<K, G>(x_scales + m * segments, u);
      unroll<R>([&](auto r) INLINE_LAMBDA {
        const VecF both = multiply(x_scale, scales[r * UNITS + u]);
        sum[m * R + r] = add_scaled(sum[m * R + r], acc[m * R + r], both);
      });
    });
  }
  unroll<C * R>([&](auto i) INLINE_LAMBDA { sums[i / R * TILE_ROWS + i % R] = sum[i]; });
}

template <int K, int G, int R>
void gemm_tile(const Weight& w, const Table& table, const Lut<K>& lut, const ScaleReader& reader,
               const Tail<K>& tail, const Activation& x, int64_t first, int64_t count, int64_t row, int64_t end, char* scratch, float* out,
               int64_t stride) {
  constexpr int UNITS = STEPS / (G == 64 ? 2 : 1);
  const int64_t chunks = chunk_count(w);
  const int64_t full = w.cols / CHUNK;
  VecF* sums = reinterpret_cast<VecF*>(scratch);  // (PANEL, TILE_ROWS)
  VecF* units = sums + PANEL * TILE_ROWS;  // (R, UNITS): the weight's scales in this chunk
  int16_t* values = reinterpret_cast<int16_t*>(units + R * UNITS);  // (R, CHUNK)
  float* spread = reinterpret_cast<float*>(values + R * CHUNK);  // (R, segments)
  float* zeros = spread + R * x.segments;  // (R, blocks)
  float* scales = zeros + R * w.blocks;  // (R, blocks) and a step
  const int64_t valid = row + R <= end ? R : end - row;
  reader.read(row, valid, scales);
  for (int r = 0; r < R; ++r) {
    const int64_t at = row + (r < valid ? r : 0);  // past the end: the first one again, for nothing
    spread_scales(w, scales + (at - row) * w.blocks, nullptr, G, x.segments, spread + r * x.segments);
    if (w.zero_type != Type::none) {
      read_numbers(w.zeros, w.zero_type, at * w.blocks, w.blocks, zeros + r * w.blocks);
    }
  }
  for (int64_t i = 0; i < count * TILE_ROWS; ++i) sums[i] = zero_float();
  for (int64_t c = 0; c < chunks; ++c) {
    const int steps = c < full ? STEPS : tail.steps;
    for (int r = 0; r < R; ++r) {
      const uint8_t* packed = w.planes + (row + (r < valid ? r : 0)) * w.row_bytes + c * K * (CHUNK / 8);
      prefetch(packed + AHEAD, K * (CHUNK / 8));
      decode_chunk<K>(lut, tail, packed, c < full, values + r * CHUNK);
      for (int u = 0; u < UNITS; ++u) {
        units[r * UNITS + u] = unit_scale<K, G>(spread + r * x.segments + c * (CHUNK / G), u);
      }
    }
    const int16_t* q = x.values + (first * chunks + c) * CHUNK;
    const float* x_scales = x.scales + first * x.segments + c * (CHUNK / G);
    const int64_t next = chunks * CHUNK;
    int64_t m = 0;
    for (; m + TILE_COLS <= count; m += TILE_COLS) {
      multiply_chunk<K, G, R, TILE_COLS>(values, steps, q + m * next, next, x_scales + m * x.segments, x.segments, units,
                                         sums + m * TILE_ROWS);
    }
    for (; m < count; ++m) {
      multiply_chunk<K, G, R, 1>(values, steps, q + m * next, next, x_scales + m * x.segments, x.segments, units,
                                 sums + m * TILE_ROWS);
    }
  }
  for (int64_t m = 0; m < count; ++m) {
    for (int r = 0; r < valid; ++r) {
      float value = sum_lanes(sums[m * TILE_ROWS + r]) * table.unit;
      if (w.zero_type != Type::none) {
        value += dot_floats(zeros + r * w.blocks, x.sums + (first + m) * w.blocks, w.blocks);
      }
      out[m * stride + r] = value;
    }
    if (w.outliers > 0) add_outliers(w, x.outliers + (first + m) * w.outliers, row, row + valid, out + m * stride);
  }
}

template <int K, int G>
void gemm_rows(const Weight& w, const Table& table, const Activation& x, int64_t first, int64_t count, int64_t begin,
               int64_t end, float* out, int64_t stride) {
  constexpr int R = TILE_ROWS;
  const size_t floats = static_cast<size_t>(R * x.segments + 2 * R * w.blocks + STEP);
  const ScaleReader reader(w);
  const Scratch scratch((PANEL + STEPS) * R * sizeof(VecF) + R * CHUNK * sizeof(int16_t) + sizeof(float) * floats);
  const Lut<K> lut(table);
  const Tail<K> tail(w.cols % CHUNK);
  for (int64_t row = begin; row < end; row += R) {
    gemm_tile<K, G, R>(w, table, lut, reader, tail, x, first, count, row, end, scratch.data, out + row - begin, stride);
  }
}

// A few rows of x ------------------------------------------------------------------------------
//
// Decoded values stay in registers and meet C rows of x at once; a tile of the weight's rows shares the
// chunk of x that is in the L1 cache.

constexpr int FEW_MOST = 8;  // rows of x from which decoding to memory pays
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
void gemm_of(const Weight& w, const Table& table, const Activation& x, int64_t first, int64_t count, int64_t begin,
             int64_t end, float* out, int64_t stride) {
  if (count > FEW_MOST) {
    KBIT_BY_BITS(w.bits, (gemm_rows<K, G>(w, table, x, first, count, begin, end, out, stride)));
    return;
  }
  for (int64_t m = 0; m < count; m += FEW_COLS) {
    const int64_t here = m + FEW_COLS < count ? FEW_COLS : count - m;
    float* to = out + m * stride;
    if (here <= 4) {
      KBIT_BY_BITS(w.bits, (few_rows<K, G, 4>(w, table, x, first + m, here, begin, end, to, stride)));
    } else {
      KBIT_BY_BITS(w.bits, (few_rows<K, G, FEW_COLS>(w, table, x, first + m, here, begin, end, to, stride)));
    }
  }
}

void gemm(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
          int64_t stride) {
  for (int64_t first = 0; first < x.rows; first += PANEL) {
    const int64_t count = first + PANEL < x.rows ? PANEL : x.rows - first;
    if (x.granule == 64) {
      gemm_of<64>(w, table, x, first, count, begin, end, out + first * stride, stride);
    } else {
      gemm_of<32>(w, table, x, first, count, begin, end, out + first * stride, stride);
    }
  }
}

}  // namespace
}  // namespace kbit
