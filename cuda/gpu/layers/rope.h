// rope_write_kv on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"

namespace pyserve::gpu {

struct RopeParams {
  void* qkv;  // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] = q | k | v
  int64_t qkv_stride;        // strides in elements
  const int32_t* positions;  // [num_tokens]
  const float* cos_sin;      // [max_position, rotary_dim] = cosines | sines
  int64_t cos_sin_stride, max_position;
  const int64_t* slot_mapping;  // -1: nothing is written to the cache
  const void* q_norm_weight;    // [head_dim] or null
  const void* k_norm_weight;
  float eps, norm_offset;  // norm_offset is added to the norm weights
  const float* q_scales;   // factors of the rotated q by position; null: none
  void* key_cache;  // [num_blocks, block_size, num_kv_heads, head_dim]
  int64_t key_block_stride, key_token_stride, key_head_stride;
  void* value_cache;
  int64_t value_block_stride, value_token_stride, value_head_stride;
  int64_t num_kv_slots;  // num_blocks * block_size
  int64_t block_size;
  int64_t num_tokens;
  int32_t num_heads, num_kv_heads, head_dim, rotary_dim;
  Dtype dtype;  // 16 bits
};

// Traps for a position outside [0, max_position) or a slot outside [-1, num_kv_slots).
cudaError_t launch_rope_write_kv(const RopeParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
