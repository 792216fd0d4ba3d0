// Attention over a paged cache of latents (latent_attention): items of 16 packed query rows, all of
// which read the same kept rows, of 512 + 64 elements, as keys and their first 512 as values.
//
// The heads are taken in tiles of at most 16, all alike, which stand for KV heads in the plan: the
// decode items of a tile are those of attention.h, one range of them to a CTA. A prefill item, 128
// packed rows, is the work of 8 CTAs, 16 rows each; that each reads the kept rows costs L2, which
// has them since the first.
// Each of a CTA's 4 warps owns 128 of the 512 columns and 16 of the 64, in both products: it copies
// them for 16 kept rows at a time (latent_loader.cuh), keeps its columns of the queries in
// registers, and so waits for no other warp's copies. Only its part of the scores, a sum over its
// columns, goes to the others by shared memory; each warp adds up all four and turns them into
// weights by itself, in an order that gives all warps the same. So a tile has one block-wide
// barrier, and nothing is put together at an item's end. Products are mma.sync m16n8k16; scores are
// summed in four chains, as one would wait for itself. Rows of several items of one tile are merged
// by CTAs that are last: latent_merge.cuh.
//
// Floor: bytes, sum(visible keys) * 1152 at the memory's rate, where the tiles' heads are read
// once; a second tile reads L2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/latent_loader.cuh"
#include "gpu/attention/latent_merge.cuh"
#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/pdl.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/core/swizzle.cuh"

namespace pyserve::gpu::latent {

constexpr int kSteps = (kWarpColumns + kWarpRope) / 16;
constexpr int kScoresAt = kWarps * kWarpBytes;
// By tile in turn, warp, 8 keys, lane.
using SharedScores = float4[2][kWarps][kKeys / 8][kWarpSize];
constexpr int kFlagAt = kScoresAt + static_cast<int>(sizeof(SharedScores));
constexpr int kSmemBytes = kFlagAt + 16;
static_assert(sizeof(MergeArea) <= sizeof(SharedScores));  // which it takes the place of
constexpr int kSubTiles = kPrefillRows / kDecodeRows;
static_assert(kStages % 2 == 0);  // scores alternate with stages

// This warp's columns of the 16 rows' queries, as the left operand of the first product.
template <class T>
struct Queries {
  uint32_t q[kSteps][4];

  __device__ void load(const Latent& l, const Work& work, int tile) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      const bool is_row = row < work.num_rows && work.slot >= 0;
      const int64_t offset = is_row ? work.token_of(l, row) * l.p.q_token_stride +
                                          work.head_of(l, tile, row) * l.p.q_head_stride
                                    : 0;
      const T* source = static_cast<const T*>(l.p.q) + offset + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const bool is_rope = i == kSteps - 1;
        const auto* pairs = reinterpret_cast<const uint32_t*>(
            source + (is_rope ? kLatentSize + warp * kWarpRope : warp * kWarpColumns + 16 * i));
        q[i][half] = is_row ? pairs[0] : 0;
        q[i][half + 2] = is_row ? pairs[4] : 0;
      }
    }
  }

  // s: what this warp's columns add to the scores of the tile's kept rows, 8 and 8 of them.
  __device__ __forceinline__ void score(float (&s)[2][4], uint32_t stage) const {
    const int lane = threadIdx.x % kWarpSize, key = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
    const uint32_t row = stage + key * kRowBytes + (chunk ^ (key % 8)) * 16;
    const uint32_t rope =
        stage + kRopeAt + key * kRopeRowBytes + (chunk ^ (key / 4 % 2)) * 16;
    float odd[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t b[4];
      ldmatrix_x4(b, i == kSteps - 1 ? rope : at_chunk(row, 2 * i));
      float(&sums)[2][4] = i % 2 == 0 ? s : odd;
      mma_16816<T>(sums[0], q[i], b[0], b[1]);
      mma_16816<T>(sums[1], q[i], b[2], b[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] += odd[n][j];
    }
  }
};

// The scores, from each warp's part s of them: s. `parts` are those of one tile; the barrier is the
// block's. Every warp adds its own and its neighbour's to the sum of the other two, which is the
// same sum in all of them.
__device__ __forceinline__ void add_up(float (&s)[2][4],
                                       float4 (&parts)[kWarps][kKeys / 8][kWarpSize]) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int n = 0; n < 2; ++n) parts[warp][n][lane] = {s[n][0], s[n][1], s[n][2], s[n][3]};
  __syncthreads();
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float4 a = parts[warp ^ 1][n][lane], b = parts[warp ^ 2][n][lane],
                 c = parts[warp ^ 3][n][lane];
    s[n][0] = (s[n][0] + a.x) + (b.x + c.x);
    s[n][1] = (s[n][1] + a.y) + (b.y + c.y);
    s[n][2] = (s[n][2] + a.z) + (b.z + c.z);
    s[n][3] = (s[n][3] + a.w) + (b.w + c.w);
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

  __device__ void mask(float (&s)[2][4], int first_key) const {
    const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column + 8 * n + j % 2 > position[j / 2]) s[n][j] = -INFINITY;
      }
    }
  }

  // Online softmax: makes the weights of s, as the left operand of the second product, and rescales
  // the sums so far.
  __device__ void weigh(const float (&s)[2][4], float scale_log2, uint32_t (&weights)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = 2 * half;
      float highest = fmaxf(fmaxf(s[0][j], s[0][j + 1]), fmaxf(s[1][j], s[1][j + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 2));
      const float before = largest[half];
      largest[half] = fmaxf(before, highest * scale_log2);
      const float shift = largest[half] == -INFINITY ? 0.0f : largest[half];
      const float factor = exp2_approx(before - shift);
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float low = exp2_approx(fmaf(s[n][j], scale_log2, -shift));
        const float high = exp2_approx(fmaf(s[n][j + 1], scale_log2, -shift));
        weights[half + 2 * n] = pack_pair<T>(low, high);
        total += low + high;
      }
      sum[half] = sum[half] * factor + total;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        acc[i][j] *= factor;
        acc[i][j + 1] *= factor;
      }
    }
  }

  // acc += weights * this warp's columns of the tile.
  __device__ void add(const uint32_t (&weights)[4], uint32_t stage) {
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t values = stage + lane % 16 * kRowBytes + ((lane / 16) ^ (lane % 8)) * 16;
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, at_chunk(values, i));
      mma_16816<T>(acc[i], weights, b[0], b[1]);
      mma_16816<T>(acc[i + 1], weights, b[2], b[3]);
    }
  }
};

template <class T>
__device__ T* out_row(const Latent& l, const Work& work, int tile, int row) {
  return static_cast<T*>(l.p.out) + work.token_of(l, row) * l.p.out_token_stride +
         work.head_of(l, tile, row) * l.p.out_head_stride;
}

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

// Where an item is one of several of its query tile: the last of the CTAs of its group of splits,
// or of all, puts theirs together, and where there are groups the last of those all groups. Rows of
// the tile are those of `whole`, of which this CTA has had a part.
template <class T, int kItemRows>
__device__ void merge(const Latent& l, const Work& work, const Work& whole, int tile,
                      MergeArea& area, int32_t* flag) {
  constexpr int kParts = kItemRows / kDecodeRows;
  const int num_splits = work.item.num_splits, first = work.item.partial - work.item.split;
  const int size = splits_of_group(num_splits), begin = work.item.split / size * size;
  const bool has_groups = size < num_splits;
  // Split 0's counter is of all; a group's is that of its first split, or of the one behind it.
  const auto arrives = [&](int split, int count) {
    int32_t* arrivals =
        l.partials.arrivals + static_cast<int64_t>(first + split) * l.p.num_kv_heads + tile;
    return arrives_last(arrivals, count, flag);
  };
  Parts parts{first + begin, 1, min(size, num_splits - begin)};
  const int counter = has_groups && begin == 0 ? 1 : begin;
  if (!arrives(counter, parts.count * kParts)) return;
#pragma unroll 1
  for (bool is_all = !has_groups;; is_all = true) {
    const int64_t target = static_cast<int64_t>(parts.first) * l.p.num_kv_heads + tile;
    put_together<kItemRows>(
        l.partials, parts, tile, l.p.num_kv_heads, whole.num_rows, area,
        [&](int row, float2 stats, const float(&total)[4]) {
          const int column = threadIdx.x * 4;
          if (!is_all) {  // in the place of the group's first
            const int64_t at = target * kItemRows + row;
            float4 sums = {total[0], total[1], total[2], total[3]};
            *reinterpret_cast<float4*>(l.partials.acc + at * kLatentSize + column) = sums;
            if (column == 0) *reinterpret_cast<float2*>(l.partials.stats + at * 2) = stats;
          } else if (work.slot >= 0) {
            const float scale = stats.y == 0.0f ? 0.0f : 1.0f / stats.y;
            *reinterpret_cast<uint2*>(out_row<T>(l, whole, tile, row) + column) =
                make_uint2(pack_pair<T>(total[0] * scale, total[1] * scale),
                           pack_pair<T>(total[2] * scale, total[3] * scale));
          }
        });
    if (is_all) return;
    parts = {first, size, (num_splits - 1) / size + 1};
    if (!arrives(0, parts.count)) return;
  }
}

// The items of a CTA, one after the other.
template <class T, int kItemRows>
__device__ void attend(const Latent& l, const Items& items, int tile, unsigned char* smem) {
  const uint32_t ring = smem_address(smem) + threadIdx.x / kWarpSize * kWarpBytes;
  auto& scores = *reinterpret_cast<SharedScores*>(smem + kScoresAt);
  Loader<T> loader(l, items);
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) loader.issue(ring + i * kStageBytes);
  int stage = 0;
#pragma unroll 1
  for (int index = items.first; index < items.last; ++index) {
    const Work work = items.at(l, index);
    if (kItemRows == kDecodeRows && work.query_len * l.group > kDecodeRows) __trap();
    Queries<T> queries;
    queries.load(l, work, tile);
    Rows<T> rows(l, work);
    const int unmasked_end = work.position + work.first_row / l.group + 1;
#pragma unroll 1
    for (int first = work.item.kv_begin; first < work.kv_end; first += kKeys) {
      // Into the stage before this one, which is read.
      loader.issue(ring + (stage + kStages - 1) % kStages * kStageBytes);
      const uint32_t here = ring + stage * kStageBytes;
      cp_async_wait<kStages - 1>();
      __syncwarp();
      float s[2][4];
      queries.score(s, here);
      add_up(s, scores[stage % 2]);  // nobody reads those of two tiles ago since the last barrier
      if (first + kKeys > unmasked_end) rows.mask(s, first);
      uint32_t weights[4];
      rows.weigh(s, l.scale_log2, weights);
      rows.add(weights, here);
      __syncwarp();  // the stage is read
      stage = (stage + 1) % kStages;
    }
    write_rows<T, kItemRows>(l, work, tile, items.sub_tile, rows);
    if (work.item.num_splits == 1) continue;
    Work whole = work;
    whole.first_row -= items.sub_tile * kDecodeRows;
    whole.num_rows = min(kItemRows, work.query_len * l.group - whole.first_row);
    merge<T, kItemRows>(l, work, whole, tile, *reinterpret_cast<MergeArea*>(smem + kScoresAt),
                        reinterpret_cast<int32_t*>(smem + kFlagAt));
  }
  cp_async_wait<0>();
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
  attend<T, kItemRows>(l, {work + items, first, last, part}, tile, dynamic_smem);
}

// Of the decode items (kItemRows is kDecodeRows) or of the prefill items of a plan.
template <class T, int kItemRows>
cudaError_t launch_items(const Latent& l, int64_t num_blocks, cudaStream_t stream) {
  constexpr auto kKernel = latent_attention_kernel<T, kItemRows>;
  const cudaError_t error = allow_smem<kKernel, kSmemBytes>();
  if (error != cudaSuccess) return error;
  return launch_chained(kKernel, static_cast<unsigned>(num_blocks), kThreads, kSmemBytes, stream,
                        l);
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
