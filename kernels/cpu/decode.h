// Rows of a weight as floats, and what suits a row of x. Included once by each vector set, after its
// primitives and its `gemm`.
#pragma once

#include "bytes.h"
#include "weights.h"

namespace kbit {
namespace {

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

Mode mode(const Weight& w, const Table& table) {
  if (table.is_affine || (TAKES_BYTES && table.has_bytes)) return Mode::affine;
  return w.bits >= HALF_FROM && table.exponent != 0 ? Mode::half : Mode::table;
}

void decode(const Weight& w, int64_t row, float* out) { KBIT_BY_BITS(w.bits, decode_row<K>(w, row, out)); }

// A set without the parts that are compiled by themselves.
Kernels set_named(const char* name) {
  Kernels set{};
  set.name = name;
  set.is_fast = is_fast_weight;
  set.mode = mode;
  set.gemm = gemm;
  set.value_bytes = sizeof(Value);
  set.multiply_bytes = multiply_bytes;
  set.decode = decode;
  set.dot = dot_floats;
  return set;
}

}  // namespace
}  // namespace kbit
