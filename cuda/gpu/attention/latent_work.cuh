// What the kernels of latent_attention know about their work: items of the plan, taken 16 packed
// rows at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"

namespace pyserve::gpu::latent {

struct Latent {
  AttentionParams p;  // key_cache is the latent cache; a KV head is a tile of heads
  AttentionPartials partials;
  int group;
  int decode_items;  // offset in p.work
  float scale_log2;
};

__device__ __forceinline__ AttentionItem item_at(const int32_t* items, int index) {
  const int4* words = reinterpret_cast<const int4*>(items) + 2 * int64_t{index};
  const int4 head = __ldcg(words), tail = __ldcg(words + 1);
  return {head.x, head.y, head.z, head.w, tail.x, tail.y, tail.z, tail.w};
}

// 16 packed rows of an item; the same in all threads of a group.
struct Work {
  AttentionItem item;
  int slot, first_query, query_len, seq_len;
  int position;   // position of the row's first query
  int first_row;  // first packed row, counted in the row
  int num_rows;   // packed rows from it on, at most 16; 0 where a prefill item has fewer
  int kv_end;     // end of the item's keys that these rows see, or the rows that use the same keys

  // For part sub_tile of the item. `count` parts from first_sub_tile on are worked on together and
  // use the same keys.
  __device__ Work(const Latent& l, const AttentionItem& of_plan, int sub_tile, int first_sub_tile,
                  int count)
      : item(of_plan) {
    slot = __ldcg(l.p.row_slots + item.row);
    first_query = __ldcg(l.p.cu_seqlens_q + item.row);
    query_len = __ldcg(l.p.cu_seqlens_q + item.row + 1) - first_query;
    seq_len = __ldcg(l.p.seq_lens + item.row);
    position = seq_len - query_len;
    const int num_packed = query_len * l.group, tile_row = item.query_tile * kPrefillRows;
    first_row = tile_row + sub_tile * kDecodeRows;
    num_rows = max(0, min(kDecodeRows, num_packed - first_row));
    const int first = tile_row + first_sub_tile * kDecodeRows;
    const int last = min(first + count * kDecodeRows, num_packed) - 1;
    kv_end =
        last < first || slot < 0 ? item.kv_begin : min(item.kv_end, position + last / l.group + 1);
    // A plan that was made for other rows, or one that leads out of bounds, traps here.
    if (slot >= l.p.num_slots || first_query < 0 || query_len <= 0 || position < 0 ||
        first_query > l.p.num_tokens - query_len || item.kv_end > seq_len ||
        (item.kv_end - 1) >> l.p.block_size_log2 >= l.p.max_blocks_per_seq) {
      __trap();
    }
  }

  __device__ int token_of(const Latent& l, int row) const {
    return first_query + (first_row + row) / l.group;
  }
  __device__ int head_of(const Latent& l, int tile, int row) const {
    return tile * l.group + (first_row + row) % l.group;
  }
};

template <class T>
__device__ T* out_row(const Latent& l, const Work& work, int tile, int row) {
  return static_cast<T*>(l.p.out) + work.token_of(l, row) * l.p.out_token_stride +
         work.head_of(l, tile, row) * l.p.out_head_stride;
}

}  // namespace pyserve::gpu::latent
