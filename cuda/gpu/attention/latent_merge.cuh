// How the items that share a query tile of latent_attention put their partial results together:
// merge.cuh's rule, of results of 512 columns and 16 rows, 32 KB each. One CTA reads some 64 bytes
// a clock, half a microsecond for each of them, so where there are many the last of each group of
// neighbours merges the group, and the last of those the groups. Results are put together in the
// order of the keys within a group and over the groups, whoever was last.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/latent_loader.cuh"
#include "gpu/core/block.cuh"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu::latent {

constexpr int kFewSplits = 12;  // that one CTA merges alone: two rounds would take as long
static_assert(kThreads * 4 == kLatentSize && kDecodeRows == 4 * kWarps);
static_assert(kMaxDecodeRanges <= kWarpSize * kWarpSize);  // a lane for each part

// Splits that are put together at first: all, or so many that there are as many groups.
__device__ __forceinline__ int splits_of_group(int num_splits) {
  if (num_splits <= kFewSplits) return num_splits;
  int size = 4;
  while (size * size < num_splits) ++size;
  return size;
}

// Results of one tile of heads that are to be put together, at most 32: every `step`th from `first`
// on.
struct Parts {
  int first, step, count;
};

struct MergeArea {
  float factors[kDecodeRows][kWarpSize];  // of each row and part
  float2 stats[kDecodeRows];              // largest score, sum of weights
};

// The largest scores and sums of 16 rows of results, of which the first part's begin at row `at` of
// the partial results, and what each part counts for.
__device__ __forceinline__ void weigh_parts(const AttentionPartials& partials, int64_t at,
                                            int64_t step, int count, MergeArea& area) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  float2 mine[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mine[i] = {-INFINITY, 0.0f};
    if (lane < count) {
      const float* stats = partials.stats + (at + lane * step + warp * 4 + i) * 2;
      mine[i] = __ldcg(reinterpret_cast<const float2*>(stats));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float largest = mine[i].x;
#pragma unroll
    for (int j = 16; j > 0; j /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, j));
    }
    const float factor = exp2_approx(mine[i].x - (largest == -INFINITY ? 0.0f : largest));
    const float sum = lane_sum(factor * mine[i].y);
    area.factors[warp * 4 + i][lane] = factor;
    if (lane == 0) area.stats[warp * 4 + i] = {largest, sum};
  }
}

// Puts parts together, num_rows rows of them, by the whole block. `write` gets a row, its largest
// score and sum, and four columns of its sums, from 4 * threadIdx.x on.
template <int kItemRows, class Write>
__device__ __forceinline__ void put_together(const AttentionPartials& partials, const Parts& parts,
                                             int tile, int num_tiles, int num_rows,
                                             MergeArea& area, Write&& write) {
  constexpr int kRowsAtOnce = 4, kPartsAtOnce = 6;  // loads that are under way: 48 KB of a CTA's
  const int64_t begin = (static_cast<int64_t>(parts.first) * num_tiles + tile) * kItemRows;
  const int64_t step = static_cast<int64_t>(parts.step) * num_tiles * kItemRows;
#pragma unroll 1
  for (int base = 0; base < num_rows; base += kDecodeRows) {
    weigh_parts(partials, begin + base, step, parts.count, area);
    __syncthreads();
    const int end = min(kDecodeRows, num_rows - base);
#pragma unroll 1
    for (int row = 0; row < end; row += kRowsAtOnce) {
      const float* source =
          partials.acc + (begin + base + row) * kLatentSize + threadIdx.x * 4;
      float total[kRowsAtOnce][4] = {};
#pragma unroll 1
      for (int part = 0; part < parts.count; part += kPartsAtOnce) {
        float4 value[kPartsAtOnce][kRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kPartsAtOnce; ++i) {
#pragma unroll
          for (int j = 0; j < kRowsAtOnce; ++j) {
            value[i][j] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (part + i >= parts.count || row + j >= end) continue;
            const float* from = source + (part + i) * step * kLatentSize + j * kLatentSize;
            value[i][j] = __ldcg(reinterpret_cast<const float4*>(from));
          }
        }
#pragma unroll
        for (int i = 0; i < kPartsAtOnce; ++i) {
#pragma unroll
          for (int j = 0; j < kRowsAtOnce; ++j) {
            if (part + i >= parts.count) continue;
            const float factor = area.factors[row + j][part + i];
            total[j][0] += factor * value[i][j].x;
            total[j][1] += factor * value[i][j].y;
            total[j][2] += factor * value[i][j].z;
            total[j][3] += factor * value[i][j].w;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        if (row + j < end) write(base + row + j, area.stats[row + j], total[j]);
      }
    }
    __syncthreads();  // `area` is read
  }
}

}  // namespace pyserve::gpu::latent
