// The kernel sets that this machine can run, and the one that runs: KBITC_CPU at the first call names it, or the
// best does.
#pragma once

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"
#include "row_ops.h"
#include "tensors.h"
#include "training.h"

namespace kbit {
namespace {

struct KernelSet {
  const Kernels* products;
  const RowKernels* rows;
  const TrainingKernels* training;
};

// The kernel sets that this machine can run, best first. Nothing else of the others may be called.
const std::vector<KernelSet>& runnable() {
  static const std::vector<KernelSet> all = [] {
    std::vector<KernelSet> sets;
#if defined(__x86_64__)
    __builtin_cpu_init();
#if defined(KBIT_AVX512)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      sets.push_back({avx512_kernels(), avx512_row_kernels(), avx512_training_kernels()});
    }
#endif
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      sets.push_back({avx2_kernels(), avx2_row_kernels(), avx2_training_kernels()});
    }
#endif
    sets.push_back({portable_kernels(), portable_row_kernels(), portable_training_kernels()});
    return sets;
  }();
  return all;
}

const KernelSet* find_kernels(const std::string& name) {
  std::string known;
  for (const KernelSet& set : runnable()) {
    if (name.empty() || name == "auto" || name == set.products->name) return &set;
    known += (known.empty() ? "" : ", ") + std::string(set.products->name);
  }
  KBIT_CHECK(false, "no CPU kernels '", name, "'; KBITC_CPU may be ", known, ", auto or off on this machine");
}

std::atomic<const KernelSet*>& chosen() {
  static std::atomic<const KernelSet*> set = [] {
    const char* wanted = std::getenv("KBITC_CPU");
    return find_kernels(wanted == nullptr ? "" : wanted);
  }();
  return set;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed)->products; }
const RowKernels& row_kernels() { return *chosen().load(std::memory_order_relaxed)->rows; }
const TrainingKernels& training_kernels() { return *chosen().load(std::memory_order_relaxed)->training; }

std::string cpu_kernels() { return kernels().name; }

void use_cpu_kernels(const std::string& name) { chosen() = find_kernels(name); }

}  // namespace
}  // namespace kbit
