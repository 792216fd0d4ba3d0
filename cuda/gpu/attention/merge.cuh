// How the partial results of the items that share a query tile are merged: in the order of the
// keys, so that the result does not depend on which item came last (Dao et al. 2023,
// Flash-Decoding). For decode and prefill attention the CTA that arrives last merges them, which
// saves a launch. For latents, whose rows have 512 columns, a kernel of its own does it with the
// whole device (latent_merge.cuh).
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "gpu/attention/attention.h"
#include "gpu/core/block.cuh"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// Merges kColumns columns of one packed row, from first_column on, and rounds them to T. Whole
// warps call this. Rows that see no key in any split become zeros. The loads of kAtOnce splits are
// in flight together.
template <class T, int kHeadDim, int kRows, int kColumns = kHeadDim, int kAtOnce = 8>
__device__ __forceinline__ void merge_row(const AttentionPartials& partials, int first_partial,
                                          int num_splits, int kv_head, int num_kv_heads, int row,
                                          T* out_row, int first_column = 0) {
  constexpr int kPerLane = kColumns == 64 ? 2 : 4;    // columns of a piece per lane
  constexpr int kPieceColumns = kPerLane * kWarpSize;  // columns of a piece for the whole warp
  constexpr int kPieces = (kColumns + kPieceColumns - 1) / kPieceColumns;
  static_assert(kWarpSize % kAtOnce == 0);
  using Piece = std::conditional_t<kPerLane == 4, float4, float2>;
  const int lane = threadIdx.x % kWarpSize;
  const int step = num_kv_heads * kRows;  // rows from one split to the next
  const int64_t begin =
      (static_cast<int64_t>(first_partial) * num_kv_heads + kv_head) * kRows + row;
  const float* stats = partials.stats + begin * 2;
  const float* acc = partials.acc + begin * kHeadDim + first_column;
  const auto column = [&](int piece) { return piece * kPieceColumns + lane * kPerLane; };
  const auto is_there = [&](int piece) {
    return kColumns % kPieceColumns == 0 || column(piece) < kColumns;
  };

  float total[kPieces][kPerLane] = {}, sum = 0.0f, largest = -INFINITY;
  for (int base = 0; base < num_splits; base += kWarpSize) {
    const int count = min(kWarpSize, num_splits - base);
    float2 mine{-INFINITY, 0.0f};
    if (lane < count) {
      mine = __ldcg(reinterpret_cast<const float2*>(stats) + int64_t{step} * (base + lane));
    }
    float highest = mine.x;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, i));
    }
    const float before = largest;
    largest = fmaxf(before, highest);
    const float shift = largest == -INFINITY ? 0.0f : largest;
    const float rescale = exp2_approx(before - shift), factor = exp2_approx(mine.x - shift);
    sum = sum * rescale + lane_sum(factor * mine.y);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) total[piece][j] *= rescale;
    }
#pragma unroll 1
    for (int first = 0; first < count; first += kAtOnce) {
      Piece values[kAtOnce][kPieces] = {};
      const float* source = acc + int64_t{step} * kHeadDim * (base + first);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          if (first + i >= count || !is_there(piece)) continue;
          const float* at = source + i * step * kHeadDim + column(piece);
          values[i][piece] = __ldcg(reinterpret_cast<const Piece*>(at));
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float weight = __shfl_sync(kFullMask, factor, first + i);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          const Piece& value = values[i][piece];
          total[piece][0] += weight * value.x;
          total[piece][1] += weight * value.y;
          if constexpr (kPerLane == 4) {
            total[piece][2] += weight * value.z;
            total[piece][3] += weight * value.w;
          }
        }
      }
    }
  }
  const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
  out_row += first_column;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    if (!is_there(piece)) continue;
    const float(&sums)[kPerLane] = total[piece];
    const uint32_t low = pack_pair<T>(sums[0] * scale, sums[1] * scale);
    if constexpr (kPerLane == 4) {
      *reinterpret_cast<uint2*>(out_row + column(piece)) =
          make_uint2(low, pack_pair<T>(sums[2] * scale, sums[3] * scale));
    } else {
      *reinterpret_cast<uint32_t*>(out_row + column(piece)) = low;
    }
  }
}

}  // namespace pyserve::gpu
