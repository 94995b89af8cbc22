// Rows shared out to torch's threads, and the memory that a calling thread keeps. What it takes from its arena is
// good until the call's `Lease` ends.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "team.h"
#include "tensors.h"

namespace kbit {
namespace {

constexpr int64_t ROWS_AT_ONCE = 4;  // rows of a weight that a thread takes at least
constexpr int64_t SERIAL = 1 << 16;  // multiplications below which a second thread does not pay
constexpr int64_t SERIAL_IN_TEAM = 1 << 14;  // the same where it waits already
constexpr int64_t LONG = 1 << 24;  // multiplications from which threads take rows as they come: cores differ in speed
constexpr int64_t SHARED_ROWS = 32;  // that they then take at least
constexpr int64_t TILE = 1 << 18;  // weights decoded at a time

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

void work_alone() { works_alone() = true; }

// Rows [0, rows) in parts, `body(begin, end)`, among the members of a team that are so many.
template <class F>
void over_parts(int64_t rows, int64_t work, int64_t members, const F& body, const auto& with_members) {
  if (work >= LONG && rows >= members * SHARED_ROWS) {
    const int64_t step = std::max(SHARED_ROWS, rows / (members * 16) / SHARED_ROWS * SHARED_ROWS);
    std::atomic<int64_t> next = 0;
    with_members([&](int64_t) {
      for (int64_t begin = next.fetch_add(step); begin < rows; begin = next.fetch_add(step)) {
        body(begin, std::min(rows, begin + step));
      }
    });
    return;
  }
  const int64_t tiles = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  with_members([&](int64_t member) {
    const int64_t begin = tiles * member / members * ROWS_AT_ONCE;
    const int64_t end = std::min(rows, tiles * (member + 1) / members * ROWS_AT_ONCE);
    if (begin < end) body(begin, end);
  });
}

template <class F>
void over_rows(int64_t rows, int64_t work, const F& body) {
  if (const Leading& mine = leading(); mine.team != nullptr) {
    if (work < SERIAL_IN_TEAM) {
      body(int64_t{0}, rows);
    } else {
      over_parts(rows, work, mine.members, body, [](const auto& each) { with_team(each); });
    }
    return;
  }
  const int64_t threads = torch::stable::get_num_threads();
  if (work < SERIAL || threads == 1 || works_alone()) {
    body(int64_t{0}, rows);
    return;
  }
  over_parts(rows, work, threads, body, [&](const auto& each) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t member = begin; member < end; ++member) each(member);
    });
  });
}

}  // namespace
}  // namespace kbit
