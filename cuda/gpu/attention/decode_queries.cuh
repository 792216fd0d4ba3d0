// The queries of decode_kernel.cuh: 16 packed rows as the left operand of the first product,
// rotated if the kernel does rope, and that product.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/decode_loader.cuh"
#include "gpu/attention/new_key.cuh"
#include "gpu/attention/score_scale.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/core/rotate.cuh"
#include "gpu/core/swizzle.cuh"

namespace pyserve::gpu::decode {

// The fragments of all steps of the first product, by lane.
using SharedQueries = uint4[16][kWarpSize];

// For each step a lane has elements of rows lane / 4 and lane / 4 + 8.
template <class T, int kHeadDim>
struct Queries {
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr bool kAreShared = kHeadDim > 128;
  // How many fragments a warp holds: either all of them, or only its share until it has put them
  // into shared memory. The first half of what it holds is rotated together with the second half,
  // which lies half a head further.
  static constexpr int kHeld = kAreShared ? kSteps / kWarps : kSteps;
  uint32_t q[kHeld][4];

  __device__ void load(const Decode& d, const Work& work, int kv_head) {
    const int lane = threadIdx.x % kWarpSize;
    const T* base = static_cast<const T*>(d.p.q);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half, token = row / d.group;
      const bool is_row = token < work.query_len && work.slot >= 0;
      const uint32_t* pairs = reinterpret_cast<const uint32_t*>(
          base + (is_row ? (work.first_query + token) * d.p.q_token_stride +
                               (kv_head * d.group + row % d.group) * d.p.q_head_stride
                         : 0));
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        q[i][half] = is_row ? pairs[step_of(i) * 8 + lane % 4] : 0;
        q[i][half + 2] = is_row ? pairs[step_of(i) * 8 + lane % 4 + 4] : 0;
      }
    }
  }

  // The step of the first product that q[i] belongs to.
  static __device__ int step_of(int i) {
    if constexpr (!kAreShared) return i;
    const int warp = threadIdx.x / kWarpSize;
    return i < kHeld / 2 ? warp * (kHeld / 2) + i : kSteps / 2 + warp * (kHeld / 2) + i - kHeld / 2;
  }

  // Puts the shares of all warps into shared memory.
  __device__ void share(SharedQueries& all) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      all[step_of(i)][threadIdx.x % kWarpSize] =
          make_uint4(q[i][0], q[i][1], q[i][2], q[i][3]);
    }
    __syncthreads();
  }

  // Rotates the queries. Element i and the one half a head further are held by the same lane.
  __device__ void turn(const Decode& d, const int (&position)[2]) {
    constexpr int kHalf = kHeadDim / 2;
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* cos_sin = cos_sin_of(d, position[half]) + column;
#pragma unroll
      for (int i = 0; i < kHeld / 2; ++i) {
#pragma unroll
        for (int j = half; j < 4; j += 2) {
          const int at = step_of(i) * 16 + j / 2 * 8;
          const float2 cosines = *reinterpret_cast<const float2*>(cos_sin + at);
          const float2 sines = *reinterpret_cast<const float2*>(cos_sin + kHalf + at);
          uint32_t &first = q[i][j], &second = q[i + kHeld / 2][j];
          const float2 x = unpack_pair<T>(first), y = unpack_pair<T>(second);
          const float2 even = rotate(x.x, y.x, cosines.x, sines.x);
          const float2 odd = rotate(x.y, y.y, cosines.y, sines.y);
          first = pack_pair<T>(even.x, odd.x);
          second = pack_pair<T>(even.y, odd.y);
        }
      }
    }
  }

  // Scores the warp's 16 keys at `keys` (swizzled rows). s[n] has keys 8n + 2 (lane % 4) and the
  // next one.
  __device__ void score(float (&s)[2][4], uint32_t keys, const SharedQueries& all) const {
    constexpr int kRowBytes = kSmemRowBytes<T, kHeadDim>;
    const int lane = threadIdx.x % kWarpSize;
    const int row = lane / 16 * 8 + lane % 8;
    const uint32_t address = keys + row * kRowBytes + ((lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t b[4];
      ldmatrix_x4(b, at_chunk(address, 2 * i));
      if constexpr (kAreShared) {
        const uint4 shared = all[i][lane];
        const uint32_t a[4] = {shared.x, shared.y, shared.z, shared.w};
        mma_16816<T>(s[0], a, b[0], b[1]);
        mma_16816<T>(s[1], a, b[2], b[3]);
      } else {
        mma_16816<T>(s[0], q[i], b[0], b[1]);
        mma_16816<T>(s[1], q[i], b[2], b[3]);
      }
    }
  }
};

__device__ __forceinline__ void cap_scores(float (&s)[2][4], float cap_rate) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[n][j] = cap_score(s[n][j], cap_rate);
  }
}

}  // namespace pyserve::gpu::decode
