// What both kernels of lora_shrink have in common: the rows of A, and the RMSNorm whose factor x
// lacks.
#pragma once

#include "common/epilogue.h"
#include "gpu/core/block.cuh"
#include "gpu/lora/segments.cuh"

namespace pyserve::gpu {

// The factor of the RMSNorm for the sums of a token. All lanes of a warp call this.
__device__ __forceinline__ float norm_factor(const LoraShrinkParams& p, int64_t token) {
  if (p.x_squares == nullptr) return 1.0f;
  const int count = static_cast<int>((p.k + kSquaresColumns - 1) / kSquaresColumns);
  float sum = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    sum += p.x_squares[token * p.x_squares_stride + i];
  }
  return rsqrtf(lane_sum(sum) / static_cast<float>(p.k) + p.eps);
}

// A row of A, when the rows of all parts are numbered one after the other. is_there is false from
// the part's rank on.
struct Row {
  int part, index;
  bool is_there;
};

__device__ __forceinline__ Row row_of(const LoraRows& rows, int slot, int row) {
  const int part = row / rows.max_rank, index = row % rows.max_rank;
  return {part, index, part < rows.num_parts && index < rank_of(rows, slot, part)};
}

// Whether any of the rows [first, first + count) exists.
__device__ __forceinline__ bool has_rows(const LoraRows& rows, int slot, int first, int count) {
  bool any = false;
  for (int part = first / rows.max_rank; part < rows.num_parts; ++part) {
    const int begin = part * rows.max_rank;
    if (begin >= first + count) break;
    any |= max(first - begin, 0) < rank_of(rows, slot, part);
  }
  return any;
}

}  // namespace pyserve::gpu
