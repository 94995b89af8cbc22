// The loops that the vector kernel sets share. Included once by each of them, after its primitives:
//
//   LANES             16-bit lanes of a vector
//   STEP, STEPS       codes that are unpacked together, and how many of these make a chunk
//   Vec, VecF         a vector of integers, of floats
//   Lut<K>            the 16-bit table of a k-bit weight in registers
//   natural(K, s, b)  natural position, within a chunk, of byte b of step s
//   place(K, i)       byte of a step that becomes 16-bit lane i of its two vectors
//   codes<K>(p, s)    step s of a packed chunk, as bytes whose bits above k may be dirty
//   Levels<K, MODE>   what a product with one row of x reads levels from
//   TOGETHER<K, MODE> how many rows of the weight such a product takes at once
//   multiply_unit     levels of one unit of these rows (the codes that share a scale) times x
//   FullCodes<K, M>   codes of a whole chunk of a row; Tail<K>: those of the last one, which is shorter
//   PAST_END          whether a step may take in granules past the end of a row, whose scales are then 0
//   HAS_SHORT         whether ShortCodes<K, 8> and <K, 16> read last chunks of so many lanes in registers
//   TAKES_BYTES       whether 2-bit codebooks may be read as `Table::byte`
//   add_scaled(sum, acc, scales), multiply_add, sum_lanes, dot_lanes, load_floats, ...
//   to_eight          lanes that are summed later, of which eight remain
//
// and, of the headers matmul_*.h, which say in what order several rows of x lie, those that it takes for so many:
//
//   gemm
//   largest_of_many(w, out, x, peak, n)  the largest integer that one of n floats may become
//   put_values(q, from, m, c, ...)       integers of row m, chunk c to their places; from[i]: what a row by itself
//                                        has at place i
//
// Equations (row r, block b): out[r] = unit * sum_b scale[r, b] * xscale[b] * (sum_j T[code_j] * q_j)
//                                      + sum_b zero[r, b] * sum_{j in b} x_j + outliers
#pragma once

#include "transpose.h"
#include "weights.h"

namespace kbit {
namespace {

// x, quantized ---------------------------------------------------------------------------------

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

// One row of x ---------------------------------------------------------------------------------

// sums += scale of each unit * (levels of its codes times x) over the first `steps` steps of a chunk of R rows.
template <int K, Mode MODE, int G, int R, class Codes, class Steps>
INLINE void multiply_codes(const Levels<K, MODE>& levels, const Codes* rows, Steps steps, const int16_t* x,
                           const float* const* scales, VecF* sums) {
  constexpr int PER_UNIT = G == 64 ? 2 : 1;
  const auto multiply = [&](auto u) INLINE_LAMBDA {
    if (u * PER_UNIT < steps) multiply_unit<K, MODE, G, R>(levels, rows, u, x, scales, sums);
  };
  if constexpr (K >= ROLLED_FROM && MODE == Mode::table) {
    for (int u = 0; u < STEPS / PER_UNIT; ++u) multiply(u);
  } else {
    unroll<STEPS / PER_UNIT>(multiply);
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

template <int K, Mode MODE, int G>
void gemv_rows(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out) {
  constexpr int R = TOGETHER<K, MODE>;
  constexpr bool HAS_FIRST = MODE == Mode::affine;
  const bool is_direct = w.block == G;  // each granule has a scale of its own
  const bool has_rest = HAS_FIRST || w.zero_type != Type::none;
  const int64_t stride = (x.segments + SUMMED - 1) / SUMMED * SUMMED;
  const int64_t fitting = 2048 / (w.blocks + stride);  // rows whose scales stay in the L1 cache
  const int64_t batch = fitting < SUMMED ? SUMMED : (fitting > 32 ? 32 : fitting / SUMMED * SUMMED);
  const Scratch scratch(sizeof(VecF) * static_cast<size_t>(batch) +
                        sizeof(float) * static_cast<size_t>(batch * (w.blocks + stride) + 2 * STEP));
  VecF* rest = reinterpret_cast<VecF*>(scratch.data);  // (batch): what is not a product of codes
  float* spread = reinterpret_cast<float*>(rest + batch);  // (batch, stride) and a step
  float* scales = spread + batch * stride + STEP;  // (batch, blocks) and a step
  const ScaleReader reader(w);
  const Levels<K, MODE> levels(table);
  const Tail<K> tail(w.cols % CHUNK);
  const VecF unit = repeat_float(HAS_FIRST ? table.step : (MODE == Mode::half ? table.half_unit : table.unit));
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
        spread_scales(w, here, x.scales, G, x.segments, spread + r * stride);
      }
      if (!has_rest) continue;
      rest[r] = HAS_FIRST ? multiply(dot_lanes(here, x.sums, w.blocks), level_0) : zero_float();
      if (w.zero_type != Type::none) {
        rest[r] = add(rest[r], dot_numbers(w.zeros, w.zero_type, (row + r) * w.blocks, x.sums, w.blocks));
      }
    }
    for (int64_t r = 0; r < count; r += SUMMED) {
      __m256 sums[SUMMED] = {};
      const int64_t here = count - r < SUMMED ? count - r : SUMMED;
      reader.fetch(row + batch + r, here);  // of the next batch, so that none waits for them
      const auto multiply_some = [&](int64_t i, auto some) INLINE_LAMBDA {
        VecF lanes[some];
        multiply_rows<K, MODE, G, some>(w, levels, tail, x, row + r + i, spread + (r + i) * stride, stride, lanes);
        for (int j = 0; j < some; ++j) {
          const VecF scaled = multiply(lanes[j], unit);
          sums[i + j] = to_eight(has_rest ? add(scaled, rest[r + i + j]) : scaled);
        }
      };
      int64_t i = 0;
      for (; i + R <= here; i += R) multiply_some(i, Constant<R>{});
      for (; i < here; ++i) multiply_some(i, Constant<1>{});
      put_sums(sums, here, out + row + r - begin);
    }
  }
  if (w.outliers > 0) add_outliers(w, x.outliers, begin, end, out);
}

// Floats ---------------------------------------------------------------------------------------

template <int K>
void decode_row(const Weight& w, int64_t row, float* out) {
  const Scratch scratch(sizeof(float) * static_cast<size_t>(2 * w.blocks));
  float* scales = reinterpret_cast<float*>(scratch.data);
  float* zeros = scales + w.blocks;
  if (w.scale_type == Type::code) {
    for (int64_t b = 0; b < w.blocks; ++b) scales[b] = read_scale(w, row, b);
  } else {
    read_numbers(w.scales, w.scale_type, row * w.blocks, w.blocks, scales);
  }
  if (w.zero_type != Type::none) read_numbers(w.zeros, w.zero_type, row * w.blocks, w.blocks, zeros);
  const uint8_t* packed = w.planes + row * w.row_bytes;
  alignas(64) uint8_t bytes[CHUNK];
  for (int64_t at = 0; at < w.cols; at += CHUNK, packed += K * (CHUNK / 8)) {
    const int64_t count = w.cols - at < CHUNK ? w.cols - at : CHUNK;
    if (count == CHUNK) {
      for (int s = 0; s < STEPS; ++s) {
        const Vec c = clean<K>(codes<K>(packed, s));
        for (int half = 0; half < STEP / 32; ++half) store_half(bytes + natural(K, s, 32 * half), c, half);
      }
    } else {
      unpack_chunk(packed, count, K, bytes);
    }
    for (int64_t i = 0; i < count;) {
      const int64_t b = (at + i) / w.block;
      const int64_t end = (b + 1) * w.block - at;
      const int64_t stop = end < count ? end : count;
      const float zero = w.zero_type == Type::none ? 0.0f : zeros[b];
      scale_codes(w.codebook, bytes + i, stop - i, scales[b], zero, w.zero_type != Type::none, out + at + i);
      i = stop;
    }
  }
  float values[256];
  for (int64_t i = 0; i < w.outliers; i += 256) {
    const int64_t count = w.outliers - i < 256 ? w.outliers - i : 256;
    read_numbers(w.outlier_values, w.outlier_type, row * w.outliers + i, count, values);
    for (int64_t j = 0; j < count; ++j) out[w.outlier_index[i + j]] = values[j];
  }
}

// The table of kernels -------------------------------------------------------------------------

void prepare(const Weight& w, const float* x, int64_t begin, int64_t end, Activation& out) {
  KBIT_BY_BITS(w.bits, prepare_rows<K>(w, x, begin, end, out));
}

Mode mode(const Weight& w, const Table& table) {
  if (table.is_affine || (TAKES_BYTES && table.has_bytes)) return Mode::affine;
  return w.bits >= HALF_FROM && table.exponent != 0 ? Mode::half : Mode::table;
}

template <int G>
void gemv_of(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out) {
  if (x.mode == Mode::affine) {
    KBIT_BY_BITS(w.bits, (gemv_rows<K, Mode::affine, G>(w, table, x, begin, end, out)));
  } else if (x.mode == Mode::half) {
    KBIT_BY_BITS(w.bits, (gemv_rows<K, K >= HALF_FROM ? Mode::half : Mode::table, G>(w, table, x, begin, end, out)));
  } else {
    KBIT_BY_BITS(w.bits, (gemv_rows<K, Mode::table, G>(w, table, x, begin, end, out)));
  }
}

void gemv(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out) {
  if (x.granule == 64) {
    gemv_of<64>(w, table, x, begin, end, out);
  } else {
    gemv_of<32>(w, table, x, begin, end, out);
  }
}

void decode(const Weight& w, int64_t row, float* out) { KBIT_BY_BITS(w.bits, decode_row<K>(w, row, out)); }

}  // namespace
}  // namespace kbit
