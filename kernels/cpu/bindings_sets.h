// The kernel sets that this machine can run, and the one that runs: KBITC_CPU at the first call names it, or the
// best does.
#pragma once

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace kbit {
namespace {

// The kernel sets that this machine can run, best first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(KBIT_AVX512)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    sets.push_back(avx512_kernels());
  }
#endif
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
  KBIT_CHECK(false, "no CPU kernels '", name, "'; KBITC_CPU may be ", known, ", auto or off on this machine");
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> set = [] {
    const char* wanted = std::getenv("KBITC_CPU");
    return find_kernels(wanted == nullptr ? "" : wanted);
  }();
  return set;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

std::string cpu_kernels() { return kernels().name; }

void use_cpu_kernels(const std::string& name) { chosen() = find_kernels(name); }

}  // namespace
}  // namespace kbit
