// Merges the partial results of items that share a query tile, behind the kernel that has written
// them (latent_kernel.cuh). The partial results of one row with 8k keys are 2 MB. When the CTA that
// arrived last merged them, its one SM was busy for most of the op's 40 us on an H200; here all SMs
// take part.
//
// Work: a warp merges 64 columns of one packed row. The query tiles are dealt out by their first
// items, a fixed stride apart. The plan is read while the kernel in front still runs, since it is
// older than that kernel (rule 4 of pdl.cuh).
// Bound by latency and by the bytes of the partial results.
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
constexpr int kMergeAtOnce = 16;  // splits whose loads are in flight at a time
constexpr int kMergeCtas = 6;     // CTAs per SM, with so many registers
constexpr int kRowCtas = kLatentSize / (kMergeWarps * kMergeColumns);

// Grid: the parts of a row, for all packed rows of an item, for all tiles of heads, for all first
// items.
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
  // About one wave of CTAs; for prefill as many as its rows take. The stride is odd because first
  // items often lie at equal distances, which an odd stride meets evenly.
  const int row_ctas = kRowCtas * kItemRows * l.p.num_kv_heads;
  const int num_strides = (std::max(1, l.p.device.num_sms * kMergeCtas / row_ctas) - 1) | 1;
  const int num_ctas = row_ctas * num_strides;
  return launch_chained(latent_merge_kernel<T, kItemRows>, static_cast<unsigned>(num_ctas),
                        kMergeThreads, 0, stream, l);
}

}  // namespace pyserve::gpu::latent
