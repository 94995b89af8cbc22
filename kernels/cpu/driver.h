// The loops that the vector kernel sets share. Included once by each of them, after its primitives:
//
//   LANES             16-bit lanes of a vector
//   STEP, STEPS       codes that are unpacked together, and how many of these make a chunk
//   Vec, VecF         a vector of integers, of floats
//   Lut<K>            the 16-bit table of a k-bit weight in registers
//   natural(K, s, b)  natural position, within a chunk, of byte b of step s
//   place(K, i)       byte of a step that becomes 16-bit lane i of its two vectors
//   codes<K, S>(p)    step S of a packed chunk, as bytes whose bits above k may be dirty
//   lookup(lut, c, v) bytes to two vectors of 16-bit table values
//   mul_add(acc, a, b), add_scaled(sum, acc, scales), sum_lanes, scale_pair...
//
// Equations (row r, block b): out[r] = unit * sum_b scale[r, b] * xscale[b] * (sum_j T[code_j] * q_j)
//                                      + sum_b zero[r, b] * sum_{j in b} x_j + outliers
#pragma once

namespace kbit {
namespace {

// Memory that a kernel needs for the duration of a call.
struct Scratch {
  explicit Scratch(size_t bytes) : data(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data;
};

inline int64_t chunk_count(const Weight& w) { return (w.cols + CHUNK - 1) / CHUNK; }

inline bool is_fast_weight(const Weight& w) { return w.block % 32 == 0; }

inline int64_t granule_of(const Weight& w) { return w.block % 64 == 0 ? 64 : 32; }

// x, quantized ---------------------------------------------------------------------------------

// One granule of floats to integers within [-largest, largest]; returns the scale. NaN and infinity
// must reach the output: a scale of NaN times anything is NaN.
inline float quantize_granule(const float* x, int64_t count, int64_t granule, float largest, int32_t* out) {
  alignas(64) float padded[64];
  if (count < granule) {
    for (int64_t i = 0; i < granule; ++i) padded[i] = i < count ? x[i] : 0.0f;
    x = padded;
  }
  float peak, nan;
  find_peak(x, granule, &peak, &nan);
  const float inverse = peak > 0.0f ? largest / peak : 0.0f;
  const bool is_usable = nan == 0.0f && inverse <= 3.0e38f;  // else: NaN, or nothing but sub-normals
  round_scaled(x, granule, is_usable ? inverse : 0.0f, out);
  if (nan != 0.0f) return nan;
  return is_usable ? peak / largest : 0.0f;
}

template <int K>
void prepare_rows(const Weight& w, const float* x, int64_t begin, int64_t end, Activation& out) {
  const int64_t chunks = chunk_count(w);
  const float largest = out.mode == Mode::affine ? AFFINE_MAX : static_cast<float>(TABLE_MAX);
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
    for (int64_t b = 0; b < w.blocks; ++b) sums[b] = 0.0f;
    if (out.mode == Mode::half) {
      float* values = reinterpret_cast<float*>(out.values) + m * chunks * CHUNK;
      for (int64_t i = 0; i < chunks * CHUNK; ++i) values[i] = i < w.cols ? row[i] : 0.0f;
      for (int64_t i = 0; i < w.cols; ++i) sums[i / w.block] += row[i];
      for (int64_t j = 0; j < out.segments; ++j) out.scales[m * out.segments + j] = 1.0f;
      continue;
    }
    for (int64_t c = 0; c < chunks; ++c) {
      alignas(64) int32_t q[CHUNK];
      const int64_t first = c * CHUNK;
      for (int64_t g = 0; g < CHUNK; g += out.granule) {
        const int64_t at = first + g;
        const int64_t left = w.cols - at;
        const int64_t here = left < 0 ? 0 : (left < out.granule ? left : out.granule);
        const float scale = quantize_granule(row + (here > 0 ? at : 0), here, out.granule, largest, q + g);
        out.scales[m * out.segments + at / out.granule] = scale;
        if (here == 0) continue;
        if (out.mode == Mode::affine) {  // of the quantized x, so that codes minus their middle cancel exactly
          int32_t total = 0;
          for (int64_t i = 0; i < out.granule; ++i) total += q[g + i];
          sums[at / w.block] += static_cast<float>(total) * scale;
        } else {
          float total = 0.0f;
          for (int64_t i = 0; i < here; ++i) total += row[at + i];
          sums[at / w.block] += total;
        }
      }
      int16_t* to = out.values + (m * chunks + c) * CHUNK;
      if (out.mode == Mode::affine) {
        split_bytes(q, from, reinterpret_cast<int8_t*>(to));
      } else {
        for (int i = 0; i < CHUNK; ++i) to[i] = static_cast<int16_t>(q[from[i]]);
      }
    }
  }
}

// Scales ---------------------------------------------------------------------------------------

// Scales of consecutive rows as floats. Several rows at a time, so that what is written has left the
// store buffer when the dot products read it.
class ScaleReader {
 public:
  explicit ScaleReader(const Weight& weight) : w_(weight), table_(weight) {}

  // `out` needs room for (count, blocks) floats and a step more.
  INLINE void read(int64_t row, int64_t count, float* out) const {
    const int64_t at = row * w_.blocks;
    const int64_t total = count * w_.blocks;
    if (w_.scale_type != Type::code) {
      read_numbers(w_.scales, w_.scale_type, at, total, out);
      return;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(w_.scales) + at;
    const int64_t first = w_.first_scale + at;
    const int64_t safe = w_.rows * w_.blocks - at;  // bytes from `codes` to the end
    for (int64_t i = 0; i < total;) {
      const int64_t group = (first + i) / SCALE_GROUP;
      const int64_t end = (group + 1) * SCALE_GROUP - first;
      const int64_t stop = end < total ? end : total;
      table_.read(codes + i, stop - i, safe - i, w_.scale_absmax[group], w_.scale_mean, out + i);
      i = stop;
    }
  }

 private:
  const Weight& w_;
  const ScaleTable table_;
};

// The scale of each granule of one row of the weight, times `x` where given; zero past the end.
inline void spread_scales(const Weight& w, const float* scales, const float* x, int64_t granule,
                          int64_t segments, float* out) {
  const int64_t valid = (w.cols + granule - 1) / granule;
  const int64_t ratio = w.block / granule;
  if (ratio == 1 && x != nullptr) {
    multiply_floats(scales, x, valid, out);
  } else if (ratio == 2 && x != nullptr) {
    const int64_t pairs = valid / 2;
    for (int64_t b = 0; b < pairs; ++b) {
      out[2 * b] = scales[b] * x[2 * b];
      out[2 * b + 1] = scales[b] * x[2 * b + 1];
    }
    if (valid % 2 != 0) out[valid - 1] = scales[pairs] * x[valid - 1];
  } else {
    for (int64_t b = 0, j = 0; b < w.blocks; ++b) {
      const int64_t stop = j + ratio < valid ? j + ratio : valid;
      for (; j < stop; ++j) out[j] = x == nullptr ? scales[b] : scales[b] * x[j];
    }
  }
  for (int64_t j = valid; j < segments; ++j) out[j] = 0.0f;
}

// Dot product of stored 16- or 32-bit numbers with floats.
inline float dot_numbers(const void* data, Type type, int64_t at, const float* x, int64_t count) {
  if (type == Type::f16) return dot_halves(static_cast<const uint16_t*>(data) + at, x, count);
  float values[256];
  float total = 0.0f;
  for (int64_t i = 0; i < count; i += 256) {
    const int64_t here = count - i < 256 ? count - i : 256;
    read_numbers(data, type, at + i, here, values);
    total += dot_floats(values, x + i, here);
  }
  return total;
}

// One row of x ---------------------------------------------------------------------------------

template <int K>
struct PackedCodes {
  const uint8_t* at;
  INLINE Vec operator()(int step) const { return codes<K>(at, step); }
};
template <int K>
struct RolledCodes {
  const uint8_t* at;
  INLINE Vec operator()(int step) const { return codes_at<K>(at, step); }
};

// sum += scale of each unit * (its codes' values times x), over the first `steps` steps of a chunk.
template <int K, Mode MODE, int G, class Codes>
INLINE VecF multiply_codes(const Lut<K>& lut, const Codes& codes, int steps, const int16_t* x, const float* scales,
                           VecF sum) {
  constexpr int PER_UNIT = G == 64 ? 2 : 1;
  const auto multiply_unit = [&](auto u) INLINE_LAMBDA {
    const int first = u * PER_UNIT;
    if (first >= steps) return;
    const VecF scale = unit_scale<K, G>(scales, u);
    if constexpr (MODE == Mode::half) {
      VecF part = zero_float();
      unroll<PER_UNIT>([&](auto i) INLINE_LAMBDA {
        part = multiply_halves<K>(lut, codes(first + i), reinterpret_cast<const float*>(x) + (first + i) * STEP, part);
      });
      sum = multiply_add(part, scale, sum);
    } else if constexpr (MODE == Mode::affine) {
      const Vec second = PER_UNIT == 2 ? clean<K>(codes(first + PER_UNIT - 1)) : zero();
      const int8_t* bytes = reinterpret_cast<const int8_t*>(x + first * STEP);
      sum = add_scaled(sum, affine_unit<K, PER_UNIT>(clean<K>(codes(first)), second, bytes), scale);
    } else {
      Vec acc = zero();
      Vec c[PER_UNIT], v[PER_UNIT][2];
      unroll<PER_UNIT>([&](auto i) INLINE_LAMBDA { c[i] = codes(first + i); });
      lookup_several<K, PER_UNIT>(lut, c, v);
      unroll<PER_UNIT>([&](auto i) INLINE_LAMBDA {
        acc = mul_add(acc, v[i][0], load(x + (first + i) * STEP));
        acc = mul_add(acc, v[i][1], load(x + (first + i) * STEP + LANES));
      });
      sum = add_scaled(sum, acc, scale);
    }
  };
  if constexpr (K >= ROLLED_FROM && MODE == Mode::table) {
    for (int u = 0; u < STEPS / PER_UNIT; ++u) multiply_unit(u);
  } else {
    unroll<STEPS / PER_UNIT>(multiply_unit);
  }
  return sum;
}

// R rows of the weight, `apart` from each other, so that x is loaded once for all of them while each is
// read as a stream of its own.
template <int K, Mode MODE, int G, int R>
INLINE void gemv_tile(const Weight& w, const Lut<K>& lut, const Tail<K>& tail, const Activation& x, int64_t row,
                      int64_t apart, int64_t end, const float* spread, float* out) {
  constexpr int WIDTH = MODE == Mode::half ? 2 : 1;  // of a value of x, in 16-bit words
  const int64_t full = w.cols / CHUNK;
  int64_t rows[R];  // past the end: the last one again, for nothing
  unroll<R>([&](auto r) INLINE_LAMBDA { rows[r] = row + r * apart < end ? row + r * apart : end - 1; });
  VecF sum[R];
  unroll<R>([&](auto r) INLINE_LAMBDA { sum[r] = zero_float(); });
  for (int64_t c = 0; c < full; ++c) {
    using Codes = std::conditional_t<(K >= ROLLED_FROM && MODE == Mode::table), RolledCodes<K>, PackedCodes<K>>;
    unroll<R>([&](auto r) INLINE_LAMBDA {
      const Codes codes{w.planes + rows[r] * w.row_bytes + c * K * (CHUNK / 8)};
      prefetch(codes.at, K * (CHUNK / 8));
      const float* here = spread + r * apart * x.segments + c * (CHUNK / G);
      sum[r] = multiply_codes<K, MODE, G>(lut, codes, STEPS, x.values + c * CHUNK * WIDTH, here, sum[r]);
    });
  }
  if (w.cols % CHUNK != 0) {
    unroll<R>([&](auto r) INLINE_LAMBDA {
      const auto codes = tail.read(w.planes + rows[r] * w.row_bytes + full * K * (CHUNK / 8));
      const float* here = spread + r * apart * x.segments + full * (CHUNK / G);
      sum[r] = multiply_codes<K, MODE, G>(lut, codes, tail.steps, x.values + full * CHUNK * WIDTH, here, sum[r]);
    });
  }
  for (int r = 0; r < R && row + r * apart < end; ++r) out[r * apart] = sum_lanes(sum[r]);
}

inline void add_outliers(const Weight& w, const float* x, int64_t begin, int64_t end, float* out) {
  for (int64_t row = begin; row < end; ++row) {
    out[row - begin] += dot_numbers(w.outlier_values, w.outlier_type, row * w.outliers, x, w.outliers);
  }
}

template <int K, Mode MODE, int G>
void gemv_rows(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out) {
  constexpr int R = 2;
  const int64_t fitting = 2048 / (w.blocks + x.segments) / R * R;  // rows whose scales stay in the L1 cache
  const int64_t batch = fitting < R ? R : (fitting > 32 ? 32 : fitting);
  const Scratch scratch(sizeof(float) * static_cast<size_t>(batch * (w.blocks + x.segments) + STEP));
  float* spread = reinterpret_cast<float*>(scratch.data);  // (batch, segments)
  float* scales = spread + batch * x.segments;  // (batch, blocks) and a step
  const ScaleReader reader(w);
  const Lut<K> lut(table);
  const Tail<K> tail(w.cols % CHUNK);
  const float unit = MODE == Mode::affine ? table.step : (MODE == Mode::half ? table.half_unit : table.unit);
  for (int64_t row = begin; row < end; row += batch) {
    const int64_t count = row + batch < end ? batch : end - row;
    float* here = out + row - begin;
    reader.read(row, count, scales);
    for (int64_t r = 0; r < count; ++r) {
      spread_scales(w, scales + r * w.blocks, x.scales, G, x.segments, spread + r * x.segments);
    }
    const int64_t apart = (count + R - 1) / R;
    for (int64_t r = 0; r < apart; ++r) {
      gemv_tile<K, MODE, G, R>(w, lut, tail, x, row + r, apart, row + count, spread + r * x.segments, here + r);
    }
    for (int64_t r = 0; r < count; ++r) {
      here[r] *= unit;
      if (MODE == Mode::affine) here[r] += table.first * dot_floats(scales + r * w.blocks, x.sums, w.blocks);
      if (w.zero_type != Type::none) {
        here[r] += dot_numbers(w.zeros, w.zero_type, (row + r) * w.blocks, x.sums, w.blocks);
      }
    }
  }
  if (w.outliers > 0) add_outliers(w, x.outliers, begin, end, out);
}

// Several rows of x ----------------------------------------------------------------------------

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
      prefetch(packed, K * (CHUNK / 8));
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
        prefetch(packed, K * (CHUNK / 8));
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

#define KBIT_BY_BITS(bits, call) \
  switch (bits) {                \
    case 2: { constexpr int K = 2; call; break; } \
    case 3: { constexpr int K = 3; call; break; } \
    case 4: { constexpr int K = 4; call; break; } \
    case 5: { constexpr int K = 5; call; break; } \
    case 6: { constexpr int K = 6; call; break; } \
    case 7: { constexpr int K = 7; call; break; } \
    default: { constexpr int K = 8; call; break; } \
  }

void prepare(const Weight& w, const float* x, int64_t begin, int64_t end, Activation& out) {
  KBIT_BY_BITS(w.bits, prepare_rows<K>(w, x, begin, end, out));
}

Mode mode(const Weight& w, const Table& table) {
  if (table.is_affine) return Mode::affine;
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

void gemm(const Weight& w, const Table& table, const Activation& x, int64_t first, int64_t count, int64_t begin,
          int64_t end, float* out, int64_t stride) {
  if (x.granule == 64) {
    gemm_of<64>(w, table, x, first, count, begin, end, out, stride);
  } else {
    gemm_of<32>(w, table, x, first, count, begin, end, out, stride);
  }
}

void decode(const Weight& w, int64_t row, float* out) { KBIT_BY_BITS(w.bits, decode_row<K>(w, row, out)); }

}  // namespace
}  // namespace kbit
