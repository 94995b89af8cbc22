// 8-bit codes of whole rows times int8 x, summed in int32; outlier features are added as floats: LLM.int8().
//
// Few rows of x meet the codes as they lie, vector by vector along the features. For many, codes are first brought
// into panels: GROUP features of each of PANEL_ROWS rows beside one another, so that one load of a panel serves
// PANEL_COLS rows of x, whose GROUP features are repeated over the lanes.
//
// Each set defines, before it includes this, Value (x's integers), MIDDLE_LATER (whether products take codes as
// they stand, so that 127 times the sum of x is subtracted in the end), BYTES (of a vector of codes), `ByteVec`,
// `codes_at`, `values_at`, `add_products`, `sum_ints` and `dot_floats`; and where it defines HAS_PANELS, INTS (lanes of
// 32 bits), PANEL_COLS, `load_ints`, `repeat_int`, `subtract_int`, `to_floats`, `repeat_float`, `load_floats`,
// `store_some`, `multiply`, `multiply_add` and `groups_at` (codes of eight groups). Sums may wrap on the way; up to
// BYTES_MOST features the result does not.
#pragma once

#include <limits>

#include "scalar.h"
#ifdef HAS_PANELS
#include "transpose.h"
#endif

namespace kbit {
namespace {

constexpr int GROUP = 4 / static_cast<int>(sizeof(Value));  // features in 32 bits
constexpr int BYTE_ROWS = 4;  // of a weight, and of x: what a tile of few rows keeps in registers
constexpr int BYTE_COLS = 2;

// What 127 times the sum of x is, where codes were taken as they stand.
INLINE int32_t middle_of(const Bytes& x, int64_t m) { return MIDDLE_LATER ? MIDDLE * x.sums[m] : 0; }

// One row of x, its outlier features already set to zero. NaN for what is not finite, which must not come out as a
// number.
void round_bytes(const float* x, int64_t m, Bytes& out) {
  Value* to = static_cast<Value*>(out.values) + m * out.apart;
  uint32_t top = 0;  // of the absolute values' bits, which are in their order
  for (int64_t i = 0; i < out.cols; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    const uint32_t size = bits & 0x7fffffffu;
    top = top > size ? top : size;
  }
  const float largest = from_bits(top);
  const bool is_finite = top < 0x7f800000u;
  const float inverse = top > 0 ? MIDDLE / largest : 0.0f;
  // An absmax below 4e-37 has no finite inverse: such a row is nothing but sub-normals, and becomes 0.
  const float factor = std::isfinite(inverse) && is_finite ? inverse : 0.0f;
  constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: a sum with it ends in the nearest whole number's bits
  int32_t sum = 0;
  for (int64_t i = 0; i < out.cols; ++i) {
    const float moved = (is_finite ? x[i] : 0.0f) * factor + ROUNDING;
    int32_t bits;
    std::memcpy(&bits, &moved, 4);
    const int32_t value = bits - 0x4b400000;
    to[i] = static_cast<Value>(value);
    sum += value;
  }
  for (int64_t i = out.cols; i < out.apart; ++i) to[i] = 0;
  out.sums[m] = sum;
  out.scales[m] = is_finite ? largest / MIDDLE : std::numeric_limits<float>::quiet_NaN();
}

// A few rows of x against rows [begin, end).
void multiply_few(const Weight& w, const ByteRows& rows, const Bytes& x, int64_t begin, int64_t end, float* out,
                  int64_t stride) {
  const int64_t whole = w.cols / BYTES * BYTES;
  const Value* first = static_cast<const Value*>(x.values);
  for (int64_t row = begin; row < end; row += BYTE_ROWS) {
    const uint8_t* codes[BYTE_ROWS];  // past the end: the last one again, for nothing
    for (int r = 0; r < BYTE_ROWS; ++r) codes[r] = w.planes + (row + r < end ? row + r : end - 1) * w.row_bytes;
    for (int64_t m = 0; m < x.rows; m += BYTE_COLS) {
      const Value* values[BYTE_COLS];
      for (int c = 0; c < BYTE_COLS; ++c) values[c] = first + (m + c < x.rows ? m + c : x.rows - 1) * x.apart;
      ByteVec sums[BYTE_ROWS][BYTE_COLS] = {};
      for (int64_t i = 0; i < whole; i += BYTES) {
        unroll<BYTE_ROWS>([&](auto r) INLINE_LAMBDA {
          const ByteVec row_codes = codes_at(codes[r] + i);
          unroll<BYTE_COLS>([&](auto c) INLINE_LAMBDA {
            sums[r][c] = add_products(sums[r][c], row_codes, values_at(values[c] + i));
          });
        });
      }
      for (int r = 0; r < BYTE_ROWS && row + r < end; ++r) {
        for (int c = 0; c < BYTE_COLS && m + c < x.rows; ++c) {
          uint32_t total = static_cast<uint32_t>(sum_ints(sums[r][c])) - static_cast<uint32_t>(middle_of(x, m + c));
          for (int64_t i = whole; i < w.cols; ++i) {
            const int code = MIDDLE_LATER ? codes[r][i] : codes[r][i] - MIDDLE;
            total += static_cast<uint32_t>(code * values[c][i]);
          }
          float value = static_cast<float>(static_cast<int32_t>(total)) * (x.scales[m + c] * rows.scales[row + r]);
          if (w.outliers > 0) {
            const float* weights = rows.outliers + (row + r) * w.outliers;
            value += dot_floats(weights, x.outliers + (m + c) * w.outliers, w.outliers);
          }
          out[(m + c) * stride + row + r] = value;
        }
      }
    }
  }
}

#ifdef HAS_PANELS

constexpr int PANEL_ROWS = 2 * INTS;  // rows of a weight whose products with PANEL_COLS rows of x fit in registers
constexpr int64_t MANY = 8;  // rows of x from which panels pay

// PANEL_ROWS rows of a weight from `row` on, those past `end` the last one again.
struct Panel {
  int32_t* codes;  // (groups, PANEL_ROWS): GROUP features each
  float* outliers;  // (outliers, PANEL_ROWS)
  float* scales;  // (PANEL_ROWS)

  void fill(const Weight& w, const ByteRows& rows, int64_t row, int64_t end) const {
    const uint8_t* from[PANEL_ROWS];
    for (int r = 0; r < PANEL_ROWS; ++r) {
      const int64_t own = row + r < end ? row + r : end - 1;
      from[r] = w.planes + own * w.row_bytes;
      scales[r] = rows.scales[own];
      for (int64_t i = 0; i < w.outliers; ++i) outliers[i * PANEL_ROWS + r] = rows.outliers[own * w.outliers + i];
    }
    int64_t i = 0;
    for (; i + 8 * GROUP <= w.cols; i += 8 * GROUP) {
      for (int part = 0; part < PANEL_ROWS; part += 8) {
        __m256i groups[8];
        unroll<8>([&](auto r) INLINE_LAMBDA { groups[r] = groups_at(from[part + r] + i); });
        transpose_ints(groups);
        int32_t* to = codes + i / GROUP * PANEL_ROWS + part;
        unroll<8>([&](auto r) INLINE_LAMBDA {
          _mm256_store_si256(reinterpret_cast<__m256i*>(to + r * PANEL_ROWS), groups[r]);
        });
      }
    }
    for (; i < w.cols; i += GROUP) {
      for (int r = 0; r < PANEL_ROWS; ++r) {
        Value group[GROUP] = {};
        for (int64_t g = 0; g < GROUP && i + g < w.cols; ++g) {
          group[g] = static_cast<Value>(from[r][i + g] - (MIDDLE_LATER ? 0 : MIDDLE));
        }
        std::memcpy(codes + i / GROUP * PANEL_ROWS + r, group, 4);
      }
    }
  }
};

// Where PANEL_COLS rows of x lie, from m on; past the end: the last one again, for nothing.
struct Tile {
  const Value* values[PANEL_COLS];
  int64_t rows[PANEL_COLS];

  Tile(const Bytes& x, int64_t m) {
    for (int c = 0; c < PANEL_COLS; ++c) {
      rows[c] = m + c < x.rows ? m + c : x.rows - 1;
      values[c] = static_cast<const Value*>(x.values) + rows[c] * x.apart;
    }
  }
};

using Sums = ByteVec[PANEL_COLS][2];

INLINE void add_panel(const Panel& panel, const Tile& tile, int64_t cols, Sums& sums) {
  const int32_t* codes = panel.codes;
  for (int64_t i = 0; i < cols; i += GROUP, codes += PANEL_ROWS) {
    const ByteVec low = load_ints(codes), high = load_ints(codes + INTS);
    unroll<PANEL_COLS>([&](auto c) INLINE_LAMBDA {
      int32_t group;
      std::memcpy(&group, tile.values[c] + i, 4);
      const ByteVec value = repeat_int(group);
      sums[c][0] = add_products(sums[c][0], low, value);
      sums[c][1] = add_products(sums[c][1], high, value);
    });
  }
}

// Sums to floats, with what the outlier features add; `count` rows of the panel are wanted.
INLINE void finish_panel(const Weight& w, const Panel& panel, const Bytes& x, const Tile& tile, const Sums& sums,
                         int64_t m, float* out, int64_t stride, int64_t count) {
  VecF totals[PANEL_COLS][2];
  unroll<PANEL_COLS>([&](auto c) INLINE_LAMBDA {
    unroll<2>([&](auto v) INLINE_LAMBDA {
      const int64_t row = tile.rows[c];
      const ByteVec whole = MIDDLE_LATER ? subtract_int(sums[c][v], middle_of(x, row)) : sums[c][v];
      const VecF scale = multiply(repeat_float(x.scales[row]), load_floats(panel.scales + v * INTS));
      totals[c][v] = multiply(to_floats(whole), scale);
    });
  });
  for (int64_t i = 0; i < w.outliers; ++i) {
    const float* weights = panel.outliers + i * PANEL_ROWS;
    const VecF low = load_floats(weights), high = load_floats(weights + INTS);
    unroll<PANEL_COLS>([&](auto c) INLINE_LAMBDA {
      const VecF value = repeat_float(x.outliers[tile.rows[c] * w.outliers + i]);
      totals[c][0] = multiply_add(low, value, totals[c][0]);
      totals[c][1] = multiply_add(high, value, totals[c][1]);
    });
  }
  unroll<PANEL_COLS>([&](auto c) INLINE_LAMBDA {
    if (m + c >= x.rows) return;
    float* to = out + (m + c) * stride;
    store_some(to, totals[c][0], count);
    if (count > INTS) store_some(to + INTS, totals[c][1], count - INTS);
  });
}

// Many rows of x against rows [begin, end), a panel at a time.
void multiply_many(const Weight& w, const ByteRows& rows, const Bytes& x, int64_t begin, int64_t end, float* out,
                   int64_t stride) {
  const int64_t groups = (w.cols + GROUP - 1) / GROUP;
  const Scratch scratch(static_cast<size_t>((groups + w.outliers + 1) * PANEL_ROWS) * 4);
  Panel panel;
  panel.codes = reinterpret_cast<int32_t*>(scratch.data);
  panel.outliers = reinterpret_cast<float*>(panel.codes + groups * PANEL_ROWS);
  panel.scales = panel.outliers + w.outliers * PANEL_ROWS;
  for (int64_t row = begin; row < end; row += PANEL_ROWS) {
    panel.fill(w, rows, row, end);
    const int64_t count = end - row < PANEL_ROWS ? end - row : PANEL_ROWS;
    for (int64_t m = 0; m < x.rows; m += PANEL_COLS) {
      const Tile tile(x, m);
      Sums sums = {};
      add_panel(panel, tile, w.cols, sums);
      finish_panel(w, panel, x, tile, sums, m, out + row, stride, count);
    }
  }
}

#endif

void multiply_bytes(const Weight& w, const ByteRows& rows, const Bytes& x, int64_t begin, int64_t end, float* out,
                    int64_t stride) {
#ifdef HAS_PANELS
  if (x.rows >= MANY) return multiply_many(w, rows, x, begin, end, out, stride);
#endif
  multiply_few(w, rows, x, begin, end, out, stride);
}

}  // namespace
}  // namespace kbit
