// What latent_attention reads: items of the plan, and the copies of their kept rows.
//
// Each warp has a ring of stages of its own in shared memory, of its columns of 16 kept rows each,
// so that no barrier is needed between copying and using. Copies (cp.async, 16 bytes, XOR-swizzled)
// run kStages - 1 tiles ahead, across items too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu::latent {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kKeys = 16;                            // of a tile; plans cut at multiples of it
constexpr int kWarpColumns = kLatentSize / kWarps;   // that a warp owns
constexpr int kWarpRope = kLatentRopeDim / kWarps;   // and of those behind them
constexpr int kRowBytes = kWarpColumns * 2, kRopeRowBytes = kWarpRope * 2;
constexpr int kRopeAt = kKeys * kRowBytes;  // in a stage
constexpr int kStageBytes = kKeys * (kRowBytes + kRopeRowBytes);
// 72 KB a CTA: as decode_kernel.cuh, about 64 KB on their way, and two CTAs fit an SM of sm_80.
constexpr int kStages = 4;
constexpr int kWarpBytes = kStages * kStageBytes;
static_assert(kStageBytes % 128 == 0 && kKvTile % kKeys == 0 && kKeys == 16 && kWarpRope == 16);

struct Latent {
  AttentionParams p;  // of which key_cache is the cache, and a KV head a tile of heads
  AttentionPartials partials;
  int group;
  int decode_items;  // offset in p.work
  float scale_log2;
};

// 16 packed rows of an item, the same in all threads.
struct Work {
  AttentionItem item;
  int slot, first_query, query_len, seq_len;
  int position;   // of the row's first query
  int first_row;  // packed row of the row
  int num_rows;   // from it on, at most 16; 0 where a prefill item has fewer
  int kv_end;     // of what these rows see of the item's keys

  __device__ Work(const Latent& l, const int32_t* items, int index, int sub_tile) {
    const int4* words = reinterpret_cast<const int4*>(items) + 2 * int64_t{index};
    const int4 head = __ldcg(words), tail = __ldcg(words + 1);
    item = {head.x, head.y, head.z, head.w, tail.x, tail.y, tail.z, tail.w};
    slot = __ldcg(l.p.row_slots + item.row);
    first_query = __ldcg(l.p.cu_seqlens_q + item.row);
    query_len = __ldcg(l.p.cu_seqlens_q + item.row + 1) - first_query;
    seq_len = __ldcg(l.p.seq_lens + item.row);
    position = seq_len - query_len;
    first_row = item.query_tile * kPrefillRows + sub_tile * kDecodeRows;
    num_rows = max(0, min(kDecodeRows, query_len * l.group - first_row));
    const int last = first_row + num_rows - 1;
    kv_end =
        num_rows == 0 || slot < 0 ? item.kv_begin : min(item.kv_end, position + last / l.group + 1);
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

// A CTA's share of the plan: items first .. last - 1 of `items`, part sub_tile of each.
struct Items {
  const int32_t* words;
  int first, last, sub_tile;

  __device__ Work at(const Latent& l, int index) const { return {l, words, index, sub_tile}; }
};

// Copies this warp's columns of tile after tile, through the items of its CTA. Each lane finds one
// kept row (a block table entry, read a tile ahead) and hands it to those that copy.
template <class T>
class Loader {
  static constexpr int kChunks = kRowBytes / 16, kRowsAtOnce = kWarpSize / kChunks;
  static_assert(kRopeRowBytes == 32 && kRowsAtOnce == 2);

 public:
  __device__ Loader(const Latent& l, const Items& items)
      : l_(l),
        items_(items),
        cache_(static_cast<const T*>(l.p.key_cache)),
        next_item_(items.first),
        copy_row_(threadIdx.x % kWarpSize / kChunks) {}

  // Starts the copies of the next tile, as a group; an empty one when all is copied.
  __device__ void issue(uint32_t stage) {
    while (tile_ >= end_ && next_item_ < items_.last) begin_item();
    if (tile_ < end_) {
      copy(stage);
      tile_ += kKeys;
      look_up();
    }
    cp_async_commit();
  }

 private:
  __device__ void begin_item() {
    const Work work = items_.at(l_, next_item_++);
    tile_ = work.item.kv_begin;
    end_ = work.kv_end;
    blocks_ = l_.p.block_table + max(work.slot, 0) * l_.p.block_table_stride;
    look_up();
  }

  // The kept row of the next tile that this lane finds; lanes 16 apart have the same.
  __device__ int key() const { return tile_ + threadIdx.x % kKeys; }

  __device__ void look_up() {
    block_ = key() < end_ ? __ldcg(blocks_ + (key() >> l_.p.block_size_log2)) : 0;
  }

  __device__ void copy(uint32_t stage) const {
    if (static_cast<uint32_t>(block_) >= static_cast<uint32_t>(l_.p.num_blocks)) __trap();
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t offset = block_ * l_.p.key_block_stride +
                           (key() & ((1 << l_.p.block_size_log2) - 1)) * l_.p.key_token_stride;
    const int chunk = lane % kChunks;
    const T* source = cache_ + warp * kWarpColumns + chunk * 8;
    const uint32_t target = stage + copy_row_ * kRowBytes + (chunk ^ copy_row_) * 16;
#pragma unroll
    for (int row = 0; row < kKeys; row += kRowsAtOnce) {  // copy_row_ has none of its bits
      cp_async_16((target ^ (row % 8 * 16)) + row * kRowBytes,
                  source + __shfl_sync(kFullMask, offset, row + copy_row_),
                  tile_ + row + copy_row_ < end_);
    }
    // Of the others a row is two chunks, in the order that lets ldmatrix meet every bank once.
    const int row = lane / 2, part = lane % 2;
    cp_async_16(stage + kRopeAt + row * kRopeRowBytes + (part ^ (row / 4 % 2)) * 16,
                cache_ + kLatentSize + warp * kWarpRope + part * 8 +
                    __shfl_sync(kFullMask, offset, row),
                tile_ + row < end_);
  }

  const Latent& l_;
  const Items items_;
  const T* cache_;
  const int32_t* blocks_ = nullptr;
  int next_item_, copy_row_;
  int tile_ = 0, end_ = 0;  // of the current item
  int block_ = 0;           // of key()
};

}  // namespace pyserve::gpu::latent
