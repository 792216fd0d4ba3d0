// Paged attention on CUDA: what the plan kernel, the decode kernel and the prefill kernel agree on.
//
// The queries of a row are packed: packed row = token * group + head, for the query heads of one KV
// head's group. A row of the step with at most kDecodeRows packed rows is served by the decode
// kernel. Any other is divided into query tiles of kPrefillRows packed rows, which the prefill
// kernel serves. Once a step, plan_attention divides the visible keys of all rows and query tiles
// into work items, so that the device is evenly loaded whatever the lengths are. All layers with
// the same window share this plan. An item that covers only a part of its query tile's keys (a
// split) writes float32 partial results to the workspace, and these are merged in the order of the
// keys; merge.cuh says by whom.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/device.h"
#include "gpu/core/dtype.h"

namespace pyserve::gpu {

constexpr int kDecodeRows = 16;    // packed query rows of a decode item
constexpr int kPrefillRows = 128;  // packed query rows of a prefill item
constexpr int kKvTile = 64;        // keys that are loaded together; items begin at multiples of it

// One query tile and a range of keys; it stands for such an item of every KV head.
struct AttentionItem {
  int32_t row;         // index into row_slots
  int32_t query_tile;  // packed rows from query_tile * kPrefillRows of the row on; 0 in decode
  int32_t kv_begin;    // a multiple of kKvTile
  int32_t kv_end;      // kv_begin < kv_end <= the keys that the tile's last query sees
  // Number of items that share this query tile; 1: the result goes straight to `out`.
  int32_t num_splits;
  int32_t split;       // the index of this item among them
  int32_t first_item;  // index of the item of split 0; the other splits follow it
  int32_t partial;     // partial buffer of this item; -1 if num_splits is 1
};
constexpr int kItemWords = sizeof(AttentionItem) / sizeof(int32_t);

// The words of the plan (the tensor `work`) in front of its arrays.
enum WorkWord : int32_t {
  kWorkNumDecodeItems = 0,
  kWorkNumPrefillItems,
  kWorkDecodeStartsOffset,  // int32 [num_decode_ranges + 1]: the first item of each range
  kWorkDecodeItemsOffset,   // AttentionItem [num_decode_items]
  kWorkPrefillItemsOffset,  // AttentionItem [num_prefill_items], longest first
  kWorkNumDecodeRanges,
  kWorkHeaderWords = 16,
};

// What the plan depends on besides the lengths. The plan and the attention kernels must be given
// the same numbers.
struct AttentionDevice {
  int32_t num_sms;
  int32_t decode_ctas_per_sm;  // 1 to kMaxDecodeCtasPerSm
};
constexpr int kMaxDecodeCtasPerSm = 2;
constexpr int kMaxDecodeRanges = 1024;

constexpr AttentionDevice attention_device(const Device& device) {
  // A decode CTA takes 64 KB for the keys and values in flight and 16.5 KB for the rest, and the
  // driver reserves 1 KB per CTA.
  return {device.num_sms, device.smem_per_sm >= 164 * 1024 ? kMaxDecodeCtasPerSm : 1};
}

// The number of ranges into which the decode items of a step are divided for each KV head. One CTA
// takes one range.
constexpr int num_decode_ranges(AttentionDevice device, int num_kv_heads) {
  const int ranges = device.num_sms * device.decode_ctas_per_sm / num_kv_heads;
  return ranges < 1 ? 1 : ranges > kMaxDecodeRanges ? kMaxDecodeRanges : ranges;
}

// A step with fewer prefill query tiles than this splits their keys. The splits add at most this
// many items.
constexpr int num_prefill_chunks(AttentionDevice device, int num_kv_heads) {
  const int chunks = (device.num_sms + num_kv_heads - 1) / num_kv_heads;
  return chunks < 1 ? 1 : chunks;
}

// An upper bound of kWorkNumPrefillItems for any lengths, which a launch can use for its grid.
constexpr int64_t max_prefill_items(AttentionDevice device, int64_t num_tokens, int64_t num_rows,
                                    int num_heads, int num_kv_heads) {
  const int64_t packed_rows = num_tokens * (num_heads / num_kv_heads);
  const int64_t rows = packed_rows / (kDecodeRows + 1);  // each row has more than kDecodeRows
  return packed_rows / kPrefillRows + (rows < num_rows ? rows : num_rows) +
         num_prefill_chunks(device, num_kv_heads);
}

constexpr int kDecodeStartsOffset = kWorkHeaderWords;
constexpr int decode_items_offset(int num_ranges) {
  return kDecodeStartsOffset + (num_ranges + 1 + 15) / 16 * 16;
}

// Whether there are kernels for these arguments. No model caps scores at head_dim 64.
constexpr bool serves_attention(int64_t head_dim, double softcap) {
  return head_dim == 96 || head_dim == 128 || head_dim == 256 || (head_dim == 64 && softcap == 0);
}

// The sizes that latent_attention has kernels for: a cached row is the latent and then its rotated
// part.
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
  float softcap;          // scaled scores become softcap * tanh(score / softcap); 0: no cap
  // Upper bound on the queries of a row; if decode serves that many, no prefill is launched.
  int32_t max_query_len;
  const int32_t* work;
  float* workspace;  // its arrivals are zero at first; holds decode_partials and prefill_partials
  // The limits for slots, block ids and sequence lengths, beyond which device code traps.
  int32_t num_slots, num_blocks, max_blocks_per_seq;
  AttentionDevice device;
};

// What decode attention needs to do the work of rope_write_kv itself, in steps without prefill. It
// rotates q as it loads it. It takes the keys and values of this step from qkv, rotates the keys,
// and writes both to the caches. All of head_dim is rotated.
struct DecodeRope {
  const void* keys;  // of token 0 and KV head 0 in qkv; strides in elements
  const void* values;
  int64_t token_stride;  // heads are head_dim apart
  const float* cos_sin;  // [max_position, head_dim] = cosines | sines
  int64_t cos_sin_stride, max_position;
};

// The partial results of one of the two kernels in the workspace. The splits of a query tile have
// consecutive partial buffers, so split 0 has buffer item.partial - item.split.
struct AttentionPartials {
  float* acc;         // [partial][kv_head][rows][head_dim]: sums of weights times values
  float* stats;       // [partial][kv_head][rows][2]: largest score in log2 units, sum of weights
  int32_t* arrivals;  // [partial of split 0][kv_head]; zero between launches
};

// There are two partial buffers for each range or chunk. The number of arrival words is rounded up
// to keep what follows aligned.
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

// The parameters of the kernel that fills `work` (work_words int32) for the rows of a step.
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
// The same on a device with is_hopper(), for arguments that prefill_sm90a_serves accepts
// (prefill_sm90a.cu).
bool prefill_sm90a_serves(const AttentionParams& params);
cudaError_t launch_prefill_attention_sm90a(const AttentionParams& params, Dtype dtype,
                                           cudaStream_t stream);
// Decode for a step in which decode serves every row, with q not rotated yet. Apart from q, keys
// and values, everything that it reads must have been complete before the kernel in front of it
// began its work: it reads the plan, the block table and the caches while that kernel still runs
// (rule 4 of pdl.cuh).
cudaError_t launch_rope_decode_attention(const AttentionParams& params, const DecodeRope& rope,
                                         Dtype dtype, cudaStream_t stream);
// latent_attention. key_cache holds the cached rows and head_dim is kLatentSize. The heads are
// divided into tiles of at most kDecodeRows heads, which take the place of KV heads in the plan;
// num_kv_heads is their number.
cudaError_t launch_latent_attention(const AttentionParams& params, Dtype dtype,
                                    cudaStream_t stream);
// Launches decode, and also prefill if max_query_len says that a row may be too long for decode.
cudaError_t launch_paged_attention(const AttentionParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace pyserve::gpu
