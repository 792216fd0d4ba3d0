// What the threads of the sampler's CTAs do together: prefix sums of 64-bit integers, the search
// for the item at which a running sum passes a target, and a sort of a short list. All sums are of
// integers and so exact in any order.
#pragma once

#include "gpu/core/block.cuh"
#include "gpu/sample/row.cuh"

namespace pyserve::gpu {

// The item at which a running sum passes a target.
struct Crossing {
  int item;
  uint64_t before;  // sum of the items in front of it
  uint64_t total;   // sum of all items
};

struct BlockShared {
  uint64_t warp_sums[kSampleWarps];
  Crossing crossing;
};

// The first of n items at which the running sum of get(item) exceeds target_of(total), which must
// be less than the total. What get reads must already be visible to all threads.
template <class Get, class TargetOf>
__device__ inline Crossing find_crossing(int n, BlockShared& s, const Get& get,
                                         const TargetOf& target_of) {
  const int each = (n + kSampleThreads - 1) / kSampleThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * each, n), end = min(begin + each, n);
  uint64_t sum = 0, total;
#pragma unroll 1
  for (int i = begin; i < end; ++i) sum += get(i);
  uint64_t before = block_exclusive_sum(s.warp_sums, sum, total);
  const uint64_t target = target_of(total);
  if (target >= before && target < before + sum) {
    int i = begin;
#pragma unroll 1
    for (uint64_t item = get(i); target >= before + item; item = get(++i)) before += item;
    s.crossing = {i, before, total};
  }
  __syncthreads();
  return s.crossing;
}

// A bound that at least k of the keys (row.cuh) reach, and hardly more than k; each thread brings
// two keys, a and b. The bound has 11 bits of mantissa.
__device__ inline float kth_bound(uint32_t a, uint32_t b, int k) {
  uint32_t bound = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 12; --bit) {
    const uint32_t candidate = bound | 1u << bit;
    const int count = __syncthreads_count(a >= candidate) + __syncthreads_count(b >= candidate);
    if (count >= k) bound = candidate;
    if (count == k) break;
  }
  return from_key(max(bound, to_key(-kInfinity)));
}

// Sorts n different numbers, largest first. The list is padded with zeros to a power of two, for
// which it must have room. Bitonic sort (Batcher 1968).
__device__ inline void sort_descending(uint64_t* list, int n) {
  int padded = 1;
  while (padded < n) padded *= 2;
  for (int i = n + threadIdx.x; i < padded; i += kSampleThreads) list[i] = 0;
  __syncthreads();
  for (int size = 2; size <= padded; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll 1
      for (int pair = threadIdx.x; pair < padded / 2; pair += kSampleThreads) {
        const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
        const uint64_t a = list[low], b = list[high];
        if ((a < b) == ((low & size) == 0)) {
          list[low] = b;
          list[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace pyserve::gpu
