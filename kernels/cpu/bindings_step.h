// A model's way from tokens to logits as a flat list of operations (kbitc/backends/cpu/native_lowering.py), run by
// one team of threads. A value has a row of floats for each token; products and attention share their rows out,
// what lies between them is done token by token.
#pragma once

#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "bindings_cache.h"
#include "bindings_int8.h"
#include "bindings_linear.h"
#include "row_ops.h"
#include "team.h"

namespace kbit {
namespace {

// As in kbitc/backends/cpu/native_program.py.
enum class Code : int64_t {
  unary, binary, mean, rms_norm, layer_norm, embed, embed_dense, positions, linear, dense, attend, tail
};

struct Operand {
  const float* constant;  // null: of a buffer
  int64_t buffer, offset;
  int64_t stride[DIMS];
};

struct Part8 {  // what `linear_int8` knows of a weight before it sees x
  std::vector<float> steps;
  OptTensor columns;
};

struct Operation {
  Code code;
  int64_t kind = 0, out = 0, out_offset = 0;
  Shape shape{};
  Operand a{}, b{};
  int64_t count = 0, apart = 0, width = 0;
  float eps = 0.0f;
  const float* weight = nullptr;
  const float* bias = nullptr;
  Dense dense{};
  std::vector<Part> parts;
  std::vector<const float*> biases;
  const std::vector<Part>* next = nullptr;  // those of the next product
  std::shared_ptr<Part8> bytes;  // of products in int8
  bool is_position = false;  // what is looked up, else the token itself
  int64_t shift = 0;  // added to it
  Operand key{}, value{};
  int64_t key_slot = 0, value_slot = 0, heads = 0, key_heads = 0, value_size = 0, window = 0;
  float scale = 0.0f, cap = 0.0f;
  std::vector<int64_t> live;  // buffers that the tail reads

  bool is_of_rows() const { return code < Code::linear; }
};

// How keys and values of a run are kept.
struct Cache {
  CacheKind kind;
  std::shared_ptr<const PackedCache> keys, values;  // of k bits
};

struct Sequence {
  const int64_t* slots;  // addresses of its keys and values
  int64_t start;  // tokens that it has
  int64_t first, count;  // of the new ones
};

// Memory of one run, kept for the next.
struct Workspace {
  std::unique_ptr<float[], decltype(&std::free)> data{nullptr, &std::free};
  size_t floats = 0;
  float* take(size_t count) {
    if (count > floats) {
      data.reset();
      data.reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
      if (data == nullptr) throw std::bad_alloc();
      floats = count;
    }
    return data.get();
  }
};

class Step {
 public:
  Step(const std::vector<OptTensor>& weights, const std::vector<int64_t>& numbers, const std::vector<Tensor>& constants,
       const std::vector<int64_t>& code, const std::vector<double>& floats)
      : constants_(constants), code_(code), floats_(floats) {
    constexpr size_t TENSORS = 9;
    KBIT_CHECK(weights.size() == TENSORS * (numbers.size() / 3), "kbit: a step's weights and numbers disagree");
    for (const Tensor& constant : constants_) {
      KBIT_CHECK(constant.is_contiguous(), "kbit: a step's constants are contiguous");
    }
    for (size_t i = 0; 3 * i < numbers.size(); ++i) {
      const OptTensor* at = &weights[TENSORS * i];
      weights_.push_back(std::make_unique<Packed>(Operands{*at[0], *at[1], *at[2], at[3], at[4], at[5], at[6], at[7],
                                                           at[8], numbers[3 * i], numbers[3 * i + 1],
                                                           numbers[3 * i + 2]}));
    }
    read();
  }

  int64_t output_width() const { return widths_[output_]; }
  // Addresses that a sequence's cache has.
  int64_t addresses(CacheKind kind) const { return slots_ * parts(kind); }
  static int64_t parts(CacheKind kind) { return kind == CacheKind::packed ? PackedCache::PARTS : 1; }

  // `wanted`: the new tokens, rising, whose logits are written to `out` (wanted, output_width).
  void run(const int64_t* ids, const int64_t* positions, int64_t tokens, const std::vector<Sequence>& sequences,
           const std::vector<int64_t>& wanted, const Cache& cache, int members, float* out) {
    const Leader leader(members);
    Run now{*this, ids, positions, tokens, sequences, cache, lend()};
    now.place(out, static_cast<int64_t>(wanted.size()));
    std::array<double, 3> spent{};
    auto since = std::chrono::steady_clock::now();
    for (size_t i = 0; i < operations_.size();) {
      if (operations_[i].code == Code::tail) {
        if (wanted.empty()) break;
        now.keep(operations_[i].live, wanted);
        ++i;
        continue;
      }
      size_t end = i + 1;
      if (operations_[i].is_of_rows()) {
        while (end < operations_.size() && operations_[end].is_of_rows()) ++end;
        now.rows(i, end);
      } else {
        now.shared(operations_[i]);
      }
      const auto done = std::chrono::steady_clock::now();
      spent[kind_of(operations_[i].code)] += std::chrono::duration<double>(done - since).count();
      since = done;
      i = end;
    }
    give(std::move(now.memory));
    const std::lock_guard<std::mutex> guard(lending_);
    for (size_t kind = 0; kind < spent.size(); ++kind) spent_[kind] += spent[kind];
  }

  // Seconds so far in products, in attention, and in what lies between; from now on they count anew.
  std::vector<double> spent() {
    const std::lock_guard<std::mutex> guard(lending_);
    std::vector<double> out(spent_.begin(), spent_.end());
    spent_ = {};
    return out;
  }

 private:
  static size_t kind_of(Code code) { return code == Code::attend ? 1 : (code < Code::linear ? 2 : 0); }

  struct Run {
    const Step& step;
    const int64_t* ids;
    const int64_t* positions;
    int64_t tokens;
    const std::vector<Sequence>& sequences;
    const Cache& cache;
    std::unique_ptr<Workspace> memory;
    std::vector<float*> at{};  // of each buffer
    std::vector<int64_t> kept_ids{}, kept_positions{};

    void place(float* out, int64_t wanted) {
      float* base = memory->take(static_cast<size_t>(step.row_ * tokens) + 16);
      for (const int64_t offset : step.offsets_) at.push_back(base + offset * tokens);
      if (wanted > 0) at[step.output_] = out;
    }

    // Rows of the wanted tokens to the front; from now on there are no others.
    void keep(const std::vector<int64_t>& live, const std::vector<int64_t>& wanted) {
      for (const int64_t buffer : live) {
        const int64_t width = step.widths_[buffer];
        for (size_t i = 0; i < wanted.size(); ++i) {
          if (wanted[i] == static_cast<int64_t>(i)) continue;
          std::copy_n(at[buffer] + wanted[i] * width, width, at[buffer] + static_cast<int64_t>(i) * width);
        }
      }
      for (const int64_t token : wanted) {
        kept_ids.push_back(ids[token]);
        kept_positions.push_back(positions[token]);
      }
      ids = kept_ids.data();
      positions = kept_positions.data();
      tokens = static_cast<int64_t>(wanted.size());
    }

    const float* of(const Operand& x, int64_t token) const {
      if (x.constant != nullptr) return x.constant + x.offset;
      return at[x.buffer] + token * step.widths_[x.buffer] + x.offset;
    }
    Strided strided(const Operand& x, int64_t token) const {
      Strided out{of(x, token), {}};
      std::copy_n(x.stride, DIMS, out.stride);
      return out;
    }

    void rows(size_t begin, size_t end) const {
      const RowKernels& set = row_kernels();
      over_items(tokens, SERIAL_IN_TEAM, 0, [&](int64_t token, float*) {
        for (size_t i = begin; i < end; ++i) row(set, step.operations_[i], token);
      });
    }

    void row(const RowKernels& set, const Operation& o, int64_t token) const {
      float* out = at[o.out] + token * step.widths_[o.out] + o.out_offset;
      switch (o.code) {
        case Code::unary:
          set.unary(static_cast<Unary>(o.kind), o.shape, strided(o.a, token), out);
          break;
        case Code::binary:
          set.binary(static_cast<Binary>(o.kind), o.shape, strided(o.a, token), strided(o.b, token), out);
          break;
        case Code::mean:
          set.mean(of(o.a, token), o.count, o.apart, o.width, out);
          break;
        case Code::rms_norm:
          set.rms_norm(of(o.a, token), o.count, o.width, o.weight, o.eps, out);
          break;
        case Code::layer_norm:
          set.layer_norm(of(o.a, token), o.count, o.width, o.weight, o.bias, o.eps, out);
          break;
        case Code::embed: {
          const Weight& w = *o.parts[0].weight;
          const int64_t id = (o.is_position ? positions : ids)[token] + o.shift;
          KBIT_CHECK_INDEX(id >= 0 && id < w.rows, "kbit: index ", id, " is outside 0 ... ", w.rows - 1);
          kernels().decode(w, id, out);
          break;
        }
        case Code::embed_dense: {
          const int64_t id = (o.is_position ? positions : ids)[token] + o.shift;
          KBIT_CHECK_INDEX(id >= 0 && id < o.count, "kbit: index ", id, " is outside 0 ... ", o.count - 1);
          set.to_floats(o.dense, id, o.width, out);
          break;
        }
        default:
          *out = static_cast<float>(positions[token]);
      }
    }

    void shared(const Operation& o) const {
      if (o.code == Code::attend) {
        attend(o);
        return;
      }
      const float* from = at[o.a.buffer];
      float* to = at[o.out];
      const int64_t width = step.widths_[o.out];
      if (o.code == Code::dense) {
        over_rows(o.count, o.count * o.width * tokens, [&](int64_t begin, int64_t end) {
          std::vector<float> row(static_cast<size_t>(o.width));
          row_kernels().dense(from, tokens, o.width, o.dense, begin, end - begin, o.width, row.data(), to + begin,
                              width);
        });
        if (o.bias != nullptr) add_bias(o.bias, o.count, 0, tokens, to, width);
        return;
      }
      const Lease lease;
      if (o.bytes != nullptr) {
        multiply_int8(*o.parts[0].weight, o.bytes->steps, o.bytes->columns, from, tokens, to, width);
      } else {
        multiply_floats(from, tokens, o.parts, to, width, tokens == 1 ? o.next : nullptr);
      }
      for (size_t i = 0; i < o.parts.size(); ++i) {
        const Part& part = o.parts[i];
        if (o.biases[i] != nullptr) add_bias(o.biases[i], part.weight->rows, part.first, tokens, to, width);
      }
    }

    void attend(const Operation& o) const {
      for (const Sequence& sequence : sequences) {
        Attention all{};
        all.kind = cache.kind;
        if (cache.kind == CacheKind::packed) {
          store_packed(o, sequence, all);
        } else {
          all.keys = plain(sequence, o.key_slot, o.width);
          all.values = plain(sequence, o.value_slot, o.value_size);
          store(o, o.key, sequence, all.keys);
          store(o, o.value, sequence, all.values);
        }
        all.query = of(o.a, sequence.first);
        all.query_token = step.widths_[o.a.buffer];
        all.query_head = o.a.stride[0];
        all.out = at[o.out] + sequence.first * step.widths_[o.out];
        all.out_token = step.widths_[o.out];
        all.heads = o.heads;
        all.key_heads = o.key_heads;
        all.tokens = sequence.count;
        all.start = sequence.start;
        all.window = o.window;
        all.scale = o.scale;
        all.cap = o.cap;
        if (sequence.count <= FEW_TOKENS) {
          few(all);
        } else {
          many(all);
        }
      }
    }

    CachedRows plain(const Sequence& sequence, int64_t slot, int64_t size) const {
      return {reinterpret_cast<const void*>(sequence.slots[slot]), nullptr, nullptr, nullptr, nullptr, size};
    }

    // New keys, or values, to the end of the cache.
    void store(const Operation& o, const Operand& x, const Sequence& sequence, const CachedRows& rows) const {
      void* data = const_cast<void*>(rows.rows);
      for (int64_t i = 0; i < sequence.count; ++i) {
        const float* from = of(x, sequence.first + i);
        for (int64_t head = 0; head < o.key_heads; ++head) {
          const float* own = from + head * x.stride[0];
          const int64_t place = ((sequence.start + i) * o.key_heads + head) * rows.size;
          if (cache.kind == CacheKind::f16) {
            row_kernels().to_half(own, rows.size, static_cast<uint16_t*>(data) + place);
          } else {
            std::copy_n(own, rows.size, static_cast<float*>(data) + place);
          }
        }
      }
    }

    // Both to the end of a k-bit cache, and where they lie.
    void store_packed(const Operation& o, const Sequence& sequence, Attention& all) const {
      const auto at = [&](int64_t slot) { return sequence.slots + slot * PackedCache::PARTS; };
      const PackedCache::Place keys(*cache.keys, at(o.key_slot), o.key_heads, o.width);
      const PackedCache::Place values(*cache.values, at(o.value_slot), o.key_heads, o.value_size);
      const int64_t group = o.heads / o.key_heads;
      over_items(o.key_heads, sequence.count * o.key_heads * (o.width + o.value_size) * 16, 0, [&](int64_t head, float*) {
        for (int64_t i = 0; i < sequence.count; ++i) {
          const int64_t token = sequence.start + i;
          const float* queries = of(o.a, sequence.first + i) + head * group * o.a.stride[0];
          const auto row = [&](const Operand& x) { return of(x, sequence.first + i) + head * x.stride[0]; };
          cache.keys->write(keys, token, head, row(o.key), queries, group, o.a.stride[0]);
          cache.values->write(values, token, head, row(o.value), nullptr, 0, 0);
        }
      });
      all.keys = keys.rows;
      all.values = values.rows;
      all.factors = keys.is_turned(0) ? keys.factors(0) : nullptr;  // all heads are, or none
    }

    // Segments of the cache, as they come.
    void few(const Attention& all) const {
      const int64_t length = all.start + all.tokens, segment = segment_of(length);
      const int64_t first = all.window > 0 ? std::max(int64_t{0}, all.start + 1 - all.window) / segment : 0;
      const int64_t segments = (length + segment - 1) / segment - first;
      const int64_t of_head = all.tokens * (all.heads / all.key_heads) * (all.values.size + 2);
      const int64_t apart = all.key_heads * of_head;
      std::vector<float> partial(static_cast<size_t>(segments * apart));
      std::vector<float> query(static_cast<size_t>(all.tokens * all.heads * all.keys.size));
      row_kernels().take_queries(all, query.data());
      const auto one = [&](int64_t item, float* scratch) {
        const int64_t begin = (first + item) * segment;
        row_kernels().attend_few(all, query.data(), begin, std::min(length, begin + segment),
                                 partial.data() + item * apart, scratch);
      };
      over_items(segments, all.tokens * length * all.heads * all.keys.size, attend_scratch(all), one);
      for (int64_t head = 0; head < all.key_heads; ++head) {
        row_kernels().join(all, head, partial.data() + head * of_head, segments, apart);
      }
    }

    void many(const Attention& all) const {
      const int64_t blocks = (all.tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
      const int64_t work = all.tokens * (all.start + all.tokens) * all.heads * all.keys.size;
      over_items(all.key_heads * blocks, work, attend_scratch(all), [&](int64_t item, float* scratch) {
        const int64_t block = blocks - 1 - item / all.key_heads;  // the longest first
        const int64_t begin = block * TOKENS_AT_ONCE;
        row_kernels().attend_many(
            all, {item % all.key_heads, begin, std::min(all.tokens, begin + TOKENS_AT_ONCE)}, scratch);
      });
    }

    // Items as they come, one by one; each member has so many floats of scratch memory.
    template <class F>
    static void over_items(int64_t items, int64_t work, int64_t scratch, const F& one) {
      const auto alone = [&](const auto& next) {
        thread_local Workspace memory;
        float* floats = memory.take(static_cast<size_t>(scratch));
        for (int64_t item = next(); item < items; item = next()) one(item, floats);
      };
      if (leading().team == nullptr || items == 1 || work < SERIAL_IN_TEAM) {
        int64_t at = 0;
        alone([&] { return at++; });
        return;
      }
      std::atomic<int64_t> at = 0;
      with_team([&](int64_t) { alone([&] { return at.fetch_add(1); }); });
    }
  };

  // Reading the code ---------------------------------------------------------------------------

  int64_t next() {
    KBIT_CHECK(at_ < code_.size(), "kbit: a step's code ends too early");
    return code_[at_++];
  }
  float number() { return static_cast<float>(floats_.at(static_cast<size_t>(next()))); }
  const float* constant(int64_t index) {
    return index < 0 ? nullptr : constants_.at(static_cast<size_t>(index)).const_data_ptr<float>();
  }
  Dense dense(int64_t index) {
    const Tensor& tensor = constants_.at(static_cast<size_t>(index));
    switch (type_of(tensor, "dense weights")) {
      case Type::f32:
        return {tensor.const_data_ptr(), Dense::Type::f32};
      case Type::f16:
        return {tensor.const_data_ptr(), Dense::Type::f16};
      case Type::bf16:
        return {tensor.const_data_ptr(), Dense::Type::bf16};
      default:
        KBIT_CHECK(false, "kbit: dense weights are ", tensor.scalar_type());
    }
  }
  int64_t buffer() {
    const int64_t index = next();
    KBIT_CHECK(index >= 0 && index < static_cast<int64_t>(widths_.size()), "kbit: a step has no buffer ", index);
    return index;
  }
  Operand operand() {
    Operand out{};
    const bool is_constant = next() != 0;
    const int64_t index = next();
    if (is_constant) {
      out.constant = constant(index);
    } else {
      out.buffer = index;
      KBIT_CHECK(index >= 0 && index < static_cast<int64_t>(widths_.size()), "kbit: a step has no buffer ", index);
    }
    out.offset = next();
    for (int64_t& stride : out.stride) stride = next();
    return out;
  }

  void read() {
    const int64_t buffers = next();
    row_ = next();
    output_ = next();
    for (int64_t i = 0; i < buffers; ++i) {
      offsets_.push_back(next());
      widths_.push_back(next());
    }
    while (at_ < code_.size()) operations_.push_back(operation());
    const std::vector<Part>* next = nullptr;
    for (auto o = operations_.rbegin(); o != operations_.rend(); ++o) {
      if (o->code != Code::linear) continue;
      o->next = next;
      next = &o->parts;
    }
  }

  Operation operation() {
    Operation o{static_cast<Code>(next())};
    switch (o.code) {
      case Code::unary:
      case Code::binary:
        o.kind = next();
        o.out = buffer();
        o.out_offset = next();
        for (int64_t& size : o.shape.size) size = next();
        for (int64_t& stride : o.shape.out) stride = next();
        o.a = operand();
        if (o.code == Code::binary) o.b = operand();
        break;
      case Code::mean:
        o.out = buffer();
        o.a = operand();
        o.count = next();
        o.apart = next();
        o.width = next();
        break;
      case Code::rms_norm:
      case Code::layer_norm:
        o.out = buffer();
        o.a = operand();
        o.count = next();
        o.width = next();
        o.weight = constant(next());
        o.bias = constant(next());
        o.eps = number();
        break;
      case Code::embed:
      case Code::embed_dense:
        o.out = buffer();
        o.is_position = next() != 0;
        o.shift = next();
        if (o.code == Code::embed) {
          add_part(o, next(), -1);
        } else {
          o.dense = dense(next());
          o.count = next();
          o.width = next();
        }
        break;
      case Code::positions:
        o.out = buffer();
        break;
      case Code::linear: {
        o.out = buffer();
        o.a.buffer = buffer();
        const bool is_int8 = next() != 0;
        const int64_t count = next();
        const size_t first = static_cast<size_t>(code_.at(at_));
        for (int64_t i = 0; i < count; ++i) {
          const int64_t weight = next();
          add_part(o, weight, next());
        }
        if (is_int8) o.bytes = bytes_of(*weights_[first]);
        break;
      }
      case Code::dense:
        o.out = buffer();
        o.a.buffer = buffer();
        o.dense = dense(next());
        o.count = next();
        o.width = next();
        o.bias = constant(next());
        break;
      case Code::attend:
        o.out = buffer();
        o.a = operand();
        o.key = operand();
        o.value = operand();
        o.key_slot = next();
        o.value_slot = next();
        slots_ = std::max({slots_, o.key_slot + 1, o.value_slot + 1});
        o.heads = next();
        o.key_heads = next();
        o.width = next();
        o.value_size = next();
        o.window = next();
        o.scale = number();
        o.cap = number();
        break;
      case Code::tail:
        for (int64_t left = next(); left > 0; --left) o.live.push_back(buffer());
        break;
      default:
        KBIT_CHECK(false, "kbit: a step has no operation ", static_cast<int64_t>(o.code));
    }
    return o;
  }

  void add_part(Operation& o, int64_t weight, int64_t bias) {
    const Packed& packed = *weights_.at(static_cast<size_t>(weight));
    o.parts.push_back({&packed.matrix(), &packed.table(), nullptr, o.width});
    o.biases.push_back(constant(bias));
    o.width += packed.matrix().rows;
  }

  static std::shared_ptr<Part8> bytes_of(const Packed& packed) {
    check_int8(packed.matrix(), packed.table());
    return std::make_shared<Part8>(
        Part8{steps_of(packed.matrix(), packed.table()), packed.outlier_columns()});
  }

  std::unique_ptr<Workspace> lend() {
    const std::lock_guard<std::mutex> guard(lending_);
    if (spare_.empty()) return std::make_unique<Workspace>();
    std::unique_ptr<Workspace> out = std::move(spare_.back());
    spare_.pop_back();
    return out;
  }
  void give(std::unique_ptr<Workspace> memory) {
    const std::lock_guard<std::mutex> guard(lending_);
    spare_.push_back(std::move(memory));
  }

  std::vector<std::unique_ptr<Packed>> weights_;
  const std::vector<Tensor> constants_;
  const std::vector<int64_t> code_;
  const std::vector<double> floats_;
  size_t at_ = 0;
  int64_t row_ = 0, output_ = 0, slots_ = 0;
  std::vector<int64_t> offsets_, widths_;
  std::vector<Operation> operations_;
  std::mutex lending_;
  std::array<double, 3> spent_{};
  std::vector<std::unique_ptr<Workspace>> spare_;
};

// Steps by number ------------------------------------------------------------------------------

struct Steps {
  std::mutex lock;
  std::map<int64_t, std::shared_ptr<Step>> known;
  int64_t last = 0;
};

Steps& steps() {
  static Steps* all = new Steps;  // never deleted: a thread may still be running one when the process ends
  return *all;
}

int64_t build_step(const std::vector<OptTensor>& weights, const std::vector<int64_t>& numbers,
                   const std::vector<Tensor>& constants, const std::vector<int64_t>& code,
                   const std::vector<double>& floats) {
  auto made = std::make_shared<Step>(weights, numbers, constants, code, floats);
  const std::lock_guard<std::mutex> guard(steps().lock);
  steps().known[++steps().last] = std::move(made);
  return steps().last;
}

void free_step(int64_t step) {
  const std::lock_guard<std::mutex> guard(steps().lock);
  steps().known.erase(step);
}

std::shared_ptr<Step> find_step(int64_t step) {
  const std::lock_guard<std::mutex> guard(steps().lock);
  const auto at = steps().known.find(step);
  KBIT_CHECK(at != steps().known.end(), "kbit: there is no step ", step);
  return at->second;
}

std::vector<double> step_spent(int64_t step) { return find_step(step)->spent(); }

// A k-bit format of keys, or of values, by its codebook and three numbers (`PackedCache`).
std::shared_ptr<const PackedCache> find_packed(const Tensor& codebook, const std::vector<int64_t>& numbers) {
  static std::mutex lock;
  // They hold on to their codebooks, so that no other gets the same address.
  static auto* known = new std::map<std::pair<const void*, std::vector<int64_t>>, std::shared_ptr<const PackedCache>>;
  const std::lock_guard<std::mutex> guard(lock);
  auto& own = (*known)[{codebook.const_data_ptr(), numbers}];
  if (own == nullptr) own = std::make_shared<PackedCache>(codebook, numbers);
  return own;
}

// A cache: of numbers by their bits; of k bits by the codebooks of keys and of values, and three numbers of each.
Cache find_cache(const std::vector<Tensor>& codebooks, const std::vector<int64_t>& numbers) {
  if (codebooks.empty()) {
    KBIT_CHECK(numbers.size() == 1 && (numbers[0] == 16 || numbers[0] == 32),
               "kbit: a cache of plain numbers has 16 or 32 bits");
    return {numbers[0] == 16 ? CacheKind::f16 : CacheKind::f32, nullptr, nullptr};
  }
  KBIT_CHECK(codebooks.size() == 2 && numbers.size() == 6,
             "kbit: a k-bit cache has a codebook and three numbers of keys, and of values");
  return {CacheKind::packed, find_packed(codebooks[0], {numbers.begin(), numbers.begin() + 3}),
          find_packed(codebooks[1], {numbers.begin() + 3, numbers.end()})};
}

// ids, positions: (tokens) int64. slots: (sequences, slots) int64 addresses; starts, counts: of each sequence.
// The cache: see `find_cache`. Logits (wanted, vocabulary) float32.
Tensor run_step(int64_t step, const Tensor& ids, const Tensor& positions, const Tensor& slots,
                const std::vector<int64_t>& starts, const std::vector<int64_t>& counts,
                const std::vector<int64_t>& wanted, const std::vector<Tensor>& codebooks,
                const std::vector<int64_t>& numbers) {
  const std::shared_ptr<Step> own = find_step(step);
  const int64_t tokens = ids.numel();
  KBIT_CHECK(ids.scalar_type() == Dtype::Long && positions.scalar_type() == Dtype::Long && ids.is_contiguous() &&
                 positions.is_contiguous() && positions.numel() == tokens && tokens > 0,
             "kbit: a step takes contiguous int64 tokens and as many positions");
  KBIT_CHECK(slots.scalar_type() == Dtype::Long && slots.dim() == 2 && slots.is_contiguous() &&
                 slots.size(0) == static_cast<int64_t>(starts.size()) && starts.size() == counts.size(),
             "kbit: a step takes a row of addresses, a start and a count for each sequence");
  std::vector<Sequence> sequences;
  int64_t first = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    sequences.push_back({slots.const_data_ptr<int64_t>() + static_cast<int64_t>(i) * slots.size(1), starts[i], first,
                         counts[i]});
    first += counts[i];
  }
  KBIT_CHECK(first == tokens, "kbit: the sequences have ", first, " tokens, not ", tokens);
  const Cache cache = find_cache(codebooks, numbers);
  KBIT_CHECK(slots.size(1) == own->addresses(cache.kind), "kbit: the step has a cache of ",
             own->addresses(cache.kind), " parts, not ", slots.size(1));
  int64_t before = -1;
  for (const int64_t token : wanted) {
    KBIT_CHECK_INDEX(token > before && token < tokens, "kbit: wanted tokens rise within 0 ... ", tokens - 1);
    before = token;
  }
  const Tensor out = new_tensor({static_cast<int64_t>(wanted.size()), own->output_width()}, Dtype::Float);
  own->run(ids.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>(), tokens, sequences, wanted,
           cache, works_alone() ? 1 : static_cast<int>(torch::stable::get_num_threads()), floats_of(out));
  return out;
}

}  // namespace
}  // namespace kbit
