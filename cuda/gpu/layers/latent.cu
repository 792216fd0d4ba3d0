// Two kernels of multi-head latent attention, in bfloat16 or float16: rope_write_latent norms and
// rotates what the cache keeps of a token and rotates the rope part of its queries; batched_linear
// multiplies few rows by one matrix per head.
//
// rope_write_latent: q [num_tokens, num_heads, rope_dim] is rotated into `rotated`; compressed
// [num_tokens, latent_size + rope_dim] goes to the token's slot of latent_cache, the latent through
// an RMSNorm and the rest rotated. One CTA per token; a thread takes one element or one rotated
// pair at a time. The bytes are few, so the kernel is bound by the latency of a launch. Where the
// model rotates neighbouring elements together (has_pairs), the two are stored half of rope_dim
// apart, in `rotated` as well as in the cache, so that their products agree.
// Numerics: float32 from load to store, one rounding.
//
// batched_linear: out [m, batch, n] = x [m, batch, k] times weight [batch, n, k], for m <=
// kMaxBatchedRows. Each CTA takes kBatchedRows rows of one matrix; each warp takes one of these
// rows at a time, reads it once, 16 bytes per lane, and multiplies it by all rows of x, which lie
// in shared memory. Sums are float32: each lane adds its elements, then a tree adds the lanes.
// Bound by the bytes of the matrices.
#include <algorithm>

#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/pdl.cuh"
#include "gpu/core/rotate.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/layers/latent.h"

namespace pyserve::gpu {
namespace {

constexpr int kRopeThreads = 128;

// Rotates pair i of a row of rope_dim elements.
template <class T>
__device__ void rope_pair(const T* in, const float* cos_sin, const RopeLatentParams& p, int i,
                          T* out) {
  const int half = p.rope_dim / 2;
  const float a = to_float(in[p.has_pairs ? 2 * i : i]);
  const float b = to_float(in[p.has_pairs ? 2 * i + 1 : half + i]);
  const float2 turned = rotate(a, b, cos_sin[i], cos_sin[half + i]);
  out[i] = from_float<T>(turned.x);
  out[half + i] = from_float<T>(turned.y);
}

template <class T>
__global__ void __launch_bounds__(kRopeThreads) rope_latent_kernel(RopeLatentParams p) {
  pdl_wait();
  pdl_launch_dependents();
  const int64_t token = blockIdx.x;
  const int64_t position = p.positions[token], slot = p.slot_mapping[token];
  if (position < 0 || position >= p.max_position || slot < -1 || slot >= p.num_kv_slots) __trap();
  const float* cos_sin = p.cos_sin + position * p.cos_sin_stride;
  const int half = p.rope_dim / 2;
  const T* q = static_cast<const T*>(p.q) + token * p.q_token_stride;
  T* rotated = static_cast<T*>(p.rotated) + token * p.rotated_token_stride;
  for (int i = threadIdx.x; i < p.num_heads * half; i += kRopeThreads) {
    const int head = i / half;
    rope_pair(q + head * p.q_head_stride, cos_sin, p, i % half,
              rotated + head * p.rotated_head_stride);
  }
  const T* latent = static_cast<const T*>(p.compressed) + token * p.compressed_stride;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < p.latent_size; i += kRopeThreads) {
    const float x = to_float(latent[i]);
    squares = fmaf(x, x, squares);
  }
  squares = block_sum<kRopeThreads>(squares);
  if (slot < 0) return;
  T* kept = static_cast<T*>(p.latent_cache) + slot / p.block_size * p.block_stride +
            slot % p.block_size * p.token_stride;
  const float factor = rsqrtf(squares / static_cast<float>(p.latent_size) + p.eps);
  const T* weight = static_cast<const T*>(p.norm_weight);
  for (int i = threadIdx.x; i < p.latent_size; i += kRopeThreads) {
    kept[i] = from_float<T>(to_float(latent[i]) * factor * to_float(weight[i]));
  }
  for (int i = threadIdx.x; i < half; i += kRopeThreads) {
    rope_pair(latent + p.latent_size, cos_sin, p, i, kept + p.latent_size);
  }
}

// ---- batched_linear -----------------------------------------------------------------------------

constexpr int kBatchedWarps = 8;
constexpr int kBatchedThreads = kBatchedWarps * kWarpSize;
constexpr int kBatchedRows = 64;  // rows of the weight per CTA
constexpr int kMaxBatchedK = 1024;

// Grid: (batch, n / kBatchedRows rounded up).
template <class T>
__global__ void __launch_bounds__(kBatchedThreads) batched_linear_kernel(BatchedLinearParams p) {
  __shared__ uint4 x[kMaxBatchedRows][kMaxBatchedK / kVec];
  const int batch = blockIdx.x, num_vecs = p.k / kVec;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  pdl_wait();
  pdl_launch_dependents();
  for (int i = threadIdx.x; i < p.m * num_vecs; i += kBatchedThreads) {
    const int row = i / num_vecs, at = i % num_vecs;
    x[row][at] = load_vec(static_cast<const T*>(p.x) + row * p.x_stride + batch * p.x_batch_stride +
                          at * kVec);
  }
  __syncthreads();
  const T* matrix = static_cast<const T*>(p.weight) + batch * p.weight_batch_stride;
  T* out = static_cast<T*>(p.out) + batch * p.out_batch_stride;
  const int end = min(p.n, static_cast<int>(blockIdx.y + 1) * kBatchedRows);
  for (int n = blockIdx.y * kBatchedRows + warp; n < end; n += kBatchedWarps) {
    float sums[kMaxBatchedRows] = {};
    for (int at = lane; at < num_vecs; at += kWarpSize) {
      float weights[kVec];
      unpack<T>(load_streaming(matrix + n * p.weight_stride + at * kVec), weights);
#pragma unroll
      for (int row = 0; row < kMaxBatchedRows; ++row) {
        if (row >= p.m) break;
        float values[kVec];
        unpack<T>(x[row][at], values);
#pragma unroll
        for (int i = 0; i < kVec; ++i) sums[row] = fmaf(weights[i], values[i], sums[row]);
      }
    }
#pragma unroll
    for (int row = 0; row < kMaxBatchedRows; ++row) {
      if (row >= p.m) break;
      const float sum = lane_sum(sums[row]);
      if (lane == 0) out[row * p.out_stride + n] = from_float<T>(sum);
    }
  }
}

}  // namespace

cudaError_t launch_rope_write_latent(const RopeLatentParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return launch_chained(rope_latent_kernel<T>, static_cast<unsigned>(params.num_tokens),
                          kRopeThreads, 0, stream, params);
  });
}

cudaError_t launch_batched_linear(const BatchedLinearParams& params, cudaStream_t stream) {
  if (params.m > kMaxBatchedRows || params.k > kMaxBatchedK || params.k % kVec != 0) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid(params.batch, (params.n + kBatchedRows - 1) / kBatchedRows);
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return launch_chained(batched_linear_kernel<T>, grid, kBatchedThreads, 0, stream, params);
  });
}

}  // namespace pyserve::gpu
