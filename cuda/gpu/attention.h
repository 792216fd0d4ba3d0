// Paged attention on CUDA: what the plan kernel, the decode kernel and the prefill kernel agree on.
//
// A row whose query_len * group fits kDecodeRows "packed rows" (row = token * group + head of the
// group) is the decode kernel's; any other is cut into query tiles of kPrefillRows packed rows, the
// prefill kernel's. Once a step, plan_attention cuts the visible keys of all this into work items,
// so that the card is evenly loaded whatever the lengths are; all layers with one window share it.
// An item that is not the whole of its query tile writes float32 partial results to the workspace;
// the last item of the tile to arrive merges them, in the order of the keys.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyserve::gpu {

constexpr int kDecodeRows = 16;    // packed query rows of a decode item
constexpr int kPrefillRows = 128;  // packed query rows of a prefill item
constexpr int kKvTile = 64;        // keys that are loaded at once; items begin at multiples of it

// One query tile against a range of keys, for every KV head.
struct AttentionItem {
  int32_t row;         // index into row_slots
  int32_t query_tile;  // packed rows query_tile * kPrefillRows .. of the row; 0 in decode
  int32_t kv_begin;    // a multiple of kKvTile
  int32_t kv_end;      // kv_begin < kv_end <= keys that the tile's last query sees
  int32_t num_splits;  // items that share this query tile; 1: written to `out` at once
  int32_t split;       // which of them this is
  int32_t first_item;  // item of split 0; the others follow it
  int32_t partial;     // partial buffer of this item; -1 where num_splits is 1
};
constexpr int kItemWords = sizeof(AttentionItem) / sizeof(int32_t);

// Words of the plan ("work") before its arrays.
enum WorkWord : int32_t {
  kWorkNumDecodeItems = 0,
  kWorkNumPrefillItems,
  kWorkDecodeStartsOffset,  // int32 [num_decode_ctas + 1]: items of each CTA, a contiguous range
  kWorkDecodeItemsOffset,   // AttentionItem [num_decode_items]
  kWorkPrefillItemsOffset,  // AttentionItem [num_prefill_items], longest first
  kWorkHeaderWords = 16,
};

struct AttentionParams {
  const void* q;  // [num_tokens, num_heads, head_dim], head_dim contiguous; strides in elements
  int64_t q_token_stride, q_head_stride;
  void* out;
  int64_t out_token_stride, out_head_stride;
  const void* key_cache;  // [num_blocks, block_size, num_kv_heads, head_dim]
  int64_t key_block_stride, key_token_stride, key_head_stride;
  const void* value_cache;
  int64_t value_block_stride, value_token_stride, value_head_stride;
  const int32_t* block_table;  // [num_slots, max_blocks_per_seq]
  int64_t block_table_stride;
  const int32_t* row_slots;     // [num_rows], -1: padding
  const int32_t* cu_seqlens_q;  // [num_rows + 1]
  const int32_t* seq_lens;      // [num_rows]
  int32_t num_tokens, num_rows;
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t block_size_log2;
  int32_t window;  // 0: none
  float softmax_scale;
  int32_t max_query_len;  // an upper bound over the rows: where it fits decode, no prefill launch
  const int32_t* work;
  float* workspace;  // see workspace layout in attention_plan; counters in it are left at zero
};

}  // namespace pyserve::gpu
