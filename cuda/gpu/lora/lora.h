// lora_shrink, lora_expand and lora_expand_silu_mul on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"

namespace pyserve::gpu {

// Which tokens use the adapter in which slot, and the ranks of its parts; see ops/lora.py.
struct LoraRows {
  const int32_t* starts;  // [num_slots + 1]
  const int32_t* ranks;   // [num_slots, num_parts]
  int64_t ranks_stride;
  int32_t num_slots, num_parts, max_rank;
  int64_t num_tokens;
};

// The result of lora_shrink: float32 [num_splits, num_tokens, num_parts, max_rank], to be summed
// over the splits.
struct LoraShrunk {
  float* data;
  int64_t split_stride, stride, part_stride;  // stride is that between tokens
  int32_t num_splits;
};

struct LoraShrinkParams {
  LoraRows rows;
  const void* x;  // [num_tokens, k]; strides in elements
  int64_t x_stride;
  const void* a;  // [num_slots, num_parts, max_rank, k]
  int64_t a_slot_stride, a_part_stride, a_stride;
  const float* scales;  // [num_slots, num_parts]
  int64_t scales_stride;
  const float* x_squares;  // of the RMSNorm in front; null: none
  int64_t x_squares_stride;
  float eps;
  LoraShrunk out;
  int64_t k;
  Dtype dtype;  // 16 bits
};

struct LoraExpandParams {
  LoraRows rows;
  LoraShrunk shrunk;
  const void* b;  // [num_slots, columns, max_rank]
  int64_t b_slot_stride, b_stride;
  const int32_t* columns;  // [num_parts + 1]
  const void* gate_up;     // for lora_expand_silu_mul; else null
  int64_t gate_up_stride;
  void* out;  // [num_tokens, n]
  int64_t out_stride;
  int64_t n;
  Dtype dtype;  // 16 bits
};

cudaError_t launch_lora_shrink(const LoraShrinkParams& params, cudaStream_t stream);
// For many tokens; x and a must be aligned to 16 bytes.
cudaError_t launch_lora_shrink_many(const LoraShrinkParams& params, cudaStream_t stream);
cudaError_t launch_lora_expand(const LoraExpandParams& params, cudaStream_t stream);
// For many tokens.
cudaError_t launch_lora_expand_many(const LoraExpandParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
