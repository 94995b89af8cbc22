// The loops of training.h, for one instruction set: plain ones, which the compiler makes vectors of. Every operation
// rounds once (-ffp-contract=off), so that all sets and the reference (kernels/training.py) give the same bits.
#pragma once

#include <cmath>
#include <cstring>

#include "scalar.h"
#include "training.h"

namespace kbit {
namespace {

#define ARRAY float* __restrict

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

void load_floats(const void* from, Type type, int64_t at, int64_t count, ARRAY to) {
  if (type == Type::f32) {
    std::memcpy(to, static_cast<const float*>(from) + at, static_cast<size_t>(count) * 4);
  } else if (type == Type::bf16) {
    const uint16_t* own = static_cast<const uint16_t*>(from) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from_bits(static_cast<uint32_t>(own[i]) << 16);
  } else {
    const _Float16* own = static_cast<const _Float16*>(from) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(own[i]);
  }
}

void store_floats(const float* __restrict from, Type type, int64_t at, int64_t count, void* to) {
  if (type == Type::bf16) {
    uint16_t* own = static_cast<uint16_t*>(to) + at;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(from[i]);
      const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      own[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
    }
  } else {
    _Float16* own = static_cast<_Float16*>(to) + at;
    for (int64_t i = 0; i < count; ++i) own[i] = static_cast<_Float16>(from[i]);
  }
}

// The values of a block, in `own` or where they lie.
float* open_state(const State& state, int bits, int64_t at, int64_t count, int64_t block, ARRAY own) {
  if (bits == 32) return static_cast<float*>(state.codes) + at;
  const float scale = state.scales[block];
  const float* value = state.levels.value;
  const uint8_t* codes = static_cast<const uint8_t*>(state.codes) + at * bits / 8;
  if (bits == 8) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) own[i] = value[codes[i]];
  } else {
#pragma GCC unroll 4
    for (int64_t i = 0; i + 1 < count; i += 2) {
      own[i] = value[codes[i / 2] & 15];
      own[i + 1] = value[codes[i / 2] >> 4];
    }
    if (count % 2 == 1) own[count - 1] = value[codes[count / 2] & 15];
  }
  for (int64_t i = 0; i < count; ++i) own[i] *= scale;
  return own;
}

// Codes of values in [-1, 1]; each pass does one thing, so that the compiler makes vectors of all but the look-up.
void find_codes(const float* __restrict values, int64_t count, const uint32_t* __restrict cells,
                uint8_t* __restrict codes) {
  alignas(64) uint32_t found[STATE_BLOCK_MOST];
  alignas(64) uint16_t upper[STATE_BLOCK_MOST];
  for (int64_t i = 0; i < count; ++i) upper[i] = static_cast<uint16_t>(bits_of(values[i]) >> 16);
#pragma GCC unroll 8
  for (int64_t i = 0; i < count; ++i) found[i] = cells[upper[i]];
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(values[i]);
    // Turned where the sign is set, so that more is always a larger value.
    const uint32_t lower = (bits ^ static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31)) & 0xffffu;
    codes[i] = static_cast<uint8_t>((found[i] + lower) >> 16);
  }
}

// What is not finite is kept as a scale of NaN: the whole block is no number from then on.
void close_state(ARRAY values, int bits, int64_t at, int64_t count, int64_t block, State& state) {
  if (bits == 32) return;
  uint32_t top = 0;
  for (int64_t i = 0; i < count; ++i) top = larger(top, bits_of(values[i]) & 0x7fffffffu);
  const float largest = from_bits(top);
  const float inverse = 1.0f / largest;
  const bool is_finite = top < 0x7f800000u;
  // An absmax below 3e-39 has no finite inverse: such a block becomes 0.
  const float factor = is_finite && std::isfinite(inverse) ? inverse : 0.0f;
  state.scales[block] = is_finite ? largest : std::nanf("");
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
  uint8_t* codes = static_cast<uint8_t*>(state.codes) + at * bits / 8;
  if (bits == 8) return find_codes(values, count, state.levels.cells, codes);
  alignas(64) uint8_t whole[STATE_BLOCK_MOST];
  find_codes(values, count, state.levels.cells, whole);
  for (int64_t i = 0; i + 1 < count; i += 2) codes[i / 2] = static_cast<uint8_t>(whole[i] | whole[i + 1] << 4);
  if (count % 2 == 1) codes[count / 2] = whole[count - 1];
}

// The gradient as a step takes it, in `own` or where it lies.
const float* open_gradient(const Update& u, int64_t at, int64_t count, const float* __restrict param, ARRAY own) {
  const float sign = u.numbers.sign, l2 = u.numbers.l2;
  const bool is_plain = sign == 1.0f && l2 == 0.0f;
  if (is_plain && u.grad_type == Type::f32) return static_cast<const float*>(u.grad) + at;
  load_floats(u.grad, u.grad_type, at, count, own);
  for (int64_t i = 0; !is_plain && i < count; ++i) own[i] = own[i] * sign + param[i] * l2;
  return own;
}

void step_adam(const StepNumbers n, int64_t count, const float* __restrict grad, ARRAY mean, ARRAY square,
               ARRAY param) {
  for (int64_t i = 0; i < count; ++i) {
    mean[i] = mean[i] * n.a + grad[i] * n.a_rest;
    square[i] = square[i] * n.b + grad[i] * grad[i] * n.b_rest;
    param[i] = param[i] * n.decay - mean[i] / (std::sqrt(square[i]) * n.root + n.eps) * n.rate;
  }
}

void step_momentum(const StepNumbers n, int64_t count, const float* __restrict grad, ARRAY mean, ARRAY param) {
  const bool is_nesterov = n.b != 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    mean[i] = mean[i] * n.a + grad[i] * n.a_rest;
    const float moved = is_nesterov ? grad[i] + mean[i] * n.a : mean[i];
    param[i] = param[i] * n.decay - moved * n.rate;
  }
}

void step_lion(const StepNumbers n, int64_t count, const float* __restrict grad, ARRAY mean, ARRAY param) {
  for (int64_t i = 0; i < count; ++i) {
    const float moved = mean[i] * n.a + grad[i] * n.a_rest;
    // NaN stays NaN.
    const float sign = moved > 0.0f ? 1.0f : moved < 0.0f ? -1.0f : moved;
    param[i] = param[i] * n.decay - sign * n.rate;
    mean[i] = mean[i] * n.b + grad[i] * n.b_rest;
  }
}

// Arrays of one block, apart by no multiple of 4 KB: there a load would wait for an earlier store to another one.
struct Tile {
  static constexpr int64_t APART = STATE_BLOCK_MOST + 80;
  alignas(64) float all[4 * APART];
  float* of(int which) { return all + which * APART; }
};

void step(const Update& given, Rule rule, int64_t begin, int64_t end) {
  Tile tile;
  Update u = given;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block * u.block, count = u.count - at < u.block ? u.count - at : u.block;
    const bool is_whole = u.param_type == Type::f32;
    float* param = is_whole ? static_cast<float*>(u.param) + at : tile.of(0);
    if (!is_whole) load_floats(u.param, u.param_type, at, count, param);
    const float* grad = open_gradient(u, at, count, param, tile.of(1));
    float* first = open_state(u.first, u.bits, at, count, block, tile.of(2));
    if (rule == Rule::adam) {
      float* second = open_state(u.second, u.bits, at, count, block, tile.of(3));
      step_adam(u.numbers, count, grad, first, second, param);
      close_state(second, u.bits, at, count, block, u.second);
    } else {
      (rule == Rule::lion ? step_lion : step_momentum)(u.numbers, count, grad, first, param);
    }
    close_state(first, u.bits, at, count, block, u.first);
    if (!is_whole) store_floats(param, u.param_type, at, count, u.param);
  }
}

void squares(const Update& u, int64_t begin, int64_t end, double* out) {
  constexpr int LANES = 8;
  Tile tile;
  float *grad = tile.of(0), *ratio = tile.of(1);
  const StepNumbers& n = u.numbers;
  const float least = n.eps * n.eps, correction = n.root * n.root;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block * u.block, count = u.count - at < u.block ? u.count - at : u.block;
    load_floats(u.grad, u.grad_type, at, count, grad);
    const float* second = open_state(u.second, u.bits, at, count, block, tile.of(2));
    for (int64_t i = 0; i < count; ++i) {
      const float square = grad[i] * grad[i];
      const float moment = (second[i] * n.b + square * n.b_rest) * correction;
      ratio[i] = square / (moment < least ? least : moment);
    }
    for (int64_t i = count; i < count + LANES; ++i) ratio[i] = 0.0f;
    double sums[LANES] = {};
    for (int64_t i = 0; i < count; i += LANES) {
      for (int lane = 0; lane < LANES; ++lane) sums[lane] += ratio[i + lane];
    }
    double total = 0.0;
    for (double sum : sums) total += sum;
    out[block - begin] = total;
  }
}

uint32_t largest(const void* from, Type type, int64_t begin, int64_t end) {
  constexpr int64_t TILE = 2048;
  alignas(64) float tile[TILE];
  uint32_t top = 0;
  for (int64_t at = begin; at < end; at += TILE) {
    const int64_t count = end - at < TILE ? end - at : TILE;
    load_floats(from, type, at, count, tile);
    for (int64_t i = 0; i < count; ++i) top = larger(top, bits_of(tile[i]) & 0x7fffffffu);
  }
  return top;
}

void round_tiles(const Rounding& r, int64_t begin, int64_t end) {
  constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: a sum with it ends in the nearest whole number's bits
  alignas(64) uint8_t tile[ROUND_TILE][ROUND_TILE];
  alignas(64) float values[ROUND_TILE];
  for (int64_t row = begin; row < end; row += ROUND_TILE) {
    const int64_t rows = end - row < ROUND_TILE ? end - row : ROUND_TILE;
    for (int64_t col = 0; col < r.cols; col += ROUND_TILE) {
      const int64_t cols = r.cols - col < ROUND_TILE ? r.cols - col : ROUND_TILE;
      for (int64_t i = 0; i < rows; ++i) {
        load_floats(r.from, r.type, (row + i) * r.cols + col, cols, values);
        for (int64_t j = 0; j < cols; ++j) {
          tile[i][j] = static_cast<uint8_t>(bits_of(values[j] * r.factor + ROUNDING) - 0x4b400000u + MIDDLE);
        }
        std::memcpy(r.codes + (row + i) * r.apart + col, tile[i], static_cast<size_t>(cols));
      }
      for (int64_t j = 0; j < cols; ++j) {
        uint8_t* to = r.turned + (col + j) * r.turned_apart + row;
        for (int64_t i = 0; i < rows; ++i) to[i] = tile[i][j];
      }
    }
  }
}

constexpr TrainingKernels TRAINING_KERNELS = {step, squares, largest, round_tiles};

}  // namespace
}  // namespace kbit
