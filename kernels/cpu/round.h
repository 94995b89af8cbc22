// Codes of a strip of columns, one column after another, each choice changing what later columns want
// (kernels/rounding.py says what is right). A lane is a row and nothing is summed over lanes, so that every
// instruction set gives the same bits. A column gathers the changes of all earlier ones when its turn comes: in
// the order in which they would have reached it, and in registers.
#pragma once

#include "scalar.h"

namespace kbit {
namespace {

#if defined(__AVX512F__)
constexpr int ROW_LANES = 16;
#elif defined(__AVX2__)
constexpr int ROW_LANES = 8;
#else
constexpr int ROW_LANES = 4;
#endif
constexpr int VECTORS = 8;  // independent sums, enough to hide the latency of one
constexpr int STRIP_ROWS = ROW_LANES * VECTORS;  // rows at a time
static_assert(STRIP_ROWS <= STRIP_ROWS_MOST);

using RowFloats = float __attribute__((vector_size(4 * ROW_LANES)));
using RowInts = int32_t __attribute__((vector_size(4 * ROW_LANES)));

INLINE RowFloats repeat_rows(float value) { return value - RowFloats{}; }

// `count` floats, zeros after them.
INLINE void read_panel(const float* from, int64_t count, RowFloats* out) {
  alignas(64) float padded[STRIP_ROWS];
  if (count < STRIP_ROWS) {
    std::memset(padded, 0, sizeof(padded));
    std::memcpy(padded, from, static_cast<size_t>(count) * 4);
    from = padded;
  }
  unroll<VECTORS>([&](auto v) INLINE_LAMBDA { std::memcpy(&out[v], from + v * ROW_LANES, sizeof(RowFloats)); });
}

INLINE void write_panel(const RowFloats* from, int64_t count, float* out) {
  std::memcpy(out, from, static_cast<size_t>(count) * 4);
}

// To float16 and back; ties to even, infinity beyond its largest.
inline float as_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const float size = std::fabs(value);
  float rounded;
  if (size < 0x1p-14f) {
    rounded = (size + 0.5f) - 0.5f;  // the floats above 0.5 lie as far apart as the sub-normals of float16
  } else if (size < INFINITY) {
    const uint32_t whole = bits & 0x7fffffffu;
    rounded = from_bits((whole + 0xfffu + ((whole >> 13) & 1u)) & ~0x1fffu);
    if (rounded >= 65536.0f) rounded = INFINITY;
  } else {
    return value;
  }
  return std::copysign(rounded, value);
}

// To bfloat16 and back.
inline float as_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return value;
  return from_bits((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// What a kept column holds.
INLINE void keep(Type type, const RowFloats* wanted, RowFloats* values) {
  alignas(64) float each[STRIP_ROWS];
  std::memcpy(each, wanted, sizeof(each));
  if (type == Type::f16) {
    for (int r = 0; r < STRIP_ROWS; ++r) each[r] = as_half(each[r]);
  } else if (type == Type::bf16) {
    for (int r = 0; r < STRIP_ROWS; ++r) each[r] = as_bfloat(each[r]);
  }
  std::memcpy(values, each, sizeof(each));
}

// How many bounds lie below each value, and the level of that code. Few bounds: one comparison each.
INLINE void find_among_few(const Strip& s, RowFloats value, RowInts* codes, RowFloats* levels) {
  RowInts code{};
  RowFloats level = repeat_rows(s.codebook[0]);
  for (int b = 0; b < s.bounds; ++b) {
    const RowInts is_above = ~(repeat_rows(s.bound[b]) >= value);  // all bits, for NaN too
    code -= is_above;
    level = is_above ? repeat_rows(s.codebook[b + 1]) : level;
  }
  *codes = code;
  *levels = level;
}

// Many: a search by halves. `bound` goes on with infinities.
INLINE void find_among_many(const Strip& s, RowFloats value, RowInts* codes, RowFloats* levels) {
  alignas(64) float each[ROW_LANES], level[ROW_LANES];
  alignas(64) int32_t code[ROW_LANES];
  std::memcpy(each, &value, sizeof(each));
  for (int r = 0; r < ROW_LANES; ++r) code[r] = 0;
  for (int half = 128; half > 0; half /= 2) {
    for (int r = 0; r < ROW_LANES; ++r) code[r] += s.bound[code[r] + half - 1] >= each[r] ? 0 : half;
  }
  for (int r = 0; r < ROW_LANES; ++r) {
    code[r] = code[r] < s.bounds ? code[r] : s.bounds;  // NaN is above infinity
    level[r] = s.codebook[code[r]];
  }
  std::memcpy(codes, code, sizeof(code));
  std::memcpy(levels, level, sizeof(level));
}

// The levels nearest to what a column wants: codes to `codes`, values to `values`.
INLINE void choose(const Strip& s, int64_t block, int64_t row, int64_t count, const RowFloats* wanted,
                   uint8_t* codes, RowFloats* values) {
  if (block < 0) {
    std::memset(codes, 0, static_cast<size_t>(count));
    keep(s.kept, wanted, values);
    return;
  }
  const int64_t at = block * s.rows + row;
  RowFloats scale[VECTORS], inverse[VECTORS], zero[VECTORS];
  RowInts code[VECTORS];
  read_panel(s.scales + at, count, scale);
  read_panel(s.inverse + at, count, inverse);
  if (s.zeros != nullptr) read_panel(s.zeros + at, count, zero);
  for (int v = 0; v < VECTORS; ++v) {
    const RowFloats value = (s.zeros == nullptr ? wanted[v] : wanted[v] - zero[v]) * inverse[v];
    RowFloats level;
    if (s.bounds < 16) {
      find_among_few(s, value, &code[v], &level);
    } else {
      find_among_many(s, value, &code[v], &level);
    }
    level *= scale[v];
    values[v] = s.zeros == nullptr ? level : level + zero[v];
  }
  alignas(64) int32_t each[STRIP_ROWS];
  std::memcpy(each, code, sizeof(each));
  for (int64_t r = 0; r < count; ++r) codes[r] = static_cast<uint8_t>(each[r]);
}

// `count` rows from `row` on. `changes`: (columns, STRIP_ROWS), what each column did to the later ones.
template <bool DESCENDS>
void round_panel(const Strip& s, int64_t row, int64_t count, float* changes) {
  for (int64_t i = 0; i < s.columns; ++i) {
    const int64_t at = i * s.rows + row;
    const float* passes = s.passes + i * s.columns;
    RowFloats wanted[VECTORS], start[VECTORS], values[VECTORS];
    read_panel(s.given + at, count, wanted);
    for (int64_t k = 0; k < i; ++k) {
      const RowFloats part = repeat_rows(passes[k]);
      unroll<VECTORS>([&](auto v) INLINE_LAMBDA {
        RowFloats change;
        std::memcpy(&change, changes + k * STRIP_ROWS + v * ROW_LANES, sizeof(change));
        wanted[v] = DESCENDS ? wanted[v] + part * change : wanted[v] - part * change;
      });
    }
    const RowFloats own = repeat_rows(passes[i]);
    if (DESCENDS) {
      read_panel(s.start + at, count, start);
      for (int v = 0; v < VECTORS; ++v) wanted[v] = start[v] - wanted[v] / own;
    }
    choose(s, s.block[i], row, count, wanted, s.codes + at, values);
    for (int v = 0; v < VECTORS; ++v) start[v] = DESCENDS ? values[v] - start[v] : (wanted[v] - values[v]) / own;
    std::memcpy(changes + i * STRIP_ROWS, start, sizeof(start));
    write_panel(values, count, s.values + at);
    write_panel(start, count, s.changes + at);
  }
}

void round_strip(const Strip& s, float* scratch) {
  for (int64_t row = 0; row < s.rows; row += STRIP_ROWS) {
    const int64_t count = s.rows - row < STRIP_ROWS ? s.rows - row : STRIP_ROWS;
    (s.start == nullptr ? round_panel<false> : round_panel<true>)(s, row, count, scratch);
  }
}

}  // namespace
}  // namespace kbit
