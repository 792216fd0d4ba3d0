// Paged prefill attention by mma.sync, in bfloat16 or float16: one query tile of kPrefillRows
// packed rows (packed row = token * group + head of the group) against a range of keys. Online
// softmax; scores and weights never leave the registers.
//
// Work: the grid is (KV heads, items of the plan, parts of a query tile). A warp has 16 *
// kFragments rows of the tile and all keys of a step. With 32 rows a warp reads 6 (QK) and 4 (PV)
// fragments of shared memory for 16 mma, which shared memory can just sustain beside the tensor
// cores of an sm_80 or sm_90. Tiles of K and V go through a ring of two stages: while one is used,
// cp.async fills the other. The addresses come from the block table and are looked up a tile
// earlier, once per row. Keys run from high to low, so the tiles that need a mask come first. The
// running maximum lags: it is raised only when a score exceeds it by 2^kMaxLag. The weights are as
// exact as before, because their sum has the same factor, and the output seldom needs to be
// rescaled.
//
// Bound by compute: 4 * num_heads * head_dim * sum(query_len * (context + query_len / 2)) FLOP at
// the rate of mma.sync, which on Hopper is about 0.62 of wgmma's.
// Sources: FlashAttention-2 (Dao 2023); packing the heads of a group, and paged loads: FlashInfer
// (Ye et al. 2025); the lagging maximum: the kernels of FlashAttention-4.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/prefill.cuh"
#include "gpu/attention/prefill_item.cuh"
#include "gpu/attention/score_scale.cuh"
#include "gpu/core/block.cuh"
#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/core/pdl.cuh"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu::prefill {

// Starts to copy the tile's queries, with zeros in rows behind the last.
template <class C>
__device__ __forceinline__ void copy_queries(const AttentionParams& p, const Geometry& g,
                                             uint32_t smem) {
  const int chunk = threadIdx.x % 8;
  for (int row = threadIdx.x / 8; row < C::kRows; row += C::kThreads / 8) {
    const bool valid = row < g.num_packed;
    const auto* source = query_row<typename C::T>(p, g, valid ? row : 0) + chunk * 8;
#pragma unroll
    for (int c = 0; c < C::kChunks; c += 8) {
      if (C::kChunks % 8 != 0 && chunk + c >= C::kChunks) continue;
      cp_async_16(smem + swizzled<C>(row, chunk + c), source + c * 8, valid);
    }
  }
}

// Each thread looks up one row of a step's tiles: threads 0 .. kKeys - 1 those of K, the next kKeys
// those of V.
template <class C>
__device__ __forceinline__ bool has_row(int first_key, int end_key, int step_begin, int& key) {
  key = step_begin + static_cast<int>(threadIdx.x) % C::kKeys;
  return threadIdx.x < 2 * C::kKeys && key >= first_key && key < end_key;
}

// The block that holds this thread's row; 0 where there is none. store_address checks it later, so
// that nothing waits for this load here.
template <class C>
__device__ __forceinline__ int32_t find_block(const AttentionParams& p, const Geometry& g,
                                              int end_key, int step_begin) {
  int key;
  if (!has_row<C>(g.first_key, end_key, step_begin, key)) return 0;
  return p.block_table[g.slot * p.block_table_stride + (key >> p.block_size_log2)];
}

// Steps begin at multiples of kKeys, so neighbouring steps use different stages of the ring.
template <class C>
__device__ __forceinline__ int stage_of(int step_begin) {
  return static_cast<uint32_t>(step_begin) / C::kKeys % kStages;
}

// Stores the address of this thread's row in the table of the stage.
template <class C>
__device__ __forceinline__ void store_address(const AttentionParams& p, const Geometry& g,
                                              int32_t block, int step_begin, int64_t* addresses) {
  if (threadIdx.x >= 2 * C::kKeys) return;
  if (static_cast<uint32_t>(block) >= static_cast<uint32_t>(p.num_blocks)) __trap();
  const bool is_key = threadIdx.x < C::kKeys;
  const int key = step_begin + static_cast<int>(threadIdx.x) % C::kKeys;
  const int64_t in_block = key & ((1 << p.block_size_log2) - 1);
  const int64_t offset = is_key ? block * p.key_block_stride + in_block * p.key_token_stride +
                                      g.kv_head * p.key_head_stride
                                : block * p.value_block_stride + in_block * p.value_token_stride +
                                      g.kv_head * p.value_head_stride;
  const auto* base = static_cast<const typename C::T*>(is_key ? p.key_cache : p.value_cache);
  addresses[threadIdx.x] = reinterpret_cast<int64_t>(base + offset);
}

// Starts to copy the K and V of a step. Rows that no query of the item sees become zeros: a weight
// of 0 would not hide a NaN in a value.
template <class C>
__device__ __forceinline__ void copy_step(int first_key, int end_key, int step_begin,
                                          const int64_t* addresses, uint32_t smem) {
  constexpr int kRowsAtOnce = C::kThreads / 8;
  const int chunk = threadIdx.x % 8;
  const int first_row = threadIdx.x / 8;
  const int stage = stage_of<C>(step_begin);
  const uint32_t destination =
      smem + C::kKeyOffset + stage * C::kTileBytes + swizzled<C>(first_row, chunk);
  static_assert(kRowsAtOnce % 8 == 0);  // so all rows of a thread have the same swizzle
  constexpr int kRows = C::kKeys / kRowsAtOnce;
  const char* sources[kRows][2];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int is_value = 0; is_value < 2; ++is_value) {
      const int64_t row =
          addresses[(stage * 2 + is_value) * C::kKeys + first_row + i * kRowsAtOnce];
      sources[i][is_value] = reinterpret_cast<const char*>(row) + chunk * 16;
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int key = step_begin + first_row + i * kRowsAtOnce;
    const bool valid = key >= first_key && key < end_key;
#pragma unroll
    for (int c = 0; c < C::kRowBytes; c += 128) {
      if (C::kChunks % 8 != 0 && chunk + c / 16 >= C::kChunks) continue;
      const uint32_t key_chunk = destination + i * kRowsAtOnce * C::kRowBytes + c;
      cp_async_16(key_chunk, sources[i][0] + c, valid);
      cp_async_16(key_chunk + C::kValueOffset - C::kKeyOffset, sources[i][1] + c, valid);
    }
  }
}

// Divides a warp's rows by their sums and writes them to out. They pass through the warp's part of
// the queries' shared memory, so that whole lines are written. `smem` points to the warp's first
// row there.
template <class C>
__device__ __forceinline__ void write_rows(const AttentionParams& p, const Geometry& g,
                                           const Accumulator<C>& acc, int warp_row,
                                           unsigned char* smem) {
  using T = typename C::T;
  const int lane = threadIdx.x % kWarpSize;
  __syncwarp();  // all lanes have finished with their queries
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = acc.sum[m][half];
      const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int row = m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < C::kHeadDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(smem + swizzled<C>(row, n) + lane % 4 * 4) =
            pack_pair<T>(acc.out[m][n][half * 2] * scale, acc.out[m][n][half * 2 + 1] * scale);
      }
    }
  }
  __syncwarp();
  constexpr int kRowsAtOnce = kWarpSize / C::kChunks;
  const int chunk = lane % C::kChunks;
  // This lane has no row.
  if (kWarpSize % C::kChunks != 0 && lane / C::kChunks == kRowsAtOnce) return;
  for (int row = lane / C::kChunks; row < C::kWarpRows; row += kRowsAtOnce) {
    if (warp_row + row >= g.num_packed) break;
    T* out = output_row<T>(p, g, warp_row + row);
    *reinterpret_cast<uint4*>(out + chunk * 8) =
        *reinterpret_cast<const uint4*>(smem + swizzled<C>(row, chunk));
  }
}

template <class C>
__device__ __forceinline__ void write_partial(const AttentionPartials& partials,
                                              const Accumulator<C>& acc, int64_t first_row) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + m * 16 + half * 8 + lane / 4;
      auto* out = reinterpret_cast<float2*>(partials.acc + row * C::kHeadDim + lane % 4 * 2);
#pragma unroll
      for (int n = 0; n < C::kHeadDim / 8; ++n) {
        out[n * 4] = make_float2(acc.out[m][n][half * 2], acc.out[m][n][half * 2 + 1]);
      }
      if (lane % 4 == 0) {
        reinterpret_cast<float2*>(partials.stats)[row] =
            make_float2(acc.max[m][half], acc.sum[m][half]);
      }
    }
  }
}

// Works through the item's keys, from the last step to the first, and leaves the item in shared
// memory. Returns false where the row is padding, which is then so in all items of the tile.
template <class C>
__device__ __forceinline__ bool attend(const AttentionParams& p, int item_index, int kv_head,
                                       int part, unsigned char* smem, Accumulator<C>& acc) {
  const AttentionItem item = load_item(p, item_index);
  const Geometry g = make_geometry<true, C::kRows>(p, item, kv_head, part);
  if (g.is_empty()) return false;
  const uint32_t base = smem_address(smem);
  auto* addresses = reinterpret_cast<int64_t*>(smem + C::kAddressOffset);
  const int warp_row = threadIdx.x / kWarpSize * C::kWarpRows;
  auto* positions = reinterpret_cast<int32_t*>(smem + C::kPositionOffset);
  if (threadIdx.x < C::kRows) {
    // Rows behind the last one take its position. In a warp with no other rows they take -1 and see
    // no key.
    const int row = threadIdx.x;
    const int packed = g.first_packed + min(row, g.num_packed - 1);
    const bool has_work = row / C::kWarpRows * C::kWarpRows < g.num_packed;
    positions[row] = has_work ? g.context + packed / g.group : -1;
  }
  positions += warp_row;
  if (threadIdx.x == 0) *reinterpret_cast<AttentionItem*>(smem + C::kItemOffset) = item;
  const ScoreScale scale = score_scale<C::kMayCap>(p);
  const uint32_t query_lane = row_major_lane<C>(base + warp_row * C::kRowBytes);
  const uint32_t key_lane = column_major_lane<C>(base + C::kKeyOffset);
  const uint32_t value_lane = row_major_lane<C>(base + C::kValueOffset);

  copy_queries<C>(p, g, base);
  int begin = item.kv_begin + (item.kv_end - 1 - item.kv_begin) / C::kKeys * C::kKeys;
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    const int step = begin - i * C::kKeys;
    if (step < item.kv_begin) break;
    store_address<C>(p, g, find_block<C>(p, g, item.kv_end, step), step,
                     addresses + stage_of<C>(step) * 2 * C::kKeys);
  }
  __syncthreads();  // the positions must be visible, too
  copy_step<C>(g.first_key, item.kv_end, begin, addresses, base);
  cp_async_commit();
  QueryFragments<C> q;

  for (; begin >= item.kv_begin; begin -= C::kKeys) {
    cp_async_wait<0>();
    // The step has arrived, and no thread reads the step before or its addresses any more.
    __syncthreads();
    const int next = begin - C::kKeys, after_next = next - C::kKeys;
    int32_t block = 0;
    if (next >= item.kv_begin) {
      copy_step<C>(g.first_key, item.kv_end, next, addresses, base);
      cp_async_commit();
      if (after_next >= item.kv_begin) block = find_block<C>(p, g, item.kv_end, after_next);
    }
    if constexpr (C::kQueryInRegisters) {
      if (begin + C::kKeys >= item.kv_end) {  // the first step
#pragma unroll
        for (int k = 0; k < C::kHeadDim / 16; ++k) load_queries<C>(query_lane, k, q.a[k]);
      }
    }
    const int end = min(begin + C::kKeys, item.kv_end);
    const WarpRange range{positions[0], positions[C::kWarpRows - 1], p.window};
    if (range.sees(begin, end)) {
      Scores<C> s;
      multiply_queries_keys<C>(s, query_lane, q, key_lane + stage_of<C>(begin) * C::kTileBytes);
      if (C::kMayCap && scale.cap_rate != 0.0f) cap_scores<C>(s, scale.cap_rate);
      if (end < begin + C::kKeys || !range.sees_all(begin, end)) {
        mask_scores<C>(s, positions, p.window, begin, end);
      }
      update_max<C>(acc, s, scale.log2);
      add_values<C>(acc, s, scale.log2, value_lane + stage_of<C>(begin) * C::kTileBytes);
    }
    if (after_next >= item.kv_begin) {
      store_address<C>(p, g, block, after_next, addresses + stage_of<C>(after_next) * 2 * C::kKeys);
    }
  }
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = acc.sum[m][half];
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
    }
  }
  return true;
}

// Two blocks of four warps share an SM's registers; a block of eight warps has them alone.
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kWarps == 4 ? 2 : 1)
    prefill_kernel(const AttentionParams p, const AttentionPartials partials) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  unsigned char* smem = dynamic_smem;
  // The heads of an item are neighbours in the grid: their rows lie side by side in the caches, and
  // the items come longest first for all heads at once.
  const int kv_head = blockIdx.x;
  const int item_index = blockIdx.y, part = blockIdx.z;
  pdl_wait();
  pdl_launch_dependents();
  if (item_index >= p.work[kWorkNumPrefillItems]) return;
  Accumulator<C> acc;
  clear(acc);
  if (!attend<C>(p, item_index, kv_head, part, smem, acc)) return;

  // Both are read again rather than kept over the loop, where they would take registers that it
  // needs.
  const AttentionItem item = *reinterpret_cast<const AttentionItem*>(smem + C::kItemOffset);
  const Geometry g = make_geometry<true, C::kRows>(p, item, kv_head, part);
  const int warp = threadIdx.x / kWarpSize;
  const int warp_row = warp * C::kWarpRows;
  if (item.num_splits == 1) {
    write_rows<C>(p, g, acc, warp_row, smem + warp_row * C::kRowBytes);
    return;
  }
  // Each part of a tile counts its own arrivals. A tile with splits has at least two counters,
  // enough for two parts.
  static_assert(kPrefillRows / C::kRows <= 2);
  const int64_t first_buffer =
      static_cast<int64_t>(item.partial - item.split) * p.num_kv_heads + kv_head;
  const int64_t buffer = first_buffer + static_cast<int64_t>(item.split) * p.num_kv_heads;
  if (warp_row < g.num_packed) {
    write_partial<C>(partials, acc, buffer * kPrefillRows + part * C::kRows + warp_row);
  }
  int32_t* arrivals = partials.arrivals + first_buffer + part * p.num_kv_heads;
  auto* flag = reinterpret_cast<int32_t*>(smem + C::kFlagOffset);
  if (!arrives_last(arrivals, item.num_splits, flag)) return;
  merge_rows<typename C::T, C::kHeadDim, C::kThreads>(
      p, g, partials, first_buffer * kPrefillRows + part * C::kRows, item.num_splits, 0,
      g.num_packed, threadIdx.x, reinterpret_cast<float2*>(smem), [] { __syncthreads(); });
}

template <class C>
cudaError_t launch_config(const AttentionParams& p, cudaStream_t stream) {
  constexpr auto kKernel = &prefill_kernel<C>;
  const cudaError_t error = allow_smem<kKernel, C::kSmemBytes>();
  if (error != cudaSuccess) return error;
  const int64_t items =
      max_prefill_items(p.device, p.num_tokens, p.num_rows, p.num_heads, p.num_kv_heads);
  if (items > 65535) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(p.num_kv_heads), static_cast<unsigned>(items),
                  kPrefillRows / C::kRows);
  return launch_chained(kKernel, grid, dim3(C::kThreads), C::kSmemBytes, stream, p,
                        prefill_partials(p));
}

// Whether two blocks fit on one SM. The driver reserves 1 KB more for each.
template <class C>
bool fits_twice(const Device& device) {
  return 2 * (C::kSmemBytes + 1024) <= device.smem_per_sm;
}

// For head_dim 96 and 256, and for capped scores: prefill_general.cu.
cudaError_t launch_general(const AttentionParams& p, Dtype dtype, cudaStream_t stream);

}  // namespace pyserve::gpu::prefill
