// 8-bit codes of whole rows times int8 x, summed in int32: the integer half of LLM.int8().
//
// Each set defines, before it includes this, BYTES (of a vector), MIDDLE_LATER (whether `add_products` takes
// codes as they stand, so that 127 times the sum of x is subtracted in the end), `bytes_at`, `add_products`
// and `sum_ints`. Sums may wrap on the way; up to BYTES_MOST features the result does not.
#pragma once

#include "scalar.h"

namespace kbit {
namespace {

constexpr int BYTE_ROWS = 4;  // of a weight, and of x: what a tile keeps in registers
constexpr int BYTE_COLS = 2;

void multiply_bytes(const Weight& w, const Bytes& x, int64_t begin, int64_t end, int32_t* out, int64_t stride) {
  const int64_t whole = w.cols / BYTES * BYTES;
  for (int64_t row = begin; row < end; row += BYTE_ROWS) {
    const uint8_t* codes[BYTE_ROWS];  // past the end: the last one again, for nothing
    for (int r = 0; r < BYTE_ROWS; ++r) codes[r] = w.planes + (row + r < end ? row + r : end - 1) * w.row_bytes;
    for (int64_t m = 0; m < x.rows; m += BYTE_COLS) {
      const int8_t* values[BYTE_COLS];
      for (int c = 0; c < BYTE_COLS; ++c) values[c] = x.values + (m + c < x.rows ? m + c : x.rows - 1) * x.apart;
      ByteVec sums[BYTE_ROWS][BYTE_COLS] = {};
      for (int64_t i = 0; i < whole; i += BYTES) {
        unroll<BYTE_ROWS>([&](auto r) INLINE_LAMBDA {
          const ByteVec row_codes = bytes_at(codes[r] + i);
          unroll<BYTE_COLS>([&](auto c) INLINE_LAMBDA {
            sums[r][c] = add_products(sums[r][c], row_codes, bytes_at(values[c] + i));
          });
        });
      }
      for (int r = 0; r < BYTE_ROWS && row + r < end; ++r) {
        for (int c = 0; c < BYTE_COLS && m + c < x.rows; ++c) {
          uint32_t total = static_cast<uint32_t>(sum_ints(sums[r][c]));
          if (MIDDLE_LATER) total -= static_cast<uint32_t>(MIDDLE * x.sums[m + c]);
          for (int64_t i = whole; i < w.cols; ++i) {
            const int code = MIDDLE_LATER ? codes[r][i] : codes[r][i] - MIDDLE;
            total += static_cast<uint32_t>(code * values[c][i]);
          }
          out[(m + c) * stride + row + r - begin] = static_cast<int32_t>(total);
        }
      }
    }
  }
}

}  // namespace
}  // namespace kbit
