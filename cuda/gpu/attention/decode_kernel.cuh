// Decode attention over a paged KV cache, in bfloat16 or float16. q and out are [num_tokens,
// num_heads, head_dim], the caches [num_blocks, block_size, num_kv_heads, head_dim]. An item has at
// most 16 packed query rows (attention.h), all of which use every key that is read.
//
// Work: a CTA of 4 warps works through the items of one range of the plan, for one KV head. Each
// tile of 64 keys is divided among the warps: a warp copies, scores and sums its 16 keys by itself,
// with its own running maximum, so the loop over tiles has no block-wide barrier. The results of
// the four warps are combined at the end of an item. Copies (cp.async, 16 bytes, XOR-swizzled) run
// kStages tiles ahead, also from one item to the next. Keys and values are separate groups of
// copies, so values may still arrive while keys are scored. Scores and sums use mma.sync m16n8k16.
// The weights go from the accumulators of the first product to the operand of the second without
// leaving registers (Dao 2023, FlashAttention-2). Keys that no query of the row sees are never
// read; zeros stand in for them, and scores are masked in tiles that have any. With head_dim 256 a
// warp's registers cannot hold both the queries and the sums of 16 rows, so the queries lie in
// shared memory in the order of their fragments. There is a single stage of 64 KB; new keys are
// copied as soon as the old ones have been scored, and new values as soon as the old ones have been
// added.
//
// Bound by bytes: sum(visible keys) * num_kv_heads * 2 * head_dim * 2 at the rate of memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/decode_loader.cuh"
#include "gpu/attention/decode_queries.cuh"
#include "gpu/attention/merge.cuh"
#include "gpu/attention/new_key.cuh"
#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu::decode {

// Of a warp; so much is combined with the other warps' at a time.
constexpr int kMergeFloats = 16 * 64;

// The shared memory behind the stages.
struct MergeArea {
  union {
    float acc[kWarps][kMergeFloats];  // columns swizzled
    SharedQueries queries;            // for head_dim 256, until the sums are combined
  };
  float2 stats[kWarps][kDecodeRows];  // largest score, sum of weights
  int32_t flag;
};

// The state of 16 packed rows over the keys of one warp. A lane has rows lane / 4 and lane / 4 + 8.
template <class T, int kHeadDim>
struct Rows {
  static constexpr int kTiles = kHeadDim / 8;
  Queries<T, kHeadDim> queries;
  float acc[kTiles][4];
  float largest[2];  // in log2 units
  float sum[2];      // over this lane's columns
  int position[2];   // position of the row's query

  // Begins an item whose queries are being loaded.
  __device__ void begin(const Decode& d, const Work& work) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = threadIdx.x % kWarpSize / 4 + 8 * half;
      position[half] = work.seq_len - work.query_len + row / d.group;
      largest[half] = -INFINITY;
      sum[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
    }
  }

  __device__ void mask(float (&s)[2][4], int first_key, int window) const {
    const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int distance = position[j / 2] - (column + 8 * n + j % 2);
        if (distance < 0 || (window > 0 && distance >= window)) s[n][j] = -INFINITY;
      }
    }
  }

  // Online softmax: turns the scores s into weights, as the left operand of the second product, and
  // rescales the sums so far.
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
      float p[2][2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        p[n][0] = exp2_approx(fmaf(s[n][j], scale_log2, -shift));
        p[n][1] = exp2_approx(fmaf(s[n][j + 1], scale_log2, -shift));
        weights[half + 2 * n] = pack_pair<T>(p[n][0], p[n][1]);
      }
      sum[half] = sum[half] * factor + ((p[0][0] + p[0][1]) + (p[1][0] + p[1][1]));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        acc[i][j] *= factor;
        acc[i][j + 1] *= factor;
      }
    }
  }

  // acc += weights times the 16 values at address `values`.
  __device__ void add(const uint32_t (&weights)[4], uint32_t values) {
    constexpr int kRowBytes = kSmemRowBytes<T, kHeadDim>;
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t address = values + lane % 16 * kRowBytes + ((lane / 16) ^ (lane % 8)) * 16;
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, at_chunk(address, i));
      mma_16816<T>(acc[i], weights, b[0], b[1]);
      mma_16816<T>(acc[i + 1], weights, b[2], b[3]);
    }
  }
};

template <class T>
__device__ T* out_row(const Decode& d, const Work& work, int kv_head, int row) {
  return static_cast<T*>(d.p.out) + (work.first_query + row / d.group) * d.p.out_token_stride +
         (kv_head * d.group + row % d.group) * d.p.out_head_stride;
}

// The factors by which the warps' sums of a row enter their total, and the row's largest score and
// sum of weights.
struct Shares {
  float factor[kWarps], largest, sum;

  __device__ Shares(const MergeArea& area, int row) : largest(-INFINITY), sum(0.0f) {
#pragma unroll
    for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, area.stats[i][row].x);
    const float shift = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      factor[i] = exp2_approx(area.stats[i][row].x - shift);
      sum += factor[i] * area.stats[i][row].y;
    }
  }

  __device__ void normalise() {
    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) factor[i] *= scale;
  }
};

// Combines the results of the four warps and writes them to `out` or as partial results, kRows rows
// of kColumns columns at a time.
template <int kRows, int kColumns, class T, int kHeadDim>
__device__ void put_together(const Decode& d, const Work& work, int kv_head,
                             const Rows<T, kHeadDim>& rows, MergeArea& area) {
  static_assert(kRows * kColumns <= kMergeFloats && kHeadDim % kColumns == 0);
  constexpr int kUnits = kColumns / 4;  // units of 4 columns per row
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bool is_split = work.item.num_splits > 1;
  const int num_rows = work.query_len * d.group;
  const int64_t partial_rows =
      (static_cast<int64_t>(work.item.partial) * d.p.num_kv_heads + kv_head) * kDecodeRows;
#pragma unroll
  for (int begin = 0; begin < kHeadDim; begin += kColumns) {
    // Columns are XORed with 8 (row % 4), so that the stores of half a warp fall into different
    // banks.
#pragma unroll
    for (int half = 0; half < kRows / 8; ++half) {
      float* row = area.acc[warp] + (lane / 4 + 8 * half) * kColumns;
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        const float(&value)[4] = rows.acc[begin / 8 + i];
        const int column = (i * 8 + lane % 4 * 2) ^ (lane / 4 % 4 * 8);
        *reinterpret_cast<float2*>(row + column) = make_float2(value[2 * half], value[2 * half + 1]);
      }
    }
    __syncthreads();
    for (int unit = threadIdx.x; unit < num_rows * kUnits; unit += kThreads) {
      const int row = unit / kUnits, column = unit % kUnits * 4;
      Shares shares(area, row);
      if (!is_split) shares.normalise();
      float total[4] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float4 value = *reinterpret_cast<const float4*>(
            area.acc[w] + row * kColumns + (column ^ (row % 4 * 8)));
        total[0] += shares.factor[w] * value.x;
        total[1] += shares.factor[w] * value.y;
        total[2] += shares.factor[w] * value.z;
        total[3] += shares.factor[w] * value.w;
      }
      if (is_split) {
        const int64_t partial_row = partial_rows + row;
        *reinterpret_cast<float4*>(d.partials.acc + partial_row * kHeadDim + begin + column) =
            make_float4(total[0], total[1], total[2], total[3]);
        if (begin + column == 0) {
          *reinterpret_cast<float2*>(d.partials.stats + partial_row * 2) =
              make_float2(shares.largest, shares.sum);
        }
      } else if (work.slot >= 0) {
        *reinterpret_cast<uint2*>(out_row<T>(d, work, kv_head, row) + begin + column) =
            make_uint2(pack_pair<T>(total[0], total[1]), pack_pair<T>(total[2], total[3]));
      }
    }
    __syncthreads();
  }
}

// The end of an item. Most items are one query with few heads, for which a single round of
// put_together suffices.
template <class T, int kHeadDim>
__device__ void finish(const Decode& d, const Work& work, int kv_head, Rows<T, kHeadDim>& rows,
                       MergeArea& area) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(kFullMask, sum, 1);
    sum += __shfl_xor_sync(kFullMask, sum, 2);
    if (lane % 4 == 0) {
      area.stats[warp][lane / 4 + 8 * half] = make_float2(rows.largest[half], sum);
    }
  }
  const int num_rows = work.query_len * d.group;
  // After this no warp reads the queries any more.
  if constexpr (Queries<T, kHeadDim>::kAreShared) __syncthreads();
  if (num_rows <= 8) {
    put_together<8, kHeadDim < 128 ? kHeadDim : 128>(d, work, kv_head, rows, area);
  } else {
    put_together<16, kHeadDim % 64 == 0 ? 64 : 32>(d, work, kv_head, rows, area);
  }
  if (work.item.num_splits == 1) return;
  const int first = work.item.partial - work.item.split;
  int32_t* arrivals =
      d.partials.arrivals + static_cast<int64_t>(first) * d.p.num_kv_heads + kv_head;
  if (!arrives_last(arrivals, work.item.num_splits, &area.flag) || work.slot < 0) return;
  for (int r = warp; r < num_rows; r += kWarps) {
    merge_row<T, kHeadDim, kDecodeRows>(d.partials, first, work.item.num_splits, kv_head,
                                        d.p.num_kv_heads, r, out_row<T>(d, work, kv_head, r));
  }
}

// Grid: (num_kv_heads, ranges), so that the CTAs which read one stretch of memory start together.
// With rope this kernel also does the work of rope_write_kv. The kernel in front of it is then a
// linear, and this one reads the plan, the block table and the keys of earlier steps while that one
// still runs.
template <class T, int kHeadDim, int kStages, Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ Decode d) {
  using L = Layout<T, kHeadDim, kStages>;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  const int warp = threadIdx.x / kWarpSize, kv_head = blockIdx.x, range = blockIdx.y;
  MergeArea& area = *reinterpret_cast<MergeArea*>(dynamic_smem + L::kCacheBytes);
  const uint32_t cache = smem_address(dynamic_smem) + warp * L::kWarpBytes;
  // With one stage, its two halves (keys and values) are refilled separately, each as soon as it
  // has been read.
  constexpr bool kHasHalves = kStages == 1;

  if (!has_rope<kKind>(d)) pdl_wait();
  const int first_item = __ldcg(d.p.work + kDecodeStartsOffset + range);
  const int last_item = __ldcg(d.p.work + kDecodeStartsOffset + range + 1);
  if (__ldcg(d.p.work + kWorkNumDecodeRanges) != static_cast<int>(gridDim.y)) {
    __trap();  // the plan was made for another device
  }
  if (first_item == last_item) {
    // An idle block frees its place at once, without waiting; with rope, only the blocks of range 0
    // wait. That some block of the grid waits is enough to keep the order of the kernels (rule 1 of
    // pdl.cuh).
    if (has_rope<kKind>(d) && range == 0) pdl_wait();
    return;
  }

  ItemsOf<kHeadDim> items(d, first_item, last_item);
  Loader<T, kHeadDim, kStages, kKind> loader(d, kv_head, items);
  uint32_t stage = cache;  // the stage to read next
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) loader.issue(cache + i * L::kStageBytes);
  if (has_rope<kKind>(d)) pdl_wait();
  pdl_launch_dependents();
  Rows<T, kHeadDim> rows;
  NewKey<T, kHeadDim, kKind> new_key(d, kv_head);
  // Loads what an item begins with. kAsksInTime: this is done before the item in front issues its
  // last copies, because loads return in order. With head_dim 256 there are no free registers at
  // that point.
  constexpr bool kAsksInTime = !Queries<T, kHeadDim>::kAreShared;
  const auto ask = [&](const Work& work) {
    if (has_rope<kKind>(d)) {
      if (work.seq_len > d.rope.max_position) __trap();
      const int key = first_new_key(work, 0);
      if (key >= 0) new_key.load(work, key);
    }
    rows.queries.load(d, work, kv_head);
  };
  Work next = items.take();
  ask(next);
#pragma unroll 1
  for (bool is_last = false; !is_last;) {
    const Work work = next;
    is_last = !items.are_left();
    rows.begin(d, work);
    if (has_rope<kKind>(d)) rows.queries.turn(d, rows.position);
    if constexpr (Queries<T, kHeadDim>::kAreShared) rows.queries.share(area.queries);
    // Keys in [unmasked_begin, unmasked_end) are seen by all queries of the row and need no mask.
    const int unmasked_begin = d.p.window > 0 ? max(0, work.seq_len - d.p.window) : 0;
    const int unmasked_end = work.seq_len - work.query_len + 1;
#pragma unroll 1
    for (int tile = work.item.kv_begin; tile < work.item.kv_end; tile += kKvTile) {
      cp_async_wait<2 * kStages - 1>();
      __syncwarp();
      const int first_key = tile + warp * kWarpKeys;
      if (has_rope<kKind>(d)) {
        if (new_key.position() >= first_key && new_key.position() < first_key + kWarpKeys) {
          cp_async_wait<2 * kStages - 2>();
          __syncwarp();  // the copies have put zeros where the new key goes
          while (true) {
            new_key.store(dynamic_smem + (stage - smem_address(dynamic_smem)),
                          new_key.position() - first_key, L::kPartBytes);
            const int next = first_new_key(work, new_key.position() + 1);
            if (next < 0) {
              new_key.forget();
              break;
            }
            new_key.load(work, next);
            if (next >= first_key + kWarpKeys) break;
          }
          __syncwarp();
        }
      }
      float s[2][4];
      rows.queries.score(s, stage, area.queries);
      if (kAsksInTime && !is_last && tile + kKvTile >= work.item.kv_end) {
        next = items.take();
        ask(next);
      }
      if constexpr (kHasHalves) {
        __syncwarp();  // all lanes have read the keys
        loader.issue_keys(stage);
      }
      if (kKind == Kind::kGeneral && d.scale.cap_rate != 0.0f) cap_scores(s, d.scale.cap_rate);
      if (first_key < unmasked_begin || first_key + kWarpKeys > unmasked_end) {
        rows.mask(s, first_key, d.p.window);
      }
      uint32_t weights[4];
      rows.weigh(s, d.scale.log2, weights);

      // Waits for all copies but the newest: those are the next keys (one stage), or the stages
      // behind this one.
      cp_async_wait<kHasHalves ? 1 : 2 * kStages - 2>();
      __syncwarp();
      rows.add(weights, stage + L::kPartBytes);
      __syncwarp();  // all lanes have read the stage, and the next copies may overwrite it
      if constexpr (kHasHalves) {
        loader.issue_values(stage);
      } else {
        loader.issue(stage);
        stage = stage + L::kStageBytes == cache + L::kWarpBytes ? cache : stage + L::kStageBytes;
      }
    }
    finish<T, kHeadDim>(d, work, kv_head, rows, area);
    if (!kAsksInTime && !is_last) {
      next = items.take();
      ask(next);
    }
  }
}

template <class T, int kHeadDim, Kind kKind>
cudaError_t launch_kind(const Decode& d, dim3 grid, cudaStream_t stream) {
  // On an H200 two CTAs with 64 KB each are up to 10 % faster than two with 96 KB, and they fit
  // every device.
  constexpr int kDecodeCacheBytes = 64 * 1024;
  constexpr int kStages = kDecodeCacheBytes / (2 * kKvTile * kSmemRowBytes<T, kHeadDim>);
  constexpr auto kKernel = decode_kernel<T, kHeadDim, kStages, kKind>;
  constexpr int kSmemBytes =
      Layout<T, kHeadDim, kStages>::kCacheBytes + static_cast<int>(sizeof(MergeArea));
  const cudaError_t error = allow_smem<kKernel, kSmemBytes>();
  if (error != cudaSuccess) return error;
  return launch_chained(kKernel, grid, kThreads, kSmemBytes, stream, d);
}

// For head_dim 96 and 256, and for capped scores: decode_general.cu.
cudaError_t launch_general(const Decode& d, Dtype dtype, dim3 grid, cudaStream_t stream);

}  // namespace pyserve::gpu::decode
