// x as the vector kernels take it: integers under one scale a granule, outlier features apart, and apart from these
// the few values beside which the integers of others would keep no bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings_sets.h"
#include "bindings_threads.h"

namespace kbit {
namespace {

// A value of x that rules its granule: multiplied as a float, and no part of the integers.
struct Spike {
  int64_t row, col;
  float value;
};

// x prepared for a weight; weights that agree on all of this share it.
struct Prepared {
  Activation x{};
  int bits = 0, most = 0;
  int64_t block = 0;
  std::vector<Spike> spikes;

  bool fits(const Weight& w, Mode mode) const {
    return x.rows > 0 && bits == w.bits && most == w.most && block == w.block && x.mode == mode && w.outliers == 0 &&
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

// Sets to zero, and adds to `spikes`, what of row m is more than a sixteenth of its granule's peak, wherever that
// is an eighth of the granule at most.
void split_spikes(float* row, int64_t cols, int64_t granule, int64_t m, std::vector<Spike>& spikes) {
  for (int64_t at = 0; at < cols; at += granule) {
    const int64_t end = std::min(cols, at + granule);
    float peak = 0.0f;
    for (int64_t i = at; i < end; ++i) peak = std::max(peak, std::abs(row[i]));
    const auto rules = [&](float value) { return std::abs(value) > peak / 16.0f; };
    if (std::count_if(row + at, row + end, rules) > granule / 8) continue;
    for (int64_t i = at; i < end; ++i) {
      if (!rules(row[i])) continue;
      spikes.push_back({m, i, row[i]});
      row[i] = 0.0f;
    }
  }
}

// Prepares coarse rows once more without their spikes; thrice at most, since spikes may hide others.
void prepare_again(const Weight& w, const float* x, Prepared& out) {
  Activation& a = out.x;
  std::vector<int64_t> coarse;
  for (int64_t m = 0; m < a.rows; ++m) {
    if (a.unusual[m] == Activation::COARSE) coarse.push_back(m);
  }
  if (coarse.empty()) return;
  const int64_t count = static_cast<int64_t>(coarse.size());
  std::vector<std::vector<Spike>> found(coarse.size());
  over_rows(count, count * w.cols, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(w.cols)), outliers(static_cast<size_t>(w.outliers));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = coarse[i];
      split_outliers(w, x + m * w.cols, row.data(), outliers.data());
      for (int round = 0; round < 3 && a.unusual[m] == Activation::COARSE; ++round) {
        split_spikes(row.data(), w.cols, a.granule, m, found[i]);
        kernels().prepare(w, row.data(), m, m + 1, a);
      }
    }
  });
  for (const auto& spikes : found) out.spikes.insert(out.spikes.end(), spikes.begin(), spikes.end());
}

Prepared prepare(const Weight& w, const Table& table, const float* x, int64_t rows) {
  Arena& arena = Lease::arena();
  const int64_t chunks = (w.cols + CHUNK - 1) / CHUNK;
  Prepared out;
  out.bits = w.bits;
  out.most = w.most;
  out.block = w.block;
  Activation& a = out.x;
  a.rows = rows;
  a.mode = mode_of(w, table, rows);
  a.granule = granule_of(w);
  a.segments = chunks * (CHUNK / a.granule);
  const int64_t room = rows == 1 ? 1 : (rows + X_ROWS - 1) / X_ROWS * X_ROWS;
  a.values = arena.take<int16_t>(room * chunks * CHUNK * (a.mode == Mode::half ? 2 : 1));
  a.scales = arena.take<float>(rows * a.segments);
  a.sums = arena.take<float>(rows * w.blocks);
  a.unusual = arena.take<uint8_t>(rows);
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
  prepare_again(w, x, out);
  return out;
}

}  // namespace
}  // namespace kbit
