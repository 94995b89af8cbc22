// Attention of some tokens to the keys and values of a cache, for one instruction set.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "packed_rows.h"
#include "row_ops.h"
#include "vectors.h"

namespace kbit {
namespace {

// Products -------------------------------------------------------------------------------------

// c (R, 16 or 8) (+)= a (R, depth) b (depth, 16 or 8), in registers.
template <int R, int N, class T>
inline void micro(const float* a, int64_t a_apart, const T* b, int64_t b_apart, int64_t depth, float* c,
                  int64_t c_apart, bool adds) {
  V acc[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) acc[r][n] = adds ? load(c + r * c_apart + n * W) : repeat(0.0f);
  }
  for (int64_t d = 0; d < depth; ++d) {
    V v[N];
    for (int n = 0; n < N; ++n) v[n] = load(b + d * b_apart + n * W);
    for (int r = 0; r < R; ++r) {
      const V x = repeat(a[r * a_apart + d]);
      for (int n = 0; n < N; ++n) acc[r][n] += x * v[n];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) store(c + r * c_apart + n * W, acc[r][n]);
  }
}

template <int R, class T>
inline void micro_rows(const float* a, int64_t a_apart, const T* b, int64_t b_apart, int64_t depth, int64_t width,
                       float* c, int64_t c_apart, bool adds) {
  int64_t n = 0;
  if constexpr (R == 1) {  // long stretches of b's rows, which lie far apart
    for (; n + 8 * W <= width; n += 8 * W) micro<R, 8>(a, a_apart, b + n, b_apart, depth, c + n, c_apart, adds);
  }
  if constexpr (R <= 3) {
    for (; n + 4 * W <= width; n += 4 * W) micro<R, 4>(a, a_apart, b + n, b_apart, depth, c + n, c_apart, adds);
  }
  for (; n + 2 * W <= width; n += 2 * W) micro<R, 2>(a, a_apart, b + n, b_apart, depth, c + n, c_apart, adds);
  for (; n + W <= width; n += W) micro<R, 1>(a, a_apart, b + n, b_apart, depth, c + n, c_apart, adds);
  for (; n < width; ++n) {
    for (int r = 0; r < R; ++r) {
      float value = adds ? c[r * c_apart + n] : 0.0f;
      for (int64_t d = 0; d < depth; ++d) value += a[r * a_apart + d] * one(b + d * b_apart + n);
      c[r * c_apart + n] = value;
    }
  }
}

// c (rows, width) (+)= a (rows, depth) b (depth, width).
template <class T>
inline void multiply(const float* a, int64_t rows, int64_t a_apart, const T* b, int64_t b_apart, int64_t depth,
                     int64_t width, float* c, int64_t c_apart, bool adds) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) {
    micro_rows<6>(a + r * a_apart, a_apart, b, b_apart, depth, width, c + r * c_apart, c_apart, adds);
  }
  for (; r + 2 <= rows; r += 2) {
    micro_rows<2>(a + r * a_apart, a_apart, b, b_apart, depth, width, c + r * c_apart, c_apart, adds);
  }
  for (; r < rows; ++r) {
    micro_rows<1>(a + r * a_apart, a_apart, b, b_apart, depth, width, c + r * c_apart, c_apart, adds);
  }
}

// Attention ------------------------------------------------------------------------------------

inline V capped(V x, float cap) { return cap > 0.0f ? repeat(cap) * hyperbolic(x / repeat(cap)) : x; }

// The first key that a token at a position sees.
inline int64_t first_seen(const Attention& a, int64_t position) {
  return a.window > 0 && position - a.window + 1 > 0 ? position - a.window + 1 : 0;
}

// scores (of keys first + [0, count)) of a query at a position to weights: e^(score - peak), 0 where it sees nothing.
// Returns their sum; `peak` is the larger of what it was and the largest score.
inline float soften(const Attention& a, float* scores, int64_t first, int64_t count, int64_t position, float* peak) {
  const int64_t low = std::max(first_seen(a, position), first) - first;
  const int64_t high = std::min(position + 1, first + count) - first;
  if (low >= high) {
    std::fill(scores, scores + count, 0.0f);
    return 0.0f;
  }
  std::fill(scores, scores + low, 0.0f);
  std::fill(scores + high, scores + count, 0.0f);
  const int64_t width = high - low;
  float* own = scores + low;
  float largest = *peak;
  V most = repeat(largest);
  for (int64_t i = 0; i < width; i += W) {
    V v = read(own + i, 1, width - i);
    if (a.cap > 0.0f) {
      v = capped(v, a.cap);
      write(own + i, v, width - i);
    }
    if (width - i >= W) {
      most = v > most ? v : most;
    } else {
      for (int64_t j = 0; i + j < width; ++j) largest = v[j] > largest ? v[j] : largest;
    }
  }
  for (int j = 0; j < W; ++j) largest = most[j] > largest ? most[j] : largest;
  *peak = largest;
  V sums = repeat(0.0f);
  float rest = 0.0f;
  for (int64_t i = 0; i < width; i += W) {
    const V v = exponential(read(own + i, 1, width - i) - repeat(largest));
    write(own + i, v, width - i);
    if (width - i >= W) {
      sums += v;
    } else {
      for (int64_t j = 0; i + j < width; ++j) rest += v[j];
    }
  }
  return sum(sums) + rest;
}

// R rows of x times four rows of y; the width is a multiple of W.
template <int R>
inline void four_dots(const float* x, int64_t x_apart, const float* y, int64_t y_apart, int64_t width, float* out,
                      int64_t out_apart) {
  V acc[R][4];
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < 4; ++k) acc[r][k] = repeat(0.0f);
  }
  for (int64_t i = 0; i < width; i += W) {
    V v[R];
    for (int r = 0; r < R; ++r) v[r] = load(x + r * x_apart + i);
    for (int k = 0; k < 4; ++k) {
      const V own = load(y + k * y_apart + i);
      for (int r = 0; r < R; ++r) acc[r][k] += v[r] * own;
    }
  }
  for (int r = 0; r < R; ++r) store_sums(acc[r], out + r * out_apart);
}

// `body(constant number of rows, first row)` over so many rows, some at a time.
template <class F>
inline void over_some(int64_t rows, const F& body) {
  int64_t r = 0;
  for (; r + 3 <= rows; r += 3) body(Constant<3>{}, r);
  if (r + 2 == rows) {
    body(Constant<2>{}, r);
  } else if (r < rows) {
    body(Constant<1>{}, r);
  }
}

// H x in place: see `RowKernels::turn`.
void turn(float* x, int64_t size) {
  const int64_t whole = size & -size;
  for (int64_t step = 1; step < whole; step *= 2) {
    for (int64_t at = 0; at < size; at += 2 * step) {
      for (int64_t i = at; i < at + step; ++i) {
        const float low = x[i], high = x[i + step];
        x[i] = low + high;
        x[i + step] = low - high;
      }
    }
  }
  const float unit = 1.0f / std::sqrt(static_cast<float>(whole));
  for (int64_t i = 0; i < size; ++i) x[i] *= unit;
}

// A query as it meets the keys.
inline void take_query(const Attention& a, const float* from, int64_t key_head, float* query) {
  const int64_t size = a.keys.size;
  for (int64_t i = 0; i < size; ++i) query[i] = from[i] * a.scale;
  if (a.factors == nullptr) return;
  for (int64_t i = 0; i < size; ++i) query[i] /= a.factors[key_head * size + i];
  turn(query, size);
}

// Keys or values of one head, a token's `apart` numbers from the next one's.
template <class T>
struct Rows {
  const T* at;
  int64_t apart;
};

// Those of a cache that holds numbers, from a token on.
template <class T>
inline Rows<T> rows_of(const Attention& a, const CachedRows& from, int64_t key_head, int64_t token) {
  const int64_t apart = a.key_heads * from.size;
  return {static_cast<const T*>(from.rows) + token * apart + key_head * from.size, apart};
}

// Rows of a cache of k bits, `apart` of them from one another, to (count, size) floats.
inline void unpack_cached(const Attention& a, const CachedRows& from, int64_t row, int64_t apart, int64_t count,
                          float* out) {
  const int64_t plain = FIRST_TOKENS * a.key_heads - row;  // rows ahead that are float16
  const int64_t early = std::max(int64_t{0}, std::min((plain + apart - 1) / apart, count));
  for (int64_t i = 0; i < early; ++i) {
    halves_to_floats(from.first + (row + i * apart) * from.size, from.size, out + i * from.size);
  }
  unpack(from, row + early * apart, apart, count - early, out + early * from.size);
}

// Those of one head, from a token on, as floats in `memory`.
inline Rows<float> unpacked(const Attention& a, const CachedRows& from, int64_t key_head, int64_t token, int64_t count,
                            float* memory) {
  unpack_cached(a, from, token * a.key_heads + key_head, a.key_heads, count, memory);
  return {memory, from.size};
}

// scores (rows, count), `scores_apart` floats apart, of queries (rows, size).
inline void score(const float* query, int64_t rows, const float* keys, int64_t apart, int64_t count, int64_t size,
                  float* scores, int64_t scores_apart) {
  int64_t k = 0;
  for (; size % W == 0 && k + 4 <= count; k += 4) {
    over_some(rows, [&](auto some, int64_t r) {
      four_dots<some>(query + r * size, size, keys + k * apart, apart, size, scores + r * scores_apart + k,
                      scores_apart);
    });
  }
  for (; k < count; ++k) {
    for (int64_t r = 0; r < rows; ++r) {
      scores[r * scores_apart + k] = dot(query + r * size, keys + k * apart, size);
    }
  }
}

// Keys, or values, of a cache as a few tokens meet them: those of all heads of some tokens at a time, for what lies
// side by side comes fast; and while these are used, those of a later tile are on their way into the L2 cache.
struct Tiles {
  const Attention& a;
  const CachedRows& from;
  const int64_t row_bytes = a.kind == CacheKind::packed ? from.format->bits * ((from.size + 7) / 8)
                                                        : from.size * (a.kind == CacheKind::f16 ? 2 : 4);

  Rows<float> read(int64_t token, int64_t count, float* memory) const {
    const int64_t apart = a.key_heads * from.size;
    if (a.kind == CacheKind::f32) return rows_of<float>(a, from, 0, token);
    if (a.kind == CacheKind::f16) {
      halves_to_floats(rows_of<uint16_t>(a, from, 0, token).at, count * apart, memory);
    } else {
      unpack_cached(a, from, token * a.key_heads, 1, count * a.key_heads, memory);
    }
    return {memory, apart};
  }
  // A head's share of the tile that begins at a token; it may lie behind the last.
  void fetch(int64_t token, int64_t head) const {
    const char* at = static_cast<const char*>(from.rows) + (token * a.key_heads + head * TOKENS_OF_TILE) * row_bytes;
    for (int64_t i = 0; i < TOKENS_OF_TILE * row_bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
  }
};

// `body(tile, first key, keys, head)` for each head of the keys [first, last), a tile at a time.
template <class F>
inline void over_tiles(const Tiles& tiles, int64_t first, int64_t last, float* memory, const F& body) {
  for (int64_t token = first; token < last; token += TOKENS_OF_TILE) {
    const int64_t own = std::min(TOKENS_OF_TILE, last - token);
    const Rows<float> tile = tiles.read(token, own, memory);
    for (int64_t head = 0; head < tiles.a.key_heads; ++head) {
      body(tile, token - first, own, head);
      tiles.fetch(token + 2 * TOKENS_OF_TILE, head);
    }
  }
}

void take_queries(const Attention& a, float* query) {
  const int64_t group = a.heads / a.key_heads, rows = a.tokens * group;
  for (int64_t i = 0; i < a.key_heads * rows; ++i) {
    const int64_t head = i / rows, r = i % rows;
    const float* from = a.query + r / group * a.query_token + (head * group + r % group) * a.query_head;
    take_query(a, from, head, query + i * a.keys.size);
  }
}

void attend_few(const Attention& a, const float* query, int64_t first, int64_t last, float* partial, float* scratch) {
  const int64_t group = a.heads / a.key_heads, rows = a.tokens * group, count = last - first;
  const int64_t size = a.keys.size, value_size = a.values.size;
  float* scores = scratch;  // (key_heads, rows, count)
  float* memory = scores + a.key_heads * rows * count;  // (TOKENS_OF_TILE, key_heads, size or value_size)
  over_tiles({a, a.keys}, first, last, memory, [&](Rows<float> tile, int64_t k, int64_t own, int64_t head) {
    score(query + head * rows * size, rows, tile.at + head * size, tile.apart, own, size,
          scores + head * rows * count + k, count);
  });
  for (int64_t i = 0; i < a.key_heads * rows; ++i) {
    float* own = partial + i * (value_size + 2);
    own[0] = -std::numeric_limits<float>::infinity();
    own[1] = soften(a, scores + i * count, first, count, a.start + i % rows / group, own);
  }
  over_tiles({a, a.values}, first, last, memory, [&](Rows<float> tile, int64_t k, int64_t own, int64_t head) {
    over_some(rows, [&](auto some, int64_t r) {
      const int64_t i = head * rows + r;
      micro_rows<some>(scores + i * count + k, count, tile.at + head * value_size, tile.apart, own, value_size,
                       partial + i * (value_size + 2) + 2, value_size + 2, k > 0);
    });
  });
}

void join(const Attention& a, int64_t key_head, const float* partial, int64_t segments, int64_t apart) {
  const int64_t group = a.heads / a.key_heads, value_size = a.values.size, width = value_size + 2;
  for (int64_t r = 0; r < a.tokens * group; ++r) {
    float peak = -std::numeric_limits<float>::infinity();
    for (int64_t s = 0; s < segments; ++s) peak = std::max(peak, partial[s * apart + r * width]);
    float sums = 0.0f;
    float* out = a.out + r / group * a.out_token + (key_head * group + r % group) * value_size;
    std::fill(out, out + value_size, 0.0f);
    for (int64_t s = 0; s < segments; ++s) {
      const float* own = partial + s * apart + r * width;
      if (own[1] == 0.0f) continue;  // nothing seen there
      const float factor = std::exp(own[0] - peak);
      sums += factor * own[1];
      for (int64_t i = 0; i < value_size; ++i) out[i] += factor * own[2 + i];
    }
    for (int64_t i = 0; i < value_size; ++i) out[i] /= sums;
  }
}

// `tile(first, count, memory)`: the keys and values of some tokens; there are so many floats of memory.
template <class F>
void many(const Attention& a, const AttentionPart& part, float* scratch, const F& tile) {
  const int64_t group = a.heads / a.key_heads, tokens = part.last - part.first, rows = tokens * group;
  const int64_t size = a.keys.size, value_size = a.values.size;
  float* query = scratch;  // (rows, size), scaled
  float* sums = query + rows * size;  // (rows, value_size)
  float* scores = sums + rows * value_size;  // (rows, KEYS_AT_ONCE)
  float* peaks = scores + rows * KEYS_AT_ONCE;  // (rows)
  float* totals = peaks + rows;  // (rows)
  float* turned = totals + rows;  // (size, KEYS_AT_ONCE)
  float* memory = turned + size * KEYS_AT_ONCE;  // (KEYS_AT_ONCE, size + value_size)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = part.key_head * group + r % group;
    const float* from = a.query + (part.first + r / group) * a.query_token + head * a.query_head;
    take_query(a, from, part.key_head, query + r * size);
    peaks[r] = -std::numeric_limits<float>::infinity();
    totals[r] = 0.0f;
  }
  std::fill(sums, sums + rows * value_size, 0.0f);
  const int64_t begin = first_seen(a, a.start + part.first) / KEYS_AT_ONCE * KEYS_AT_ONCE;
  const int64_t end = a.start + part.last;
  for (int64_t first = begin; first < end; first += KEYS_AT_ONCE) {
    const int64_t count = std::min(KEYS_AT_ONCE, end - first);
    const auto [keys, values] = tile(first, count, memory);
    for (int64_t k = 0; k < KEYS_AT_ONCE; ++k) {
      for (int64_t i = 0; i < size; ++i) {
        turned[i * KEYS_AT_ONCE + k] = k < count ? one(keys.at + k * keys.apart + i) : 0.0f;
      }
    }
    multiply(query, rows, size, turned, KEYS_AT_ONCE, size, KEYS_AT_ONCE, scores, KEYS_AT_ONCE, false);
    for (int64_t r = 0; r < rows; ++r) {
      const float before = peaks[r];
      const float own =
          soften(a, scores + r * KEYS_AT_ONCE, first, count, a.start + part.first + r / group, peaks + r);
      if (peaks[r] > before && totals[r] > 0.0f) {
        const float factor = std::exp(before - peaks[r]);
        totals[r] *= factor;
        for (int64_t i = 0; i < value_size; ++i) sums[r * value_size + i] *= factor;
      }
      totals[r] += own;
    }
    multiply(scores, rows, KEYS_AT_ONCE, values.at, values.apart, count, value_size, sums, value_size, true);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = part.key_head * group + r % group;
    float* out = a.out + (part.first + r / group) * a.out_token + head * value_size;
    for (int64_t i = 0; i < value_size; ++i) out[i] = sums[r * value_size + i] / totals[r];
  }
}

void attend_many(const Attention& a, const AttentionPart& part, float* scratch) {
  const auto plain = [&](auto number) {
    using T = decltype(number);
    many(a, part, scratch, [&](int64_t first, int64_t, float*) {
      return std::pair(rows_of<T>(a, a.keys, part.key_head, first), rows_of<T>(a, a.values, part.key_head, first));
    });
  };
  if (a.kind == CacheKind::f16) return plain(uint16_t{});
  if (a.kind == CacheKind::f32) return plain(float{});
  many(a, part, scratch, [&](int64_t first, int64_t count, float* memory) {
    const Rows<float> keys = unpacked(a, a.keys, part.key_head, first, count, memory);
    return std::pair(keys, unpacked(a, a.values, part.key_head, first, count, memory + count * a.keys.size));
  });
}

}  // namespace
}  // namespace kbit
