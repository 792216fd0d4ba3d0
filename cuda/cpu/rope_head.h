// A head, or a latent, in float32 on its way from an activation to a cache: normed, rotated and
// rounded.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/check.h"
#include "../common/limits.h"
#include "vec.h"

namespace pyserve {

constexpr int64_t kMaxHead = std::max(kMaxHeadDim, kMaxLatentSize);

// One head in float32. The buffer has room for a whole last vector.
struct Head {
  alignas(64) float x[kMaxHead + kLanes];
};

template <class T>
void load_head(const T* in, int64_t n, Head& head) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(head.x + i, load(in + i));
  if (i < n) store(head.x + i, load_first(in + i, n - i));
}

template <class T>
void norm_head(const T* weight, float offset, float eps, int64_t n, Head& head) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) squares = fma(load(head.x + i), load(head.x + i), squares);
  // The buffer has zeros behind the end.
  if (i < n) squares = fma(load(head.x + i), load(head.x + i), squares);
  const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    store(head.x + i, load(head.x + i) * factor * (load(weight + i) + offset));
  }
  if (i < n) {
    store(head.x + i, load(head.x + i) * factor * (load_first(weight + i, n - i) + offset));
  }
}

inline void rotate_head(const float* cos, const float* sin, int64_t half, Head& head) {
  float* low = head.x;
  float* high = head.x + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(low + i), b = load(high + i), c = load(cos + i), s = load(sin + i);
    store(low + i, fma(a, c, -(b * s)));
    store(high + i, fma(b, c, a * s));
  }
  for (; i < half; ++i) {
    const float a = low[i], b = high[i];
    low[i] = a * cos[i] - b * sin[i];
    high[i] = b * cos[i] + a * sin[i];
  }
}

template <class T>
void store_head(const Head& head, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(head.x + i));
  if (i < n) store_first(out + i, load(head.x + i), n - i);
}

// Checks that positions are in the table of cosines and sines, and that KV slots are in the cache
// or -1.
inline void check_ranges(const View& positions, const View& slot_mapping, int64_t max_position,
                         int64_t num_kv_slots) {
  for (int64_t i = 0; i < positions.size(0); ++i) {
    const int64_t position = positions.ptr<int32_t>()[i];
    const int64_t slot = slot_mapping.ptr<int64_t>()[i];
    PYSERVE_CHECK(position >= 0 && position < max_position, positions.op, ": position ", position,
                  " is outside [0, ", max_position, ")");
    PYSERVE_CHECK(slot >= -1 && slot < num_kv_slots, positions.op, ": KV slot ", slot,
                  " is outside [-1, ", num_kv_slots, ")");
  }
}

}  // namespace pyserve
