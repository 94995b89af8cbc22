// Plain helpers that every kernel set includes; each gets a copy of its own (hence the anonymous
// namespace), compiled for its own instruction set.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "kernels.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // of what many instances call: compiled once

// A call with the number of bits as a constant K.
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

namespace kbit {
namespace {

// A loop whose index is a constant, so that arrays which it indexes live in registers.
template <int VALUE>
struct Constant {
  constexpr operator int() const { return VALUE; }
};

template <class Body, int... I>
INLINE void unroll_over(const Body& body, std::integer_sequence<int, I...>) {
  (body(Constant<I>{}), ...);
}
template <int COUNT, class Body>
INLINE void unroll(const Body& body) {
  unroll_over(body, std::make_integer_sequence<int, COUNT>{});
}

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

// Into the L2 cache. What lies past the end of the memory is not touched.
INLINE void prefetch(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i, 0, 2);
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float from_half(uint16_t half) {
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  float size;
  if (exponent == 0) {
    size = static_cast<float>(mantissa) * 0x1p-24f;
  } else if (exponent == 31) {
    size = from_bits(0x7f800000u | (mantissa << 13));
  } else {
    size = from_bits(((exponent + 112) << 23) | (mantissa << 13));
  }
  return (half & 0x8000u) ? -size : size;
}

inline float read_number(const void* data, Type type, int64_t at) {
  switch (type) {
    case Type::f32:
      return static_cast<const float*>(data)[at];
    case Type::bf16:
      return from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16);
    case Type::f16:
      return from_half(static_cast<const uint16_t*>(data)[at]);
    default:
      return 0.0f;
  }
}

// Scale of block b of a row.
inline float read_scale(const Weight& w, int64_t row, int64_t b) {
  const int64_t at = row * w.blocks + b;
  if (w.scale_type != Type::code) return read_number(w.scales, w.scale_type, at);
  const float value = w.scale_codebook[static_cast<const uint8_t*>(w.scales)[at]];
  return value * w.scale_absmax[(w.first_scale + at) / SCALE_GROUP] + w.scale_mean;
}

// Widths of the bit planes of k-bit codes, lowest bits first.
inline int plane_widths(int bits, int widths[3]) {
  int count = 0;
  for (int width = 8; width >= 1; width /= 2) {
    if (bits & width) widths[count++] = width;
  }
  return count;
}

// The code of one weight.
inline int code_at(const Weight& w, int64_t row, int64_t col) {
  const int64_t chunk = col / CHUNK, at = col % CHUNK;
  const int64_t left = w.cols - chunk * CHUNK;
  const int64_t lanes = ((left < CHUNK ? left : CHUNK) + 7) / 8;
  const int group = static_cast<int>(at / lanes);
  const uint8_t* plane = w.planes + row * w.row_bytes + chunk * w.bits * (CHUNK / 8);
  int widths[3], code = 0, shift = 0;
  const int planes = plane_widths(w.bits, widths);
  for (int p = 0; p < planes; ++p) {
    const int per_byte = 8 / widths[p];
    const int byte = plane[group / per_byte * lanes + at % lanes];
    code |= ((byte >> (widths[p] * (group % per_byte))) & ((1 << widths[p]) - 1)) << shift;
    plane += widths[p] * lanes;
    shift += widths[p];
  }
  return code;
}

// One weight that is no outlier.
inline float weight_at(const Weight& w, int64_t row, int64_t col) {
  const int64_t b = col / w.block;
  const float value = w.codebook[code_at(w, row, col)] * read_scale(w, row, b);
  return w.zero_type == Type::none ? value : value + read_number(w.zeros, w.zero_type, row * w.blocks + b);
}

// Codes of one chunk of `count` codes, in natural order.
NOINLINE void unpack_chunk(const uint8_t* packed, int64_t count, int bits, uint8_t* codes) {
  const int64_t lanes = (count + 7) / 8;
  int widths[3];
  const int planes = plane_widths(bits, widths);
  for (int64_t group = 0; group < 8; ++group) {
    uint8_t* out = codes + group * lanes;
    const int64_t here = count - group * lanes < lanes ? count - group * lanes : lanes;
    const uint8_t* plane = packed;
    int shift = 0;
    for (int p = 0; p < planes; ++p) {
      const int width = widths[p];
      const int per_byte = 8 / width;
      const uint8_t* bytes = plane + group / per_byte * lanes;
      const int phase = width * (static_cast<int>(group) % per_byte);
      const int mask = (1 << width) - 1;
      if (shift == 0) {
        for (int64_t lane = 0; lane < here; ++lane) {
          out[lane] = static_cast<uint8_t>((bytes[lane] >> phase) & mask);
        }
      } else {
        for (int64_t lane = 0; lane < here; ++lane) {
          out[lane] = static_cast<uint8_t>(out[lane] | (((bytes[lane] >> phase) & mask) << shift));
        }
      }
      plane += width * lanes;
      shift += width;
    }
  }
}

}  // namespace
}  // namespace kbit
