// The weight as it came: its tensors, checked, seen as what kernels take. A `Packed` holds on to the tensors that
// its pointers lead into, so it outlives every `Weight` it gave.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <optional>

#include "scalar.h"
#include "tensors.h"

namespace kbit {
namespace {

struct Operands {
  Tensor planes, scales, codebook;
  OptTensor zeros, scale_codebook, scale_absmax, scale_mean, outlier_values, outlier_index;
  int64_t in_features, bits, block;
};

Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case Dtype::Float:
      return Type::f32;
    case Dtype::Half:
      return Type::f16;
    case Dtype::BFloat16:
      return Type::bf16;
    case Dtype::Byte:
      return Type::code;
    default:
      KBIT_CHECK(false, "kbit: ", name, " are ", t.scalar_type(), "; expected float16, bfloat16, float32 or codes");
  }
}

// Levels as bytes, times a step and from a first one on.
struct ByteLevels {
  bool is_close = false;
  float step = 0.0f, first = 0.0f;
  uint8_t byte[4] = {};
};

// Tried are all numbers of steps between the outermost of `count` levels; a level of 0 stays exactly 0.
ByteLevels fit_bytes(const float* levels, int count) {
  constexpr double MOST = 3e-4;  // root mean square of the error, over that of the levels
  ByteLevels out;
  const auto [low, high] = std::minmax_element(levels, levels + count);
  const double range = double{*high} - *low;
  const int zero = static_cast<int>(std::find(levels, levels + count, 0.0f) - levels);
  double size = 0.0, mean = 0.0;
  for (int i = 0; i < count; ++i) {
    size += double{levels[i]} * levels[i];
    mean += levels[i] / double(count);
  }
  double best = MOST * MOST;
  for (int steps = 1; steps <= 255 && range > 0.0; ++steps) {
    double byte[4], mean_byte = 0.0;
    for (int i = 0; i < count; ++i) {
      byte[i] = std::nearbyint((levels[i] - *low) / range * steps);
      mean_byte += byte[i] / count;
    }
    const double byte_at = zero < count ? byte[zero] : mean_byte;  // a point of the line that fits best
    const double level_at = zero < count ? 0.0 : mean;
    double product = 0.0, square = 0.0, error = 0.0;
    for (int i = 0; i < count; ++i) {
      product += (byte[i] - byte_at) * (levels[i] - level_at);
      square += (byte[i] - byte_at) * (byte[i] - byte_at);
    }
    const double step = product / square;
    const double first = level_at - step * byte_at;
    for (int i = 0; i < count; ++i) {
      const double off = first + step * byte[i] - levels[i];
      error += off * off / size;
    }
    if (!(error < best)) continue;
    best = error;
    out.is_close = true;
    out.step = static_cast<float>(step);
    out.first = static_cast<float>(first);
    for (int i = 0; i < count; ++i) out.byte[i] = static_cast<uint8_t>(byte[i]);
  }
  return out;
}

// The same, remembered: a weight is checked anew at every call.
const ByteLevels& byte_levels(const float* levels, int count) {
  constexpr size_t MOST = 4096;  // codebooks
  std::array<uint32_t, 5> key = {static_cast<uint32_t>(count)};
  std::memcpy(&key[1], levels, sizeof(float) * static_cast<size_t>(count));
  thread_local std::map<std::array<uint32_t, 5>, ByteLevels> known;
  if (const auto found = known.find(key); found != known.end()) return found->second;
  if (known.size() >= MOST) known.clear();
  return known[key] = fit_bytes(levels, count);
}

// What the largest level becomes as an integer, where all levels are rounded to integers. The larger, the less levels
// lose; the smaller, the larger may the integers of x be that they are multiplied with. And some fit: levels of int4
// are integers already.
int fit_most(const float* levels, int count, float largest, int64_t granule) {
  // Root mean squares of errors, over those of what is rounded: of Gaussian x, for each unit of `most`, and at least.
  const double of_x = granule == 64 ? 6.0e-9 : 3.5e-9, least_of_x = 2.0e-5;
  double size = 0.0;
  for (int i = 0; i < count; ++i) size += double{levels[i]} * levels[i] / (double{largest} * largest);
  int best = static_cast<int>(TABLE_MAX);
  double least = std::numeric_limits<double>::infinity();
  for (int most = 1; most <= TABLE_MAX; ++most) {
    double lost = 0.0;
    for (int i = 0; i < count; ++i) {
      const double level = double{levels[i]} / largest * most;
      const double off = (level - std::nearbyint(level)) / most;
      lost += off * off;
    }
    const double lost_of_x = std::max(of_x * most, least_of_x);
    const double error = lost / size + lost_of_x * lost_of_x;
    if (error < least) {
      least = error;
      best = most;
    }
  }
  return best;
}

// The same, remembered. Of more than 32 levels the best is not looked for: that would take long, and gain little,
// but where they are a `step` apart (or 0) and 0 is one of them or halfway between two: then they are integers.
int most_of(const float* levels, int count, float largest, float step, int64_t granule) {
  constexpr size_t MOST = 4096;  // codebooks
  constexpr int LEVELS = 32, USUAL = 11585;
  if (largest == 0.0f) return USUAL;
  if (count > LEVELS) {
    const float halves = step > 0.0f ? 2 * levels[0] / step : 0.5f;
    const bool is_whole = std::abs(halves - std::nearbyint(halves)) < 1e-2f && 2 * largest / step < TABLE_MAX;
    return is_whole ? static_cast<int>(std::lrint(2 * largest / step)) : USUAL;
  }
  std::array<uint32_t, LEVELS + 2> key = {static_cast<uint32_t>(count), static_cast<uint32_t>(granule)};
  std::memcpy(&key[2], levels, sizeof(float) * static_cast<size_t>(count));
  thread_local std::map<std::array<uint32_t, LEVELS + 2>, int> known;
  if (const auto found = known.find(key); found != known.end()) return found->second;
  if (known.size() >= MOST) known.clear();
  return known[key] = fit_most(levels, count, largest, granule);
}

// Levels as numbers a step apart: levels[i] = first + step * i, up to rounding.
struct Line {
  float step, first;
  bool fits;
};

Line line_through(const float* levels, int64_t count, float largest) {
  const float step = count > 1 ? (levels[count - 1] - levels[0]) / static_cast<float>(count - 1) : 0.0f;
  Line out{step, levels[0], step > 0.0f};
  for (int64_t i = 0; i < count; ++i) {
    out.fits &= std::abs(levels[i] - (out.first + step * static_cast<float>(i))) <= 1e-6f * largest;
  }
  return out;
}

template <class Index>
void check_features(const Index* outliers, int64_t count, int64_t cols) {
  for (int64_t i = 0; i < count; ++i) {
    KBIT_CHECK_INDEX(outliers[i] >= 0 && outliers[i] < cols, "kbit: outlier feature ", outliers[i],
                     " is outside 0 ... ", cols - 1);
  }
}

// A checked weight of any number of dimensions, seen as one matrix after another.
class Packed {
 public:
  explicit Packed(const Operands& given) : kept_(given) {
    Operands& o = kept_;
    KBIT_CHECK(o.bits >= 2 && o.bits <= 8, "kbit: ", o.bits, " bits; expected 2 to 8");
    KBIT_CHECK(o.block >= 1 && o.in_features >= 1, "kbit: block ", o.block, ", ", o.in_features, " features");
    const int64_t row_bytes = o.bits * ((o.in_features + 7) / 8);
    const int64_t blocks = (o.in_features + o.block - 1) / o.block;
    const Tensor& planes = keep(o.planes, "planes");
    KBIT_CHECK(planes.scalar_type() == Dtype::Byte && (planes.dim() == 2 || planes.dim() == 3) &&
                   planes.size(-1) == row_bytes,
               "kbit: planes are ", planes.scalar_type(), " of shape ", text(planes), "; expected (rows, ", row_bytes,
               ") bytes for ", o.in_features, " codes of ", o.bits, " bits");
    Sizes lead = shape_of(planes);
    lead.pop_back();
    base_.rows = planes.size(-2);
    base_.cols = o.in_features;
    base_.blocks = blocks;
    base_.row_bytes = row_bytes;
    base_.block = o.block;
    base_.bits = static_cast<int>(o.bits);
    count_ = planes.dim() == 3 ? planes.size(0) : 1;
    base_.planes = planes.const_data_ptr<uint8_t>();

    base_.scale_type = type_of(keep(o.scales, "scales"), "scales");
    check(o.scales, lead, blocks, "scales");
    base_.scales = o.scales.const_data_ptr();
    read_codebook();
    if (o.zeros.has_value()) {
      base_.zero_type = type_of(keep(*o.zeros, "zeros"), "zeros");
      KBIT_CHECK(base_.zero_type != Type::code, "kbit: zeros are bytes");
      check(*o.zeros, lead, blocks, "zeros");
      base_.zeros = o.zeros->const_data_ptr();
    }
    if (base_.scale_type == Type::code) read_constants();
    if (o.outlier_values.has_value()) read_outliers(lead);
  }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  int64_t count() const { return count_; }
  int dim() const { return static_cast<int>(kept_.planes.dim()); }
  const Weight& matrix() const {
    KBIT_CHECK(dim() == 2, "kbit: expected a 2-D weight, got planes of shape ", text(kept_.planes));
    return base_;
  }
  const Table& table() const { return table_; }

  // (rows, outliers) float32; nothing without outliers.
  OptTensor outlier_columns() const {
    return base_.outliers > 0 ? OptTensor(as_floats(*kept_.outlier_values)) : std::nullopt;
  }

  Weight expert(int64_t index) const {
    Weight w = base_;
    w.planes += index * w.rows * w.row_bytes;
    const int64_t scale = index * w.rows * w.blocks;
    w.scales = moved(w.scales, w.scale_type, scale);
    w.first_scale = scale;
    w.zeros = moved(w.zeros, w.zero_type, scale);
    w.outlier_values = moved(w.outlier_values, w.outlier_type, index * w.rows * w.outliers);
    return w;
  }

 private:
  static const Tensor& keep(Tensor& t, const char* name) {
    KBIT_CHECK(t.is_cpu(), "kbit: ", name, " are not on the CPU");
    t = as_contiguous(t);
    return t;
  }

  static void check(const Tensor& t, const Sizes& lead, int64_t last, const char* name) {
    Sizes wanted = lead;
    wanted.push_back(last);
    KBIT_CHECK(shape_of(t) == wanted, "kbit: ", name, " have shape ", text(t), "; expected ", text(wanted));
  }

  static const void* moved(const void* data, Type type, int64_t by) {
    if (data == nullptr) return nullptr;
    const int64_t size = type == Type::f32 ? 4 : (type == Type::code ? 1 : 2);
    return static_cast<const char*>(data) + by * size;
  }

  void read_codebook() {
    const Tensor& book = keep(kept_.codebook, "codebook");
    const int64_t most = int64_t{1} << base_.bits;
    KBIT_CHECK(book.scalar_type() == Dtype::Float && book.dim() == 1 && book.numel() >= 1 && book.numel() <= most,
               "kbit: the codebook is ", book.scalar_type(), " of shape ", text(book), "; expected 1 to ", most,
               " float32 levels");
    base_.levels = static_cast<int>(book.numel());
    const float* levels = book.const_data_ptr<float>();
    float largest = 0.0f;
    for (int i = 0; i < 256; ++i) {
      levels_[i] = i < base_.levels ? levels[i] : 0.0f;  // a damaged code reads 0, nothing else
      largest = std::max(largest, std::abs(levels_[i]));
    }
    base_.codebook = levels_;
    Table& t = table_;
    const Line line = line_through(levels, base_.levels, largest);
    t.first = line.first;
    t.step = line.step;
    t.is_affine = line.fits;
    base_.most = most_of(levels_, base_.levels, largest, t.is_affine ? t.step : 0.0f, granule_of(base_));
    t.unit = largest / static_cast<float>(base_.most);
    t.has_bytes = t.is_affine;
    for (int i = 0; i < 8; ++i) t.byte[i] = static_cast<uint8_t>(i);
    if (!t.is_affine && base_.bits == 2) {
      const ByteLevels& bytes = byte_levels(levels_, base_.levels);
      t.has_bytes = bytes.is_close;
      t.step = bytes.step;
      t.first = bytes.first;
      std::copy(bytes.byte, bytes.byte + 4, t.byte);
    }
    t.exponent = 0;
    for (int exponent = 1; exponent <= 4 && t.exponent == 0; ++exponent) {
      if (is_small_float(exponent, largest)) t.exponent = exponent;
    }
    for (int i = 0; i < 256; ++i) {
      t.value[i] = largest > 0.0f ? static_cast<int16_t>(std::lrint(levels_[i] / t.unit)) : int16_t{0};
    }
  }

  // Whether level `zero + r` is r, read as an unsigned float of so many exponent bits, up to one factor.
  bool is_small_float(int exponent, float largest) {
    const int shift = 11 - base_.bits + exponent;
    const int zero = (1 << (base_.bits - 1)) - 1;
    if (shift < 0 || base_.levels != 2 * zero + 1 || levels_[zero] != 0.0f) return false;
    const auto pattern = [&](int rank) {
      return from_half(static_cast<uint16_t>(rank << shift));
    };
    table_.half_unit = largest / pattern(zero);
    for (int rank = 1; rank <= zero; ++rank) {
      const float expected = pattern(rank) * table_.half_unit;
      if (std::abs(levels_[zero + rank] - expected) > 1e-6f * largest) return false;
      if (levels_[zero - rank] != -levels_[zero + rank]) return false;
    }
    return true;
  }

  void read_constants() {
    Operands& o = kept_;
    KBIT_CHECK(o.scale_codebook.has_value() && o.scale_absmax.has_value() && o.scale_mean.has_value(),
               "kbit: scales are codes, but their codebook, absmax or mean is missing");
    const Tensor& book = keep(*o.scale_codebook, "scale_codebook");
    const Tensor& absmax = keep(*o.scale_absmax, "scale_absmax");
    const Tensor& mean = keep(*o.scale_mean, "scale_mean");
    const int64_t groups = (o.scales.numel() + SCALE_GROUP - 1) / SCALE_GROUP;
    KBIT_CHECK(book.scalar_type() == Dtype::Float && book.numel() == 256, "kbit: scale_codebook needs 256 float32");
    KBIT_CHECK(absmax.scalar_type() == Dtype::Float && absmax.numel() == groups, "kbit: scale_absmax has ",
               absmax.numel(), " values; expected ", groups, " float32");
    KBIT_CHECK(mean.scalar_type() == Dtype::Float && mean.numel() == 1, "kbit: scale_mean needs one float32");
    base_.scale_codebook = book.const_data_ptr<float>();
    base_.scale_absmax = absmax.const_data_ptr<float>();
    base_.scale_mean = *mean.const_data_ptr<float>();
  }

  void read_outliers(const Sizes& lead) {
    Operands& o = kept_;
    KBIT_CHECK(o.outlier_index.has_value(), "kbit: outlier values without their indices");
    const Tensor& index = keep(*o.outlier_index, "outlier_index");
    KBIT_CHECK(index.scalar_type() == Dtype::Int && index.dim() == 1, "kbit: outlier_index needs int32 indices");
    base_.outliers = index.numel();
    base_.outlier_index = index.const_data_ptr<int32_t>();
    check_features(base_.outlier_index, base_.outliers, base_.cols);
    base_.outlier_type = type_of(keep(*o.outlier_values, "outlier_values"), "outlier values");
    KBIT_CHECK(base_.outlier_type != Type::code, "kbit: outlier values are bytes");
    check(*o.outlier_values, lead, base_.outliers, "outlier_values");
    base_.outlier_values = o.outlier_values->const_data_ptr();
  }

  Operands kept_;
  Weight base_{};
  Table table_{};
  int64_t count_ = 1;
  float levels_[256];
};

#define KBIT_WEIGHT                                                                                              \
  const Tensor &planes, const Tensor &scales, const Tensor &codebook, const OptTensor &zeros,                    \
      const OptTensor &scale_codebook, const OptTensor &scale_absmax, const OptTensor &scale_mean,               \
      const OptTensor &outlier_values, const OptTensor &outlier_index, int64_t in_features, int64_t bits,        \
      int64_t block
#define KBIT_PACKED                                                                                              \
  Packed({planes, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean, outlier_values, outlier_index, \
          in_features, bits, block})

}  // namespace
}  // namespace kbit
