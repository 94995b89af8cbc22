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
// holding at most one boundary, answers with two look-ups; where some hold more, a search among those of the cell.
inline void find_codes(const Encoder& e, const float* values, int64_t count, uint8_t* codes) {
  int32_t cell[CHUNK];
  for (int64_t i = 0; i < count; ++i) cell[i] = cell_of(values[i], e.cells);
  if (!e.is_apart) {
    for (int64_t i = 0; i < count; ++i) {
      int low = e.base[cell[i]], high = e.base[cell[i] + 1];
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

// The levels nearest to values, in [-1, 1] units of the codebook.
inline void find_levels(const Encoder& e, const float* levels, const float* values, int64_t count, float* out) {
  if (e.bounds < 16) {  // one comparison a boundary, over whole vectors
    for (int64_t i = 0; i < count; ++i) out[i] = levels[0];
    for (int b = 0; b < e.bounds; ++b) {
      const float bound = e.bound[b], next = levels[b + 1];
      for (int64_t i = 0; i < count; ++i) out[i] = values[i] > bound ? next : out[i];
    }
    return;
  }
  uint8_t codes[CHUNK];
  find_codes(e, values, count, codes);
  for (int64_t i = 0; i < count; ++i) out[i] = levels[codes[i]];
}

// Sums over a block, of weights m, values w and the levels c that they were given.
struct Moments {
  double m = 0, c = 0, cc = 0, w = 0, wc = 0;
};

// The scale (and zero, with HAS_ZERO) that fit best under given levels, and how much of sum(m w^2) they
// explain: weighted least squares in closed form.
struct Fit {
  float scale = 0, zero = 0;
  double gain = 0;
};

template <bool HAS_ZERO>
inline Fit fit_block(const Moments& s) {
  Fit out;
  if constexpr (HAS_ZERO) {
    const double det = s.m * s.cc - s.c * s.c;
    if (!(det > 1e-12 * s.m * s.cc)) return out;
    const double scale = (s.m * s.wc - s.w * s.c) / det;
    const double zero = (s.cc * s.w - s.c * s.wc) / det;
    out = {static_cast<float>(scale), static_cast<float>(zero), scale * s.wc + zero * s.w};
  } else if (s.cc > 0) {
    out = {static_cast<float>(s.wc / s.cc), 0.0f, s.wc * s.wc / s.cc};
  }
  return out;
}

// Assign levels under a scale and a zero, then fit both to them.
template <bool HAS_ZERO>
inline Fit refit(const Encoder& e, const float* levels, const float* x, const float* weight, int64_t count,
                 float scale, float zero) {
  Moments total;
  const float inverse = 1.0f / scale;
  float values[CHUNK], found[CHUNK];
  for (int64_t at = 0; at < count; at += CHUNK) {
    const int64_t here = count - at < CHUNK ? count - at : CHUNK;
    for (int64_t i = 0; i < here; ++i) values[i] = (x[at + i] - zero) * inverse;
    find_levels(e, levels, values, here, found);
    constexpr int LANES = 16;  // independent sums, so that the compiler may use vectors
    float m[LANES] = {}, c[LANES] = {}, cc[LANES] = {}, w[LANES] = {}, wc[LANES] = {};
    const auto add = [&](int64_t i, int lane) {
      const float weighted = weight[at + i] * found[i];
      cc[lane] += weighted * found[i];
      wc[lane] += weighted * x[at + i];
      if constexpr (HAS_ZERO) {  // the scale alone needs none of these
        m[lane] += weight[at + i];
        c[lane] += weighted;
        w[lane] += weight[at + i] * x[at + i];
      }
    };
    int64_t i = 0;
    for (; i + LANES <= here; i += LANES) {
      for (int lane = 0; lane < LANES; ++lane) add(i + lane, lane);
    }
    for (; i < here; ++i) add(i, static_cast<int>(i % LANES));
    for (int lane = 0; lane < LANES; ++lane) {
      total.m += m[lane];
      total.c += c[lane];
      total.cc += cc[lane];
      total.w += w[lane];
      total.wc += wc[lane];
    }
  }
  return fit_block<HAS_ZERO>(total);
}

// The scale and zero of each block of one row: those that candidates lead to after one refit, the best of
// them refitted `rounds` times more. `scales` and `zeros` hold the first candidate: absmax and middle.
template <bool HAS_ZERO>
void search_row(const Encoder& e, const float* levels, const float* x, const float* weight, int64_t cols,
                int64_t block, const float* ratios, int64_t candidates, int rounds, float* scales, float* zeros) {
  for (int64_t b = 0, at = 0; at < cols; ++b, at += block) {
    const int64_t count = cols - at < block ? cols - at : block;
    const float first = scales[b], middle = HAS_ZERO ? zeros[b] : 0.0f;
    if (first == 0.0f || !std::isfinite(1.0f / first)) continue;
    Fit best;
    const auto consider = [&](const Fit& found) {
      const bool is_better = found.gain > best.gain && found.scale * first > 0.0f && std::isfinite(found.scale) &&
                             std::isfinite(found.zero);
      if (is_better) best = found;
      return is_better;
    };
    for (int64_t k = 0; k < candidates; ++k) {
      consider(refit<HAS_ZERO>(e, levels, x + at, weight + at, count, first * ratios[k], middle));
    }
    for (int r = 0; r < rounds && best.gain > 0; ++r) {
      if (!consider(refit<HAS_ZERO>(e, levels, x + at, weight + at, count, best.scale, best.zero))) break;
    }
    if (best.gain > 0) {
      scales[b] = best.scale;
      if (HAS_ZERO) zeros[b] = best.zero;
    }
  }
}

void search(const Encoder& e, const float* levels, const float* x, const float* weight, int64_t cols, int64_t block,
            const float* ratios, int64_t candidates, int rounds, float* scales, float* zeros) {
  const auto row = zeros == nullptr ? search_row<false> : search_row<true>;
  row(e, levels, x, weight, cols, block, ratios, candidates, rounds, scales, zeros);
}

}  // namespace
}  // namespace kbit
