// LoRA's first product of the linear that reads the result, in the kernel for few rows that makes
// it: the CTA that finishes columns of out multiplies them with the same columns of that linear's A
// and leaves a sum of its own. So no launch stands between the two linears. The next one adds up
// the CTAs' sums as splits (Lora::fill).
//
//   out[cta, t, p, r] = scales[s, p] * sum over the CTA's columns j of value[t, j] * a[s, p, r, j],
//   where s is the slot of token t's adapter, r runs up to the rank of part p, and value is what
//   the next linear reads, rounded: `scaled` where a norm follows, or else what was stored
//
// Such a launch takes 2 to 3 us: 0.7 to 1.2 for being there, because all SMs come into step once
// more, and the rest is the latency of its loads. Here nothing waits for a load:
// - Thread (row, c) takes column c of each group, kPassRows rows of A at a time for each token
//   (a pair), and keeps what it holds in registers. A is asked for when a group begins, and used
//   only behind the barrier of the group after it, which also makes the group's values visible. So
//   a group needs no barrier more, and the last group has one of its own. There are two buffers of
//   values: they are written between two barriers and read between the next two.
// - The lanes of a row add up their sums once, in the order of a butterfly. CTAs that have no
//   column write zeros, so that nobody need clear the sums.
//
// Numerics: float32; the order depends on n, the epilogue and the number of SMs alone, and is not
// that of lora_shrink.
// Bound by bytes: 2 * n for each row of A, 0.03 to 0.1 us of an 8B model at rank 16. Predicted, not
// measured: 0.2 to 0.4 us a product at one token, most of it behind the last group: a barrier,
// num_pairs products and four shuffles of each pair. The next linear reads num_ctas sums for each r
// and token: 25 KB by each SM for q, k, v of rank 16.
#pragma once

#include "gpu/core/block.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/linear/linear_lora.h"
#include "gpu/lora/segments.cuh"

namespace pyserve::gpu {

constexpr int kMaxNextPairs = 8;  // of a thread: tokens times passes over the rows of A
// Rows of A that the CTA takes in a pass.
template <class Rows, class Tile>
constexpr int kNextRows = Tile::kThreads / Rows::kColumns;

// All threads call all of it but keep, in this order: ask and settle once, begin and turn for each
// group, end.
template <class T, class Rows, class Tile>
class NextShrink {
 public:
  // values: float [2, num_tokens, kColumns] of shared memory.
  __device__ __forceinline__ NextShrink(const LoraNext& next, int num_tokens, float* values)
      : n_(next), num_tokens_(num_tokens),
        num_passes_((next.num_parts * next.max_rank + kPassRows - 1) / kPassRows),
        num_pairs_(next.a == nullptr ? 0 : num_tokens * num_passes_), values_(values) {}

  // Issues the loads that settle() needs. slots: of the tokens' adapters.
  __device__ __forceinline__ void ask(const int32_t* slots) {
    for_pairs([&](int j, int token, int row) {
      const int slot = slots[token];
      offsets_[j] = -1;
      if (slot == kNoSlot || row >= n_.num_parts * n_.max_rank) return;
      const int part = part_of(row);
      offsets_[j] = static_cast<int>(slot * n_.a_slot_stride + part * n_.a_part_stride +
                                     (row - part * n_.max_rank) * n_.a_stride) +
                    static_cast<int>(threadIdx.x) % kColumns;
      ranks_[j] = load_word(n_.ranks + slot * n_.ranks_stride + part);
      scales_[j] = n_.scales[slot * n_.scales_stride + part];
    });
  }

  __device__ __forceinline__ void settle() {
    for_pairs([&](int j, int, int row) {
      if (offsets_[j] < 0) return;
      if (ranks_[j] < 0 || ranks_[j] > n_.max_rank) __trap();
      if (row - part_of(row) * n_.max_rank >= ranks_[j]) offsets_[j] = -1;
    });
  }

  // When a group of columns [column, end) begins.
  __device__ __forceinline__ void begin(int column, int end) {
    const bool is_in = static_cast<int>(threadIdx.x) % kColumns < end - column;
    for_pairs([&](int j, int, int) {
      earlier_[j] = a_[j];
      a_[j] = 0;
      if (!is_in || offsets_[j] < 0) return;
      a_[j] = load_half_word(static_cast<const uint16_t*>(n_.a) + (int64_t{offsets_[j]} + column));
    });
  }

  // Takes a value of the group: of a token and a column of the group, 0 where there is none.
  __device__ __forceinline__ void keep(int token, int column, T value) const {
    if (num_pairs_ == 0 || token >= num_tokens_) return;
    values_[(buffer_ * num_tokens_ + token) * kColumns + column] = to_float(value);
  }

  // When all results of a group are finished, behind its barrier.
  __device__ __forceinline__ void turn() {
    if (has_group_) add(earlier_, buffer_ ^ 1);
    has_group_ = true;
    buffer_ ^= 1;
  }

  // Behind the last group.
  __device__ __forceinline__ void end() {
    if (num_pairs_ == 0) return;
    if (has_group_) {
      __syncthreads();
      add(a_, buffer_ ^ 1);
    }
    for_pairs([&](int j, int token, int row) {
      const float sum = lane_sum<kColumns>(sums_[j]);
      if (offsets_[j] < 0 || threadIdx.x % kColumns != 0) return;
      const int part = part_of(row);
      n_.out.data[blockIdx.x * n_.out.split_stride + token * n_.out.stride +
                  part * n_.out.part_stride + row - part * n_.max_rank] = sum * scales_[j];
    });
  }

 private:
  static constexpr int kColumns = Rows::kColumns, kPassRows = kNextRows<Rows, Tile>;
  static constexpr int kMaxPairs = kMaxNextPairs;

  // Calls fn(pair, token, row) for this thread's pairs. Rows of A are counted over all parts.
  template <class Fn>
  __device__ __forceinline__ void for_pairs(Fn&& fn) const {
    if (num_pairs_ == 0) return;
    int token = 0, pass = 0;
#pragma unroll
    for (int j = 0; j < kMaxPairs; ++j) {
      if (j < num_pairs_) fn(j, token, pass * kPassRows + static_cast<int>(threadIdx.x) / kColumns);
      if (++pass == num_passes_) pass = 0, ++token;
    }
  }

  __device__ __forceinline__ int part_of(int row) const {
    int part = 0;
#pragma unroll
    for (int i = 1; i < kMaxLoraParts; ++i) part += row >= i * n_.max_rank;
    return part;
  }

  __device__ __forceinline__ void add(const uint16_t (&a)[kMaxPairs], int buffer) {
    const float* own = values_ + buffer * num_tokens_ * kColumns + threadIdx.x % kColumns;
    for_pairs([&](int j, int token, int) {
      sums_[j] = fmaf(own[token * kColumns], unpack_pair<T>(a[j]).x, sums_[j]);
    });
  }

  const LoraNext& n_;
  int num_tokens_, num_passes_, num_pairs_;
  float* values_;
  int buffer_ = 0;
  bool has_group_ = false;
  int offsets_[kMaxPairs] = {};  // of A, from a group's column on; -1: there is no such row
  int ranks_[kMaxPairs] = {};
  float scales_[kMaxPairs] = {}, sums_[kMaxPairs] = {};
  uint16_t a_[kMaxPairs] = {}, earlier_[kMaxPairs] = {};  // of the group in work, of that before
};

}  // namespace pyserve::gpu
