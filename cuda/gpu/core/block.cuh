// Sums over the threads of a warp and of a block, and a way to find out which of several blocks is
// the last to arrive.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// The sum of x over each aligned group of kWidth lanes; every lane of the group gets it. The
// additions form a butterfly, so their order is fixed and all lanes get the same bits.
template <int kWidth = kWarpSize>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int distance = kWidth / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kFullMask, x, distance);
  }
  return x;
}

// The sum of x over the block's threads; every thread gets it. The block must consist of whole
// warps. Each call in a kernel passes a different kCall and so gets its own shared array: no
// barrier is then needed between one call's reads and the next call's writes.
template <int kMaxThreads, int kCall = 0>
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float partial[kMaxThreads / kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  x = lane_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return lane_sum(threadIdx.x % kWarpSize < blockDim.x / kWarpSize ? partial[lane] : 0.0f);
}

// The sum of x over lanes 0 .. this one, this one included.
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

// The sum of x over the threads in front of this one, in a block of kWarps warps; `total` becomes
// the sum over all threads. `warp_sums` is shared memory that only these sums use. A further call
// with the same array may follow at once, because each call begins with a barrier.
template <int kWarps, class Int>
__device__ __forceinline__ Int block_exclusive_sum(Int (&warp_sums)[kWarps],
                                                   std::type_identity_t<Int> x, Int& total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Int inclusive = warp_inclusive_sum(x);
  __syncthreads();  // the readers of an earlier call have finished
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  Int before = 0;
  if constexpr (kWarps == kWarpSize) {
    const Int warps = warp_inclusive_sum(warp_sums[lane]);
    total = __shfl_sync(kFullMask, warps, kWarps - 1);
    before = __shfl_sync(kFullMask, warps, warp == 0 ? 0 : warp - 1);
    if (warp == 0) before = 0;
  } else {  // this form needs fewer registers, which the sampler is short of
    total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i == warp) before = total;
      total += warp_sums[i];
    }
  }
  return before + inclusive - x;
}

// Several groups of threads (blocks, or parts of blocks) each do a share of some work; the one that
// arrives last finishes it. Returns whether the calling group is the last of `count` groups; if so,
// it sees everything that the other groups wrote before they arrived. All threads of a group call
// this, exactly one of them with is_first. `sync` is a barrier of the group. `flag` is a word of
// shared memory that nothing else uses until the group's next barrier. `arrivals` is zero before
// the first group arrives, and the last group sets it back to zero.
template <class Int, class Sync>
__device__ __forceinline__ bool arrives_last(Int* arrivals, int count, int32_t* flag, bool is_first,
                                             Sync&& sync) {
  sync();
  if (is_first) {
    __threadfence();  // behind the barrier, so that the fence covers the writes of the whole group
    const bool last = atomicAdd(arrivals, Int{1}) == static_cast<Int>(count - 1);
    if (last) *arrivals = 0;  // ready for the next launch; no further group arrives in this one
    __threadfence();
    *flag = last;
  }
  sync();
  return *flag != 0;
}

// The same where each group is a whole block.
template <class Int>
__device__ __forceinline__ bool arrives_last(Int* arrivals, int count, int32_t* flag) {
  return arrives_last(arrivals, count, flag, threadIdx.x == 0, [] { __syncthreads(); });
}

}  // namespace pyserve::gpu
