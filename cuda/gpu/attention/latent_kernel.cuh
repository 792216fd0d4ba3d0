// Attention over a paged cache of latents (latent_attention): items of 16 packed query rows, all of
// which read the same kept rows, of 512 + 64 elements, as keys and their first 512 as values.
//
// The heads are taken in tiles of at most 16, all alike, which stand for KV heads in the plan: the
// decode items of a tile are those of attention.h, one range of them to a CTA. A prefill item, 128
// packed rows, is the work of 8 groups of 4 warps, 16 rows each.
// A CTA has one group and takes 32 kept rows at a time, two CTAs an SM; or it has two groups, which
// read the same kept rows, 64 at a time, for a tile of heads or a part of a prefill item each: so
// the rows cross L2 and shared memory's port once for both, and a warp that scores 16 rather than 8
// kept rows reads the queries half as often. Kept rows are copied (cp.async, 16 bytes,
// XOR-swizzled) into one of two stages while the other is used.
// Each warp of a group scores a quarter of them and puts its scores into shared memory; then each
// warp turns all scores into weights by itself, and adds up 128 of the 512 columns. So the running
// maximum and sum are the same in all warps, and nothing is put together at an item's end. Products
// are mma.sync m16n8k16; scores of a row are summed in four chains, as one would wait for itself.
// What several items of a query tile have of its rows is merged by a kernel behind this one:
// latent_merge.cuh.
//
// Floor: bytes, sum(visible keys) * 1152 at the memory's rate, for up to two tiles of heads; others
// read L2.
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

constexpr int kWarps = 4, kGroupThreads = kWarps * kWarpSize;  // of a group
constexpr int kWidth = kLatentSize + kLatentRopeDim;
constexpr int kWarpColumns = kLatentSize / kWarps;
constexpr int kRowBytes = kWidth * 2;
constexpr int kQueryBytes = kDecodeRows * kRowBytes;  // of a group
constexpr int kSubTiles = kPrefillRows / kDecodeRows;

// What a CTA of kGroups groups has in shared memory: two stages, queries, scores.
template <int kGroups>
struct Layout {
  static constexpr int kThreads = kGroups * kGroupThreads;
  static constexpr int kKeys = 32 * kGroups;        // of a tile; plans cut at multiples of it
  static constexpr int kWarpKeys = kKeys / kWarps;  // that a warp scores
  static constexpr int kStageBytes = kKeys * kRowBytes;
  static constexpr int kScoreStride = kKeys + 8;  // floats: rows of a half warp: different banks
  static constexpr int kScoreBytes = kDecodeRows * kScoreStride * 4;  // of a group
  static constexpr int kQueriesAt = 2 * kStageBytes;
  static constexpr int kScoresAt = kQueriesAt + kGroups * kQueryBytes;
  static constexpr int kSmemBytes = kScoresAt + kGroups * kScoreBytes;
  static constexpr int kCtasPerSm = 2 / kGroups;
  static_assert(kRowBytes % 128 == 0 && kKvTile % kKeys == 0 && kWarpKeys % 8 == 0);
};

__device__ __forceinline__ int group_of_thread() { return threadIdx.x / kGroupThreads; }
__device__ __forceinline__ int warp_of_group() { return threadIdx.x / kWarpSize % kWarps; }

// Copies tile after tile of one item. Eight threads share a kept row; each has two of them.
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

  // Starts the copies of the next tile, as a group; an empty one when all is copied.
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
  // Reads ahead: the blocks of the next tile's rows. They stay as they are read until they are
  // used: what is made of them here would wait for them here.
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

// Starts the copies of the group's queries, as they lie, into swizzled rows; zeros where there are
// none. Eight threads share a row.
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

// The scores of this warp's kept rows, 8 or 16 -> its columns of `scores`.
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

// Running state of the group's rows, of this warp's columns. A lane has rows lane / 4 and + 8.
template <class T, int kGroups>
struct Rows {
  using L = Layout<kGroups>;
  static constexpr int kSteps = L::kKeys / 16;  // of the second product
  static constexpr int kTiles = kWarpColumns / 8;
  float acc[kTiles][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};  // in log2 units
  float sum[2] = {};                          // of this lane's keys
  int position[2];                            // of the row's query

  __device__ Rows(const Latent& l, const Work& work) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = threadIdx.x % kWarpSize / 4 + 8 * half;
      position[half] = work.position + (work.first_row + row) / l.group;
    }
  }

  // Online softmax over a tile from key `first` on: its weights, as left operands of the second
  // product for 16 keys each, and the sums so far rescaled.
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

  // acc += weights * this warp's columns of the tile.
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

// Writes the rows' results: to `out`, or as partial ones.
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

// An item: in decode each group has it for its own tile of heads, in prefill its own part from
// first_sub_tile on.
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
  __syncthreads();  // what the item before has left is read
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
    __syncthreads();  // the tile and the queries are there, the tile and the scores before are read
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

// Grid of decode: tiles of heads, ranges of the plan behind each other; each CTA takes the items of
// its range. Of prefill: parts of an item, tiles of heads, items behind each other, more than there
// are; each CTA takes one part. The groups of a CTA have tiles, or parts, next to each other.
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
    if (__ldcg(work + kWorkNumDecodeRanges) != num_ranges) __trap();  // not for this device
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

// Of the decode items (kItemRows is kDecodeRows) or of the prefill items of a plan.
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
