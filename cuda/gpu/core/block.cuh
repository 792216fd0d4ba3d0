// Sums over the threads of a warp and of a block, and which block of several comes last.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// The sum over each aligned group of kWidth lanes, in all of them. The order is that of a tree.
template <int kWidth = kWarpSize>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int distance = kWidth / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kFullMask, x, distance);
  }
  return x;
}

// The sum over the block's threads, in all of them; with whole warps. Each of a kernel's calls is
// another kCall, and so has other shared memory.
template <int kMaxThreads, int kCall = 0>
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float partial[kMaxThreads / kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  x = lane_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return lane_sum(threadIdx.x % kWarpSize < blockDim.x / kWarpSize ? partial[lane] : 0.0f);
}

// The sum of x over the lanes up to this one.
template <class Int>
__device__ __forceinline__ Int warp_inclusive_sum(Int x) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const Int other = __shfl_up_sync(kFullMask, x, distance);
    if (lane >= distance) x += other;
  }
  return x;
}

// The sum of x over the threads in front of this one, of a block of kWarps warps; `total` is that
// over all. `warp_sums` is shared memory for these sums alone: a later call may begin at once.
template <int kWarps, class Int>
__device__ __forceinline__ Int block_exclusive_sum(Int (&warp_sums)[kWarps],
                                                   std::type_identity_t<Int> x, Int& total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Int inclusive = warp_inclusive_sum(x);
  __syncthreads();  // the readers of an earlier call are through
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  Int before = 0;
  if constexpr (kWarps == kWarpSize) {
    const Int warps = warp_inclusive_sum(warp_sums[lane]);
    total = __shfl_sync(kFullMask, warps, kWarps - 1);
    before = __shfl_sync(kFullMask, warps, warp == 0 ? 0 : warp - 1);
    if (warp == 0) before = 0;
  } else {  // fewer registers, which the sampler is short of
    total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i == warp) before = total;
      total += warp_sums[i];
    }
  }
  return before + inclusive - x;
}

// Whether these threads are the last of `count` such groups to arrive; if so they see what all
// others wrote before. All of a group call it, one with is_first; `sync` is the group's barrier.
// `flag` is a word of shared memory that nobody else uses until the group's next barrier.
// `arrivals` is zero before the first group arrives and after the last has.
template <class Int, class Sync>
__device__ __forceinline__ bool arrives_last(Int* arrivals, int count, int32_t* flag, bool is_first,
                                             Sync&& sync) {
  sync();
  if (is_first) {
    __threadfence();  // after the barrier: orders the whole group's writes before its arrival
    const bool last = atomicAdd(arrivals, Int{1}) == static_cast<Int>(count - 1);
    if (last) *arrivals = 0;  // for the next launch: nobody else arrives in this one
    __threadfence();
    *flag = last;
  }
  sync();
  return *flag != 0;
}

// The same of whole blocks.
template <class Int>
__device__ __forceinline__ bool arrives_last(Int* arrivals, int count, int32_t* flag) {
  return arrives_last(arrivals, count, flag, threadIdx.x == 0, [] { __syncthreads(); });
}

}  // namespace pyserve::gpu
