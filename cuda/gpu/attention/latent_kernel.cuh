// Attention over a paged cache of latents (latent_attention): items of 16 packed query rows, all of
// which read the same kept rows, of 512 + 64 elements, as keys and their first 512 as values.
//
// The heads are taken in tiles of at most 16, all alike, which stand for KV heads in the plan: the
// decode items of a tile are those of attention.h, one range of them to a CTA. A prefill item, 128
// packed rows, is the work of 8 CTAs, 16 rows each; that each reads the kept rows costs L2, which
// has them since the first.
// A CTA of 4 warps takes 32 kept rows at a time, copied (cp.async, 16 bytes, XOR-swizzled) into one
// of two stages while the other is used. Each warp scores 8 of them and puts its scores into shared
// memory; then each warp turns all scores into weights by itself, and adds up 128 of the 512
// columns. So the running maximum and sum are the same in all warps, and nothing is put together at
// an item's end. Products are mma.sync m16n8k16; scores of a row are summed in four chains, as one
// would wait for itself. What several items of a query tile have of its rows is merged by a kernel
// behind this one: latent_merge.cuh.
//
// Floor: bytes, sum(visible keys) * 1152 at the memory's rate, where the tiles' heads are read
// once; a second tile reads L2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/latent_merge.cuh"
#include "gpu/attention/latent_work.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/pdl.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/core/swizzle.cuh"

namespace pyserve::gpu::latent {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kWidth = kLatentSize + kLatentRopeDim;
constexpr int kKeys = 32;                  // of a tile; plans cut at multiples of it
constexpr int kWarpKeys = kKeys / kWarps;  // that a warp scores
constexpr int kWarpColumns = kLatentSize / kWarps;
constexpr int kRowBytes = kWidth * 2;
constexpr int kStageBytes = kKeys * kRowBytes;
constexpr int kQueriesAt = 2 * kStageBytes;
constexpr int kScoresAt = kQueriesAt + kDecodeRows * kRowBytes;
constexpr int kScoreStride = kKeys + 8;  // floats: rows of a half warp fall in different banks
constexpr int kSmemBytes = kScoresAt + kDecodeRows * kScoreStride * 4;
constexpr int kSubTiles = kPrefillRows / kDecodeRows;
static_assert(kRowBytes % 128 == 0 && kKvTile % kKeys == 0 && kWarpKeys == 8);

// Copies tile after tile of one item. Eight threads share a kept row; each has two of them.
template <class T>
class Loader {
  static constexpr int kThreadsPerRow = 8, kRowsAtOnce = kThreads / kThreadsPerRow;
  static constexpr int kParts = kKeys / kRowsAtOnce;
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

// Starts the copies of the rows' queries, as they lie, into swizzled rows; zeros where there are
// none. Eight threads share a row.
template <class T>
__device__ void copy_queries(const Latent& l, const Work& work, int tile, uint32_t queries) {
  static_assert(kThreads == kDecodeRows * 8);
  const int row = threadIdx.x / 8, first = threadIdx.x % 8;
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

// The scores of this warp's 8 kept rows -> its columns of `scores`.
template <class T>
__device__ __forceinline__ void score(uint32_t stage, uint32_t queries, float* scores) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int key = warp * kWarpKeys + lane % 8;
  const uint32_t keys_at = stage + key * kRowBytes + ((lane / 8) ^ (lane % 8)) * 16;
  const uint32_t queries_at = queries + lane % 16 * kRowBytes + ((lane / 16) ^ (lane % 8)) * 16;
  float sums[4][4] = {};
#pragma unroll
  for (int i = 0; i < kWidth / 32; ++i) {
    uint32_t a[4], b[4];
    ldmatrix_x4(b, at_chunk(keys_at, 4 * i));
    ldmatrix_x4(a, at_chunk(queries_at, 4 * i));
    mma_16816<T>(sums[i % 2 * 2], a, b[0], b[1]);
    ldmatrix_x4(a, at_chunk(queries_at, 4 * i + 2));
    mma_16816<T>(sums[i % 2 * 2 + 1], a, b[2], b[3]);
  }
  const int column = warp * kWarpKeys + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int j = 2 * half;
    float2 pair;
    pair.x = (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
    pair.y = (sums[0][j + 1] + sums[1][j + 1]) + (sums[2][j + 1] + sums[3][j + 1]);
    *reinterpret_cast<float2*>(scores + (lane / 4 + 8 * half) * kScoreStride + column) = pair;
  }
}

// Running state of the 16 rows, of this warp's columns. A lane has rows lane / 4 and + 8.
template <class T>
struct Rows {
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
                        uint32_t (&weights)[2][4]) {
    const int lane = threadIdx.x % kWarpSize, column = lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* row = scores + (lane / 4 + 8 * half) * kScoreStride + column;
      float s[4][2];
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
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
      for (int n = 0; n < 4; ++n) {
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
  __device__ void add(const uint32_t (&weights)[2][4], uint32_t stage) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const uint32_t values =
        stage + lane % 16 * kRowBytes + ((lane / 16) ^ (lane % 8)) * 16 + warp * kWarpColumns * 2;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
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
template <class T, int kItemRows>
__device__ void write_rows(const Latent& l, const Work& work, int tile, int sub_tile,
                           Rows<T>& rows) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
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
      for (int i = 0; i < Rows<T>::kTiles; ++i) {
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
      for (int i = 0; i < Rows<T>::kTiles; ++i) {
        *reinterpret_cast<uint32_t*>(out + 8 * i) =
            pack_pair<T>(rows.acc[i][2 * half] * scale, rows.acc[i][2 * half + 1] * scale);
      }
    }
  }
}

template <class T, int kItemRows>
__device__ void attend(const Latent& l, const int32_t* items, int index, int tile, int sub_tile,
                       unsigned char* smem) {
  const Work work(l, item_at(items, index), sub_tile);
  if (kItemRows == kDecodeRows && work.query_len * l.group > kDecodeRows) __trap();
  const uint32_t stages = smem_address(smem);
  auto* scores = reinterpret_cast<float*>(smem + kScoresAt);
  __syncthreads();  // what the item before has left is read
  Loader<T> loader(l, work);
  copy_queries<T>(l, work, tile, stages + kQueriesAt);
  loader.issue(stages);
  Rows<T> rows(l, work);
  uint32_t here = stages, there = stages + kStageBytes;
#pragma unroll 1
  for (int first = work.item.kv_begin; first < work.kv_end; first += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // the tile and the queries are there, the tile and the scores before are read
    loader.issue(there);
    score<T>(here, stages + kQueriesAt, scores);
    __syncthreads();
    uint32_t weights[2][4];
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
// are; each CTA takes one part.
template <class T, int kItemRows>
__global__ void __launch_bounds__(kThreads, 2)
    latent_attention_kernel(const __grid_constant__ Latent l) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  pdl_wait();
  pdl_launch_dependents();
  const int32_t* work = l.p.work;
  constexpr int kParts = kItemRows / kDecodeRows;
  const int part = blockIdx.x % kParts, rest = blockIdx.x / kParts;
  const int tile = rest % l.p.num_kv_heads;
  int first = rest / l.p.num_kv_heads, last = first + 1, items = 0;
  if constexpr (kItemRows == kDecodeRows) {
    const int range = first, num_ranges = gridDim.x / l.p.num_kv_heads;
    if (__ldcg(work + kWorkNumDecodeRanges) != num_ranges) __trap();  // not for this device
    first = __ldcg(work + kDecodeStartsOffset + range);
    last = __ldcg(work + kDecodeStartsOffset + range + 1);
    items = l.decode_items;
  } else {
    last = min(last, __ldcg(work + kWorkNumPrefillItems));
    items = __ldcg(work + kWorkPrefillItemsOffset);
  }
#pragma unroll 1
  for (int index = first; index < last; ++index) {
    attend<T, kItemRows>(l, work + items, index, tile, part, dynamic_smem);
  }
}

// Of the decode items (kItemRows is kDecodeRows) or of the prefill items of a plan.
template <class T, int kItemRows>
cudaError_t launch_items(const Latent& l, int64_t num_blocks, cudaStream_t stream) {
  constexpr auto kKernel = latent_attention_kernel<T, kItemRows>;
  cudaError_t error = allow_smem<kKernel, kSmemBytes>();
  if (error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(num_blocks);
  error = launch_chained(kKernel, grid, kThreads, kSmemBytes, stream, l);
  return error == cudaSuccess ? launch_merge<T, kItemRows>(l, stream) : error;
}

template <class T>
cudaError_t launch_latent(const AttentionParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  constexpr float kLog2E = 1.4426950408889634f;
  const int group = params.num_heads / params.num_kv_heads, num_tiles = params.num_kv_heads;
  const int num_ranges = num_decode_ranges(params.device, num_tiles);
  const int items = decode_items_offset(num_ranges);
  const Latent decode{params, decode_partials(params), group, items, params.softmax_scale * kLog2E};
  const cudaError_t error =
      launch_items<T, kDecodeRows>(decode, int64_t{num_ranges} * num_tiles, stream);
  if (error != cudaSuccess || static_cast<int64_t>(params.max_query_len) * group <= kDecodeRows) {
    return error;
  }
  const Latent prefill{params, prefill_partials(params), group, items,
                       params.softmax_scale * kLog2E};
  const int64_t num_items = max_prefill_items(params.device, params.num_tokens, params.num_rows,
                                              params.num_heads, num_tiles);
  return launch_items<T, kPrefillRows>(prefill, num_items * num_tiles * kSubTiles, stream);
}

}  // namespace pyserve::gpu::latent
