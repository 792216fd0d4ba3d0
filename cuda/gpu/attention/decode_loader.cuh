// What decode.cu reads: items of the plan, and the copies of their keys and values.
//
// Each warp keeps a ring of stages of its own in shared memory, so that no barrier is needed
// between copying and using. Rows of keys and values lie there as they are, but for the 16-byte
// chunks of a row, whose number is XORed with the row's: ldmatrix then meets no bank conflict. Each
// lane finds the address of one key (a block table entry, read a tile ahead) and hands it to those
// that copy.
//
// An SM's loads come back in the order in which they were asked for, copies among them: what is read
// ahead is asked for in front of a tile's copies, or it would wait until they have landed, and the
// copies of the next tile for it. On an H200 that was a quarter to two fifths of a warp's time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/score_scale.cuh"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu::decode {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpKeys = kKvTile / kWarps;  // one k16 step of the second product
constexpr int kChunk = 8;                    // elements of a 16-byte copy

static_assert(kWarpKeys == 16 && kDecodeRows == 16);

struct Decode {
  AttentionParams p;
  AttentionPartials partials;
  DecodeRope rope;  // zero where rope_write_kv has done its work
  int group;
  int items_offset;  // in p.work
  ScoreScale scale;
};

// Half of what the plan says of an item.
__device__ __forceinline__ int4 item_words(const Decode& d, int index, int half) {
  return __ldcg(reinterpret_cast<const int4*>(d.p.work + d.items_offset) + 2 * int64_t{index} +
                half);
}

// What the step says of an item's row.
struct RowWords {
  int slot = 0, first_query = 0, end_query = 0, seq_len = 0;

  __device__ void load(const Decode& d, int row) {
    slot = __ldcg(d.p.row_slots + row);
    first_query = __ldcg(d.p.cu_seqlens_q + row);
    end_query = __ldcg(d.p.cu_seqlens_q + row + 1);
    seq_len = __ldcg(d.p.seq_lens + row);
  }
};

// An item and its row, the same in all threads.
struct Work {
  AttentionItem item;
  int slot, first_query, query_len, seq_len;
  int first_visible;  // key, of the row's first query

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

// The items of a CTA one after the other. When one is taken, the row of the next is asked for and
// the first half of the one behind that, and of the item itself what only its end needs; or where
// registers are short, all of the item, and its user waits.
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

  // Where any is left.
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
  int4 head_{}, head_behind_{};  // of next_ and of the one behind it
  RowWords row_;                 // of next_
};

template <int kHeadDim>
using ItemsOf = Items<(kHeadDim <= 128)>;

// What a kernel does: rope_write_kv's work too (kRope), or what its arguments say (kGeneral: that
// work or not, capped scores or not).
enum class Kind { kPlain, kRope, kGeneral };

template <Kind kKind>
__device__ __forceinline__ bool has_rope(const Decode& d) {
  return kKind == Kind::kRope || (kKind == Kind::kGeneral && d.rope.cos_sin != nullptr);
}

// Of a row of keys or values in shared memory: a multiple of 128, so that chunks can be swizzled.
template <class T, int kHeadDim>
constexpr int kSmemRowBytes = (kHeadDim * static_cast<int>(sizeof(T)) + 127) / 128 * 128;

template <class T, int kHeadDim, int kStages>
struct Layout {
  static constexpr int kRowBytes = kSmemRowBytes<T, kHeadDim>;
  static constexpr int kPartBytes = kWarpKeys * kRowBytes;  // one warp's keys, or values, of a tile
  static constexpr int kStageBytes = 2 * kPartBytes;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kCacheBytes = kWarps * kWarpBytes;
};

// Copies one warp's part of tile after tile, through the items of its CTA.
// With rope only the keys of earlier steps, and it may begin before pdl_wait(), past L1.
template <class T, int kHeadDim, int kStages, Kind kKind>
class Loader {
  using L = Layout<T, kHeadDim, kStages>;
  static constexpr int kChunksPerRow = kHeadDim / kChunk;
  static constexpr int kRowsPerCopy = kWarpSize / kChunksPerRow;
  static constexpr int kCopies = kWarpKeys / kRowsPerCopy;
  static_assert(kWarpKeys % kRowsPerCopy == 0);

 public:
  // Where any item is left.
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

  // Starts the copies of the next tile into a stage of this warp, keys and values each a group;
  // empty ones when all is copied.
  __device__ void issue(uint32_t stage) {
    issue_keys(stage);
    issue_values(stage);
  }

  // The same in two halves: keys, and then the values of those.
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
  // What a lane has found out about the tile: where its key lies, and which rows it helps to copy.
  struct Found {
    int block, token;  // token: -1 where all is copied
    unsigned copied;
  };

  // Each lane finds one key; its row is copied by several.
  __device__ Found find() const {
    if (static_cast<uint32_t>(block_) >= static_cast<uint32_t>(d_.p.num_blocks)) __trap();
    return {block_, key() & ((1 << d_.p.block_size_log2) - 1),
            __ballot_sync(kFullMask, is_copied(key())) >> copy_row_};
  }

  // On to the next tile, whose blocks are asked for.
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

  // The key of the next tile that this lane finds; lanes 16 apart have the same.
  __device__ int key() const {
    return tile_ + threadIdx.x / kWarpSize * kWarpKeys + threadIdx.x % kWarpKeys;
  }

  __device__ bool is_copied(int key) const { return key >= first_visible_ && key < copy_end_; }

  // Reads ahead: the block of the next tile's key.
  __device__ void look_up() {
    block_ = is_copied(key()) ? __ldcg(blocks_ + (key() >> d_.p.block_size_log2)) : 0;
  }

  // The rows of the tile that was found; offset: of this lane's key.
  __device__ void copy(uint32_t stage, const T* source, int64_t offset) const {
    stage += destination_;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = i * kRowsPerCopy;  // copy_row_, added below, has none of these bits
      const int64_t row_offset = __shfl_sync(kFullMask, offset, row + copy_row_);
      if (kWarpSize % kChunksPerRow != 0 && copy_row_ == kRowsPerCopy) continue;  // a lane too many
      cp_async_16((stage ^ (row % 8 * 16)) + row * L::kRowBytes, source + row_offset,
                  (found_.copied >> row & 1) != 0);
    }
  }

  const Decode& d_;
  ItemsOf<kHeadDim> items_;
  const T* keys_;  // of the KV head, at this lane's chunk
  const T* values_;
  const int32_t* blocks_ = nullptr;
  int tile_ = 0, kv_end_ = 0, first_visible_ = 0;  // tile_: the next one, of the item's
  int copy_end_ = 0;
  int block_ = 0;   // of key()
  Found found_{};   // of the tile that is being copied
  int copy_row_;                                   // row of a copy that this lane does a chunk of
  uint32_t destination_;
};

}  // namespace pyserve::gpu::decode
