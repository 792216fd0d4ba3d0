// What paged_attention does with one tile of keys: scores, softmax and sums of values.
// attention.cpp explains the numerics and the two ways through a tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/limits.h"
#include "vec.h"

namespace pyserve::attention {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kBlockRows = 64;              // the most rows of a work item
// Rows that share each load of K or V, limited by the registers.
constexpr int kRowGroup = 4;
constexpr int kColumns = kLanes == 16 ? 4 : 2;  // vectors of V in a register block, likewise
static_assert(kTileKeys % (2 * kLanes) == 0);

// Row k of K or V for one KV head. `offset` is that head's offset in elements.
template <class T>
struct HeadRows {
  const void* const* rows;
  int64_t offset;

  const T* operator[](int64_t k) const { return static_cast<const T*>(rows[k]) + offset; }
};

// Prefetches a row that is read soon. The blocks of a cache lie anywhere, so the hardware cannot
// predict the address.
template <class T, int kHeadDim>
void prefetch(const T* row) {
  for (size_t line = 0; line < kHeadDim * sizeof(T); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + line);
  }
}

// ---- rows in float32 ----------------------------------------------------------------------------
// The elements of such a row lie in the order of load_pair. Those behind the last whole pair of
// vectors keep their order, and zeros follow them. q, K, V and out have the same dtype, so all have
// the same order.

template <class T>
void load_row(const T* in, int64_t n, float* out) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= n; d += 2 * kLanes) {
    Vec low, high;
    load_pair(in + d, low, high);
    store(out + d, low);
    store(out + d + kLanes, high);
  }
  for (; d + kLanes <= n; d += kLanes) store(out + d, load(in + d));
  if (d < n) store(out + d, load_first(in + d, n - d));
}

template <class T>
void store_row(const float* in, float factor, int64_t n, T* out) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= n; d += 2 * kLanes) {
    store_pair(out + d, load(in + d) * factor, load(in + d + kLanes) * factor);
  }
  for (; d + kLanes <= n; d += kLanes) store(out + d, load(in + d) * factor);
  if (d < n) store_first(out + d, load(in + d) * factor, n - d);
}

// ---- scores of a tile ---------------------------------------------------------------------------

// scores[r][k] = q[r] . keys[k] for kRows rows, read directly from the cache.
template <class T, int kHeadDim, int kRows>
void direct_scores(const float* q, HeadRows<T> keys, HeadRows<T> next_keys, int64_t n,
                   float* scores) {
  for (int64_t k0 = 0; k0 < n; k0 += kLanes) {
    Vec partial[kRows][kLanes];
    const int64_t count = std::min<int64_t>(kLanes, n - k0);
    for (int64_t k = 0; k < count; ++k) {
      const T* key = keys[k0 + k];
      prefetch<T, kHeadDim>(next_keys[k0 + k]);
      Vec sums[kRows] = {};
#pragma GCC unroll 8
      for (int d = 0; d < kHeadDim; d += 2 * kLanes) {
        Vec low, high;
        load_pair(key + d, low, high);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[r] = fma(load(q + r * kHeadDim + d), low, sums[r]);
          sums[r] = fma(load(q + r * kHeadDim + d + kLanes), high, sums[r]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) partial[r][k] = sums[r];
    }
    for (int r = 0; r < kRows; ++r) {
      for (int64_t k = count; k < kLanes; ++k) partial[r][k] = Vec{};
      store(scores + r * kTileKeys + k0, sum_rows(partial[r]));
    }
  }
}

// out [padded_dim][kTileKeys] = the tile's keys, transposed, with zeros behind the last key up to a
// whole vector.
template <class T>
void transpose_keys(const void* const* keys, int64_t n, int64_t head_dim, int64_t padded_dim,
                    float* out) {
  // Of a slice of head_dim: whole pairs of vectors, except for the last slice.
  alignas(64) float rows[kLanes][kMaxHeadDim];
  static_assert(kMaxHeadDim % (2 * kLanes) == 0);
  for (int64_t d0 = 0; d0 < head_dim; d0 += kMaxHeadDim) {
    const int64_t size = std::min(head_dim - d0, kMaxHeadDim);
    const int64_t padded_size = std::min(padded_dim - d0, kMaxHeadDim);
    for (int64_t k0 = 0; k0 < n; k0 += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, n - k0);
      for (int64_t k = 0; k < count; ++k) {
        load_row(static_cast<const T*>(keys[k0 + k]) + d0, size, rows[k]);
      }
      for (int64_t d = 0; d < padded_size; d += kLanes) {
        Vec square[kLanes] = {};
        for (int64_t k = 0; k < count; ++k) square[k] = load(rows[k] + d);
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(out + (d0 + d + i) * kTileKeys + k0, square[i]);
      }
    }
  }
}

// scores[r][k] = q[r] . k_transposed[:, k] for kRowGroup rows.
inline void block_scores(const float* q, int64_t q_stride, const float* k_transposed, int64_t n,
                         int64_t head_dim, float* scores) {
  for (int64_t k0 = 0; k0 < n; k0 += 2 * kLanes) {
    Vec sums[kRowGroup][2] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
      const Vec low = load(k_transposed + d * kTileKeys + k0);
      const Vec high = load(k_transposed + d * kTileKeys + k0 + kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRowGroup; ++r) {
        const Vec x = splat(q[r * q_stride + d]);
        sums[r][0] = fma(x, low, sums[r][0]);
        sums[r][1] = fma(x, high, sums[r][1]);
      }
    }
    for (int r = 0; r < kRowGroup; ++r) {
      store(scores + r * kTileKeys + k0, sums[r][0]);
      store(scores + r * kTileKeys + k0 + kLanes, sums[r][1]);
    }
  }
}

// ---- softmax and values -------------------------------------------------------------------------

// scores[k] = tanh(scores[k] * scale). It works on whole vectors; scores behind the n keys are
// masked later.
inline void cap_scores(float* scores, float scale, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes) store(scores + k, tanh(load(scores + k) * scale));
}

// Turns dot products into weights 2^(score * scale - row_max) with the row's new maximum. Returns
// the factor by which the row's earlier sums shrink. Keys outside [from, to) of the tile get weight
// 0. The scale is applied here in a fused operation, because applying it to q would round each
// element.
inline float softmax_row(float* scores, float scale, int64_t from, int64_t to, int64_t n,
                         float& row_max, float& row_sum) {
  const int64_t end = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t k = 0; k < from; ++k) scores[k] = -INFINITY;
  for (int64_t k = to; k < end; ++k) scores[k] = -INFINITY;
  Vec largest = load(scores);
  for (int64_t k = kLanes; k < end; k += kLanes) largest = max(largest, load(scores + k));
  const float new_max = std::max(row_max, max(largest) * scale);
  Vec total = {};
  for (int64_t k = 0; k < end; k += kLanes) {
    const Vec weight = exp2(fma(load(scores + k), splat(scale), splat(-new_max)));
    store(scores + k, weight);
    total += weight;
  }
  const float rescale = exp2(splat(row_max - new_max))[0];
  row_max = new_max;
  row_sum = row_sum * rescale + sum(total);
  return rescale;
}

// acc[r][:] = acc[r][:] * rescale[r] + sum over k of weights[r][k] * values[k][:], for kRows rows
// and kCols vectors of columns from `column` on.
template <class T, int kRows, int kCols>
void add_values(const float* weights, const float* rescale, HeadRows<T> values, int64_t n,
                int64_t column, float* acc, int64_t acc_stride) {
  Vec sums[kRows][kCols];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) {
      sums[r][c] = load(acc + r * acc_stride + column + c * kLanes) * rescale[r];
    }
  }
  for (int64_t k = 0; k < n; ++k) {
    const T* value = values[k] + column;
    Vec parts[kCols];
    if constexpr (kCols == 1) {
      parts[0] = load(value);
    } else {
#pragma GCC unroll 4
      for (int c = 0; c < kCols; c += 2) load_pair(value + c * kLanes, parts[c], parts[c + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = splat(weights[r * kTileKeys + k]);
#pragma GCC unroll 4
      for (int c = 0; c < kCols; ++c) sums[r][c] = fma(weight, parts[c], sums[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) {
      store(acc + r * acc_stride + column + c * kLanes, sums[r][c]);
    }
  }
}

}  // namespace pyserve::attention
