// What a kernel set offers, and the plain structures that it works on. No ATen here: the files
// that are compiled for one instruction set include nothing that another file might share with them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kbit {

constexpr int64_t CHUNK = 256;  // codes that are packed together (kbitc/packing.py)
constexpr int64_t SCALE_GROUP = 256;  // double-quantized scales that share a constant
constexpr int64_t AHEAD = 6144;  // bytes by which packed rows are fetched into the L2 cache before they are read
constexpr int64_t X_ROWS = 8;  // rows of x that may lie interleaved
constexpr int MIDDLE = 127;  // the 8-bit code of level 0 of `int8`
constexpr int64_t BYTES_MOST = 133000;  // features that int32 can sum: 127 * 127 * BYTES_MOST < 2^31
constexpr int64_t TABLE_MAX = 16383;  // largest level of a codebook as an integer, `Weight::most`
constexpr int64_t VALUE_MAX = 32767;  // largest value of x as an integer

// How one row of x meets the codes. Several rows take `table`.
enum class Mode : int {
  table,  // 16-bit levels times 16-bit x
  affine,  // the codes themselves times x as high and low bytes
  half,  // levels assembled as float16 bit patterns, times x in float32
};

enum class Type : int { none, f32, f16, bf16, code };

// A 2-D packed weight, or one expert of a 3-D one.
struct Weight {
  const uint8_t* planes;
  const void* scales;  // (rows, blocks); `code` is the 8-bit code of a double-quantized scale
  const void* zeros;
  const float* codebook;
  const float* scale_codebook;
  const float* scale_absmax;
  const void* outlier_values;  // (rows, outliers)
  const int32_t* outlier_index;
  int64_t rows, cols, blocks, row_bytes, outliers;
  int64_t first_scale;  // position of scale (0, 0) in the whole tensor: double quantization counts from there
  int64_t block;
  int bits, levels;
  int most;  // what the largest level is as an integer, at most TABLE_MAX
  Type scale_type, zero_type, outlier_type;
  float scale_mean;
};

// Weights and values of x that share a scale inside integer dot products.
inline int64_t granule_of(const Weight& w) { return w.block % 64 == 0 ? 64 : 32; }

// How a weight's codes become numbers inside integer dot products.
struct Table {
  alignas(64) int16_t value[256];  // codebook / unit, rounded
  float unit;
  bool is_affine;  // codebook[i] = step * i + first, up to rounding
  bool has_bytes;  // codebook[i] is nearly step * byte[i] + first; so it is where codebooks are affine
  float step, first;
  uint8_t byte[8];  // of codebooks of at most 3 bits; i where they are affine
  int exponent;  // bits of it where levels are a small float's, so that float16 patterns hold them; or 0
  float half_unit;  // codebook[zero + r] = half_unit * float16(r << (11 - bits + exponent))
};

// Rows of x, quantized block by block in the order in which the kernel visits codes.
struct Activation {
  // Why a row takes a second look (bindings_linear.h): integers under one scale a granule do not hold all of it.
  static constexpr uint8_t COARSE = 1;  // beside the peaks of their granules the other values keep few bits
  static constexpr uint8_t EXTREME = 2;  // not finite, or so large or small that products leave float32
  // (rows up to a multiple of X_ROWS, chunks * 256); affine: pairs of int8 vectors (high, low); half: floats
  int16_t* values;
  float* scales;  // (rows, segments): one for each `granule` weights
  float* sums;  // (rows, blocks): sum of x over the block
  float* outliers;  // (rows, outliers)
  uint8_t* unusual;  // (rows): 0, COARSE or EXTREME
  int64_t rows, segments, granule;
  Mode mode;
};

// Rows of x, each as int8 under one scale.
struct Bytes {
  void* values;  // (rows, apart), integers of the set's `value_bytes`; outlier features are zero
  int32_t* sums;  // (rows): of the values
  float* scales;  // (rows)
  float* outliers;  // (rows, outliers)
  int64_t rows, cols, apart;  // `apart`: at least `cols`, a multiple of 4
};

// What multiplies the codes of a weight's rows.
struct ByteRows {
  const float* scales;  // (rows): of a step
  const float* outliers;  // (rows, outliers)
};

// The boundaries between the levels of a codebook, and a grid over [-1, 1] that finds them quickly.
struct Encoder {
  static constexpr int MOST_CELLS = 1 << 13;
  float bound[255];  // midpoints, rounded down: a value of exactly this size belongs to the lower code
  int bounds;
  int cells;
  bool is_apart;  // at most one boundary a cell, which `edge` holds
  uint8_t base[MOST_CELLS + 2];  // boundaries in the cells below
  float edge[MOST_CELLS + 1];
};

inline int32_t cell_of(float value, int cells) {
  const float scaled = (value + 1.0f) * (static_cast<float>(cells) / 2);
  const float most = static_cast<float>(cells);
  return static_cast<int32_t>(scaled > 0.0f ? (scaled < most ? scaled : most) : 0.0f);
}

// A strip of columns that get their codes one after another; `columns` by `rows` all but where it says otherwise.
struct Strip {
  const float* given;  // feedback: the values wanted; descent: the slopes
  const float* start;  // descent: the values so far; null for feedback
  const float* passes;  // (columns, columns): [j, i] is what column i passes on to a later j, [i, i] its own
  const int64_t* block;  // (columns): -1 of a kept one
  const float* scales;  // (all blocks, rows)
  const float* inverse;
  const float* zeros;  // null without
  const float* codebook;  // one more than bounds
  float bound[255];  // infinite after the last
  int bounds;
  Type kept;
  int64_t columns, rows;
  uint8_t* codes;
  float* values;
  float* changes;
};
constexpr int64_t STRIP_ROWS_MOST = 128;  // rows of a strip that are worked on at a time

struct Kernels {
  const char* name;
  // Whether blocks of this size can use integer dot products; what cannot goes through `decode`.
  bool (*is_fast)(const Weight& weight);
  // What suits one row of x.
  Mode (*mode)(const Weight& weight, const Table& table);
  // Quantize rows [begin, end) of x, outlier features already set to zero; `x` is row `begin`.
  void (*prepare)(const Weight& weight, const float* x, int64_t begin, int64_t end, Activation& out);
  // out[r - begin] for r in [begin, end): one row of x.
  void (*gemv)(const Weight& weight, const Table& table, const Activation& x, int64_t begin, int64_t end,
               float* out);
  // out[m * stride + r - begin] for r in [begin, end) and every row m of x, at least two.
  void (*gemm)(const Weight& weight, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
               int64_t stride);
  int64_t value_bytes;  // of an integer in `Bytes`
  // Row m of x, outlier features already set to zero, to int8.
  void (*round_bytes)(const float* x, int64_t m, Bytes& out);
  // out[m * stride + r] for r in [begin, end) and every row m of x: products with 8-bit codes, and with outliers.
  void (*multiply_bytes)(const Weight& weight, const ByteRows& rows, const Bytes& x, int64_t begin, int64_t end,
                         float* out, int64_t stride);
  // Row `row` as `cols` floats, outlier columns in place: codebook[code] * scale + zero.
  void (*decode)(const Weight& weight, int64_t row, float* out);
  float (*dot)(const float* a, const float* b, int64_t count);
  // The inverse: one row of floats to packed codes.
  void (*encode)(const Encoder& encoder, const float* x, const float* scales, const float* zeros, int64_t cols,
                 int64_t block, int bits, uint8_t* out);
  // Scales (and zeros, unless null) of one row that fit best by weighted squared error, from first ones.
  void (*search)(const Encoder& encoder, const float* levels, const float* x, const float* weight, int64_t cols,
                 int64_t block, const float* ratios, int64_t candidates, int rounds, float* scales, float* zeros);
  // Codes, values and changes of a strip; `scratch` holds (columns, STRIP_ROWS_MOST), at a multiple of 64 bytes.
  void (*round_strip)(const Strip& strip, float* scratch);
};

// The parts of the vector sets that are compiled in files of their own.
void add_avx2_gemv(Kernels& set);
void add_avx2_rounding(Kernels& set);
void add_avx512_gemv(Kernels& set);
void add_avx512_rounding(Kernels& set);

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace kbit
