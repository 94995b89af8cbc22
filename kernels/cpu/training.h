// What training does to whole tensors: optimizer steps on states of block-wise codes, and weights to int8. Plain
// structures, no ATen: compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace kbit {

constexpr int64_t STATE_BLOCK_MOST = 4096;
constexpr int64_t ROUND_TILE = 64;  // rows and columns that are rounded at a time

// The values that codes of a state stand for, times their block's scale.
struct StateLevels {
  const float* value;  // 2^bits
  // (65536), by the upper 16 bits of a float: its code is the upper half of what stands there plus its lower 16 bits
  // (their complement where the sign is set).
  const uint32_t* cells;
};

struct State {
  void* codes;  // bytes; 4 bits: the lower half is the earlier one; 32 bits: floats
  float* scales;  // one a block; none for floats
  StateLevels levels;
};

enum class Rule : int { adam, momentum, lion };

// What a step computes with; `a`, `b` and what they leave are a rule's own.
struct StepNumbers {
  float sign;  // of the gradient: -1 to maximize
  float l2;  // times the parameter, added to the gradient
  float decay;  // of the parameter itself
  float rate;
  float a, a_rest;
  float b, b_rest;
  float root;  // adam: 1 / sqrt(1 - beta2^t)
  float eps;
};
constexpr int64_t STEP_NUMBERS = 10;

// A parameter, or some whole blocks of one.
struct Update {
  void* param;
  const void* grad;
  Type param_type, grad_type;
  int64_t count, block;
  int bits;
  State first, second;  // `second` of adam alone
  StepNumbers numbers;
};

// A matrix to int8 codes under one factor, as it lies and turned.
struct Rounding {
  const void* from;  // (rows, cols)
  Type type;
  int64_t rows, cols;
  float factor;
  uint8_t* codes;  // (rows, apart); MIDDLE is 0
  uint8_t* turned;  // (cols, turned_apart)
  int64_t apart, turned_apart;
};

struct TrainingKernels {
  // Blocks [begin, end).
  void (*step)(const Update& update, Rule rule, int64_t begin, int64_t end);
  // out[i - begin]: the sum over block i of g^2 / max(v, eps^2), v the second moment after the step, corrected.
  void (*squares)(const Update& update, int64_t begin, int64_t end, double* out);
  // The bits of the largest absolute value, in whose order these are; NaN is above all.
  uint32_t (*largest)(const void* from, Type type, int64_t begin, int64_t end);
  // Tiles of rows [begin, end).
  void (*round_tiles)(const Rounding& rounding, int64_t begin, int64_t end);
};

const TrainingKernels* portable_training_kernels();
const TrainingKernels* avx2_training_kernels();
const TrainingKernels* avx512_training_kernels();

}  // namespace kbit
