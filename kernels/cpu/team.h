// A persistent team of threads for work of microseconds: helpers spin between jobs, and sleep when none comes.
//
// One team a process, which one job has at a time: who finds it busy works alone. A child of fork gets a new one.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace kbit {
namespace {

// Whether the calling thread does its work alone, because others like it have the rest of the machine.
inline bool& works_alone() {
  thread_local bool is_alone = false;
  return is_alone;
}

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

class Team {
 public:
  static constexpr int SPINS = 20000;  // of a helper before it sleeps: about a millisecond
  static constexpr int PATIENCE = 4000;  // of who waits for helpers, before it offers its core to them

  // `body(member)` for every member in [0, members), member 0 on the calling thread.
  template <class F>
  void run(int members, const F& body) {
    if (members <= 1) {
      body(0);
      return;
    }
    grow(members - 1);
    call_ = [](const void* context, int member) { (*static_cast<const F*>(context))(member); };
    context_ = &body;
    members_ = members;
    pending_.store(static_cast<int>(helpers_), std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) epoch_.notify_all();
    std::exception_ptr own;
    try {
      body(0);
    } catch (...) {
      own = std::current_exception();
    }
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < PATIENCE) {
        pause_cpu();
      } else {
        sched_yield();
      }
    }
    if (own == nullptr) own = error_;
    error_ = nullptr;
    if (own != nullptr) std::rethrow_exception(own);
  }

 private:
  void grow(int helpers) {
    for (; helpers_ < helpers; ++helpers_) {
      const int member = static_cast<int>(helpers_) + 1;
      const uint32_t seen = epoch_.load();
      std::thread([this, member, seen] { help(member, seen); }).detach();
    }
  }

  void help(int member, uint32_t seen) {
    works_alone() = true;
    for (;;) {
      for (int spins = 0; spins < SPINS && epoch_.load(std::memory_order_acquire) == seen; ++spins) pause_cpu();
      if (epoch_.load(std::memory_order_acquire) == seen) {
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        epoch_.wait(seen, std::memory_order_seq_cst);
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
        continue;
      }
      ++seen;  // every helper answers every job, so none is ever missed
      if (member < members_) {
        try {
          call_(context_, member);
        } catch (...) {
          const std::lock_guard<std::mutex> guard(failing_);
          if (error_ == nullptr) error_ = std::current_exception();
        }
      }
      pending_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::atomic<uint32_t> epoch_{0};
  std::atomic<int> pending_{0}, sleeping_{0};
  void (*call_)(const void*, int) = nullptr;
  const void* context_ = nullptr;
  int members_ = 0;
  int64_t helpers_ = 0;
  std::mutex failing_;
  std::exception_ptr error_;
};

struct SharedTeam {
  Team team;
  std::mutex busy;
};

// The process's; never deleted: helpers may still look at it when the process ends.
inline SharedTeam& shared_team() {
  static std::atomic<SharedTeam*> shared = new SharedTeam;
  // The helpers are no part of a child of fork, and the lock may be held by a thread that is not either.
  static const int is_watched = pthread_atfork(nullptr, nullptr, [] { shared = new SharedTeam; });
  static_cast<void>(is_watched);
  return *shared.load();
}

// The team that the calling thread leads, if any; what is shared out by `over_rows` then goes to it.
struct Leading {
  Team* team = nullptr;
  int members = 1;
};

inline Leading& leading() {
  thread_local Leading mine;
  return mine;
}

// `body(member)` for every member of the team that the calling thread leads; within it everybody works alone.
template <class F>
void with_team(const F& body) {
  const Leading mine = leading();
  const bool was_alone = works_alone();
  struct Back {
    const Leading& mine;
    const bool was_alone;
    ~Back() {
      leading() = mine;
      works_alone() = was_alone;
    }
  } back{mine, was_alone};
  leading() = {};
  works_alone() = true;
  mine.team->run(mine.members, body);
}

// Leads the process's team for a while; works alone if it is busy.
class Leader {
 public:
  explicit Leader(int members) {
    if (members <= 1) return;
    SharedTeam& shared = shared_team();
    lock_ = std::unique_lock<std::mutex>(shared.busy, std::try_to_lock);
    if (lock_.owns_lock()) {
      leading() = {&shared.team, members};
    } else {
      works_alone() = true;
    }
  }
  ~Leader() {
    leading() = {};
    works_alone() = was_alone_;
  }
  Leader(const Leader&) = delete;
  Leader& operator=(const Leader&) = delete;

 private:
  const bool was_alone_ = works_alone();
  std::unique_lock<std::mutex> lock_;
};

}  // namespace
}  // namespace kbit
