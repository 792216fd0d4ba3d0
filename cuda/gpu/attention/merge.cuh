// How the items that share a query tile put their partial results together. Each writes its own,
// then arrives; the last to arrive merges all of them in the order of the keys, so that the result
// does not depend on who was last (Dao et al. 2023, Flash-Decoding, with its second kernel folded
// into the first).
#pragma once

#include <cuda_runtime.h>

#include "gpu/attention/attention.h"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// One packed row of the merged result, rounded to T; called by whole warps. Rows that see no key in
// any split become zeros.
template <class T, int kHeadDim, int kRows>
__device__ __forceinline__ void merge_row(const AttentionPartials& partials, int first_partial,
                                          int num_splits, int kv_head, int num_kv_heads, int row,
                                          T* out_row) {
  constexpr int kPerLane = kHeadDim == 64 ? 2 : 4;  // columns of a piece
  constexpr int kColumns = kPerLane * kWarpSize;     // of a warp's pieces
  constexpr int kPieces = (kHeadDim + kColumns - 1) / kColumns;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t step = static_cast<int64_t>(num_kv_heads) * kRows;  // rows from split to split
  const int64_t begin =
      (static_cast<int64_t>(first_partial) * num_kv_heads + kv_head) * kRows + row;
  const float* stats = partials.stats + begin * 2;

  float largest = -INFINITY;
  for (int split = lane; split < num_splits; split += kWarpSize) {
    largest = fmaxf(largest, __ldcg(stats + split * step * 2));
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, i));
  }
  if (largest == -INFINITY) largest = 0.0f;

  const auto column = [&](int piece) { return piece * kColumns + lane * kPerLane; };
  float total[kPieces][kPerLane] = {}, sum = 0.0f;
  for (int base = 0; base < num_splits; base += kWarpSize) {
    float factor = 0.0f, part = 0.0f;
    if (base + lane < num_splits) {
      const float2 mine = __ldcg(reinterpret_cast<const float2*>(stats + (base + lane) * step * 2));
      factor = exp2_approx(mine.x - largest);
      part = factor * mine.y;
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) part += __shfl_xor_sync(kFullMask, part, i);
    sum += part;
    const int count = min(kWarpSize, num_splits - base);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const float weight = __shfl_sync(kFullMask, factor, i);
      const float* source = partials.acc + (begin + (base + i) * step) * kHeadDim;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (kHeadDim % kColumns != 0 && column(piece) >= kHeadDim) continue;
        if constexpr (kPerLane == 4) {
          const float4 value = __ldcg(reinterpret_cast<const float4*>(source + column(piece)));
          total[piece][0] += weight * value.x;
          total[piece][1] += weight * value.y;
          total[piece][2] += weight * value.z;
          total[piece][3] += weight * value.w;
        } else {
          const float2 value = __ldcg(reinterpret_cast<const float2*>(source + column(piece)));
          total[piece][0] += weight * value.x;
          total[piece][1] += weight * value.y;
        }
      }
    }
  }
  const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    if (kHeadDim % kColumns != 0 && column(piece) >= kHeadDim) continue;
    const float(&sums)[kPerLane] = total[piece];
    if constexpr (kPerLane == 4) {
      *reinterpret_cast<uint2*>(out_row + column(piece)) =
          make_uint2(pack_pair<T>(sums[0] * scale, sums[1] * scale),
                     pack_pair<T>(sums[2] * scale, sums[3] * scale));
    } else {
      *reinterpret_cast<uint32_t*>(out_row + column(piece)) =
          pack_pair<T>(sums[0] * scale, sums[1] * scale);
    }
  }
}

}  // namespace pyserve::gpu
