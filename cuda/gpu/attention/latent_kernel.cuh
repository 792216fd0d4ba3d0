// Attention over a paged cache of latents (latent_attention), in bfloat16 or float16. q is
// [num_tokens, num_heads, 576] and out [num_tokens, num_heads, 512]. The cache has one row of 512 +
// 64 elements per token, which all heads share: the whole row is the key and its first 512 elements
// are the value.
//
// Work: the heads are divided into equal tiles of at most 16, which stand for KV heads in the plan.
// An item is worked on 16 packed query rows at a time, by a group of 4 warps. A decode item has one
// such part, a prefill item of 128 packed rows has 8. A CTA has either one group, which takes 32
// cached rows at a time, with two CTAs per SM; or two groups, which read the same 64 cached rows at
// a time, each for its own tile of heads or its own part of a prefill item. With two groups the
// rows cross L2 and the port of shared memory once for both, and a warp that scores 16 instead of 8
// cached rows reads the queries half as often. Cached rows are copied (cp.async, 16 bytes,
// XOR-swizzled) into one of two stages while the other is used. Each warp of a group scores a
// quarter of the cached rows and puts the scores into shared memory. Then each warp turns all of
// the scores into weights by itself and sums up 128 of the 512 columns. So all warps have the same
// running maxima and sums, and need not combine anything at the end of an item. Products are
// mma.sync m16n8k16; the scores of a row are summed in four chains, because a single chain would
// wait for itself. The partial results of items that share a query tile are merged by a kernel
// behind this one: latent_merge.cuh.
//
// Bound by bytes: sum(visible keys) * 1152 at the rate of memory, for up to two tiles of heads;
// further tiles read L2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/latent_merge.cuh"
#include "gpu/attention/latent_work.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/mbarrier.cuh"
#include "gpu/core/pdl.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/core/swizzle.cuh"

namespace pyserve::gpu::latent {

constexpr int kWarps = 4, kGroupThreads = kWarps * kWarpSize;  // per group
constexpr int kWidth = kLatentSize + kLatentRopeDim;
constexpr int kWarpColumns = kLatentSize / kWarps;
constexpr int kRowBytes = kWidth * 2;
constexpr int kQueryBytes = kDecodeRows * kRowBytes;  // per group
constexpr int kSubTiles = kPrefillRows / kDecodeRows;

// The shared memory of a CTA with kGroups groups: two stages, queries, scores.
template <int kGroups>
struct Layout {
  static constexpr int kThreads = kGroups * kGroupThreads;
  // Cached rows of a tile; items begin at multiples of it.
  static constexpr int kKeys = 32 * kGroups;
  static constexpr int kWarpKeys = kKeys / kWarps;  // cached rows that a warp scores
  static constexpr int kStageBytes = kKeys * kRowBytes;
  // In floats; padded, so that the rows of half a warp lie in different banks.
  static constexpr int kScoreStride = kKeys + 8;
  static constexpr int kScoreBytes = kDecodeRows * kScoreStride * 4;  // per group
  static constexpr int kQueriesAt = 2 * kStageBytes;
  static constexpr int kScoresAt = kQueriesAt + kGroups * kQueryBytes;
  static constexpr int kSmemBytes = kScoresAt + kGroups * kScoreBytes;
  static constexpr int kCtasPerSm = 2 / kGroups;
  static_assert(kRowBytes % 128 == 0 && kKvTile % kKeys == 0 && kWarpKeys % 8 == 0);
};

__device__ __forceinline__ int group_of_thread() { return threadIdx.x / kGroupThreads; }
__device__ __forceinline__ int warp_of_group() { return threadIdx.x / kWarpSize % kWarps; }

// Copies one tile of an item after another. Eight threads share a cached row, and each helps with
// two rows per tile.
template <class T, int kGroups>
class Loader {
  using L = Layout<kGroups>;
  static constexpr int kThreadsPerRow = 8, kRowsAtOnce = L::kThreads / kThreadsPerRow;
  static constexpr int kKeys = L::kKeys, kParts = kKeys / kRowsAtOnce;
  static constexpr int kCopies = kRowBytes / 16 / kThreadsPerRow;
  static_assert(kCopies * kThreadsPerRow * 16 == kRowBytes);

 public:
  __device__ Loader(const Latent& l, const Work& work)
      : l_(l),
        blocks_(l.p.block_table + max(work.slot, 0) * l.p.block_table_stride),
        tile_(work.item.kv_begin),
        end_(work.kv_end),
        row_(threadIdx.x / kThreadsPerRow) {
    look_up();
  }

  // Starts the copies of the next tile as one group, which is empty when everything has been
  // copied.
  __device__ void issue(uint32_t stage) {
    if (tile_ < end_) {
      const int chunk = threadIdx.x % kThreadsPerRow;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int row = row_ + part * kRowsAtOnce, key = tile_ + row;
        if (static_cast<uint32_t>(block_[part]) >= static_cast<uint32_t>(l_.p.num_blocks)) __trap();
        const T* source =
            static_cast<const T*>(l_.p.key_cache) + int64_t{block_[part]} * l_.p.key_block_stride +
            (key & ((1 << l_.p.block_size_log2) - 1)) * l_.p.key_token_stride + chunk * 8;
        const uint32_t target = stage + row * kRowBytes + (chunk ^ (row % 8)) * 16;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          cp_async_16(target + i * 128, source + i * 64, key < end_);
        }
      }
      tile_ += kKeys;
      look_up();
    }
    cp_async_commit();
  }

 private:
  // Reads the block table entries of the next tile's rows, a tile ahead. They are not used here,
  // because any use would wait for the loads.
  __device__ void look_up() {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int key = tile_ + row_ + part * kRowsAtOnce;
      block_[part] = key < end_ ? __ldcg(blocks_ + (key >> l_.p.block_size_log2)) : 0;
    }
  }

  const Latent& l_;
  const int32_t* blocks_;
  int tile_, end_, row_;
  int32_t block_[kParts];
};

// Starts the copies of the group's queries into swizzled rows; rows without a query become zeros.
// Eight threads share a row.
template <class T>
__device__ void copy_queries(const Latent& l, const Work& work, int tile, uint32_t queries) {
  static_assert(kGroupThreads == kDecodeRows * 8);
  const int row = threadIdx.x % kGroupThreads / 8, first = threadIdx.x % 8;
  const bool is_valid = row < work.num_rows && work.slot >= 0;
  const T* source = static_cast<const T*>(l.p.q) + first * 8;
  if (is_valid) {
    source += work.token_of(l, row) * l.p.q_token_stride +
              work.head_of(l, tile, row) * l.p.q_head_stride;
  }
  const uint32_t target = queries + row * kRowBytes + (first ^ (row % 8)) * 16;
#pragma unroll
  for (int i = 0; i < kRowBytes / 128; ++i) {
    cp_async_16(target + i * 128, source + i * 64, is_valid);
  }
}

// Scores this warp's 8 or 16 cached rows, into its columns of `scores`.
template <class T, int kGroups>
__device__ __forceinline__ void score(uint32_t stage, uint32_t queries, float* scores) {
  using L = Layout<kGroups>;
  constexpr int kEights = L::kWarpKeys / 8, kChains = 2 / kEights;
  const int lane = threadIdx.x % kWarpSize, first = warp_of_group() * L::kWarpKeys;
  const uint32_t keys_at =
      stage + (first + lane % 8) * kRowBytes + ((lane / 8) ^ (lane % 8)) * 16;
  const uint32_t queries_at = queries + lane % 16 * kRowBytes + ((lane / 16) ^ (lane % 8)) * 16;
  float sums[kEights][kChains][2][4] = {};
#pragma unroll
  for (int i = 0; i < kWidth / 32; ++i) {
    uint32_t a[2][4];
    ldmatrix_x4(a[0], at_chunk(queries_at, 4 * i));
    ldmatrix_x4(a[1], at_chunk(queries_at, 4 * i + 2));
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, at_chunk(keys_at + n * 8 * kRowBytes, 4 * i));
      mma_16816<T>(sums[n][i % kChains][0], a[0], b[0], b[1]);
      mma_16816<T>(sums[n][i % kChains][1], a[1], b[2], b[3]);
    }
  }
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto sum = [&](int j) {
        float total = sums[n][0][0][j] + sums[n][0][1][j];
        if constexpr (kChains == 2) total += sums[n][1][0][j] + sums[n][1][1][j];
        return total;
      };
      float2 pair;
      pair.x = sum(2 * half);
      pair.y = sum(2 * half + 1);
      const int column = first + 8 * n + lane % 4 * 2;
      *reinterpret_cast<float2*>(scores + (lane / 4 + 8 * half) * L::kScoreStride + column) = pair;
    }
  }
}

// The state of a group's rows for this warp's columns. A lane has rows lane / 4 and lane / 4 + 8.
template <class T, int kGroups>
struct Rows {
  using L = Layout<kGroups>;
  static constexpr int kSteps = L::kKeys / 16;  // steps of the second product
  static constexpr int kTiles = kWarpColumns / 8;
  float acc[kTiles][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};  // in log2 units
  float sum[2] = {};                          // over this lane's keys
  int position[2];                            // position of the row's query

  __device__ Rows(const Latent& l, const Work& work) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = threadIdx.x % kWarpSize / 4 + 8 * half;
      position[half] = work.position + (work.first_row + row) / l.group;
    }
  }

  // Online softmax over the tile that begins at key `first`: makes its weights, as left operands of
  // the second product for 16 keys each, and rescales the sums so far.
  __device__ void weigh(const float* scores, int first, float scale_log2,
                        uint32_t (&weights)[kSteps][4]) {
    const int lane = threadIdx.x % kWarpSize, column = lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* row = scores + (lane / 4 + 8 * half) * L::kScoreStride + column;
      float s[2 * kSteps][2];
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2 * kSteps; ++n) {
        const float2 pair = *reinterpret_cast<const float2*>(row + 8 * n);
        const int key = first + 8 * n + column;
        s[n][0] = key <= position[half] ? pair.x : -INFINITY;
        s[n][1] = key < position[half] ? pair.y : -INFINITY;
        highest = fmaxf(highest, fmaxf(s[n][0], s[n][1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 2));
      const float before = largest[half];
      largest[half] = fmaxf(before, highest * scale_log2);
      const float shift = largest[half] == -INFINITY ? 0.0f : largest[half];
      const float factor = exp2_approx(before - shift);
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < 2 * kSteps; ++n) {
        const float low = exp2_approx(fmaf(s[n][0], scale_log2, -shift));
        const float high = exp2_approx(fmaf(s[n][1], scale_log2, -shift));
        weights[n / 2][half + n % 2 * 2] = pack_pair<T>(low, high);
        total += low + high;
      }
      sum[half] = sum[half] * factor + total;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        acc[i][2 * half] *= factor;
        acc[i][2 * half + 1] *= factor;
      }
    }
  }

  // acc += weights times this warp's columns of the tile.
  __device__ void add(const uint32_t (&weights)[kSteps][4], uint32_t stage) {
    const int lane = threadIdx.x % kWarpSize, warp = warp_of_group();
    const uint32_t values =
        stage + lane % 16 * kRowBytes + ((lane / 16) ^ (lane % 8)) * 16 + warp * kWarpColumns * 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, at_chunk(values + step * 16 * kRowBytes, i));
        mma_16816<T>(acc[i], weights[step], b[0], b[1]);
        mma_16816<T>(acc[i + 1], weights[step], b[2], b[3]);
      }
    }
  }
};

// Writes the results of the rows to `out`, or as partial results.
template <class T, int kItemRows, int kGroups>
__device__ void write_rows(const Latent& l, const Work& work, int tile, int sub_tile,
                           Rows<T, kGroups>& rows) {
  constexpr int kTiles = Rows<T, kGroups>::kTiles;
  const int lane = threadIdx.x % kWarpSize, warp = warp_of_group();
  const int column = warp * kWarpColumns + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(kFullMask, sum, 1);
    sum += __shfl_xor_sync(kFullMask, sum, 2);
    if (row >= work.num_rows) continue;
    if (work.item.num_splits > 1) {
      const int64_t partial =
          (static_cast<int64_t>(work.item.partial) * l.p.num_kv_heads + tile) * kItemRows +
          sub_tile * kDecodeRows + row;
      float* acc = l.partials.acc + partial * kLatentSize + column;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        float2 pair;
        pair.x = rows.acc[i][2 * half];
        pair.y = rows.acc[i][2 * half + 1];
        *reinterpret_cast<float2*>(acc + 8 * i) = pair;
      }
      if (warp == 0 && lane % 4 == 0) {
        float2 stats;
        stats.x = rows.largest[half];
        stats.y = sum;
        *reinterpret_cast<float2*>(l.partials.stats + partial * 2) = stats;
      }
    } else if (work.slot >= 0) {
      const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
      T* out = out_row<T>(l, work, tile, row) + column;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        *reinterpret_cast<uint32_t*>(out + 8 * i) =
            pack_pair<T>(rows.acc[i][2 * half] * scale, rows.acc[i][2 * half + 1] * scale);
      }
    }
  }
}

// Works on one item. In decode each group takes it for its own tile of heads; in prefill each group
// takes its own part of 16 rows, from first_sub_tile on.
template <class T, int kItemRows, int kGroups>
__device__ void attend(const Latent& l, const AttentionItem& item, int first_tile,
                       int first_sub_tile, unsigned char* smem) {
  using L = Layout<kGroups>;
  constexpr bool kIsDecode = kItemRows == kDecodeRows;
  const int tile = first_tile + (kIsDecode ? group_of_thread() : 0);
  const int sub_tile = first_sub_tile + (kIsDecode ? 0 : group_of_thread());
  const Work work(l, item, sub_tile, first_sub_tile, kIsDecode ? 1 : kGroups);
  if (kIsDecode && work.query_len * l.group > kDecodeRows) __trap();
  const uint32_t stages = smem_address(smem);
  const uint32_t queries = stages + L::kQueriesAt + group_of_thread() * kQueryBytes;
  auto* scores =
      reinterpret_cast<float*>(smem + L::kScoresAt + group_of_thread() * L::kScoreBytes);
  __syncthreads();  // all threads have finished with the data of the item before
  Loader<T, kGroups> loader(l, work);
  copy_queries<T>(l, work, tile, queries);
  uint32_t here = stages, there = stages + L::kStageBytes;
  loader.issue(here);
  loader.issue(there);
  Rows<T, kGroups> rows(l, work);
  const int begin = work.item.kv_begin;
#pragma unroll 1
  for (int first = begin; first < work.kv_end; first += L::kKeys) {
    if (first == begin) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    // Tile and queries are there; all have finished with the stage and scores before.
    __syncthreads();
    if (first != begin) loader.issue(there);
    score<T, kGroups>(here, queries, scores);
    named_barrier_sync(1 + group_of_thread(), kGroupThreads);
    uint32_t weights[Rows<T, kGroups>::kSteps][4];
    rows.weigh(scores, first, l.scale_log2, weights);
    rows.add(weights, here);
    const uint32_t read = here;
    here = there;
    there = read;
  }
  cp_async_wait<0>();
  write_rows<T, kItemRows>(l, work, tile, sub_tile, rows);
}

// Grid for decode: all tiles of heads for the first range of the plan, then for the next; each CTA
// takes the items of its range. Grid for prefill: the parts of an item, for all tiles of heads, for
// all items; each CTA takes one part. The grid may be larger than the number of items. The groups
// of a CTA take neighbouring tiles, or neighbouring parts.
template <class T, int kItemRows, int kGroups>
__global__ void __launch_bounds__(Layout<kGroups>::kThreads, Layout<kGroups>::kCtasPerSm)
    latent_attention_kernel(const __grid_constant__ Latent l) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  pdl_wait();
  pdl_launch_dependents();
  const int32_t* work = l.p.work;
  if constexpr (kItemRows == kDecodeRows) {
    const int num_tiles = l.p.num_kv_heads / kGroups, num_ranges = gridDim.x / num_tiles;
    const int tile = blockIdx.x % num_tiles * kGroups;
    const int32_t* starts = work + kDecodeStartsOffset + blockIdx.x / num_tiles;
    const int first = __ldcg(starts), last = __ldcg(starts + 1);
    // The plan was made for another device.
    if (__ldcg(work + kWorkNumDecodeRanges) != num_ranges) __trap();
#pragma unroll 1
    for (int index = first; index < last; ++index) {
      const AttentionItem item = item_at(work + l.decode_items, index);
      attend<T, kItemRows, kGroups>(l, item, tile, 0, dynamic_smem);
    }
  } else {
    constexpr int kParts = kSubTiles / kGroups;
    const int part = blockIdx.x % kParts * kGroups, rest = blockIdx.x / kParts;
    const int index = rest / l.p.num_kv_heads;
    if (index >= __ldcg(work + kWorkNumPrefillItems)) return;
    const AttentionItem item = item_at(work + __ldcg(work + kWorkPrefillItemsOffset), index);
    attend<T, kItemRows, kGroups>(l, item, rest % l.p.num_kv_heads, part, dynamic_smem);
  }
}

// Launches for the decode items of a plan (kItemRows is kDecodeRows) or for its prefill items.
template <class T, int kItemRows, int kGroups>
cudaError_t launch_items(const Latent& l, int64_t num_groups, cudaStream_t stream) {
  using L = Layout<kGroups>;
  constexpr auto kKernel = latent_attention_kernel<T, kItemRows, kGroups>;
  cudaError_t error = allow_smem<kKernel, L::kSmemBytes>();
  if (error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(num_groups / kGroups);
  error = launch_chained(kKernel, grid, L::kThreads, L::kSmemBytes, stream, l);
  return error == cudaSuccess ? launch_merge<T, kItemRows>(l, stream) : error;
}

template <class T>
cudaError_t launch_latent(const AttentionParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const bool can_pair = device->smem_per_block >= Layout<2>::kSmemBytes;
  constexpr float kLog2E = 1.4426950408889634f;
  const int group = params.num_heads / params.num_kv_heads, num_tiles = params.num_kv_heads;
  const int num_ranges = num_decode_ranges(params.device, num_tiles);
  const int items = decode_items_offset(num_ranges);
  const Latent decode{params, decode_partials(params), group, items, params.softmax_scale * kLog2E};
  const auto launch_decode = can_pair && num_tiles % 2 == 0 ? launch_items<T, kDecodeRows, 2>
                                                            : launch_items<T, kDecodeRows, 1>;
  const cudaError_t error = launch_decode(decode, int64_t{num_ranges} * num_tiles, stream);
  if (error != cudaSuccess || static_cast<int64_t>(params.max_query_len) * group <= kDecodeRows) {
    return error;
  }
  const Latent prefill{params, prefill_partials(params), group, items,
                       params.softmax_scale * kLog2E};
  const int64_t num_items = max_prefill_items(params.device, params.num_tokens, params.num_rows,
                                              params.num_heads, num_tiles);
  const auto launch_prefill =
      can_pair ? launch_items<T, kPrefillRows, 2> : launch_items<T, kPrefillRows, 1>;
  return launch_prefill(prefill, num_items * num_tiles * kSubTiles, stream);
}

}  // namespace pyserve::gpu::latent
