// What a step does between its products: a row of floats for each token, one operation at a time; and attention.
// Plain structures, no ATen: compiled once for each instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kbit {

constexpr int DIMS = 4;

enum class Unary : int { copy, neg, square, rsqrt, silu, gelu, gelu_tanh, tanh, relu, sigmoid, cos, sin, exp, sqrt };
enum class Binary : int { add, sub, mul, div };

// An operand of a token: `data[i0 * stride[0] + ... + i3 * stride[3]]`.
struct Strided {
  const float* data;
  int64_t stride[DIMS];
};

struct Shape {
  int64_t size[DIMS];  // 1 where there are fewer dimensions
  int64_t out[DIMS];  // strides of what is written
};

enum class CacheKind : int { f32, f16, packed };

// How packed rows of a cache are read.
struct RowFormat {
  const float* levels;  // 256
  int bits;
  bool is_even;  // levels[i] = first + step * i, up to rounding
  float step, first;
  int64_t block;
  int block_shift;  // column >> block_shift is its block; -1 where blocks are no power of two
};

// Keys, or values, of a cache: of token t and key head g, row t * key_heads + g.
struct CachedRows {
  const void* rows;  // of `size` floats or float16; packed: the planes of their codes
  const uint16_t* scales;  // packed: float16, one for each block of a row
  const uint16_t* zeros;  // packed: likewise, or null
  const uint16_t* first;  // packed: the first FIRST_TOKENS, float16
  const RowFormat* format;  // packed
  int64_t size;
};

// Attention of some tokens of one sequence, whose keys and values lie in a cache.
struct Attention {
  const float* query;  // token t, head h, element e: query[t * query_token + h * query_head + e]
  int64_t query_token, query_head;
  CachedRows keys, values;
  CacheKind kind;
  const float* factors;  // (key_heads, size): of keys that lie turned; null of others
  float* out;  // token t, head h: out[t * out_token + h * values.size]
  int64_t out_token;
  int64_t heads, key_heads;
  int64_t tokens;  // new ones
  int64_t start;  // tokens before the first of these
  int64_t window;  // tokens that one sees, itself included; 0: all
  float scale, cap;
};

// A share of it where the new tokens are many: a key head, and a block of them.
struct AttentionPart {
  int64_t key_head, first, last;
};

// Unpacked numbers.
struct Dense {
  enum class Type : int { f32, f16, bf16 };
  const void* data;
  Type type;
};

struct RowKernels {
  void (*unary)(Unary kind, const Shape& shape, const Strided& x, float* out);
  void (*binary)(Binary kind, const Shape& shape, const Strided& a, const Strided& b, float* out);
  void (*mean)(const float* x, int64_t count, int64_t apart, int64_t width, float* out);
  // (x / sqrt(mean(x^2) + eps)) * weight, of `count` rows; weight may be null
  void (*rms_norm)(const float* x, int64_t count, int64_t width, const float* weight, float eps, float* out);
  void (*layer_norm)(const float* x, int64_t count, int64_t width, const float* weight, const float* bias, float eps,
                     float* out);
  void (*to_half)(const float* x, int64_t count, uint16_t* out);  // what is too large becomes the largest
  // In place: times an orthonormal Hadamard matrix of the largest power of 2 that divides the size, block by block.
  void (*turn)(float* x, int64_t size);
  // Tokens [first, last) of the new ones see all that they may: `scratch` floats as `attend_scratch` says.
  void (*attend_many)(const Attention& all, const AttentionPart& part, float* scratch);
  // Queries as they meet the keys: of each key head and token and head of its group a row of `keys.size`.
  void (*take_queries)(const Attention& all, float* query);
  // Keys [first, last), at most `segment_of` them, for every new token: of each such row one of (maximum, sum, sums of
  // values) in `partial`.
  void (*attend_few)(const Attention& all, const float* query, int64_t first, int64_t last, float* partial,
                     float* scratch);
  // Partial sums of all segments to the output of one key head; `apart` floats between segments.
  void (*join)(const Attention& all, int64_t key_head, const float* partial, int64_t segments, int64_t apart);
  // out (m, n) = a (m, k) b (n, k)^T, rows of a and out `*_apart` floats apart; `row`: k floats of scratch memory.
  void (*dense)(const float* a, int64_t m, int64_t a_apart, const Dense& b, int64_t first, int64_t n, int64_t k,
                float* row, float* out, int64_t out_apart);
  // Row `row` of a dense matrix of `width` columns.
  void (*to_floats)(const Dense& from, int64_t row, int64_t width, float* out);
};

constexpr int64_t FIRST_TOKENS = 64;  // of a k-bit cache, that stay float16
constexpr int64_t KEYS_AT_ONCE = 64;  // keys of a tile
constexpr int64_t TOKENS_AT_ONCE = 16;  // new tokens of a part of `attend_many`
constexpr int64_t SEGMENT = 128;  // keys of a part of `attend_few`, at most
constexpr int64_t TOKENS_OF_TILE = 16;  // that are read for all heads at once
constexpr int64_t FEW_TOKENS = 4;  // new tokens up to which it is taken

// Keys of a part of `attend_few`: some parts for threads to share where the cache is short; their number does not count.
inline int64_t segment_of(int64_t length) {
  constexpr int64_t PARTS = 16;
  const int64_t own = (length + PARTS * TOKENS_OF_TILE - 1) / (PARTS * TOKENS_OF_TILE) * TOKENS_OF_TILE;
  return std::min(own, SEGMENT);
}

// Floats of scratch memory for a part.
inline int64_t attend_scratch(const Attention& a) {
  const int64_t rows = TOKENS_AT_ONCE * (a.heads / a.key_heads);
  const int64_t both = a.keys.size + a.values.size;
  const int64_t few = FEW_TOKENS * a.heads * SEGMENT + TOKENS_OF_TILE * a.key_heads * both;
  const int64_t many = rows * (both + KEYS_AT_ONCE + 2) + KEYS_AT_ONCE * (both + a.keys.size);
  return std::max(few, many) + 64;
}

const RowKernels* portable_row_kernels();
const RowKernels* avx2_row_kernels();
const RowKernels* avx512_row_kernels();

}  // namespace kbit
