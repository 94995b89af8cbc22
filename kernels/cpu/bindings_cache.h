// Keys, or values, of a k-bit cache, packed as they come: each row of a token and a key head for itself, keys centred,
// balanced and turned, the first tokens at float16. kbitc/backends/_decoding/packed_rows.py says why, and the same in
// torch.
#pragma once

#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "bindings_encode.h"
#include "bindings_sets.h"
#include "row_ops.h"

namespace kbit {
namespace {

class PackedCache {
 public:
  // `numbers`: bits, block, and whether blocks are measured from the middle of their range.
  PackedCache(const Tensor& codebook, const std::vector<int64_t>& numbers) : book_(as_contiguous(codebook)) {
    KBIT_CHECK(numbers.size() == 3, "kbit: a k-bit cache is said by bits, block and zeros");
    const int64_t bits = numbers[0], block = numbers[1], levels = book_.numel();
    KBIT_CHECK(bits >= 2 && bits <= 8 && block >= 1, "kbit: a cache of ", bits, " bits, block ", block);
    KBIT_CHECK(book_.scalar_type() == Dtype::Float && book_.dim() == 1 && levels >= 1 && levels <= (int64_t{1} << bits),
               "kbit: the codebook of a cache is ", book_.scalar_type(), " of shape ", text(book_));
    encoder_ = make_encoder(book_);
    has_zeros_ = numbers[2] != 0;
    std::copy_n(book_.const_data_ptr<float>(), levels, levels_);
    format_.levels = levels_;
    format_.bits = static_cast<int>(bits);
    format_.block = block;
    format_.block_shift = (block & (block - 1)) == 0 ? __builtin_ctzll(static_cast<uint64_t>(block)) : -1;
    const Line line = line_through(levels_, levels, 1.0f);  // the largest level
    format_.first = line.first;
    format_.step = line.step;
    format_.is_even = line.fits;
  }
  PackedCache(const PackedCache&) = delete;
  PackedCache& operator=(const PackedCache&) = delete;

  // A sequence's keys, or values, of one layer: addresses of planes, scales, first, ways and zeros, 0 for what is not
  // there.
  static constexpr int64_t PARTS = 5;
  struct Place {
    CachedRows rows;
    float* ways;  // of keys: (3, key_heads, size); null of values
    int64_t heads;

    Place(const PackedCache& own, const int64_t* addresses, int64_t key_heads, int64_t size)
        : rows{reinterpret_cast<const void*>(addresses[0]), pointer<const uint16_t>(addresses[1]),
               pointer<const uint16_t>(addresses[4]), pointer<const uint16_t>(addresses[2]), &own.format_, size},
          ways(pointer<float>(addresses[3])), heads(key_heads) {}

    bool are_keys() const { return ways != nullptr; }
    float* squares(int64_t head) const { return ways + head * rows.size; }
    float* centre(int64_t head) const { return ways + (heads + head) * rows.size; }
    float* factors(int64_t head) const { return ways + (2 * heads + head) * rows.size; }
    // Whether they are known; until then keys lie as they are.
    bool is_turned(int64_t head) const { return are_keys() && *factors(head) != 0.0f; }
    uint16_t* early(int64_t token, int64_t head) const {
      return const_cast<uint16_t*>(rows.first) + (token * heads + head) * rows.size;
    }

   private:
    template <class T>
    static T* pointer(int64_t address) {
      return reinterpret_cast<T*>(address);
    }
  };

  // The row of one token for one key head; of keys, `queries` are those of the head's group, `apart` floats apart.
  void write(const Place& to, int64_t token, int64_t head, const float* x, const float* queries, int64_t group,
             int64_t apart) const {
    const int64_t size = to.rows.size;
    const bool is_early = token < FIRST_TOKENS;
    if (to.are_keys() && token == 0) {
      for (float* part : {to.squares(head), to.centre(head), to.factors(head)}) std::fill_n(part, size, 0.0f);
    }
    if (to.are_keys() && !to.is_turned(head)) {
      if (is_early) {
        add_squares(queries, group, apart, size, to.squares(head));
      } else {
        settle(to, head);
      }
    }
    thread_local std::vector<float> memory;
    memory.assign(x, x + size);
    turn(to, head, memory.data());
    if (is_early) {
      row_kernels().to_half(memory.data(), size, to.early(token, head));
    } else {
      pack(memory.data(), to.rows, token * to.heads + head);
    }
  }

 private:
  static void add_squares(const float* queries, int64_t group, int64_t apart, int64_t size, float* out) {
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t i = 0; i < size; ++i) out[i] += queries[g * apart + i] * queries[g * apart + i];
    }
  }

  // Centre and factors of a head from its first tokens, which lie turned from now on.
  static void settle(const Place& to, int64_t head) {
    constexpr float LEAST = 1e-4f;  // of the mean square of a head's channels: what a channel counts at least
    const int64_t size = to.rows.size;
    const float* queries = to.squares(head);
    float* centre = to.centre(head);
    float* factors = to.factors(head);
    std::vector<float> keys(static_cast<size_t>(size), 0.0f), rows(static_cast<size_t>(FIRST_TOKENS * size));
    for (int64_t t = 0; t < FIRST_TOKENS; ++t) {
      for (int64_t i = 0; i < size; ++i) {
        rows[t * size + i] = from_half(to.early(t, head)[i]);
        centre[i] += rows[t * size + i] / FIRST_TOKENS;
      }
    }
    for (int64_t t = 0; t < FIRST_TOKENS; ++t) {
      for (int64_t i = 0; i < size; ++i) {
        const float off = rows[t * size + i] - centre[i];
        keys[i] += off * off;
      }
    }
    const auto floored = [&](const float* squares) {
      const float mean = std::accumulate(squares, squares + size, 0.0f) / static_cast<float>(size);
      return [=](int64_t i) { return mean > 0.0f ? std::max(squares[i], LEAST * mean) : 1.0f; };
    };
    const auto query_at = floored(queries), key_at = floored(keys.data());
    float largest = 0.0f;
    for (int64_t i = 0; i < size; ++i) {
      factors[i] = std::sqrt(std::sqrt(query_at(i) / key_at(i)));
      largest = std::max(largest, factors[i]);
    }
    for (int64_t i = 0; i < size; ++i) factors[i] /= largest;
    for (int64_t t = 0; t < FIRST_TOKENS; ++t) {
      turn(to, head, rows.data() + t * size);
      row_kernels().to_half(rows.data() + t * size, size, to.early(t, head));
    }
  }

  // H ((x - centre) * factors), where they are known.
  static void turn(const Place& to, int64_t head, float* x) {
    const int64_t size = to.rows.size;
    if (!to.is_turned(head)) return;
    const float* centre = to.centre(head);
    const float* factors = to.factors(head);
    for (int64_t i = 0; i < size; ++i) x[i] = (x[i] - centre[i]) * factors[i];
    row_kernels().turn(x, size);
  }

  // A row of `rows.size` floats as codes.
  void pack(const float* x, const CachedRows& rows, int64_t row) const {
    const int64_t size = rows.size, block = format_.block, blocks = (size + block - 1) / block;
    thread_local std::vector<float> memory;
    memory.assign(static_cast<size_t>(2 * blocks), 0.0f);
    float* scales = memory.data();
    float* zeros = scales + blocks;
    uint16_t* stored = const_cast<uint16_t*>(rows.scales) + row * blocks;
    uint16_t* middles = has_zeros_ ? const_cast<uint16_t*>(rows.zeros) + row * blocks : nullptr;
    for (int64_t b = 0; b < blocks; ++b) {
      const float* own = x + b * block;
      float low = own[0], high = own[0], sum = 0.0f;
      for (int64_t i = 0; i < std::min(block, size - b * block); ++i) {
        low = own[i] < low ? own[i] : low;
        high = own[i] > high ? own[i] : high;
        sum += own[i] - own[i];  // NaN where a value is not finite: such a block reads NaN
      }
      zeros[b] = low / 2 + high / 2;
      if (has_zeros_) as_stored(zeros + b, middles + b);
      scales[b] = (has_zeros_ ? std::max(high - zeros[b], zeros[b] - low) : std::max(high, -low)) + sum;
    }
    for (int64_t b = 0; b < blocks; ++b) as_stored(scales + b, stored + b);
    uint8_t* planes = static_cast<uint8_t*>(const_cast<void*>(rows.rows)) + row * format_.bits * ((size + 7) / 8);
    kernels().encode(*encoder_, x, scales, has_zeros_ ? zeros : nullptr, size, block, format_.bits, planes);
  }

  // A number as float16 holds it.
  static void as_stored(float* value, uint16_t* half) {
    row_kernels().to_half(value, 1, half);
    *value = from_half(*half);
  }

  const Tensor book_;
  std::unique_ptr<Encoder> encoder_;
  RowFormat format_{};
  bool has_zeros_ = false;
  float levels_[256] = {};
};

}  // namespace
}  // namespace kbit
