// rope_write_latent and batched_linear on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"

namespace pyserve::gpu {

struct RopeLatentParams {
  const void* q;  // [num_tokens, num_heads, rope_dim]; strides in elements
  int64_t q_token_stride, q_head_stride;
  void* rotated;  // the same
  int64_t rotated_token_stride, rotated_head_stride;
  const void* compressed;  // [num_tokens, latent_size + rope_dim]
  int64_t compressed_stride;
  const void* norm_weight;   // [latent_size]
  const int32_t* positions;  // [num_tokens]
  const float* cos_sin;      // [max_position, rope_dim] = cosines | sines
  int64_t cos_sin_stride, max_position;
  const int64_t* slot_mapping;  // -1: nothing is written to the cache
  void* latent_cache;           // [num_blocks, block_size, latent_size + rope_dim]
  int64_t block_stride, token_stride;
  int64_t num_kv_slots, block_size;
  int64_t num_tokens;
  int32_t num_heads, latent_size, rope_dim;
  float eps;
  bool has_pairs;
  Dtype dtype;  // 16 bits
};

// Traps for a position outside [0, max_position) or a slot outside [-1, num_kv_slots).
cudaError_t launch_rope_write_latent(const RopeLatentParams& params, cudaStream_t stream);

// The most rows that batched_linear takes. More rows are left to torch, whose products use tiles of
// rows.
constexpr int kMaxBatchedRows = 8;

struct BatchedLinearParams {
  const void* x;  // [m, batch, k]; strides in elements
  int64_t x_stride, x_batch_stride;
  const void* weight;  // [batch, n, k]
  int64_t weight_batch_stride, weight_stride;
  void* out;  // [m, batch, n]
  int64_t out_stride, out_batch_stride;
  int32_t m, batch, n, k;
  Dtype dtype;  // 16 bits
};

cudaError_t launch_batched_linear(const BatchedLinearParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
