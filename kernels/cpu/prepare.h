// x to the integers that products take. Included once by each vector set, after its primitives (gemv.h lists them) and
// the headers matmul_*.h, which say in what order several rows of x lie, for those that it takes:
//
//   largest_of_many(w, out, x, peak, n)  the largest integer that one of n floats may become
//   put_values(q, from, m, c, ...)       integers of row m, chunk c to their places; from[i]: what a row by itself
//                                        has at place i
#pragma once

#include "bytes.h"
#include "encode.h"
#include "round.h"
#include "weights.h"

namespace kbit {
namespace {

// One granule of floats to integers within plus or minus largest_of(floats, their peak); returns the scale.
// NaN and infinity must reach the output: a scale of NaN times anything is NaN.
template <class LargestOf>
inline float quantize_granule(const float* x, int64_t granule, const LargestOf& largest_of, float* peak,
                              int32_t* out) {
  float nan;
  find_peak(x, granule, peak, &nan);
  const float largest = largest_of(x, *peak);
  const float inverse = *peak > 0.0f ? largest / *peak : 0.0f;
  const bool is_usable = nan == 0.0f && inverse <= 3.0e38f;  // else: NaN, or nothing but sub-normals
  round_scaled(x, granule, is_usable ? inverse : 0.0f, out);
  if (nan != 0.0f) return *peak = nan;
  return is_usable ? *peak / largest : 0.0f;
}

// Whether a row keeps enough: how large its values are beside what rounding them loses. In granules that one value
// rules, those of more than a sixteenth of it do not count.
class RowCheck {
 public:
  void see(float peak) {
    if (!(peak <= peak_) && peak_ == peak_) peak_ = peak;  // once NaN, always
  }

  void add(const float* x, const int32_t* q, int64_t count, float scale, float peak) {
    see(peak);
    const int32_t most = scale > 0.0f ? static_cast<int32_t>(peak / scale + 0.5f) : 0, bound = most / 16;
    int32_t total = 0, small = 0;  // small: the same sum with no value above a sixteenth of the peak
    for (int64_t i = 0; i < count; ++i) {
      const int32_t size = q[i] < 0 ? -q[i] : q[i];
      total += size;
      small += size < bound ? size : bound;
    }
    const double step = scale, n = static_cast<double>(count);
    if (small >= FINE * count) {
      const double typical = step * (total < 4 * small ? total : 4 * small);  // 4: as of Gaussian values
      error_ += n * n / 12.0 * step * step;
      kept_ += typical * typical;
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      if (16 * (q[i] < 0 ? -q[i] : q[i]) > most) continue;
      const double value = x[i], lost = value - q[i] * step;
      error_ += n * lost * lost;
      kept_ += n * value * value;
    }
  }

  uint8_t verdict() const {
    if (peak_ == 0.0f) return 0;
    if (!(peak_ <= LARGE && peak_ >= 1.0f / LARGE)) return Activation::EXTREME;
    return error_ > MOST * MOST * kept_ ? Activation::COARSE : 0;
  }

 private:
  static constexpr int64_t FINE = 320;  // steps: a value of this size loses less than a thousandth
  static constexpr double MOST = 1e-3;  // of the size of the values, lost
  static constexpr float LARGE = 0x1p64f;  // products with scales, levels and integers fit in float32
  float peak_ = 0.0f;
  double error_ = 0.0, kept_ = 0.0;  // sums of squares, times the values of a granule
};

template <int K>
void prepare_rows(const Weight& w, const float* x, int64_t begin, int64_t end, Activation& out) {
  const int64_t chunks = chunk_count(w);
  const auto largest_of = [&](const float* floats, float peak) {
    if (out.rows > 1) return largest_of_many(w, out, floats, peak, out.granule);
    return out.mode == Mode::affine ? AFFINE_MAX : largest_of_eight(w);
  };
  uint8_t from[CHUNK];  // kernel order to natural order
  for (int s = 0; s < STEPS; ++s) {
    for (int i = 0; i < STEP; ++i) {
      const int byte = out.mode == Mode::affine ? i : place(K, i);
      from[s * STEP + i] = static_cast<uint8_t>(natural(K, s, byte));
    }
  }
  for (int64_t m = begin; m < end; ++m) {
    const float* row = x + (m - begin) * w.cols;
    float* sums = out.sums + m * w.blocks;
    RowCheck check;
    for (int64_t b = 0; b < w.blocks; ++b) sums[b] = 0.0f;
    if (out.mode == Mode::half) {
      float* values = reinterpret_cast<float*>(out.values) + m * chunks * CHUNK;
      for (int64_t i = 0; i < chunks * CHUNK; ++i) values[i] = i < w.cols ? row[i] : 0.0f;
      for (int64_t i = 0; i < w.cols; ++i) sums[i / w.block] += row[i];
      for (int64_t j = 0; j < out.segments; ++j) out.scales[m * out.segments + j] = 1.0f;
      float peak, nan;
      find_peak(values, chunks * CHUNK, &peak, &nan);
      check.see(nan == 0.0f ? peak : nan);
      out.unusual[m] = check.verdict();
      continue;
    }
    for (int64_t c = 0; c < chunks; ++c) {
      alignas(64) int32_t q[CHUNK];
      const int64_t first = c * CHUNK;
      for (int64_t g = 0; g < CHUNK; g += out.granule) {
        const int64_t at = first + g;
        const int64_t left = w.cols - at;
        const int64_t here = left < 0 ? 0 : (left < out.granule ? left : out.granule);
        alignas(64) float padded[64];
        const float* floats = row + at;
        if (here < out.granule) {
          for (int64_t i = 0; i < out.granule; ++i) padded[i] = i < here ? row[at + i] : 0.0f;
          floats = padded;
        }
        float peak;
        const float scale = quantize_granule(floats, out.granule, largest_of, &peak, q + g);
        out.scales[m * out.segments + at / out.granule] = scale;
        if (here == 0) continue;
        int32_t total = 0;  // of the quantized x, so that codes minus their middle cancel exactly
        for (int64_t i = 0; i < out.granule; ++i) total += q[g + i];
        sums[at / w.block] += static_cast<float>(total) * scale;
        check.add(floats, q + g, out.granule, scale, peak);
      }
      int16_t* to = out.values + c * CHUNK;
      if (out.rows > 1) {
        put_values(q, from, m, c, chunks, out);
      } else if (out.mode == Mode::affine) {
        split_bytes(q, from, reinterpret_cast<int8_t*>(to));
      } else {
        for (int i = 0; i < CHUNK; ++i) to[i] = static_cast<int16_t>(q[from[i]]);
      }
    }
    out.unusual[m] = check.verdict();
  }
}

void prepare(const Weight& w, const float* x, int64_t begin, int64_t end, Activation& out) {
  KBIT_BY_BITS(w.bits, prepare_rows<K>(w, x, begin, end, out));
}

// The part of a set that is compiled with this.
void add_rounding(Kernels& set) {
  set.prepare = prepare;
  set.round_bytes = round_bytes;
  set.encode = encode;
  set.search = search;
  set.round_strip = round_strip;
}

}  // namespace
}  // namespace kbit
