// What the two prefill kernels (prefill_kernel.cuh, prefill_sm90a.cu) share: where the rows and
// keys of an item lie, and how the partial results of a query tile are merged.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu::prefill {

// Finite, so that a row that has seen no key needs no special case.
constexpr float kNoMax = -1e30f;
// In log2 units; weights stay below 2^8, far inside the range of float16.
constexpr float kMaxLag = 8.0f;

// What a block works on; the same in all of its threads.
struct Geometry {
  int32_t kv_head, group;
  int32_t slot;
  int32_t query_begin;   // token index of the row's first query
  int32_t context;       // position of that query
  int32_t first_packed;  // the tile's first packed row, counted in the row
  int32_t num_packed;    // packed rows of the tile
  int32_t first_key;     // the lowest key that any query of the tile sees

  // Whether the row is padding, which leaves nothing to do; it is so for all items of the tile.
  __device__ __forceinline__ bool is_empty() const { return slot < 0 || num_packed <= 0; }
};

// For part `part` of an item, where a part has kRows of its packed rows. With kIsChecked it traps
// if the row's slot or lengths are out of range.
template <bool kIsChecked = true, int kRows = kPrefillRows>
__device__ __forceinline__ Geometry make_geometry(const AttentionParams& p,
                                                  const AttentionItem& item, int kv_head,
                                                  int part = 0) {
  Geometry g;
  g.kv_head = kv_head;
  g.group = p.num_heads / p.num_kv_heads;
  g.slot = p.row_slots[item.row];
  g.query_begin = p.cu_seqlens_q[item.row];
  const int query_len = p.cu_seqlens_q[item.row + 1] - g.query_begin;
  const int seq_len = p.seq_lens[item.row];
  g.context = seq_len - query_len;
  const bool in_range = g.slot < p.num_slots && g.context >= 0 && g.query_begin >= 0 &&
                        g.query_begin + query_len <= p.num_tokens &&
                        seq_len <= static_cast<int64_t>(p.max_blocks_per_seq) << p.block_size_log2;
  if (kIsChecked && g.slot >= 0 && !in_range) __trap();
  g.first_packed = item.query_tile * kPrefillRows + part * kRows;
  g.num_packed = min(kRows, query_len * g.group - g.first_packed);
  const int first_position = g.context + g.first_packed / g.group;
  g.first_key = p.window > 0 ? max(item.kv_begin, first_position - p.window + 1) : item.kv_begin;
  return g;
}

__device__ __forceinline__ AttentionItem load_item(const AttentionParams& p, int index) {
  return reinterpret_cast<const AttentionItem*>(p.work + p.work[kWorkPrefillItemsOffset])[index];
}

// Where packed row `row` of the tile lies in q; output_row says the same for out.
template <class T>
__device__ __forceinline__ const T* query_row(const AttentionParams& p, const Geometry& g,
                                              int row) {
  const int packed = g.first_packed + row;
  const int64_t token = g.query_begin + packed / g.group;
  const int64_t head = g.kv_head * g.group + packed % g.group;
  return static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
}

template <class T>
__device__ __forceinline__ T* output_row(const AttentionParams& p, const Geometry& g, int row) {
  const int packed = g.first_packed + row;
  const int64_t token = g.query_begin + packed / g.group;
  const int64_t head = g.kv_head * g.group + packed % g.group;
  return static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
}

// The offsets, in elements, of packed rows first_row, first_row + num_step, ... of a tile in q or
// out. They are stepped through without a division per row, which would take longer than copying
// the row.
struct RowWalk {
  int64_t offset, step, wrap;
  int32_t head, head_step, group;

  __device__ __forceinline__ RowWalk(const Geometry& g, int first_row, int num_step,
                                     int64_t token_stride, int64_t head_stride)
      : group(g.group) {
    const int packed = g.first_packed + first_row;
    head = packed % group;
    head_step = num_step % group;
    offset = (g.query_begin + packed / group) * token_stride +
             static_cast<int64_t>(g.kv_head * group + head) * head_stride;
    step = num_step / group * token_stride + head_step * head_stride;
    wrap = token_stride - group * head_stride;
  }

  __device__ __forceinline__ void advance() {
    offset += step;
    head += head_step;
    if (head >= group) {
      head -= group;
      offset += wrap;
    }
  }
};

// Does what merge_row of merge.cuh does, for rows first_row .. end_row - 1 of a tile together, by
// kThreads threads, at least as many as there are rows. If the rows were merged one by one, the
// loads of each would wait for those of the row before. Split 0 lies from row first_partial on in
// the partial buffers. `scales` is shared memory for one pair per row, and `sync` is the barrier of
// these threads.
template <class T, int kHeadDim, int kThreads, class Sync>
__device__ __forceinline__ void merge_rows(const AttentionParams& p, const Geometry& g,
                                           const AttentionPartials& partials, int64_t first_partial,
                                           int num_splits, int first_row, int end_row, int thread,
                                           float2* scales, Sync&& sync) {
  constexpr int kRowsAtOnce = 4, kLanes = kHeadDim / 4;  // lanes per row, four columns each
  const int64_t split_rows = static_cast<int64_t>(p.num_kv_heads) * kPrefillRows;
  const auto* stats = reinterpret_cast<const float2*>(partials.stats) + first_partial;
  const auto* acc = reinterpret_cast<const float4*>(partials.acc) + first_partial * kLanes;
  if (const int row = first_row + thread; row < end_row) {
    float largest = kNoMax, sum = 0.0f;
#pragma unroll 4
    for (int split = 0; split < num_splits; ++split) {
      largest = fmaxf(largest, __ldcg(stats + split * split_rows + row).x);
    }
#pragma unroll 4
    for (int split = 0; split < num_splits; ++split) {
      const float2 part = __ldcg(stats + split * split_rows + row);
      sum += exp2_approx(part.x - largest) * part.y;
    }
    // The largest score, and 1 / sum of weights.
    scales[row] = make_float2(largest, sum == 0.0f ? 0.0f : 1.0f / sum);
  }
  sync();
  constexpr int kStep = kThreads / kLanes;  // distance between the rows of a thread
  if (kThreads % kLanes != 0 && thread / kLanes == kStep) return;  // this thread has no row
  const int lane = thread % kLanes;
  for (int base = first_row + thread / kLanes; base < end_row; base += kRowsAtOnce * kStep) {
    float4 total[kRowsAtOnce] = {};
#pragma unroll 2
    for (int split = 0; split < num_splits; ++split) {
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int row = min(base + i * kStep, end_row - 1);
        const int64_t at = split * split_rows + row;
        const float weight = exp2_approx(__ldcg(stats + at).x - scales[row].x);
        const float4 part = __ldcg(acc + at * kLanes + lane);
        total[i].x += weight * part.x;
        total[i].y += weight * part.y;
        total[i].z += weight * part.z;
        total[i].w += weight * part.w;
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int row = base + i * kStep;
      if (row >= end_row) break;
      const float scale = scales[row].y;
      *reinterpret_cast<uint2*>(output_row<T>(p, g, row) + lane * 4) =
          make_uint2(pack_pair<T>(total[i].x * scale, total[i].y * scale),
                     pack_pair<T>(total[i].z * scale, total[i].w * scale));
    }
  }
}

}  // namespace pyserve::gpu::prefill
