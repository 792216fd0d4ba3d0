// Paged attention on CUDA: what the plan kernel, the decode kernel and the prefill kernel agree on.
//
// A row whose query_len * group fits kDecodeRows "packed rows" (row = token * group + head of the
// group) is the decode kernel's; any other is cut into query tiles of kPrefillRows packed rows, the
// prefill kernel's. Once a step, plan_attention cuts the visible keys of all this into work items,
// so that the card is evenly loaded whatever the lengths are; all layers with one window share it.
// An item that is not the whole of its query tile writes float32 partial results to the workspace,
// which are merged in the order of the keys (merge.cuh says by whom).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/device.h"
#include "gpu/core/dtype.h"

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
  kWorkDecodeStartsOffset,  // int32 [num_decode_ranges + 1]: items of each range
  kWorkDecodeItemsOffset,   // AttentionItem [num_decode_items]
  kWorkPrefillItemsOffset,  // AttentionItem [num_prefill_items], longest first
  kWorkNumDecodeRanges,
  kWorkHeaderWords = 16,
};

// What the work is cut for. Plan and launch must see the same numbers.
struct AttentionDevice {
  int32_t num_sms;
  int32_t decode_ctas_per_sm;  // 1 or 2
};
constexpr int kMaxDecodeCtasPerSm = 2;
constexpr int kMaxDecodeRanges = 1024;

constexpr AttentionDevice attention_device(const Device& device) {
  // A decode CTA takes 64 KB for keys and values that are being copied and 16.5 KB besides; the
  // driver keeps 1 KB for each CTA.
  return {device.num_sms, device.smem_per_sm >= 164 * 1024 ? 2 : 1};
}

// Ranges into which a step's decode tiles are cut, for each KV head: one CTA each.
constexpr int num_decode_ranges(AttentionDevice device, int num_kv_heads) {
  const int ranges = device.num_sms * device.decode_ctas_per_sm / num_kv_heads;
  return ranges < 1 ? 1 : ranges > kMaxDecodeRanges ? kMaxDecodeRanges : ranges;
}

// A step that has fewer prefill query tiles than this splits their keys, which makes at most this
// many further items.
constexpr int num_prefill_chunks(AttentionDevice device, int num_kv_heads) {
  const int chunks = (device.num_sms + num_kv_heads - 1) / num_kv_heads;
  return chunks < 1 ? 1 : chunks;
}

// Upper bound of kWorkNumPrefillItems for any lengths: what a launch may take for its grid.
constexpr int64_t max_prefill_items(AttentionDevice device, int64_t num_tokens, int64_t num_rows,
                                    int num_heads, int num_kv_heads) {
  const int64_t packed_rows = num_tokens * (num_heads / num_kv_heads);
  const int64_t rows = packed_rows / (kDecodeRows + 1);  // each has more than kDecodeRows
  return packed_rows / kPrefillRows + (rows < num_rows ? rows : num_rows) +
         num_prefill_chunks(device, num_kv_heads);
}

constexpr int kDecodeStartsOffset = kWorkHeaderWords;
constexpr int decode_items_offset(int num_ranges) {
  return kDecodeStartsOffset + (num_ranges + 1 + 15) / 16 * 16;
}

// Whether there are kernels for it: capped scores of head_dim 64 no model has.
constexpr bool serves_attention(int64_t head_dim, double softcap) {
  return head_dim == 96 || head_dim == 128 || head_dim == 256 || (head_dim == 64 && softcap == 0);
}

// What latent_attention has kernels for: a kept row is the latent and what is rotated.
constexpr int kLatentSize = 512;
constexpr int kLatentRopeDim = 64;

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
  float softcap;          // scaled scores become softcap * tanh(score / softcap); 0: they do not
  int32_t max_query_len;  // no row has more queries; where decode takes so many, no prefill
  const int32_t* work;
  float* workspace;  // zero at first; decode_partials and prefill_partials lie in it
  // What device code traps on: a slot, a block id or a sequence length that is out of range.
  int32_t num_slots, num_blocks, max_blocks_per_seq;
  AttentionDevice device;
};

// What decode attention needs to do the work of rope_write_kv itself, for steps without prefill:
// q is turned as it is loaded, and the keys and values of this step, turned, come from qkv and go to
// the caches. All of head_dim is turned.
struct DecodeRope {
  const void* keys;  // of token 0, KV head 0, in qkv; strides in elements
  const void* values;
  int64_t token_stride;  // head_dim from head to head
  const float* cos_sin;  // [max_position, head_dim] = cosines | sines
  int64_t cos_sin_stride, max_position;
};

// Partial results of one of the two kernels, in the workspace. The splits of a query tile have
// consecutive partial buffers, so split 0 has buffer item.partial - item.split.
struct AttentionPartials {
  float* acc;         // [partial][kv_head][rows][head_dim]: weights times values, summed
  float* stats;       // [partial][kv_head][rows][2]: largest score in log2 units, sum of weights
  int32_t* arrivals;  // [partial of split 0][kv_head]; zero between launches
};

// Two partial buffers for each range or chunk; words of arrivals are rounded up to keep alignment.
constexpr int64_t partial_buffers(int num_ranges, int num_kv_heads) {
  return int64_t{2} * num_ranges * num_kv_heads;
}
constexpr int64_t arrival_words(int num_ranges, int num_kv_heads) {
  return (partial_buffers(num_ranges, num_kv_heads) + 31) / 32 * 32;
}
constexpr int64_t partial_words(int num_ranges, int num_kv_heads, int rows, int head_dim) {
  return arrival_words(num_ranges, num_kv_heads) +
         partial_buffers(num_ranges, num_kv_heads) * rows * (head_dim + 2);
}

inline AttentionPartials partials_at(float* words, int num_ranges, int num_kv_heads, int rows) {
  AttentionPartials partials{};
  partials.arrivals = reinterpret_cast<int32_t*>(words);
  partials.stats = words + arrival_words(num_ranges, num_kv_heads);
  partials.acc = partials.stats + partial_buffers(num_ranges, num_kv_heads) * rows * 2;
  return partials;
}

inline AttentionPartials decode_partials(const AttentionParams& p) {
  return partials_at(p.workspace, num_decode_ranges(p.device, p.num_kv_heads), p.num_kv_heads,
                     kDecodeRows);
}

inline AttentionPartials prefill_partials(const AttentionParams& p) {
  const int num_ranges = num_decode_ranges(p.device, p.num_kv_heads);
  return partials_at(
      p.workspace + partial_words(num_ranges, p.num_kv_heads, kDecodeRows, p.head_dim),
      num_prefill_chunks(p.device, p.num_kv_heads), p.num_kv_heads, kPrefillRows);
}

// Fills `work` (work_words int32) for the rows of a step.
struct AttentionPlanParams {
  const int32_t* cu_seqlens_q;  // [num_rows + 1]
  const int32_t* seq_lens;      // [num_rows]
  int32_t num_rows, num_heads, num_kv_heads;
  int32_t window;  // 0: none
  AttentionDevice device;
  int32_t* work;
  int64_t work_words;
};

cudaError_t launch_plan_attention(const AttentionPlanParams& params, cudaStream_t stream);
cudaError_t launch_decode_attention(const AttentionParams& params, Dtype dtype,
                                    cudaStream_t stream);
cudaError_t launch_prefill_attention(const AttentionParams& params, Dtype dtype,
                                     cudaStream_t stream);
// prefill.cu's work on a card with is_hopper(), where prefill_sm90a_serves (prefill_sm90a.cu).
bool prefill_sm90a_serves(const AttentionParams& params);
cudaError_t launch_prefill_attention_sm90a(const AttentionParams& params, Dtype dtype,
                                           cudaStream_t stream);
// Decode for a step of which every row is decode's, q not turned yet. What a kernel of the step
// wrote, other than q, keys and values, was complete when the kernel in front began its work: the
// plan, the block table and the caches are read while that one still runs.
cudaError_t launch_rope_decode_attention(const AttentionParams& params, const DecodeRope& rope,
                                         Dtype dtype, cudaStream_t stream);
// latent_attention: key_cache holds the kept rows, head_dim is kLatentSize, num_kv_heads the number
// of tiles of at most kDecodeRows heads each that the plan has for KV heads.
cudaError_t launch_latent_attention(const AttentionParams& params, Dtype dtype,
                                    cudaStream_t stream);
// Decode, and prefill where a row may be too long for decode. max_query_len is read here only.
cudaError_t launch_paged_attention(const AttentionParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace pyserve::gpu
