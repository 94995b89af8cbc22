// Any machine: rows are decoded to float32, a row at a time, and multiplied as they are.
#include "encode.h"
#include "round.h"

namespace kbit {
namespace {

using Value = int8_t;
constexpr int BYTES = 8;
constexpr bool MIDDLE_LATER = false;
struct ByteVec {
  int32_t lane[BYTES];
};
inline ByteVec codes_at(const uint8_t* p) {
  ByteVec out;
  for (int i = 0; i < BYTES; ++i) out.lane[i] = p[i] - MIDDLE;
  return out;
}
inline ByteVec values_at(const Value* p) {
  ByteVec out;
  for (int i = 0; i < BYTES; ++i) out.lane[i] = p[i];
  return out;
}
inline ByteVec add_products(ByteVec sum, const ByteVec& codes, const ByteVec& x) {
  for (int i = 0; i < BYTES; ++i) sum.lane[i] += codes.lane[i] * x.lane[i];
  return sum;
}
float dot_floats(const float* a, const float* b, int64_t count) {
  float sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (; i < count; ++i) sums[0] += a[i] * b[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}
inline int32_t sum_ints(const ByteVec& v) {
  int32_t total = 0;
  for (int i = 0; i < BYTES; ++i) total += v.lane[i];
  return total;
}

}  // namespace
}  // namespace kbit

#include "bytes.h"

namespace kbit {
namespace {

inline void read_numbers(const void* data, Type type, int64_t at, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = read_number(data, type, at + i);
}

bool is_fast(const Weight&) { return false; }

void decode(const Weight& w, int64_t row, float* out) {
  const uint8_t* packed = w.planes + row * w.row_bytes;
  uint8_t codes[CHUNK];
  for (int64_t at = 0; at < w.cols; at += CHUNK, packed += w.bits * (CHUNK / 8)) {
    const int64_t count = w.cols - at < CHUNK ? w.cols - at : CHUNK;
    unpack_chunk(packed, count, w.bits, codes);
    for (int64_t i = 0; i < count;) {
      const int64_t b = (at + i) / w.block;
      const int64_t end = (b + 1) * w.block - at;
      const int64_t stop = end < count ? end : count;
      const float scale = read_scale(w, row, b);
      const float zero = read_number(w.zeros, w.zero_type, row * w.blocks + b);
      const bool has_zero = w.zero_type != Type::none;
      for (; i < stop; ++i) {
        const float value = w.codebook[codes[i]] * scale;
        out[at + i] = has_zero ? value + zero : value;
      }
    }
  }
  for (int64_t i = 0; i < w.outliers; ++i) {
    out[w.outlier_index[i]] = read_number(w.outlier_values, w.outlier_type, row * w.outliers + i);
  }
}

}  // namespace

const Kernels* portable_kernels() {
  static const Kernels kernels = {"portable", is_fast, nullptr, nullptr, nullptr, nullptr, sizeof(Value), round_bytes, multiply_bytes, decode, dot_floats, encode, search, round_strip};
  return &kernels;
}

}  // namespace kbit
