// What a warp of the prefill kernel does with one step of keys: scores, masks, online softmax, and
// weights times values, all in registers. Queries, keys and values lie in swizzled shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/prefill_item.cuh"
#include "gpu/attention/score_scale.cuh"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu::prefill {

constexpr int kStages = 2;

// The sizes of a prefill kernel. Of a query tile's kPrefillRows packed rows a block takes
// kRowsPerBlock. With kMayCapScores, the kernel's arguments say whether scores are capped.
template <class Element, int kDim, int kWarpsPerBlock, int kKeysPerStep,
          int kRowsPerBlock = kPrefillRows, bool kMayCapScores = false>
struct Config {
  using T = Element;
  static constexpr int kHeadDim = kDim;
  static constexpr int kWarps = kWarpsPerBlock;
  static constexpr int kKeys = kKeysPerStep;
  static constexpr int kRows = kRowsPerBlock;
  static constexpr bool kMayCap = kMayCapScores;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kFragments = kRows / (16 * kWarps);  // fragments of 16 rows per warp
  static constexpr int kWarpRows = 16 * kFragments;
  static constexpr bool kQueryInRegisters = kFragments * kHeadDim <= 128;
  static constexpr int kChunks = kHeadDim / 8;  // chunks of 16 bytes per row
  // Whole groups of 8 chunks, for the swizzle.
  static constexpr int kRowBytes = (kChunks + 7) / 8 * 128;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  // Shared memory: queries, the rings of keys and of values, row addresses, query positions, a
  // flag, the item.
  static constexpr int kKeyOffset = kRows * kRowBytes;
  static constexpr int kValueOffset = kKeyOffset + kStages * kTileBytes;
  static constexpr int kAddressOffset = kValueOffset + kStages * kTileBytes;
  static constexpr int kPositionOffset = kAddressOffset + kStages * 2 * kKeys * sizeof(int64_t);
  static constexpr int kFlagOffset = kPositionOffset + kRows * sizeof(int32_t);
  static constexpr int kItemOffset = kFlagOffset + 16;
  static constexpr int kSmemBytes = kItemOffset + sizeof(AttentionItem);
  static_assert(kSmemBytes <= 163 * 1024 && kPrefillRows % kRows == 0);
  static_assert(kKvTile % kKeys == 0 && kThreads >= kRows && kThreads >= 2 * kKeys);
};

// The byte offset of a 16-byte chunk in a row. The low three bits of its number are XORed with the
// row's number, so that the same chunk of eight rows lies in different banks.
template <class C>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return row * C::kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Which keys the rows of one warp see.
struct WarpRange {
  int first_position, last_position, window;
  __device__ __forceinline__ bool sees(int begin, int end) const {
    return begin <= last_position && (window == 0 || end > first_position - window + 1);
  }
  __device__ __forceinline__ bool sees_all(int begin, int end) const {
    return end <= first_position + 1 && (window == 0 || begin > last_position - window);
  }
};

// The state of a warp's rows: the output so far, and the maxima and sums of the softmax. For each
// fragment a thread holds rows lane / 4 and lane / 4 + 8, and in each 8 columns the columns 2 *
// (lane % 4) and the next.
template <class C>
struct Accumulator {
  float out[C::kFragments][C::kHeadDim / 8][4];
  float max[C::kFragments][2];  // log2 of a factor that all of the row's weights have
  float sum[C::kFragments][2];  // over this thread's columns
};

template <class C>
__device__ __forceinline__ void clear(Accumulator<C>& acc) {
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc.max[m][i / 2] = kNoMax;
      acc.sum[m][i / 2] = 0.0f;
#pragma unroll
      for (int n = 0; n < C::kHeadDim / 8; ++n) acc.out[m][n][i] = 0.0f;
    }
  }
}

template <class C>
using Scores = float[C::kFragments][C::kKeys / 8][4];

// The addresses of a lane for ldmatrix within a tile. 16 rows further the address grows by 16 *
// kRowBytes; column block i of 16 elements is at column_block(address, i).
template <class C>
// A operand from Q; B operand from V, transposed.
__device__ __forceinline__ uint32_t row_major_lane(uint32_t tile) {
  const int lane = threadIdx.x % kWarpSize;
  return tile + swizzled<C>(lane % 16, lane / 16);
}

template <class C>
__device__ __forceinline__ uint32_t column_major_lane(uint32_t tile) {  // B operand from K
  const int lane = threadIdx.x % kWarpSize;
  return tile + swizzled<C>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

__device__ __forceinline__ uint32_t column_block(uint32_t address, int i) {
  return (address ^ (i % 4 * 32)) + i / 4 * 128;
}

template <class C>
struct QueryFragments {
  uint32_t a[C::kHeadDim / 16][C::kFragments][4];
};

template <class C>
__device__ __forceinline__ void load_queries(uint32_t query_lane, int k,
                                             uint32_t (&a)[C::kFragments][4]) {
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
    ldmatrix_x4(a[m], column_block(query_lane, k) + m * 16 * C::kRowBytes);
  }
}

template <class C>
__device__ __forceinline__ void multiply_queries_keys(Scores<C>& s, uint32_t query_lane,
                                                      QueryFragments<C>& q, uint32_t key_lane) {
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < C::kHeadDim / 16; ++k) {
    if constexpr (!C::kQueryInRegisters) load_queries<C>(query_lane, k, q.a[k]);
#pragma unroll
    for (int n = 0; n < C::kKeys / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, column_block(key_lane, k) + n * 16 * C::kRowBytes);
#pragma unroll
      for (int m = 0; m < C::kFragments; ++m) {
        mma_16816<typename C::T>(s[m][2 * n], q.a[k][m], b[0], b[1]);
        mma_16816<typename C::T>(s[m][2 * n + 1], q.a[k][m], b[2], b[3]);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void cap_scores(Scores<C>& s, float cap_rate) {
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = cap_score(s[m][n][i], cap_rate);
    }
  }
}

template <class C>
__device__ __forceinline__ void mask_scores(Scores<C>& s, const int32_t* positions, int window,
                                            int step_begin, int end_key) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = positions[m * 16 + half * 8 + lane / 4];
      const int first = window > 0 ? position - window + 1 : 0;
      const int num_visible = max(min(position + 1, end_key) - first, 0);
      // A key in front of the first visible one has a negative offset, which is huge as an unsigned
      // number.
      const uint32_t from_first = static_cast<uint32_t>(step_begin + lane % 4 * 2) - first;
#pragma unroll
      for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t offset = from_first + n * 8 + i;
          if (offset >= static_cast<uint32_t>(num_visible)) s[m][n][half * 2 + i] = -INFINITY;
        }
      }
    }
  }
}

// Raises the running maxima of the warp's rows if any score exceeds its row's maximum by more than
// kMaxLag.
template <class C>
__device__ __forceinline__ void update_max(Accumulator<C>& acc, const Scores<C>& s,
                                           float scale_log2) {
  float tile_max[C::kFragments][2];
  bool exceeds = false;
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = fmaxf(s[m][0][half * 2], s[m][0][half * 2 + 1]);
#pragma unroll
      for (int n = 1; n < C::kKeys / 8; ++n) {
        x = fmaxf(x, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
      }
      x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));
      x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 2));
      tile_max[m][half] = x * scale_log2;
      exceeds |= tile_max[m][half] > acc.max[m][half] + kMaxLag;
    }
  }
  if (!__any_sync(kFullMask, exceeds)) return;
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float new_max = fmaxf(acc.max[m][half], tile_max[m][half]);
      const float factor = exp2_approx(acc.max[m][half] - new_max);
      acc.max[m][half] = new_max;
      acc.sum[m][half] *= factor;
#pragma unroll
      for (int n = 0; n < C::kHeadDim / 8; ++n) {
        acc.out[m][n][half * 2] *= factor;
        acc.out[m][n][half * 2 + 1] *= factor;
      }
    }
  }
}

// Turns the scores of 16 keys into weights, as the A operand of the product with V.
template <class C>
__device__ __forceinline__ void make_weights(Accumulator<C>& acc, Scores<C>& s, int k,
                                             float scale_log2, uint32_t (&a)[C::kFragments][4]) {
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i % 2;
      float* score = &s[m][2 * k + i / 2][half * 2];
      const float w0 = exp2_approx(fmaf(score[0], scale_log2, -acc.max[m][half]));
      const float w1 = exp2_approx(fmaf(score[1], scale_log2, -acc.max[m][half]));
      acc.sum[m][half] += w0 + w1;
      a[m][i] = pack_pair<typename C::T>(w0, w1);
    }
  }
}

template <class C>
__device__ __forceinline__ void add_values(Accumulator<C>& acc, Scores<C>& s, float scale_log2,
                                           uint32_t value_lane) {
  uint32_t a[2][C::kFragments][4];
  make_weights<C>(acc, s, 0, scale_log2, a[0]);
#pragma unroll
  for (int k = 0; k < C::kKeys / 16; ++k) {
    if (k + 1 < C::kKeys / 16) make_weights<C>(acc, s, k + 1, scale_log2, a[(k + 1) % 2]);
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, column_block(value_lane, n) + k * 16 * C::kRowBytes);
#pragma unroll
      for (int m = 0; m < C::kFragments; ++m) {
        mma_16816<typename C::T>(acc.out[m][2 * n], a[k % 2][m], b[0], b[1]);
        mma_16816<typename C::T>(acc.out[m][2 * n + 1], a[k % 2][m], b[2], b[3]);
      }
    }
  }
}

}  // namespace pyserve::gpu::prefill
