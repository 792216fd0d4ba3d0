// rope_write_kv: rotary embedding of q and k (Su et al. 2021; the elements i and i + rotary_dim / 2
// of a head are rotated together), and the write of k and v to the paged KV cache. qkv is
// [num_tokens, (num_heads + 2 num_kv_heads) head_dim] in bfloat16 or float16; q is rotated in
// place. Where norm weights are given, each head of q and k goes through an RMSNorm first; where
// q_scales are given, q is multiplied by that of its position afterwards.
//
// Work: one CTA per token, kLanes lanes per head. Each lane takes the 8 elements at i and the 8 at
// i + rotary_dim / 2, which are rotated together; a lane behind these takes two neighbouring
// vectors behind rotary_dim, which are not rotated. A lane has the same place in every head that it
// takes, so it reads its cosines and sines only once. Heads whose vectors are not whole or not
// aligned go to a plain kernel with one warp per head.
// Numerics: float32 from load to store, one rounding.
// Bound by bytes: 4 per element of qkv.
#include "gpu/layers/rope.h"

#include <algorithm>

#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/rotate.cuh"
#include "gpu/core/vec.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kMaxThreads = 256;

// What all heads of one token have in common.
template <class T>
struct Token {
  const float* cos_sin;
  float q_scale;
  T* qkv;
  T* key;  // of KV head 0; null where nothing is written to the cache
  T* value;

  __device__ __forceinline__ Token(const RopeParams& p, int64_t index) {
    const int64_t position = p.positions[index], slot = p.slot_mapping[index];
    if (position < 0 || position >= p.max_position || slot < -1 || slot >= p.num_kv_slots) __trap();
    cos_sin = p.cos_sin + position * p.cos_sin_stride;
    q_scale = p.q_scales == nullptr ? 1.0f : p.q_scales[position];
    qkv = static_cast<T*>(p.qkv) + index * p.qkv_stride;
    key = value = nullptr;
    if (slot >= 0) {
      const int64_t block = slot / p.block_size, offset = slot % p.block_size;
      key = static_cast<T*>(p.key_cache) + block * p.key_block_stride + offset * p.key_token_stride;
      value = static_cast<T*>(p.value_cache) + block * p.value_block_stride +
              offset * p.value_token_stride;
    }
  }

  // Where a head of q, k or v is stored; null where it is not.
  __device__ __forceinline__ T* target(const RopeParams& p, int head) const {
    if (head < p.num_heads) return qkv + int64_t{head} * p.head_dim;
    if (key == nullptr) return nullptr;
    head -= p.num_heads;
    if (head < p.num_kv_heads) return key + head * p.key_head_stride;
    return value + (head - p.num_kv_heads) * p.value_head_stride;
  }
};

__device__ __forceinline__ void load_floats(const float* from, float (&to)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x;
    to[i + 1] = four.y;
    to[i + 2] = four.z;
    to[i + 3] = four.w;
  }
}

// Applies RMSNorm to one lane's 16 elements of a head; `squares` is the sum of squares over the
// whole head.
template <class T>
__device__ __forceinline__ void norm_pair(const T* weight, float squares, const RopeParams& p,
                                          int first, int second, float (&a)[kVec],
                                          float (&b)[kVec]) {
  const float factor = rsqrtf(squares / static_cast<float>(p.head_dim) + p.eps);
  float scales[kVec];
  unpack<T>(load_vec(weight + first), scales);
#pragma unroll
  for (int i = 0; i < kVec; ++i) a[i] = a[i] * factor * (scales[i] + p.norm_offset);
  unpack<T>(load_vec(weight + second), scales);
#pragma unroll
  for (int i = 0; i < kVec; ++i) b[i] = b[i] * factor * (scales[i] + p.norm_offset);
}

// kLanes lanes per head with 16 elements each; lanes beyond the end of the head are idle. A thread
// loads its elements of kBatch heads before it rotates the first, to have more loads in flight.
template <class T, int kLanes, int kBatch, bool kNorm>
__global__ void __launch_bounds__(kMaxThreads) rope_kernel(RopeParams p) {
  const int place = threadIdx.x % kLanes, half = p.rotary_dim / 2;
  const bool is_active = 2 * kVec * place < p.head_dim, is_turned = kVec * place < half;
  // First and second are the offsets of the lane's two vectors.
  const int first = is_turned ? kVec * place : 2 * kVec * place;
  const int second = first + (is_turned ? half : kVec);
  const int num_turned = p.num_heads + p.num_kv_heads, num_all = num_turned + p.num_kv_heads;
  const int heads_at_once = blockDim.x / kLanes;

  pdl_wait();
  pdl_launch_dependents();
  uint4 packed[kBatch][2];
  auto load_heads = [&](int head) {
    const T* row = static_cast<const T*>(p.qkv) + blockIdx.x * p.qkv_stride;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, head += heads_at_once) {
      packed[i][0] = packed[i][1] = uint4{};
      if (is_active && head < num_all) {
        packed[i][0] = load_vec(row + int64_t{head} * p.head_dim + first);
        packed[i][1] = load_vec(row + int64_t{head} * p.head_dim + second);
      }
    }
  };
  int head = threadIdx.x / kLanes;
  load_heads(head);  // these loads are on their way while the token's position is read
  const Token<T> token(p, blockIdx.x);
  float cosines[kVec] = {}, sines[kVec] = {};
  if (is_turned) {
    load_floats(token.cos_sin + kVec * place, cosines);
    load_floats(token.cos_sin + half + kVec * place, sines);
  }
  // All lanes of a warp take part in every iteration, because the norms sum up by shuffles.
  for (int base = 0; base < num_all; base += kBatch * heads_at_once) {
    if (base > 0) load_heads(head);
#pragma unroll
    for (int i = 0; i < kBatch; ++i, head += heads_at_once) {
      float a[kVec], b[kVec];
      unpack<T>(packed[i][0], a);
      unpack<T>(packed[i][1], b);
      float squares = 0.0f;
      if constexpr (kNorm) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) squares = fmaf(a[j], a[j], fmaf(b[j], b[j], squares));
        squares = lane_sum<kLanes>(squares);
      }
      if (!is_active || head >= num_all) continue;
      T* target = token.target(p, head);
      if (target == nullptr) continue;
      if (head < num_turned) {
        if constexpr (kNorm) {
          const auto* weight =
              static_cast<const T*>(head < p.num_heads ? p.q_norm_weight : p.k_norm_weight);
          if (weight != nullptr) norm_pair(weight, squares, p, first, second, a, b);
        }
        if (is_turned) {
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            const float2 turned = rotate(a[j], b[j], cosines[j], sines[j]);
            a[j] = turned.x;
            b[j] = turned.y;
          }
        }
        const float scale = head < p.num_heads ? token.q_scale : 1.0f;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          a[j] *= scale;
          b[j] *= scale;
        }
        packed[i][0] = pack<T>(a);
        packed[i][1] = pack<T>(b);
      }
      store_vec(target + first, packed[i][0]);
      store_vec(target + second, packed[i][1]);
    }
  }
}

// Any head_dim, rotary_dim and alignment: one warp per head, and a lane takes one element or one
// pair at a time.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) rope_plain_kernel(RopeParams p) {
  pdl_wait();
  pdl_launch_dependents();
  const Token<T> token(p, blockIdx.x);
  const int lane = threadIdx.x % kWarpSize, half = p.rotary_dim / 2;
  const int num_turned = p.num_heads + p.num_kv_heads, num_all = num_turned + p.num_kv_heads;
  for (int head = threadIdx.x / kWarpSize; head < num_all; head += blockDim.x / kWarpSize) {
    const T* source = token.qkv + int64_t{head} * p.head_dim;
    T* target = token.target(p, head);
    if (target == nullptr) continue;
    if (head >= num_turned) {
      for (int i = lane; i < p.head_dim; i += kWarpSize) target[i] = source[i];
      continue;
    }
    const auto* weight =
        static_cast<const T*>(head < p.num_heads ? p.q_norm_weight : p.k_norm_weight);
    const float scale = head < p.num_heads ? token.q_scale : 1.0f;
    float factor = 1.0f;
    if (weight != nullptr) {
      float squares = 0.0f;
      for (int i = lane; i < p.head_dim; i += kWarpSize) {
        squares = fmaf(to_float(source[i]), to_float(source[i]), squares);
      }
      factor = rsqrtf(lane_sum(squares) / static_cast<float>(p.head_dim) + p.eps);
    }
    auto normed = [&](int i) {
      const float value = to_float(source[i]) * factor;
      return weight != nullptr ? value * (to_float(weight[i]) + p.norm_offset) : value;
    };
    // This may be in place, so a lane reads both elements of its pair before it writes them.
    for (int i = lane; i < half; i += kWarpSize) {
      const float2 turned =
          rotate(normed(i), normed(half + i), token.cos_sin[i], token.cos_sin[half + i]);
      target[i] = from_float<T>(turned.x * scale);
      target[half + i] = from_float<T>(turned.y * scale);
    }
    for (int i = p.rotary_dim + lane; i < p.head_dim; i += kWarpSize) {
      target[i] = from_float<T>(normed(i) * scale);
    }
  }
}

bool is_aligned(const RopeParams& p) {
  const bool fits = p.head_dim % (2 * kVec) == 0 && p.rotary_dim % (2 * kVec) == 0;
  const bool caches =
      is_vec_aligned(p.key_cache, p.key_block_stride | p.key_token_stride | p.key_head_stride) &&
      is_vec_aligned(p.value_cache,
                     p.value_block_stride | p.value_token_stride | p.value_head_stride);
  return fits && caches && is_vec_aligned(p.qkv, p.qkv_stride) &&
         reinterpret_cast<uintptr_t>(p.cos_sin) % 16 == 0 && p.cos_sin_stride % 4 == 0 &&
         is_vec_aligned(p.q_norm_weight, 0) && is_vec_aligned(p.k_norm_weight, 0);
}

template <class T, int kLanes, bool kNorm>
cudaError_t launch_lanes(const RopeParams& p, cudaStream_t stream) {
  constexpr int kBatch = 2;
  const int num_heads = p.num_heads + 2 * p.num_kv_heads;
  const int threads = (num_heads * kLanes + kBatch - 1) / kBatch;
  const int whole_warps = (threads + kWarpSize - 1) / kWarpSize * kWarpSize;
  return launch_chained(rope_kernel<T, kLanes, kBatch, kNorm>, static_cast<unsigned>(p.num_tokens),
                        std::min(whole_warps, kMaxThreads), 0, stream, p);
}

template <class T, int kLanes>
cudaError_t launch_lanes(const RopeParams& p, cudaStream_t stream) {
  const bool has_norm = p.q_norm_weight != nullptr || p.k_norm_weight != nullptr;
  return has_norm ? launch_lanes<T, kLanes, true>(p, stream)
                  : launch_lanes<T, kLanes, false>(p, stream);
}

template <class T>
cudaError_t launch_rope_as(const RopeParams& p, cudaStream_t stream) {
  if (!is_aligned(p)) {
    return launch_chained(rope_plain_kernel<T>, static_cast<unsigned>(p.num_tokens), kMaxThreads, 0,
                          stream, p);
  }
  if (p.head_dim <= 64) return launch_lanes<T, 4>(p, stream);
  if (p.head_dim <= 128) return launch_lanes<T, 8>(p, stream);
  return launch_lanes<T, 16>(p, stream);
}

}  // namespace

cudaError_t launch_rope_write_kv(const RopeParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  return dispatch_half(params.dtype, [&]<class T>(T) { return launch_rope_as<T>(params, stream); });
}

}  // namespace pyserve::gpu
