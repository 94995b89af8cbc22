// Floats to packed codes. Plain loops, which the compiler vectorizes for each instruction set.
#pragma once

#include "scalar.h"

namespace kbit {
namespace {

// Codes of one chunk, padded with zeros to 8 * lanes, to bytes.
inline void pack_chunk(const uint8_t* codes, int64_t count, int bits, uint8_t* packed) {
  const int64_t lanes = (count + 7) / 8;
  int widths[3];
  const int planes = plane_widths(bits, widths);
  int shift = 0;
  for (int p = 0; p < planes; ++p) {
    const int width = widths[p];
    const int per_byte = 8 / width;
    const int mask = (1 << width) - 1;
    for (int64_t row = 0; row < width; ++row) {
      uint8_t* out = packed + row * lanes;
      for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = 0;
      for (int phase = 0; phase < per_byte; ++phase) {
        const uint8_t* from = codes + (row * per_byte + phase) * lanes;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          out[lane] = static_cast<uint8_t>(out[lane] | (((from[lane] >> shift) & mask) << (phase * width)));
        }
      }
    }
    packed += width * lanes;
    shift += width;
  }
}

// The code of a value in [-1, 1]: how many boundaries between levels lie below it. A grid of cells, each
// holding at most one boundary, answers with two look-ups; boundaries too close for that, a binary search.
inline void find_codes(const Encoder& e, const float* values, int64_t count, uint8_t* codes) {
  if (e.cells == 0) {
    for (int64_t i = 0; i < count; ++i) {
      int low = 0, high = e.bounds;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (e.bound[middle] < values[i]) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      codes[i] = static_cast<uint8_t>(low);
    }
    return;
  }
  int32_t cell[CHUNK];
  for (int64_t i = 0; i < count; ++i) cell[i] = cell_of(values[i], e.cells);
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<uint8_t>(e.base[cell[i]] + (values[i] > e.edge[cell[i]] ? 1 : 0));
  }
}

// One row of `cols` floats (outlier features zero already) to `row_bytes` packed bytes.
void encode(const Encoder& e, const float* x, const float* scales, const float* zeros, int64_t cols, int64_t block,
            int bits, uint8_t* out) {
  float values[CHUNK];
  uint8_t codes[CHUNK];
  for (int64_t at = 0; at < cols; at += CHUNK, out += bits * (CHUNK / 8)) {
    const int64_t count = cols - at < CHUNK ? cols - at : CHUNK;
    for (int64_t i = 0; i < count;) {
      const int64_t b = (at + i) / block;
      const int64_t end = (b + 1) * block - at;
      const int64_t stop = end < count ? end : count;
      // 1 / scale overflows below 3e-39: such a block is nothing but sub-normals, and becomes 0.
      float inverse = scales[b] == 0.0f ? 0.0f : 1.0f / scales[b];
      inverse = std::isfinite(inverse) ? inverse : 0.0f;
      const float zero = zeros == nullptr ? 0.0f : zeros[b];
      for (int64_t j = i; j < stop; ++j) values[j] = (x[at + j] - zero) * inverse;
      i = stop;
    }
    find_codes(e, values, count, codes);
    for (int64_t i = count; i < (count + 7) / 8 * 8; ++i) codes[i] = 0;
    pack_chunk(codes, count, bits, out);
  }
}

}  // namespace
}  // namespace kbit
