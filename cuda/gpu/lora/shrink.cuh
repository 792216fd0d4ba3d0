// What both kernels of lora_shrink have in common: rows of A, and the norm that is a factor of x.
#pragma once

#include "common/epilogue.h"
#include "gpu/core/block.cuh"
#include "gpu/lora/segments.cuh"

namespace pyserve::gpu {

// What the norm before multiplies the sums of a token by; all lanes of a warp call it.
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

// Row `row` of all parts' A together.
struct Row {
  int part, index;
  bool is_there;
};

__device__ __forceinline__ Row row_of(const LoraRows& rows, int slot, int row) {
  const int part = row / rows.max_rank, index = row % rows.max_rank;
  return {part, index, part < rows.num_parts && index < rank_of(rows, slot, part)};
}

// Whether any of rows [first, first + count) is there.
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
