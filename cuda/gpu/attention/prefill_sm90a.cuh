// What a thread of prefill_sm90a.cu does with its rows (masks, online softmax, writing), and the
// layout of shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/prefill_item.cuh"
#include "gpu/core/mbarrier.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/core/tma.cuh"

namespace pyserve::gpu::prefill::sm90a {

constexpr int kGroupThreads = 128;  // threads of a warpgroup
constexpr int kConsumers = 2;       // warpgroups that compute
constexpr int kGroupRows = kPrefillRows / kConsumers;
constexpr int kBlockSize = 16;  // keys per block of the cache
constexpr int kStages = 2;
constexpr int kBlockBytes = kBlockSize * 128;  // bytes of a block in one panel
static_assert(kGroupRows == 64);  // wgmma's m

// Named barrier of the first computing warpgroup; the second's follows.
constexpr int kGroupBarrier = 1;

enum Ring { kQueryFull, kQueryEmpty, kKeyFull, kKeyEmpty, kValueFull, kValueEmpty, kNumRings };

// What accompanies a tile of queries through shared memory to the computing warpgroups.
struct Work {
  AttentionItem item;  // num_splits 0 means that there is no more work
  Geometry geometry;
};
static_assert(sizeof(Work) % 16 == 0);

template <class Element, int kDim>
struct Config {
  using T = Element;
  static constexpr int kHeadDim = kDim;
  static constexpr int kKeys = 128;
  static constexpr int kBlocks = kKeys / kBlockSize;
  static constexpr int kPanels = kDim / 64;  // panels have rows of 128 bytes
  static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
  static constexpr int kQueryPanelBytes = kPrefillRows * 128;
  static constexpr int kPanelBytes = kKeys * 128;
  static constexpr int kQueryBytes = kPanels * kQueryPanelBytes;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  // Shared memory: two tiles of queries, the rings of K and V, barriers, the works that the queries
  // belong to, and scales and flags for merging.
  static constexpr int kKeyOffset = kStages * kQueryBytes;
  static constexpr int kValueOffset = kKeyOffset + kStages * kTileBytes;
  static constexpr int kBarrierOffset = kValueOffset + kStages * kTileBytes;
  static constexpr int kWorkOffset = kBarrierOffset + kNumRings * kStages * 8;
  static constexpr int kScaleOffset = kWorkOffset + kStages * sizeof(Work);
  static constexpr int kFlagOffset = kScaleOffset + kPrefillRows * 8;
  static constexpr int kUsedBytes = kFlagOffset + kConsumers * 4;
  static constexpr int kSmemBytes = kUsedBytes + 1024;  // room to begin at a multiple of 1024
  static_assert(kSmemBytes <= 227 * 1024 && kUsedBytes % 8 == 0);
};

struct Smem {
  uint32_t base;

  template <class C>
  __device__ __forceinline__ uint32_t queries(int stage) const {
    return base + stage * C::kQueryBytes;
  }
  template <class C>
  __device__ __forceinline__ uint32_t keys(int stage) const {
    return base + C::kKeyOffset + stage * C::kTileBytes;
  }
  template <class C>
  __device__ __forceinline__ uint32_t values(int stage) const {
    return base + C::kValueOffset + stage * C::kTileBytes;
  }
  template <class C>
  __device__ __forceinline__ uint32_t barrier(Ring ring, int stage) const {
    return base + C::kBarrierOffset + (ring * kStages + stage) * 8;
  }
};

using Place = RingPlace<kStages>;

template <class C>
__device__ __forceinline__ void init_barriers(const Smem& smem) {
  for (int stage = 0; stage < kStages; ++stage) {
    mbarrier_init(smem.barrier<C>(kQueryFull, stage), 1);
    mbarrier_init(smem.barrier<C>(kKeyFull, stage), C::kPanels);
    mbarrier_init(smem.barrier<C>(kValueFull, stage), 1);
    // One arrival per computing warp.
    for (const Ring ring : {kQueryEmpty, kKeyEmpty, kValueEmpty}) {
      mbarrier_init(smem.barrier<C>(ring, stage), kConsumers * kGroupThreads / kWarpSize);
    }
  }
  barriers_ready();
}

template <class C>
__device__ __forceinline__ int num_tiles(const AttentionItem& item) {
  return (item.kv_end - item.kv_begin + C::kKeys - 1) / C::kKeys;
}

// The state of a thread's rows, which are rows lane / 4 and lane / 4 + 8 of its warp's 16.
template <class C>
struct Accumulator {
  float out[C::kHeadDim / 2];
  float max[2];  // log2 of a factor that all of the row's weights have
  float sum[2];  // over this thread's columns
};

// Which keys a thread's two rows see, and the range of positions of its warp's rows.
struct Visible {
  int position[2];
  int warp_first, warp_last, window, kv_end;

  __device__ __forceinline__ bool all_see(int begin, int end) const {
    return end <= min(warp_first + 1, kv_end) && (window == 0 || begin > warp_last - window);
  }
};

__device__ __forceinline__ Visible make_visible(const AttentionParams& p, const AttentionItem& item,
                                                const Geometry& g, int warp_row) {
  const auto position = [&](int row) {  // rows behind the last take its position
    return g.context + (g.first_packed + min(row, g.num_packed - 1)) / g.group;
  };
  const int row = warp_row + threadIdx.x % kWarpSize / 4;
  return {{position(row), position(row + 8)}, position(warp_row), position(warp_row + 15),
          p.window, item.kv_end};
}

template <int kCount>
__device__ __forceinline__ void mask_scores(float (&s)[kCount], const Visible& visible, int begin) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = visible.position[half];
    const int first = visible.window > 0 ? position - visible.window + 1 : 0;
    const int num_visible = max(min(position + 1, visible.kv_end) - first, 0);
    // A key in front of the first visible one has a negative offset, which is huge as an unsigned
    // number.
    const uint32_t from_first = static_cast<uint32_t>(begin + column) - first;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (from_first + j * 8 + i >= static_cast<uint32_t>(num_visible)) {
          s[j * 4 + half * 2 + i] = -INFINITY;
        }
      }
    }
  }
}

// Raises the running maxima of the warp's rows if any score exceeds its row's maximum by more than
// kMaxLag. If it returns true, the output must be multiplied by `factor`, as the sums have been.
template <class C, int kCount>
__device__ __forceinline__ bool update_max(Accumulator<C>& acc, const float (&s)[kCount],
                                           float scale_log2, float (&factor)[2]) {
  float tile_max[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x = fmaxf(s[half * 2], s[half * 2 + 1]);
#pragma unroll
    for (int j = 1; j < kCount / 4; ++j) {
      x = fmaxf(x, fmaxf(s[j * 4 + half * 2], s[j * 4 + half * 2 + 1]));
    }
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 2));
    tile_max[half] = x * scale_log2;
  }
  const bool exceeds = tile_max[0] > acc.max[0] + kMaxLag || tile_max[1] > acc.max[1] + kMaxLag;
  if (!__any_sync(kFullMask, exceeds)) return false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float new_max = fmaxf(acc.max[half], tile_max[half]);
    factor[half] = exp2_approx(acc.max[half] - new_max);
    acc.max[half] = new_max;
    acc.sum[half] *= factor[half];
  }
  return true;
}

template <class C>
__device__ __forceinline__ void rescale(Accumulator<C>& acc, const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; ++i) acc.out[i] *= factor[i / 2 % 2];
}

// Turns scores into weights, in place.
template <class C, int kCount>
__device__ __forceinline__ void make_weights(Accumulator<C>& acc, float (&s)[kCount],
                                             float scale_log2) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    s[i] = exp2_approx(fmaf(s[i], scale_log2, -acc.max[i / 2 % 2]));
    acc.sum[i / 2 % 2] += s[i];
  }
}

// Divides a warp's rows by their sums and writes them to out. They pass through `queries`, shared
// memory that is no longer read, so that whole lines are written. warp_row is the first of the
// warp's 16 rows.
template <class C>
__device__ __forceinline__ void write_rows(const AttentionParams& p, const Geometry& g,
                                           const Accumulator<C>& acc, int warp_row,
                                           uint32_t queries) {
  using T = typename C::T;
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t rows = queries + warp_row * 128;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = acc.sum[half] == 0.0f ? 0.0f : 1.0f / acc.sum[half];
    const int row = half * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < C::kHeadDim / 8; ++j) {
      const float* pair = acc.out + j * 4 + half * 2;
      store_shared(rows + j / 8 * C::kQueryPanelBytes + swizzled_128(row, j % 8) + lane % 4 * 4,
                   pack_pair<T>(pair[0] * scale, pair[1] * scale));
    }
  }
  __syncwarp();
  constexpr int kChunks = C::kHeadDim / 8;
  const int chunk = lane % kChunks;
  constexpr int kRows = kWarpSize / kChunks;
  T* out = static_cast<T*>(p.out) + chunk * 8;
  RowWalk walk(g, warp_row + lane / kChunks, kRows, p.out_token_stride, p.out_head_stride);
#pragma unroll
  for (int row = lane / kChunks; row < 16; row += kRows, walk.advance()) {
    if (warp_row + row >= g.num_packed) break;
    *reinterpret_cast<uint4*>(out + walk.offset) =
        load_shared(rows + chunk / 8 * C::kQueryPanelBytes + swizzled_128(row, chunk % 8));
  }
}

// Writes a warp's rows as partial results, from row first_row of all partial buffers on.
template <class C>
__device__ __forceinline__ void write_partial(const AttentionPartials& partials,
                                              const Accumulator<C>& acc, int64_t first_row) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + half * 8 + lane / 4;
    auto* out = reinterpret_cast<float2*>(partials.acc + row * C::kHeadDim + lane % 4 * 2);
#pragma unroll
    for (int j = 0; j < C::kHeadDim / 8; ++j) {
      out[j * 4] = make_float2(acc.out[j * 4 + half * 2], acc.out[j * 4 + half * 2 + 1]);
    }
    if (lane % 4 == 0) {
      reinterpret_cast<float2*>(partials.stats)[row] = make_float2(acc.max[half], acc.sum[half]);
    }
  }
}

}  // namespace pyserve::gpu::prefill::sm90a
