// What the decode kernel reads: the items of the plan, and copies of their keys and values.
//
// Each warp has a ring of stages of its own in shared memory, so no barrier is needed between
// copying and using. Rows of keys and values keep their order there, but the number of a 16-byte
// chunk within a row is XORed with the row's number, so that ldmatrix meets no bank conflicts. Each
// lane finds the address of one key, from a block table entry that it has read a tile ahead, and
// hands it by a shuffle to the lanes that copy the row.
//
// An SM returns loads, cp.async included, in the order in which they were issued. Data that is read
// ahead is therefore loaded before a tile's copies are issued. Otherwise it would arrive only
// behind those copies and would in turn delay the next tile's copies; on an H200 that cost a
// quarter to two fifths of a warp's time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/score_scale.cuh"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu::decode {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpKeys = kKvTile / kWarps;  // the depth of one mma of the second product
constexpr int kChunk = 8;                    // elements of a 16-byte copy

static_assert(kWarpKeys == 16 && kDecodeRows == 16);

struct Decode {
  AttentionParams p;
  AttentionPartials partials;
  DecodeRope rope;  // all zero if rope_write_kv is a kernel of its own
  int group;
  int items_offset;  // offset in p.work
  ScoreScale scale;
};

// Half of the words of an item in the plan.
__device__ __forceinline__ int4 item_words(const Decode& d, int index, int half) {
  return __ldcg(reinterpret_cast<const int4*>(d.p.work + d.items_offset) + 2 * int64_t{index} +
                half);
}

// What the step's metadata says of an item's row.
struct RowWords {
  int slot = 0, first_query = 0, end_query = 0, seq_len = 0;

  __device__ void load(const Decode& d, int row) {
    slot = __ldcg(d.p.row_slots + row);
    first_query = __ldcg(d.p.cu_seqlens_q + row);
    end_query = __ldcg(d.p.cu_seqlens_q + row + 1);
    seq_len = __ldcg(d.p.seq_lens + row);
  }
};

// An item and its row; the same in all threads.
struct Work {
  AttentionItem item;
  int slot, first_query, query_len, seq_len;
  int first_visible;  // first key that the row's first query sees

  __device__ Work(const Decode& d, const int4& head, const int4& tail, const RowWords& row)
      : item{head.x, head.y, head.z, head.w, tail.x, tail.y, tail.z, tail.w},
        slot(row.slot),
        first_query(row.first_query),
        query_len(row.end_query - row.first_query),
        seq_len(row.seq_len) {
    first_visible = d.p.window > 0 ? max(0, seq_len - query_len - d.p.window + 1) : 0;
    // A plan that was made for other rows, or one that leads out of bounds, traps here.
    if (slot >= d.p.num_slots || first_query < 0 || query_len <= 0 ||
        query_len * d.group > kDecodeRows || first_query > d.p.num_tokens - query_len ||
        item.kv_end > seq_len ||
        (item.kv_end - 1) >> d.p.block_size_log2 >= d.p.max_blocks_per_seq) {
      __trap();
    }
  }
};

// The items of a CTA, one after another. With kReadsAhead, taking an item also starts to load the
// row of the next item and the first half of the one after that; the second half of the taken item,
// which is needed only at its end, is loaded at that time too. Without it, for want of registers,
// all of an item is loaded when it is taken, and the caller waits.
template <bool kReadsAhead>
class Items {
 public:
  __device__ Items(const Decode& d, int first, int last) : d_(d), next_(first), last_(last) {
    if constexpr (!kReadsAhead) return;
    head_ = item_words(d, first, 0);
    if (first + 1 < last) head_behind_ = item_words(d, first + 1, 0);
    row_.load(d, head_.x);
  }

  __device__ bool are_left() const { return next_ < last_; }

  // Must be called only while items are left.
  __device__ Work take() {
    if constexpr (!kReadsAhead) {
      head_ = item_words(d_, next_, 0);
      row_.load(d_, head_.x);
    }
    const Work work(d_, head_, item_words(d_, next_, 1), row_);
    ++next_;
    if constexpr (!kReadsAhead) return work;
    head_ = head_behind_;
    if (are_left()) row_.load(d_, head_.x);
    if (next_ + 1 < last_) head_behind_ = item_words(d_, next_ + 1, 0);
    return work;
  }

 private:
  const Decode& d_;
  int next_, last_;
  int4 head_{}, head_behind_{};  // of item next_ and of the one behind it
  RowWords row_;                 // of item next_
};

template <int kHeadDim>
using ItemsOf = Items<(kHeadDim <= 128)>;

// What a kernel does besides attention: nothing (kPlain), the work of rope_write_kv (kRope), or
// what its arguments say (kGeneral: with or without that work, with or without a cap on scores).
enum class Kind { kPlain, kRope, kGeneral };

template <Kind kKind>
__device__ __forceinline__ bool has_rope(const Decode& d) {
  return kKind == Kind::kRope || (kKind == Kind::kGeneral && d.rope.cos_sin != nullptr);
}

// Bytes of a row of keys or values in shared memory: a multiple of 128, so that its chunks can be
// swizzled.
template <class T, int kHeadDim>
constexpr int kSmemRowBytes = (kHeadDim * static_cast<int>(sizeof(T)) + 127) / 128 * 128;

template <class T, int kHeadDim, int kStages>
struct Layout {
  static constexpr int kRowBytes = kSmemRowBytes<T, kHeadDim>;
  // The keys, or the values, of a warp's part of a tile.
  static constexpr int kPartBytes = kWarpKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kPartBytes;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kCacheBytes = kWarps * kWarpBytes;
};

// Copies one warp's part of one tile after another, through all items of its CTA. With rope it
// copies only keys of earlier steps; it then begins before pdl_wait() and reads past L1 (rule 4 of
// pdl.cuh).
template <class T, int kHeadDim, int kStages, Kind kKind>
class Loader {
  using L = Layout<T, kHeadDim, kStages>;
  static constexpr int kChunksPerRow = kHeadDim / kChunk;
  static constexpr int kRowsPerCopy = kWarpSize / kChunksPerRow;
  static constexpr int kCopies = kWarpKeys / kRowsPerCopy;
  static_assert(kWarpKeys % kRowsPerCopy == 0);

 public:
  // Must be constructed only while items are left.
  __device__ Loader(const Decode& d, int kv_head, const ItemsOf<kHeadDim>& items)
      : d_(d),
        items_(items),
        keys_(static_cast<const T*>(d.p.key_cache) + kv_head * d.p.key_head_stride),
        values_(static_cast<const T*>(d.p.value_cache) + kv_head * d.p.value_head_stride) {
    const int lane = threadIdx.x % kWarpSize, chunk = lane % kChunksPerRow;
    copy_row_ = lane / kChunksPerRow;
    keys_ += chunk * kChunk;
    values_ += chunk * kChunk;
    destination_ = copy_row_ * L::kRowBytes + (chunk ^ copy_row_) * 16;
    begin_item();
  }

  // Starts the copies of the next tile into a stage of this warp. Keys and values are one group of
  // copies each; the groups are empty when everything has been copied.
  __device__ void issue(uint32_t stage) {
    issue_keys(stage);
    issue_values(stage);
  }

  // The two halves of issue(): the keys, and then the values of the same tile.
  __device__ void issue_keys(uint32_t stage) {
    found_.token = -1;
    if (tile_ < kv_end_) {
      found_ = find();
      go_on();
      copy(stage, keys_,
           int64_t{found_.block} * d_.p.key_block_stride + found_.token * d_.p.key_token_stride);
    }
    cp_async_commit();
  }

  __device__ void issue_values(uint32_t stage) {
    if (found_.token >= 0) {
      copy(stage + L::kPartBytes, values_,
           int64_t{found_.block} * d_.p.value_block_stride + found_.token * d_.p.value_token_stride);
    }
    cp_async_commit();
  }

 private:
  // What a lane has found out about the current tile: where its key lies, and which of the rows
  // that it helps to copy exist.
  struct Found {
    int block, token;  // token is -1 where everything has been copied
    unsigned copied;
  };

  // Each lane finds one key; several lanes together copy its row.
  __device__ Found find() const {
    if (static_cast<uint32_t>(block_) >= static_cast<uint32_t>(d_.p.num_blocks)) __trap();
    return {block_, key() & ((1 << d_.p.block_size_log2) - 1),
            __ballot_sync(kFullMask, is_copied(key())) >> copy_row_};
  }

  // Moves on to the next tile and starts to read its block table entries.
  __device__ void go_on() {
    tile_ += kKvTile;
    if (tile_ < kv_end_) {
      look_up();
    } else if (items_.are_left()) {
      begin_item();
    }
  }

  __device__ void begin_item() {
    const Work work = items_.take();
    tile_ = work.item.kv_begin;
    kv_end_ = work.item.kv_end;
    copy_end_ = has_rope<kKind>(d_) ? min(kv_end_, work.seq_len - work.query_len) : kv_end_;
    // A padded row has no blocks, so none of its keys is copied.
    first_visible_ = work.slot < 0 ? kv_end_ : work.first_visible;
    blocks_ = d_.p.block_table + max(work.slot, 0) * d_.p.block_table_stride;
    look_up();
  }

  // The key of the next tile that this lane finds. Lanes 16 apart find the same one.
  __device__ int key() const {
    return tile_ + threadIdx.x / kWarpSize * kWarpKeys + threadIdx.x % kWarpKeys;
  }

  __device__ bool is_copied(int key) const { return key >= first_visible_ && key < copy_end_; }

  // Reads the block table entry of the next tile's key, a tile ahead.
  __device__ void look_up() {
    block_ = is_copied(key()) ? __ldcg(blocks_ + (key() >> d_.p.block_size_log2)) : 0;
  }

  // Copies the rows of the tile that was found. `offset` is that of this lane's key.
  __device__ void copy(uint32_t stage, const T* source, int64_t offset) const {
    stage += destination_;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = i * kRowsPerCopy;  // copy_row_, added below, has none of these bits
      const int64_t row_offset = __shfl_sync(kFullMask, offset, row + copy_row_);
      // This lane has no row.
      if (kWarpSize % kChunksPerRow != 0 && copy_row_ == kRowsPerCopy) continue;
      cp_async_16((stage ^ (row % 8 * 16)) + row * L::kRowBytes, source + row_offset,
                  (found_.copied >> row & 1) != 0);
    }
  }

  const Decode& d_;
  ItemsOf<kHeadDim> items_;
  const T* keys_;  // at this lane's chunk of the KV head
  const T* values_;
  const int32_t* blocks_ = nullptr;
  int tile_ = 0, kv_end_ = 0, first_visible_ = 0;  // tile_ is the next tile of the item
  int copy_end_ = 0;
  int block_ = 0;   // of the key that key() names
  Found found_{};   // of the tile that is being copied
  // The row of a copy of which this lane takes a chunk.
  int copy_row_;
  uint32_t destination_;
};

}  // namespace pyserve::gpu::decode
