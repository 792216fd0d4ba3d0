// Which experts have rows, and how their work is numbered: every CTA makes this list for itself from
// the offsets, so that no grid depends on where tokens go.
#pragma once

#include "common/limits.h"
#include "gpu/core/block.cuh"

namespace pyserve::gpu {

// The experts that have rows. Items of one are numbered from first_item on: for each block of
// block_rows of its rows, `items_per_block` of them.
struct WorkList {
  int num_listed;
  int expert[kMaxExperts], first_row[kMaxExperts], end_row[kMaxExperts];
  int first_item[kMaxExperts + 1];  // the last one's is how many there are

  // By one warp; the others see it behind a barrier.
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

// An item and the expert that it is of. Items only go up.
struct WorkPlace {
  int item, entry = 0;

  __device__ explicit WorkPlace(int item) : item(item) {}
  __device__ bool is_there(const WorkList& list) {
    while (entry < list.num_listed && item >= list.first_item[entry + 1]) ++entry;
    return entry < list.num_listed;
  }
};

}  // namespace pyserve::gpu
