// Puts together what the items that share a query tile have of its rows, behind the kernel that has
// written it (latent_kernel.cuh). The parts of one row of 8k are 2 MB: the one SM of the CTA that
// came last was busy with them for most of the op's 40 us on an H200, so here all SMs are.
//
// A warp merges 64 columns of one packed row, of those query tiles whose first item is in its
// stride of the items. What the plan says is read while the kernel in front still runs, as it is
// older.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/latent_work.cuh"
#include "gpu/attention/merge.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/pdl.cuh"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu::latent {

constexpr int kMergeWarps = 4, kMergeColumns = 64;
constexpr int kMergeThreads = kMergeWarps * kWarpSize;
constexpr int kMergeAtOnce = 16;  // splits, on their way to registers
constexpr int kMergeCtas = 6;     // of an SM, with so many registers
constexpr int kRowCtas = kLatentSize / (kMergeWarps * kMergeColumns);

// Grid: parts of a row, packed rows of an item, tiles of heads, first items behind each other.
template <class T, int kItemRows>
__global__ void __launch_bounds__(kMergeThreads, kMergeCtas)
    latent_merge_kernel(const __grid_constant__ Latent l) {
  pdl_launch_dependents();
  const int part = blockIdx.x % kRowCtas, packed_row = blockIdx.x / kRowCtas % kItemRows;
  const int rest = blockIdx.x / (kRowCtas * kItemRows), stride_ctas = kRowCtas * kItemRows;
  const int tile = rest % l.p.num_kv_heads, first = rest / l.p.num_kv_heads;
  const int num_strides = gridDim.x / (stride_ctas * l.p.num_kv_heads);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  constexpr bool kIsDecode = kItemRows == kDecodeRows;
  const int32_t* items =
      l.p.work + (kIsDecode ? l.decode_items : __ldcg(l.p.work + kWorkPrefillItemsOffset));
  const int num_items = __ldcg(l.p.work + (kIsDecode ? kWorkNumDecodeItems : kWorkNumPrefillItems));
  const int sub_tile = packed_row / kDecodeRows, row = packed_row % kDecodeRows;
#pragma unroll 1
  for (int base = first; base < num_items; base += kWarpSize * num_strides) {
    AttentionItem mine{};
    if (base + lane * num_strides < num_items) mine = item_at(items, base + lane * num_strides);
    unsigned found = __ballot_sync(kFullMask, mine.num_splits > 1 && mine.split == 0);
#pragma unroll 1
    for (; found != 0; found &= found - 1) {
      const int index = base + (__ffs(static_cast<int>(found)) - 1) * num_strides;
      const Work work(l, item_at(items, index), sub_tile, sub_tile, 1);
      if (row >= work.num_rows || work.slot < 0) continue;
      pdl_wait();
      merge_row<T, kLatentSize, kItemRows, kMergeColumns, kMergeAtOnce>(
          l.partials, work.item.partial, work.item.num_splits, tile, l.p.num_kv_heads, packed_row,
          out_row<T>(l, work, tile, row), (part * kMergeWarps + warp) * kMergeColumns);
    }
  }
  pdl_wait();
}

template <class T, int kItemRows>
cudaError_t launch_merge(const Latent& l, cudaStream_t stream) {
  // About a wave, of prefill as many as it takes. An odd stride meets evenly the first items, which often lie evenly apart.
  const int row_ctas = kRowCtas * kItemRows * l.p.num_kv_heads;
  const int num_strides = (std::max(1, l.p.device.num_sms * kMergeCtas / row_ctas) - 1) | 1;
  const int num_ctas = row_ctas * num_strides;
  return launch_chained(latent_merge_kernel<T, kItemRows>, static_cast<unsigned>(num_ctas),
                        kMergeThreads, 0, stream, l);
}

}  // namespace pyserve::gpu::latent
