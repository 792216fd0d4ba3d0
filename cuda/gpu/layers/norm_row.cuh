// A row of rms_norm or add_rms_norm, held in registers by the threads of a block. Thread i holds
// kVecs vectors: i, i + blockDim.x, and so on; the last ones may lie beyond the end of the row.
//
// The vectors are held packed as 16-bit elements, which takes half the registers across the barrier
// of the sum.
#pragma once

#include "gpu/core/vec.cuh"
#include "gpu/layers/norm.h"

namespace pyserve::gpu {

__device__ __forceinline__ float norm_factor(float squares, int64_t hidden, float eps) {
  return rsqrtf(squares / static_cast<float>(hidden) + eps);
}

// held += added, rounded. The norm is then that of the residual as it is stored.
template <class T>
__device__ __forceinline__ void add_rounded(uint4& held, const uint4& added) {
  float values[kVec], more[kVec];
  unpack<T>(held, values);
  unpack<T>(added, more);
#pragma unroll
  for (int j = 0; j < kVec; ++j) values[j] += more[j];
  held = pack<T>(values);
}

template <class T>
__device__ __forceinline__ float add_squares(const uint4& held, float squares) {
  float values[kVec];
  unpack<T>(held, values);
#pragma unroll
  for (int j = 0; j < kVec; ++j) squares = fmaf(values[j], values[j], squares);
  return squares;
}

template <class T>
__device__ __forceinline__ uint4 normed(uint4& held, uint4& weight, float factor, float offset) {
  float values[kVec], scales[kVec];
  forget_origin(held);
  forget_origin(weight);
  unpack<T>(held, values);
  unpack<T>(weight, scales);
#pragma unroll
  for (int j = 0; j < kVec; ++j) values[j] = values[j] * factor * (scales[j] + offset);
  return pack<T>(values);
}

// The number of threads, in whole warps, that share `num_items` items when each takes at most
// `each`.
inline unsigned norm_threads(int64_t num_items, int64_t each) {
  const int64_t threads = (num_items + each - 1) / each;
  const int64_t whole_warps = (threads + kWarpSize - 1) / kWarpSize * kWarpSize;
  return static_cast<unsigned>(whole_warps < kMaxNormThreads ? whole_warps : kMaxNormThreads);
}

}  // namespace pyserve::gpu
