// torch.ops.kbit.* on the CPU: checks of what was given, threads, and the choice of a kernel set.
//
// linear    one row of x: `gemv`; more: `gemm`; both on x quantized to 16 bits block by block. Blocks that
//           are not a multiple of 32 take the decoded rows and float32.
// the rest  rows decoded to float32, a tile at a time.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "scalar.h"

namespace kbit {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t ROWS_AT_ONCE = 4;  // rows of a weight that a thread takes at least
constexpr int64_t SERIAL = 1 << 16;  // multiplications below which a second thread does not pay
constexpr int64_t TILE = 1 << 18;  // weights decoded at a time

// The kernel sets that this machine can run, best first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    sets.push_back(avx512_kernels());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(avx2_kernels());
#endif
  sets.push_back(portable_kernels());
  return sets;
}

const Kernels* find_kernels(const std::string& name) {
  std::string known;
  for (const Kernels* set : runnable()) {
    if (name.empty() || name == "auto" || name == set->name) return set;
    known += (known.empty() ? "" : ", ") + std::string(set->name);
  }
  TORCH_CHECK(false, "no CPU kernels '", name, "'; KBITC_CPU may be ", known, ", auto or off on this machine");
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> set = [] {
    const char* wanted = std::getenv("KBITC_CPU");
    return find_kernels(wanted == nullptr ? "" : wanted);
  }();
  return set;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

// The weight as it came ------------------------------------------------------------------------

struct Operands {
  Tensor planes, scales, codebook;
  OptTensor zeros, scale_codebook, scale_absmax, scale_mean, outlier_values, outlier_index;
  int64_t in_features, bits, block;
};

Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Type::f32;
    case at::kHalf:
      return Type::f16;
    case at::kBFloat16:
      return Type::bf16;
    case at::kByte:
      return Type::code;
    default:
      TORCH_CHECK(false, "kbit: ", name, " are ", t.scalar_type(), "; expected float16, bfloat16, float32 or codes");
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

// A checked weight of any number of dimensions, seen as one matrix after another.
class Packed {
 public:
  explicit Packed(const Operands& given) : kept_(given) {
    Operands& o = kept_;
    TORCH_CHECK(o.bits >= 2 && o.bits <= 8, "kbit: ", o.bits, " bits; expected 2 to 8");
    TORCH_CHECK(o.block >= 1 && o.in_features >= 1, "kbit: block ", o.block, ", ", o.in_features, " features");
    const int64_t row_bytes = o.bits * ((o.in_features + 7) / 8);
    const int64_t blocks = (o.in_features + o.block - 1) / o.block;
    const Tensor& planes = keep(o.planes, "planes");
    TORCH_CHECK(planes.scalar_type() == at::kByte && (planes.dim() == 2 || planes.dim() == 3) &&
                    planes.size(-1) == row_bytes,
                "kbit: planes are ", planes.scalar_type(), " of shape ", planes.sizes(), "; expected (rows, ", row_bytes,
                ") bytes for ", o.in_features, " codes of ", o.bits, " bits");
    const auto lead = planes.sizes().slice(0, planes.dim() - 1);
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
      TORCH_CHECK(base_.zero_type != Type::code, "kbit: zeros are bytes");
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
    TORCH_CHECK(dim() == 2, "kbit: expected a 2-D weight, got planes of shape ", kept_.planes.sizes());
    return base_;
  }
  const Table& table() const { return table_; }

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
    TORCH_CHECK(t.device().is_cpu(), "kbit: ", name, " are on ", t.device(), ", not on the CPU");
    t = t.contiguous();
    return t;
  }

  static void check(const Tensor& t, at::IntArrayRef lead, int64_t last, const char* name) {
    TORCH_CHECK(t.dim() == static_cast<int64_t>(lead.size()) + 1 && t.sizes().slice(0, lead.size()) == lead &&
                    t.size(-1) == last,
                "kbit: ", name, " have shape ", t.sizes(), "; expected ", lead, " and then ", last);
  }

  static const void* moved(const void* data, Type type, int64_t by) {
    if (data == nullptr) return nullptr;
    const int64_t size = type == Type::f32 ? 4 : (type == Type::code ? 1 : 2);
    return static_cast<const char*>(data) + by * size;
  }

  void read_codebook() {
    const Tensor& book = keep(kept_.codebook, "codebook");
    const int64_t most = int64_t{1} << base_.bits;
    TORCH_CHECK(book.scalar_type() == at::kFloat && book.dim() == 1 && book.numel() >= 1 && book.numel() <= most,
                "kbit: the codebook is ", book.scalar_type(), " of shape ", book.sizes(), "; expected 1 to ", most,
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
    t.unit = largest / static_cast<float>(TABLE_MAX);
    t.first = levels[0];
    t.step = base_.levels > 1 ? (levels[base_.levels - 1] - levels[0]) / static_cast<float>(base_.levels - 1) : 0.0f;
    t.is_affine = t.step > 0.0f;
    for (int i = 0; i < base_.levels; ++i) {
      t.is_affine &= std::abs(levels[i] - (t.first + t.step * static_cast<float>(i))) <= 1e-6f * largest;
    }
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
      return static_cast<float>(c10::Half(static_cast<uint16_t>(rank << shift), c10::Half::from_bits()));
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
    TORCH_CHECK(o.scale_codebook.has_value() && o.scale_absmax.has_value() && o.scale_mean.has_value(),
                "kbit: scales are codes, but their codebook, absmax or mean is missing");
    const Tensor& book = keep(*o.scale_codebook, "scale_codebook");
    const Tensor& absmax = keep(*o.scale_absmax, "scale_absmax");
    const Tensor& mean = keep(*o.scale_mean, "scale_mean");
    const int64_t groups = (o.scales.numel() + SCALE_GROUP - 1) / SCALE_GROUP;
    TORCH_CHECK(book.scalar_type() == at::kFloat && book.numel() == 256, "kbit: scale_codebook needs 256 float32");
    TORCH_CHECK(absmax.scalar_type() == at::kFloat && absmax.numel() == groups, "kbit: scale_absmax has ",
                absmax.numel(), " values; expected ", groups, " float32");
    TORCH_CHECK(mean.scalar_type() == at::kFloat && mean.numel() == 1, "kbit: scale_mean needs one float32");
    base_.scale_codebook = book.const_data_ptr<float>();
    base_.scale_absmax = absmax.const_data_ptr<float>();
    base_.scale_mean = *mean.const_data_ptr<float>();
  }

  void read_outliers(at::IntArrayRef lead) {
    Operands& o = kept_;
    TORCH_CHECK(o.outlier_index.has_value(), "kbit: outlier values without their indices");
    const Tensor& index = keep(*o.outlier_index, "outlier_index");
    TORCH_CHECK(index.scalar_type() == at::kInt && index.dim() == 1, "kbit: outlier_index needs int32 indices");
    base_.outliers = index.numel();
    base_.outlier_index = index.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < base_.outliers; ++i) {
      TORCH_CHECK_INDEX(base_.outlier_index[i] >= 0 && base_.outlier_index[i] < base_.cols, "kbit: outlier feature ",
                        base_.outlier_index[i], " is outside 0 ... ", base_.cols - 1);
    }
    base_.outlier_type = type_of(keep(*o.outlier_values, "outlier_values"), "outlier values");
    TORCH_CHECK(base_.outlier_type != Type::code, "kbit: outlier values are bytes");
    check(*o.outlier_values, lead, base_.outliers, "outlier_values");
    base_.outlier_values = o.outlier_values->const_data_ptr();
  }

  Operands kept_;
  Weight base_{};
  Table table_{};
  int64_t count_ = 1;
  float levels_[256];
};

// Memory that a thread keeps between calls, so that large activations are not mapped anew each time.
class Arena {
 public:
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (used_ + bytes > parts_.size_bytes) {
      older_.push_back(std::move(parts_));
      parts_ = Block(std::max(2 * bytes, size_t{1} << 20));
      used_ = 0;
    }
    T* at = reinterpret_cast<T*>(parts_.data + used_);
    used_ += bytes;
    return at;
  }
  void clear() {
    older_.clear();
    used_ = 0;
  }

 private:
  struct Block {
    Block() = default;
    explicit Block(size_t bytes) : data(static_cast<char*>(std::aligned_alloc(64, bytes))), size_bytes(bytes) {
      if (data == nullptr) throw std::bad_alloc();
    }
    Block(Block&& other) noexcept : data(other.data), size_bytes(other.size_bytes) {
      other.data = nullptr;
      other.size_bytes = 0;
    }
    Block& operator=(Block&& other) noexcept {
      std::swap(data, other.data);
      std::swap(size_bytes, other.size_bytes);
      return *this;
    }
    ~Block() { std::free(data); }
    char* data = nullptr;
    size_t size_bytes = 0;
  };
  Block parts_;
  std::vector<Block> older_;
  size_t used_ = 0;
};

struct Lease {  // of the calling thread's arena, for one call
  Lease() { arena().clear(); }
  ~Lease() { arena().clear(); }
  static Arena& arena() {
    thread_local Arena mine;
    return mine;
  }
};

// Threads --------------------------------------------------------------------------------------

template <class F>
void over_rows(int64_t rows, int64_t work, const F& body) {
  if (work < SERIAL || at::get_num_threads() == 1 || at::in_parallel_region()) {
    body(int64_t{0}, rows);
    return;
  }
  const int64_t tiles = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    body(begin * ROWS_AT_ONCE, std::min(rows, end * ROWS_AT_ONCE));
  });
}

// Linear ---------------------------------------------------------------------------------------

// x prepared for a weight; weights that agree on all of this share it.
struct Prepared {
  Activation x{};
  int bits = 0;
  int64_t block = 0;

  bool fits(const Weight& w, Mode mode) const {
    return x.rows > 0 && bits == w.bits && block == w.block && x.mode == mode && w.outliers == 0 &&
           x.outliers == nullptr;
  }
};

Mode mode_of(const Weight& w, const Table& table, int64_t rows) {
  return rows == 1 ? kernels().mode(w, table) : Mode::table;
}

// One row of x without its outlier features, and these.
void split_outliers(const Weight& w, const float* x, float* rest, float* outliers) {
  std::copy(x, x + w.cols, rest);
  for (int64_t i = 0; i < w.outliers; ++i) {
    outliers[i] = x[w.outlier_index[i]];
    rest[w.outlier_index[i]] = 0.0f;
  }
}

Prepared prepare(const Weight& w, const Table& table, const float* x, int64_t rows) {
  Arena& arena = Lease::arena();
  const int64_t chunks = (w.cols + CHUNK - 1) / CHUNK;
  Prepared out;
  out.bits = w.bits;
  out.block = w.block;
  Activation& a = out.x;
  a.rows = rows;
  a.mode = mode_of(w, table, rows);
  a.granule = w.block % 64 == 0 ? 64 : 32;
  a.segments = chunks * (CHUNK / a.granule);
  const int64_t room = rows == 1 ? 1 : (rows + X_ROWS - 1) / X_ROWS * X_ROWS;
  a.values = arena.take<int16_t>(room * chunks * CHUNK * (a.mode == Mode::half ? 2 : 1));
  a.scales = arena.take<float>(rows * a.segments);
  a.sums = arena.take<float>(rows * w.blocks);
  if (w.outliers > 0) {
    a.outliers = arena.take<float>(rows * w.outliers);
  }
  over_rows(rows, rows == 1 ? 0 : rows * w.cols, [&](int64_t begin, int64_t end) {
    if (w.outliers == 0) {
      kernels().prepare(w, x + begin * w.cols, begin, end, a);
      return;
    }
    std::vector<float> row(static_cast<size_t>(w.cols));
    for (int64_t m = begin; m < end; ++m) {  // a row is split while it is in the cache: x is read once
      split_outliers(w, x + m * w.cols, row.data(), a.outliers + m * w.outliers);
      kernels().prepare(w, row.data(), m, m + 1, a);
    }
  });
  return out;
}

// Rows [begin, end) of a weight times every row of x, into out[m * stride + r].
void multiply(const Weight& w, const Table& table, const Activation& x, int64_t begin, int64_t end, float* out,
              int64_t stride) {
  if (x.rows == 1) {
    kernels().gemv(w, table, x, begin, end, out + begin);
    return;
  }
  kernels().gemm(w, table, x, begin, end, out + begin, stride);
}

// Any block size, any number of rows: float32 all the way.
void multiply_decoded(const Weight& w, const float* x, int64_t count, float* out, int64_t stride) {
  if (count <= 16) {
    over_rows(w.rows, w.rows * w.cols, [&](int64_t begin, int64_t end) {
      std::vector<float> row(static_cast<size_t>(w.cols));
      for (int64_t r = begin; r < end; ++r) {
        kernels().decode(w, r, row.data());
        for (int64_t m = 0; m < count; ++m) out[m * stride + r] = kernels().dot(row.data(), x + m * w.cols, w.cols);
      }
    });
    return;
  }
  const int64_t step = std::max(int64_t{16}, TILE / w.cols);
  Tensor tile = at::empty({std::min(step, w.rows), w.cols}, at::kFloat);
  const Tensor input = at::from_blob(const_cast<float*>(x), {count, w.cols}, at::kFloat);
  Tensor result = at::from_blob(out, {count, w.rows}, {stride, 1}, at::kFloat);
  for (int64_t first = 0; first < w.rows; first += step) {
    const int64_t here = std::min(step, w.rows - first);
    float* data = tile.mutable_data_ptr<float>();
    over_rows(here, here * w.cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) kernels().decode(w, first + r, data + r * w.cols);
    });
    result.narrow(1, first, here).copy_(at::mm(input, tile.narrow(0, 0, here).t()));
  }
}

Tensor dense_tile(const Weight& w, int64_t first, int64_t count, at::ScalarType dtype) {
  Tensor tile = at::empty({count, w.cols}, at::kFloat);
  float* data = tile.mutable_data_ptr<float>();
  over_rows(count, count * w.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernels().decode(w, first + r, data + r * w.cols);
  });
  return dtype == at::kFloat ? tile : tile.to(dtype);
}

Tensor checked_input(const char* name, const Tensor& x, int64_t features) {
  TORCH_CHECK(x.is_floating_point() && x.dim() > 0 && x.size(-1) == features, "kbit::", name,
              ": expected a float input whose last dimension is ", features, ", got ", x.scalar_type(), " of shape ",
              x.sizes());
  return x.reshape({-1, features});
}

struct Part {
  const Weight* weight;
  const Table* table;
  const Tensor* bias;
  int64_t first;  // column of the output
};

// x (rows, cols) times every part, side by side.
Tensor multiply_parts(const Tensor& x, const std::vector<Part>& parts, int64_t width) {
  const int64_t count = x.size(0);
  if (x.scalar_type() == at::kDouble) {
    std::vector<Tensor> each;
    for (const Part& part : parts) {
      Tensor y = at::empty({count, part.weight->rows}, x.options());
      const int64_t step = std::max(int64_t{16}, TILE / part.weight->cols);
      for (int64_t r = 0; r < part.weight->rows; r += step) {
        const int64_t here = std::min(step, part.weight->rows - r);
        y.narrow(1, r, here).copy_(at::mm(x, dense_tile(*part.weight, r, here, at::kDouble).t()));
      }
      each.push_back(part.bias == nullptr ? y : y + *part.bias);
    }
    return each.size() == 1 ? each[0] : at::cat(each, 1);
  }
  const Tensor input = x.to(at::kFloat).contiguous();
  Tensor out = at::empty({count, width}, at::kFloat);
  if (count == 0 || width == 0) return out.to(x.scalar_type());
  const Lease lease;
  const float* from = input.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  std::vector<Prepared> prepared(parts.size());
  int64_t work = 0;
  const Prepared* last = nullptr;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Weight& w = *parts[i].weight;
    if (!kernels().is_fast(w)) {
      multiply_decoded(w, from, count, to + parts[i].first, width);
      continue;
    }
    const Mode mode = mode_of(w, *parts[i].table, count);
    prepared[i] = last != nullptr && last->fits(w, mode) ? *last : prepare(w, *parts[i].table, from, count);
    last = &prepared[i];
    work += w.rows * w.cols * count;
  }
  if (work > 0) {
    over_rows(width, work, [&](int64_t begin, int64_t end) {
      for (size_t i = 0; i < parts.size(); ++i) {
        if (prepared[i].x.rows == 0) continue;
        const int64_t first = parts[i].first;
        const int64_t low = std::max(begin, first) - first;
        const int64_t high = std::min(end, first + parts[i].weight->rows) - first;
        if (low < high) multiply(*parts[i].weight, *parts[i].table, prepared[i].x, low, high, to + first, width);
      }
    });
  }
  for (const Part& part : parts) {
    if (part.bias != nullptr) out.narrow(1, part.first, part.weight->rows).add_(*part.bias);
  }
  return out.to(x.scalar_type());
}

at::DimVector shape_like(const Tensor& x, int64_t last) {
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return shape;
}

void check_bias(const OptTensor& bias, int64_t rows) {
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == rows), "kbit::linear: a bias of shape ",
              bias.has_value() ? bias->sizes() : at::IntArrayRef(), "; expected (", rows, ")");
}

#define KBIT_WEIGHT                                                                                              \
  const Tensor &planes, const Tensor &scales, const Tensor &codebook, const OptTensor &zeros,                    \
      const OptTensor &scale_codebook, const OptTensor &scale_absmax, const OptTensor &scale_mean,               \
      const OptTensor &outlier_values, const OptTensor &outlier_index, int64_t in_features, int64_t bits,        \
      int64_t block
#define KBIT_PACKED                                                                                              \
  Packed({planes, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean, outlier_values, outlier_index, \
          in_features, bits, block})

Tensor linear(const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
  const Tensor flat = checked_input("linear", x, in_features);
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  check_bias(bias, w.rows);
  const std::vector<Part> parts = {{&w, &packed.table(), bias.has_value() ? &*bias : nullptr, 0}};
  return multiply_parts(flat, parts, w.rows).view(shape_like(x, w.rows));
}

// LLM.int8(): x in int8, one scale a row, times codes of `int8` with one scale a row, in integers; outlier
// features are no part of either scale and are multiplied as floats.
struct Int8Rows {
  std::vector<int8_t> values;
  std::vector<int32_t> sums;
  std::vector<float> scales, outliers;

  Int8Rows(const Weight& w, const float* x, int64_t rows)
      : values(static_cast<size_t>(rows * w.cols)), sums(static_cast<size_t>(rows)),
        scales(static_cast<size_t>(rows)), outliers(static_cast<size_t>(rows * w.outliers)) {
    over_rows(rows, rows * w.cols, [&](int64_t begin, int64_t end) {
      std::vector<float> rest(static_cast<size_t>(w.cols));
      for (int64_t m = begin; m < end; ++m) {
        split_outliers(w, x + m * w.cols, rest.data(), outliers.data() + m * w.outliers);
        quantize(rest, values.data() + m * w.cols, m);
      }
    });
  }

 private:
  void quantize(const std::vector<float>& x, int8_t* to, int64_t m) {
    float largest = 0.0f, bad = 0.0f;
    for (const float value : x) {
      largest = std::max(largest, std::abs(value));
      bad += value * 0.0f;  // NaN for what is not finite, which must not come out as a number
    }
    const float inverse = largest > 0.0f ? MIDDLE / largest : 0.0f;
    // An absmax below 4e-37 has no finite inverse: such a row is nothing but sub-normals, and becomes 0.
    const float factor = std::isfinite(inverse) && bad == 0.0f ? inverse : 0.0f;
    int32_t sum = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const float scaled = bad == 0.0f ? x[i] * factor : 0.0f;
      to[i] = static_cast<int8_t>(std::nearbyint(scaled));
      sum += to[i];
    }
    sums[m] = sum;
    scales[m] = largest / MIDDLE + bad;
  }
};

Tensor linear_int8(const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
  const Tensor flat = checked_input("linear_int8", x, in_features);
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  const Table& table = packed.table();
  check_bias(bias, w.rows);
  const bool is_centred = table.is_affine && w.levels == 2 * MIDDLE + 1 && w.codebook[MIDDLE] == 0.0f;
  TORCH_CHECK(w.bits == 8 && w.blocks == 1 && is_centred && w.zero_type == Type::none,
              "kbit::linear_int8: needs evenly spaced 8-bit levels around 0 and one scale a row, without zero points: "
              "int8 with a block of at least in_features");
  TORCH_CHECK(w.cols <= BYTES_MOST, "kbit::linear_int8: ", w.cols, " features do not fit int32 sums");
  const Tensor input = flat.to(at::kFloat).contiguous();
  const int64_t count = input.size(0);
  Tensor out = at::empty({count, w.rows}, at::kFloat);
  const Int8Rows rows(w, input.const_data_ptr<float>(), count);
  const Bytes bytes = {rows.values.data(), rows.sums.data(), count, w.cols};
  const Tensor columns = w.outliers > 0 ? outlier_values->to(at::kFloat).contiguous() : Tensor();
  const float* kept = w.outliers > 0 ? columns.const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  over_rows(w.rows, w.rows * w.cols * count, [&](int64_t begin, int64_t end) {
    constexpr int64_t STEP = 64;  // rows whose sums wait in the cache
    std::vector<int32_t> sums(static_cast<size_t>(STEP * count));
    for (int64_t first = begin; first < end; first += STEP) {
      const int64_t here = std::min(STEP, end - first);
      kernels().multiply_bytes(w, bytes, first, first + here, sums.data(), STEP);
      for (int64_t m = 0; m < count; ++m) {
        const float* outliers = rows.outliers.data() + m * w.outliers;
        for (int64_t r = first; r < first + here; ++r) {
          const float scale = rows.scales[m] * (read_scale(w, r, 0) * table.step);
          float value = static_cast<float>(sums[m * STEP + r - first]) * scale;
          if (kept != nullptr) value += kernels().dot(kept + r * w.outliers, outliers, w.outliers);
          to[m * w.rows + r] = value;
        }
      }
    }
  });
  if (bias.has_value()) out.add_(*bias);
  return out.to(x.scalar_type()).view(shape_like(x, w.rows));
}

Tensor linears(const Tensor& x, const c10::List<OptTensor>& weights, at::IntArrayRef numbers,
               const c10::List<OptTensor>& biases) {
  constexpr size_t TENSORS = 9;
  const size_t count = numbers.size() / 3;
  TORCH_CHECK(count > 0 && numbers.size() == 3 * count && weights.size() == TENSORS * count && biases.size() == count,
              "kbit::linears: expected ", TENSORS, " tensors, 3 numbers and a bias for each weight, got ",
              weights.size(), ", ", numbers.size(), " and ", biases.size());
  const Tensor flat = checked_input("linears", x, numbers[0]);
  std::vector<std::unique_ptr<Packed>> packed;
  std::vector<Tensor> kept;
  kept.reserve(count);
  std::vector<Part> parts;
  int64_t width = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto at = [&](size_t j) -> OptTensor { return weights.get(TENSORS * i + j); };
    TORCH_CHECK(at(0).has_value() && at(1).has_value() && at(2).has_value(), "kbit::linears: weight ", i,
                " lacks planes, scales or codebook");
    packed.push_back(std::make_unique<Packed>(Operands{*at(0), *at(1), *at(2), at(3), at(4), at(5), at(6), at(7), at(8),
                                                       numbers[3 * i], numbers[3 * i + 1], numbers[3 * i + 2]}));
    const Weight& w = packed.back()->matrix();
    TORCH_CHECK(w.cols == numbers[0], "kbit::linears: weight ", i, " takes ", w.cols, " features, not ", numbers[0]);
    const OptTensor bias = biases.get(i);
    check_bias(bias, w.rows);
    if (bias.has_value()) kept.push_back(*bias);
    parts.push_back({&w, &packed.back()->table(), bias.has_value() ? &kept.back() : nullptr, width});
    width += w.rows;
  }
  return multiply_parts(flat, parts, width).view(shape_like(x, width));
}

// grad (count, rows) @ W (rows, cols), a tile of rows at a time.
void add_input_grad(const Weight& w, const Tensor& grad, Tensor out) {
  const int64_t step = std::max(int64_t{16}, TILE / w.cols);
  for (int64_t r = 0; r < w.rows; r += step) {
    const int64_t here = std::min(step, w.rows - r);
    out.addmm_(grad.narrow(1, r, here), dense_tile(w, r, here, grad.scalar_type()));
  }
}

at::ScalarType wide(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor input_grad(const Tensor& grad, KBIT_WEIGHT) {
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  const Tensor flat = checked_input("input_grad", grad, w.rows).to(wide(grad));
  Tensor out = at::zeros({flat.size(0), w.cols}, flat.options());
  add_input_grad(w, flat, out);
  return out.to(grad.scalar_type()).view(shape_like(grad, w.cols));
}

std::vector<int64_t> group_ends(const Tensor& offsets, int64_t experts, int64_t tokens) {
  TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == experts && !offsets.is_floating_point(),
              "kbit: offsets need one integer for each of ", experts, " experts, got ", offsets.scalar_type(),
              " of shape ", offsets.sizes());
  const Tensor ends = offsets.to(at::kLong).cpu().contiguous();
  std::vector<int64_t> out(ends.const_data_ptr<int64_t>(), ends.const_data_ptr<int64_t>() + experts);
  int64_t last = 0;
  for (const int64_t end : out) {
    TORCH_CHECK(end >= last && end <= tokens, "kbit: offsets must rise from 0 to ", tokens, ", got ", out);
    last = end;
  }
  return out;
}

const Packed& grouped(const Packed& packed) {
  TORCH_CHECK(packed.dim() == 3, "kbit: a grouped matmul needs a 3-D weight");
  return packed;
}

Tensor grouped_linear(const Tensor& x, KBIT_WEIGHT, const Tensor& offsets) {
  const Tensor flat = checked_input("grouped_linear", x, in_features);
  const Packed packed = KBIT_PACKED;
  const int64_t rows = grouped(packed).expert(0).rows;
  Tensor out = at::zeros({flat.size(0), rows}, x.options());
  int64_t start = 0, index = 0;
  for (const int64_t end : group_ends(offsets, packed.count(), flat.size(0))) {
    if (end > start) {
      const Weight w = packed.expert(index);
      const std::vector<Part> parts = {{&w, &packed.table(), nullptr, 0}};
      out.narrow(0, start, end - start).copy_(multiply_parts(flat.narrow(0, start, end - start), parts, rows));
    }
    start = end;
    ++index;
  }
  return out;
}

Tensor grouped_input_grad(const Tensor& grad, KBIT_WEIGHT, const Tensor& offsets) {
  const Packed packed = KBIT_PACKED;
  const Tensor flat = checked_input("grouped_input_grad", grad, grouped(packed).expert(0).rows).to(wide(grad));
  Tensor out = at::zeros({flat.size(0), in_features}, flat.options());
  int64_t start = 0, index = 0;
  for (const int64_t end : group_ends(offsets, packed.count(), flat.size(0))) {
    if (end > start) {
      add_input_grad(packed.expert(index), flat.narrow(0, start, end - start), out.narrow(0, start, end - start));
    }
    start = end;
    ++index;
  }
  return out.to(grad.scalar_type());
}

// Rows of the weight -----------------------------------------------------------------------------

Tensor embedding(const Tensor& ids, KBIT_WEIGHT, at::ScalarType dtype) {
  const Packed packed = KBIT_PACKED;
  const Weight& w = packed.matrix();
  TORCH_CHECK(!ids.is_floating_point() && ids.scalar_type() != at::kBool, "kbit::embedding: ids are ",
              ids.scalar_type(), "; expected integers");
  const Tensor flat = ids.to(at::kLong).contiguous().view({-1});
  const int64_t* at = flat.const_data_ptr<int64_t>();
  const int64_t count = flat.size(0);
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(at[i] >= 0 && at[i] < w.rows, "kbit::embedding: an id is outside 0 ... ", w.rows - 1);
  }
  Tensor out = at::empty({count, w.cols}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  over_rows(count, count * w.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().decode(w, at[i], to + i * w.cols);
  });
  at::DimVector shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(w.cols);
  return out.to(dtype).view(shape);
}

Tensor dequantize(KBIT_WEIGHT, at::ScalarType dtype) {
  const Packed packed = KBIT_PACKED;
  at::DimVector shape(planes.sizes().begin(), planes.sizes().end());
  shape.back() = in_features;
  Tensor out = at::empty(shape, at::TensorOptions().dtype(dtype));
  const Weight first = packed.expert(0);
  Tensor flat = out.view({-1, first.cols});
  const int64_t step = std::max(int64_t{16}, TILE / first.cols);
  for (int64_t index = 0; index < packed.count(); ++index) {
    const Weight w = packed.expert(index);
    for (int64_t r = 0; r < w.rows; r += step) {
      const int64_t here = std::min(step, w.rows - r);
      flat.narrow(0, index * w.rows + r, here).copy_(dense_tile(w, r, here, at::kFloat));
    }
  }
  return out;
}

// Floats to codes --------------------------------------------------------------------------------

std::unique_ptr<Encoder> make_encoder(const Tensor& codebook) {
  const Tensor book = codebook.contiguous();
  auto out = std::make_unique<Encoder>();
  const float* levels = book.const_data_ptr<float>();
  out->bounds = static_cast<int>(book.numel()) - 1;
  for (int i = 0; i < out->bounds; ++i) {
    const double middle = (static_cast<double>(levels[i + 1]) + levels[i]) / 2;
    float rounded = static_cast<float>(middle);
    if (rounded > middle) rounded = std::nextafter(rounded, -std::numeric_limits<float>::infinity());
    out->bound[i] = rounded;
  }
  for (out->cells = 256; out->cells <= Encoder::MOST_CELLS; out->cells *= 2) {
    bool is_apart = true;
    for (int i = 0; i + 1 < out->bounds && is_apart; ++i) {
      is_apart = cell_of(out->bound[i], out->cells) < cell_of(out->bound[i + 1], out->cells);
    }
    if (!is_apart) continue;
    int next = 0;
    for (int cell = 0; cell <= out->cells; ++cell) {
      out->base[cell] = static_cast<uint8_t>(next);
      const bool holds = next < out->bounds && cell_of(out->bound[next], out->cells) == cell;
      out->edge[cell] = holds ? out->bound[next++] : std::numeric_limits<float>::infinity();
    }
    return out;
  }
  out->cells = 0;
  return out;
}

Tensor encode(const Tensor& rows, const Tensor& scales, const OptTensor& zeros, const Tensor& codebook,
              const OptTensor& outlier_index, int64_t bits, int64_t block) {
  TORCH_CHECK(rows.dim() == 2 && rows.is_floating_point() && rows.numel() > 0, "kbit::encode: expected a 2-D float "
              "weight, got ", rows.scalar_type(), " of shape ", rows.sizes());
  TORCH_CHECK(bits >= 2 && bits <= 8 && block >= 1, "kbit::encode: ", bits, " bits, block ", block);
  TORCH_CHECK(codebook.scalar_type() == at::kFloat && codebook.dim() == 1 && codebook.numel() >= 1 &&
                  codebook.numel() <= (int64_t{1} << bits),
              "kbit::encode: the codebook is ", codebook.scalar_type(), " of shape ", codebook.sizes());
  const int64_t count = rows.size(0), cols = rows.size(1), blocks = (cols + block - 1) / block;
  const auto checked = [&](const Tensor& t, const char* name) {
    TORCH_CHECK(t.dim() == 2 && t.size(0) == count && t.size(1) == blocks, "kbit::encode: ", name, " have shape ",
                t.sizes(), "; expected (", count, ", ", blocks, ")");
    return t.to(at::kFloat).contiguous();
  };
  const Tensor plain_scales = checked(scales, "scales");
  const Tensor plain_zeros = zeros.has_value() ? checked(*zeros, "zeros") : Tensor();
  const Tensor columns = outlier_index.has_value() ? outlier_index->to(at::kLong) : Tensor();
  const std::unique_ptr<Encoder> encoder = make_encoder(codebook);
  const int64_t row_bytes = bits * ((cols + 7) / 8);
  Tensor out = at::empty({count, row_bytes}, at::kByte);
  const float* scale = plain_scales.const_data_ptr<float>();
  const float* zero = zeros.has_value() ? plain_zeros.const_data_ptr<float>() : nullptr;
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const int64_t step = std::max(int64_t{16}, TILE / cols);
  for (int64_t first = 0; first < count; first += step) {
    const int64_t here = std::min(step, count - first);
    Tensor tile = rows.narrow(0, first, here).to(at::kFloat).contiguous();
    if (columns.defined()) tile = tile.index_fill(1, columns, 0.0);
    const float* from = tile.const_data_ptr<float>();
    over_rows(here, here * cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = first + r;
        kernels().encode(*encoder, from + r * cols, scale + at * blocks,
                         zero == nullptr ? nullptr : zero + at * blocks, cols, block, static_cast<int>(bits),
                         to + at * row_bytes);
      }
    });
  }
  return out;
}

// Scales (and zeros) by weighted squared error: (rows, blocks) each, the zeros empty without `zeros`.
std::tuple<Tensor, Tensor> search_scales(const Tensor& rows, const Tensor& importance, const Tensor& scales,
                                         const OptTensor& zeros, const Tensor& codebook, const Tensor& ratios,
                                         int64_t block, int64_t rounds) {
  const int64_t count = rows.size(0), cols = rows.size(1), blocks = (cols + block - 1) / block;
  TORCH_CHECK(rows.dim() == 2 && rows.is_floating_point() && rows.numel() > 0 && block >= 1 && rounds >= 0,
              "kbit::search_scales: expected a 2-D float weight, got ", rows.scalar_type(), " of shape ", rows.sizes());
  TORCH_CHECK(importance.dim() == 2 && importance.size(1) == cols && importance.size(0) >= 1 &&
                  count % importance.size(0) == 0,
              "kbit::search_scales: importance has shape ", importance.sizes(), "; expected (groups, ", cols,
              ") where groups divide ", count, " rows");
  const auto checked = [&](const Tensor& t, const char* name) {
    TORCH_CHECK(t.dim() == 2 && t.size(0) == count && t.size(1) == blocks, "kbit::search_scales: ", name,
                " have shape ", t.sizes(), "; expected (", count, ", ", blocks, ")");
    return t.to(at::kFloat, false, true).contiguous();
  };
  TORCH_CHECK(codebook.scalar_type() == at::kFloat && codebook.dim() == 1 && codebook.numel() >= 1 &&
                  codebook.numel() <= 256 && ratios.scalar_type() == at::kFloat && ratios.dim() == 1,
              "kbit::search_scales: codebook and ratios are 1-D and float32");
  Tensor out = checked(scales, "scales"), middles = zeros.has_value() ? checked(*zeros, "zeros") : Tensor();
  const Tensor weight = importance.to(at::kFloat).contiguous(), levels = codebook.contiguous(), tries = ratios.contiguous();
  const std::unique_ptr<Encoder> encoder = make_encoder(codebook);
  float* scale = out.mutable_data_ptr<float>();
  float* zero = zeros.has_value() ? middles.mutable_data_ptr<float>() : nullptr;
  const float* level = levels.const_data_ptr<float>();
  const float* ratio = tries.const_data_ptr<float>();
  const float* given = weight.const_data_ptr<float>();
  const int64_t per_group = count / importance.size(0), candidates = ratios.numel();
  const int64_t step = std::max(int64_t{16}, TILE / cols);
  for (int64_t first = 0; first < count; first += step) {
    const int64_t here = std::min(step, count - first);
    const Tensor tile = rows.narrow(0, first, here).to(at::kFloat).contiguous();
    const float* from = tile.const_data_ptr<float>();
    over_rows(here, 16 * here * cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = first + r;
        kernels().search(*encoder, level, from + r * cols, given + at / per_group * cols, cols, block, ratio, candidates,
                         static_cast<int>(rounds), scale + at * blocks, zero == nullptr ? nullptr : zero + at * blocks);
      }
    });
  }
  return {out, zeros.has_value() ? middles : at::empty({0}, out.options())};
}

std::string cpu_kernels() { return kernels().name; }

void use_cpu_kernels(std::string_view name) { chosen() = find_kernels(std::string(name)); }

// Gradients ------------------------------------------------------------------------------------
//
// The same as kernels/ops.py registers for other devices. Here, so that a call which needs no gradient
// passes this layer without Python.

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

#define KBIT_TYPES                                                                                               \
  const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&,             \
      const OptTensor&, const OptTensor&, const OptTensor&, int64_t, int64_t, int64_t
#define KBIT_NAMES                                                                                               \
  planes, scales, codebook, zeros, scale_codebook, scale_absmax, scale_mean, outlier_values, outlier_index,      \
      in_features, bits, block

Tensor call_linear(const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
  static const auto op = find_op<Tensor(const Tensor&, KBIT_TYPES, const OptTensor&)>("kbit::linear");
  return op.call(x, KBIT_NAMES, bias);
}
Tensor call_input_grad(const Tensor& grad, KBIT_WEIGHT) {
  static const auto op = find_op<Tensor(const Tensor&, KBIT_TYPES)>("kbit::input_grad");
  return op.call(grad, KBIT_NAMES);
}
Tensor call_grouped_linear(const Tensor& x, KBIT_WEIGHT, const Tensor& offsets) {
  static const auto op = find_op<Tensor(const Tensor&, KBIT_TYPES, const Tensor&)>("kbit::grouped_linear");
  return op.call(x, KBIT_NAMES, offsets);
}
Tensor call_grouped_input_grad(const Tensor& grad, KBIT_WEIGHT, const Tensor& offsets) {
  static const auto op = find_op<Tensor(const Tensor&, KBIT_TYPES, const Tensor&)>("kbit::grouped_input_grad");
  return op.call(grad, KBIT_NAMES, offsets);
}

// A weight's operands, kept for the backward pass.
struct Saved {
  static constexpr size_t TENSORS = 9;
  static void put(AutogradContext* ctx, KBIT_WEIGHT, const Tensor& offsets) {
    const auto plain = [](const OptTensor& t) { return t.value_or(Tensor()); };
    ctx->save_for_backward({planes, scales, codebook, plain(zeros), plain(scale_codebook), plain(scale_absmax),
                            plain(scale_mean), plain(outlier_values), plain(outlier_index), offsets});
    ctx->saved_data["numbers"] = std::vector<int64_t>{in_features, bits, block};
  }
  template <class Call>
  static Tensor get(AutogradContext* ctx, const Call& call) {
    const variable_list t = ctx->get_saved_variables();
    const auto n = ctx->saved_data["numbers"].toIntVector();
    const auto maybe = [&](size_t i) { return t[i].defined() ? OptTensor(t[i]) : OptTensor(); };
    return call(t[0], t[1], t[2], maybe(3), maybe(4), maybe(5), maybe(6), maybe(7), maybe(8), n[0], n[1], n[2],
                t[TENSORS]);
  }
};

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
    Saved::put(ctx, KBIT_NAMES, Tensor());
    ctx->saved_data["bias"] = bias.has_value() ? static_cast<int64_t>(bias->scalar_type()) : int64_t{-1};
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_linear(x, KBIT_NAMES, bias);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(14);
    const Tensor& grad = grads[0];
    if (ctx->needs_input_grad(0)) {
      out[0] = Saved::get(ctx, [&](KBIT_WEIGHT, const Tensor&) { return call_input_grad(grad, KBIT_NAMES); });
    }
    const int64_t dtype = ctx->saved_data["bias"].toInt();
    if (dtype >= 0) out[13] = grad.reshape({-1, grad.size(-1)}).sum(0).to(static_cast<at::ScalarType>(dtype));
    return out;
  }
};

struct GroupedFunction : torch::autograd::Function<GroupedFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, KBIT_WEIGHT, const Tensor& offsets) {
    Saved::put(ctx, KBIT_NAMES, offsets);
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_grouped_linear(x, KBIT_NAMES, offsets);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(14);
    out[0] = Saved::get(ctx, [&](KBIT_WEIGHT, const Tensor& offsets) {
      return call_grouped_input_grad(grads[0], KBIT_NAMES, offsets);
    });
    return out;
  }
};

bool needs_grad(const Tensor& x, const OptTensor& bias) {
  return at::GradMode::is_enabled() && (x.requires_grad() || (bias.has_value() && bias->requires_grad()));
}

Tensor linear_autograd(const Tensor& x, KBIT_WEIGHT, const OptTensor& bias) {
  if (needs_grad(x, bias)) return LinearFunction::apply(x, KBIT_NAMES, bias);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_linear(x, KBIT_NAMES, bias);
}

Tensor grouped_linear_autograd(const Tensor& x, KBIT_WEIGHT, const Tensor& offsets) {
  if (needs_grad(x, OptTensor())) return GroupedFunction::apply(x, KBIT_NAMES, offsets);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_grouped_linear(x, KBIT_NAMES, offsets);
}

}  // namespace
}  // namespace kbit

TORCH_LIBRARY_FRAGMENT(kbit, m) {
  m.def("cpu_kernels() -> str", kbit::cpu_kernels);
  m.def("use_cpu_kernels(str name) -> ()", kbit::use_cpu_kernels);
}

TORCH_LIBRARY_IMPL(kbit, CPU, m) {
  m.impl("linear", kbit::linear);
  m.impl("linears", kbit::linears);
  m.impl("linear_int8", kbit::linear_int8);
  m.impl("input_grad", kbit::input_grad);
  m.impl("embedding", kbit::embedding);
  m.impl("grouped_linear", kbit::grouped_linear);
  m.impl("grouped_input_grad", kbit::grouped_input_grad);
  m.impl("dequantize", kbit::dequantize);
  m.impl("encode", kbit::encode);
  m.impl("search_scales", kbit::search_scales);
}

TORCH_LIBRARY_IMPL(kbit, AutogradCPU, m) {
  m.impl("linear", kbit::linear_autograd);
  m.impl("grouped_linear", kbit::grouped_linear_autograd);
}
