// Which experts have rows, and how their work is numbered. Every CTA makes this list for itself
// from the offsets, so that no grid depends on where the tokens go.
#pragma once

#include "common/limits.h"
#include "gpu/core/block.cuh"

namespace pyserve::gpu {

// The experts that have rows. The items of an expert are numbered from first_item on:
// items_per_block of them for each block of block_rows rows.
struct WorkList {
  int num_listed;
  int expert[kMaxExperts], first_row[kMaxExperts], end_row[kMaxExperts];
  int first_item[kMaxExperts + 1];  // the one behind the last expert is the number of all items

  // Called by one warp; the others see the list behind a barrier.
  __device__ void make(const int32_t* offsets, int num_experts, int block_rows,
                       int items_per_block) {
    const int lane = threadIdx.x % kWarpSize;
    int listed = 0, items = 0;
    for (int base = 0; base < num_experts; base += kWarpSize) {
      const int index = base + lane;
      const int begin = index < num_experts ? offsets[index] : 0;
      const int end = index < num_experts ? offsets[index + 1] : 0;
      const int mine = (end - begin + block_rows - 1) / block_rows * items_per_block;
      const int inclusive = warp_inclusive_sum(mine);
      const int before = warp_inclusive_sum(static_cast<int>(end > begin));
      if (end > begin) {
        const int place = listed + before - 1;
        expert[place] = index;
        first_row[place] = begin;
        end_row[place] = end;
        first_item[place] = items + inclusive - mine;
      }
      listed += __shfl_sync(kFullMask, before, kWarpSize - 1);
      items += __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
    }
    if (lane == 0) {
      num_listed = listed;
      first_item[listed] = items;
    }
  }
};

// An item, and the entry of the list that it belongs to. `item` may only increase, since the entry
// is found by going forward.
struct WorkPlace {
  int item, entry = 0;

  __device__ explicit WorkPlace(int item) : item(item) {}
  __device__ bool is_there(const WorkList& list) {
    while (entry < list.num_listed && item >= list.first_item[entry + 1]) ++entry;
    return entry < list.num_listed;
  }
};

}  // namespace pyserve::gpu
