// Applies the slot updates of a step (common/step.h) within the one CTA of plan_step. One thread
// checks a record, one warp checks and writes its lists, and all threads together rebuild the token
// counts of one slot after another. Every value of the buffer is checked. Where several updates go
// to the same slot, the last one counts.
#pragma once

#include <cfloat>

#include "common/step.h"
#include "gpu/core/ptx.cuh"
#include "gpu/step/plan_step.h"

namespace pyserve::gpu {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBatch = kThreads;  // as many updates as are applied together
constexpr int64_t kSlotUpdateHead = int64_t{kSlotUpdateWords} + kSlotHeaderWords;

// Records have different lengths, so each must be found from the one before. This is done within a
// window of so many words at a time.
constexpr int kWindowWords = 4096;

struct SlotUpdates {
  // jump[.][w] is where one gets from word w of the window after a certain number of records, if w
  // is the begin of a record; kWindowWords stands for a place outside the window. Doubling the
  // number reads one of the two arrays and writes the other.
  uint16_t jump[2][kWindowWords + 1];
  uint16_t found[kBatch];  // begins of records, in words of the window
  int32_t offset[kBatch];  // begins of records, in words of the buffer
  int32_t slot[kBatch];
  // The numbers of biases and of stop ids that the slot had before the update.
  int16_t num_old_bias[kBatch], num_old_stop[kBatch];
  bool has_penalties[kBatch];
  // Has biases, stop ids or tokens to count, or the slot has old lists to clear.
  bool has_lists[kBatch];
  bool is_last[kBatch];    // no later update of this batch is for the same slot
  bool has_counts;  // some update of this batch has penalties, so counts to rebuild
  int64_t next;     // word of the buffer where the next update begins
};

__device__ __forceinline__ void require(bool condition) {
  if (!condition) __trap();
}

// The header words of the step, once checked: the sections lie inside the buffer and in order.
struct Step {
  const int32_t* words;
  int64_t magic;
  int64_t num_words, num_rows, num_tokens, num_samples;
  int64_t rows_at, tokens_at, block_updates_at, slot_updates_at;
  int64_t num_block_updates, num_slot_updates, max_query_len;
};

// Where the parts of one slot update lie, in words of the buffer.
struct SlotUpdate {
  int64_t at, num_words;
  int64_t slot, num_bias, num_stop, num_prompt, num_output;

  __device__ int64_t header() const { return at + kSlotUpdateWords; }
  __device__ int64_t bias_ids() const { return at + kSlotUpdateHead; }
  __device__ int64_t bias_values() const { return bias_ids() + num_bias; }
  __device__ int64_t stop_ids() const { return bias_values() + num_bias; }
  __device__ int64_t prompt() const { return stop_ids() + num_stop; }
  __device__ int64_t output() const { return prompt() + num_prompt; }
};

__device__ inline SlotUpdate slot_update_at(const Step& step, int64_t at) {
  const int32_t* record = step.words + at;
  const int32_t* header = record + kSlotUpdateWords;
  return {at,
          record[kSlotUpdateNumWords],
          record[kSlotUpdateSlot],
          header[kSlotNumBias],
          header[kSlotNumStop],
          record[kSlotUpdateNumPromptTokens],
          record[kSlotUpdateNumOutputTokens]};
}

// Whether the `count` records from word `begin` on all have the size of the first. This is so for
// sequences without biases, stop ids and penalties, and makes the search for their begins
// unnecessary.
__device__ inline bool are_equal_sizes(const Step& step, int64_t begin, int count) {
  const int64_t size = step.words[begin + kSlotUpdateNumWords], at = begin + threadIdx.x * size;
  bool is_equal = true;
  if (static_cast<int>(threadIdx.x) < count) {
    is_equal = size >= kSlotUpdateHead && size <= step.num_words - at &&
               step.words[at + kSlotUpdateNumWords] == size;
  }
  return __syncthreads_and(is_equal) != 0;
}

// Finds the begins of up to `count` records from word `begin` on that lie within one window. Writes
// them to updates.found and returns their number. A record tells only where the next one begins;
// following that chain would take one step per record. Instead jump is composed with itself: each
// round doubles the number of records that it skips and the number of begins that are known.
__device__ inline int find_in_window(const Step& step, int64_t begin, int count,
                                     SlotUpdates& updates) {
  const int num_words = static_cast<int>(min(step.num_words - begin, int64_t{kWindowWords}));
  for (int i = threadIdx.x; i < num_words; i += kThreads) {
    const int64_t size = step.words[begin + i + kSlotUpdateNumWords];
    const bool is_inside = size >= kSlotUpdateHead && size < num_words - i;
    updates.jump[0][i] = static_cast<uint16_t>(is_inside ? i + size : kWindowWords);
  }
  if (threadIdx.x == 0) {
    updates.jump[0][kWindowWords] = updates.jump[1][kWindowWords] = kWindowWords;
    updates.found[0] = 0;
  }
  __syncthreads();
  int from = 0;
  for (int known = 1; known < count; known *= 2, from ^= 1) {
    const uint16_t* jump = updates.jump[from];
    const int i = threadIdx.x;
    if (i < known && known + i < count) updates.found[known + i] = jump[updates.found[i]];
    for (int j = i; j < num_words; j += kThreads) {
      updates.jump[from ^ 1][j] = jump[jump[j]];
    }
    __syncthreads();
  }
  const int i = threadIdx.x;
  return __syncthreads_count(i < count && updates.found[i] < kWindowWords);
}

__device__ inline void check_header(const PlanStepParams& p, const int32_t* header) {
  auto check = [&](int word, float low, float high) {
    const float value = __int_as_float(header[word]);
    require(value >= low && value <= high);  // a NaN fails
  };
  check(kSlotTemperature, 0.0f, FLT_MAX);
  check(kSlotTopP, FLT_MIN, 1.0f);
  check(kSlotMinP, 0.0f, 1.0f);
  check(kSlotRepetitionPenalty, FLT_MIN, FLT_MAX);
  check(kSlotPresencePenalty, -FLT_MAX, FLT_MAX);
  check(kSlotFrequencyPenalty, -FLT_MAX, FLT_MAX);
  require(header[kSlotTopK] >= 0);
  require(header[kSlotLastToken] >= -1 && header[kSlotLastToken] < p.vocab_size);
  require(header[kSlotNumComputed] >= 0);
}

// Checks update i except for its lists, and notes what is needed to apply it. One thread calls
// this.
__device__ inline void note_update(const PlanStepParams& p, const Step& step, int64_t at, int i,
                                   SlotUpdates& updates) {
  require(at + kSlotUpdateHead <= step.num_words);
  const SlotUpdate u = slot_update_at(step, at);
  require(u.num_words >= kSlotUpdateHead && u.num_words <= step.num_words - at);
  require(u.slot >= 0 && u.slot < p.num_slots);
  require(u.num_bias >= 0 && u.num_bias <= kMaxLogitBias);
  require(u.num_stop >= 0 && u.num_stop <= kMaxStopTokenIds);
  require(u.num_prompt >= 0 && u.num_output >= 0);
  require(u.num_words ==
          kSlotUpdateHead + 2 * u.num_bias + u.num_stop + u.num_prompt + u.num_output);
  check_header(p, step.words + u.header());
  const int32_t* old = p.slots + u.slot * p.slots_stride;
  const int num_old_bias = min(max(old[kSlotNumBias], 0), kMaxLogitBias);
  const int num_old_stop = min(max(old[kSlotNumStop], 0), kMaxStopTokenIds);
  updates.num_old_bias[i] = static_cast<int16_t>(num_old_bias);
  updates.num_old_stop[i] = static_cast<int16_t>(num_old_stop);
  updates.has_lists[i] = u.num_words > kSlotUpdateHead || num_old_bias + num_old_stop > 0;
  updates.offset[i] = static_cast<int32_t>(at);
  updates.slot[i] = static_cast<int32_t>(u.slot);
  updates.has_penalties[i] = step.words[u.header() + kSlotHasPenalties] != 0;
  if (updates.has_penalties[i]) updates.has_counts = true;
}

// Finds and checks the records of the next `count` <= kBatch updates.
__device__ inline void find_updates(const PlanStepParams& p, const Step& step, int count,
                                    SlotUpdates& updates) {
  int64_t begin = updates.next;
  if (threadIdx.x == 0) updates.has_counts = false;
  const int i = threadIdx.x;
  for (int done = 0; done < count;) {
    require(begin + kSlotUpdateHead <= step.num_words);
    int num_found = count - done;
    const bool are_equal = are_equal_sizes(step, begin, num_found);
    if (!are_equal) num_found = find_in_window(step, begin, num_found, updates);
    if (i < num_found) {
      const int64_t size = step.words[begin + kSlotUpdateNumWords];
      const int64_t at = begin + (are_equal ? i * size : updates.found[i]);
      note_update(p, step, at, done + i, updates);
      if (i == num_found - 1) updates.next = at + step.words[at + kSlotUpdateNumWords];
    }
    __syncthreads();
    begin = updates.next;
    done += num_found;
  }
}

__device__ inline void check_ids(const int32_t* ids, int64_t n, int64_t vocab_size, int rank,
                                 int num_threads) {
  for (int64_t i = rank; i < n; i += num_threads) require(ids[i] >= 0 && ids[i] < vocab_size);
}

// Whether no later update of this batch overrides what update i does to its slot. With
// only_by_counts, an update without penalties does not override, as it leaves the token counts
// alone.
__device__ inline bool is_last_of(const SlotUpdates& updates, int i, int count,
                                  bool only_by_counts) {
  bool is_last = true;
  for (int j = i + 1; j < count; ++j) {
    is_last &= updates.slot[j] != updates.slot[i] || (only_by_counts && !updates.has_penalties[j]);
  }
  return is_last;
}

// Writes `count` words, and zeros behind them up to num_old words. A whole warp calls this.
__device__ inline void write_list(int32_t* to, const int32_t* from, int64_t count, int num_old) {
  const int num_written = max(static_cast<int>(count), num_old);
  for (int i = threadIdx.x % kWarpSize; i < num_written; i += kWarpSize) {
    to[i] = i < count ? from[i] : 0;
  }
}

// Checks the lists of update i and writes them to its slot. A whole warp calls this. Unused words
// of a slot's lists are kept zero: a new slot is all zeros, and old entries are cleared here.
__device__ inline void apply_lists(const PlanStepParams& p, const Step& step, int i,
                                   const SlotUpdates& updates) {
  const int lane = threadIdx.x % kWarpSize;
  const SlotUpdate u = slot_update_at(step, updates.offset[i]);
  const int32_t* words = step.words;
  check_ids(words + u.bias_ids(), u.num_bias, p.vocab_size, lane, kWarpSize);
  check_ids(words + u.stop_ids(), u.num_stop + u.num_prompt + u.num_output, p.vocab_size, lane,
            kWarpSize);
  for (int64_t j = lane; j < u.num_bias; j += kWarpSize) {
    const float value = __int_as_float(words[u.bias_values() + j]);
    require(value >= -FLT_MAX && value <= FLT_MAX);
  }
  if (!updates.is_last[i]) return;
  int32_t* row = p.slots + u.slot * p.slots_stride;
  const int num_old_bias = updates.num_old_bias[i], num_old_stop = updates.num_old_stop[i];
  write_list(row + kSlotBiasIds, words + u.bias_ids(), u.num_bias, num_old_bias);
  write_list(row + kSlotBiasValues, words + u.bias_values(), u.num_bias, num_old_bias);
  write_list(row + kSlotStopIds, words + u.stop_ids(), u.num_stop, num_old_stop);
}

// Writes the headers of all updated slots, and the lists of those that have any.
__device__ inline void write_slots(const PlanStepParams& p, const Step& step, int count,
                                   SlotUpdates& updates) {
  const int own = threadIdx.x;
  if (own < count) updates.is_last[own] = is_last_of(updates, own, count, false);
  __syncthreads();
  for (int at = threadIdx.x; at < count * kSlotHeaderWords; at += kThreads) {
    const int i = at / kSlotHeaderWords, word = at % kSlotHeaderWords;
    if (!updates.is_last[i]) continue;
    p.slots[updates.slot[i] * p.slots_stride + word] =
        step.words[updates.offset[i] + kSlotUpdateWords + word];
  }
  for (int i = threadIdx.x / kWarpSize; i < count; i += kWarps) {
    if (updates.has_lists[i]) apply_lists(p, step, i, updates);
  }
  __syncthreads();
}

// The aligned 32-bit word that contains a 16-bit count, and the count's shift within it, for
// atomics. If the tensor has an odd size, its last word reaches 2 bytes beyond the tensor but not
// beyond its allocation; those 2 bytes are not changed.
struct CountWord {
  uint32_t* word;
  int shift;
};

__device__ __forceinline__ CountWord count_word(int16_t* counts, int32_t token) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(counts + token);
  return {reinterpret_cast<uint32_t*>(address & ~uintptr_t{3}), static_cast<int>(address % 4) * 8};
}

__device__ inline void zero_counts(int16_t* counts, int64_t n) {
  const int64_t num_head =
      min(static_cast<int64_t>(-reinterpret_cast<uintptr_t>(counts) % 16 / 2), n);
  const int64_t num_vecs = (n - num_head) / 8;
  uint4* vecs = reinterpret_cast<uint4*>(counts + num_head);
  for (int64_t i = threadIdx.x; i < num_head; i += kThreads) counts[i] = 0;
  for (int64_t i = threadIdx.x; i < num_vecs; i += kThreads) vecs[i] = uint4{};
  for (int64_t i = num_head + num_vecs * 8 + threadIdx.x; i < n; i += kThreads) counts[i] = 0;
}

// Counts the tokens of the output, saturating, and marks those of the prompt. All threads call
// this.
__device__ inline void rebuild_counts(const PlanStepParams& p, const Step& step,
                                      const SlotUpdate& u) {
  int16_t* counts = p.token_counts + u.slot * p.token_counts_stride;
  zero_counts(counts, p.vocab_size);
  __syncthreads();
  // Counts at most kMaxTokenCount tokens before the counts are cut back, so that no count overflows
  // its 15 bits by more than the sign bit.
  for (int64_t begin = 0; begin < u.num_output; begin += kMaxTokenCount) {
    const int32_t* tokens = step.words + u.output() + begin;
    const int64_t n = min(u.num_output - begin, int64_t{kMaxTokenCount});
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const CountWord at = count_word(counts, tokens[i]);
      atomicAdd(at.word, 1u << at.shift);
    }
    __syncthreads();
    if (u.num_output <= kMaxTokenCount) break;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      if (counts[tokens[i]] < 0) counts[tokens[i]] = kMaxTokenCount;
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < u.num_prompt; i += kThreads) {
    const CountWord at = count_word(counts, step.words[u.prompt() + i]);
    atomicOr(at.word, 0x8000u << at.shift);
  }
  __syncthreads();
}

__device__ inline void apply_slot_updates(const PlanStepParams& p, const Step& step,
                                          SlotUpdates& updates) {
  if (threadIdx.x == 0) updates.next = step.slot_updates_at;
  for (int64_t done = 0; done < step.num_slot_updates; done += kBatch) {
    __syncthreads();
    const int count = static_cast<int>(min(step.num_slot_updates - done, int64_t{kBatch}));
    find_updates(p, step, count, updates);
    write_slots(p, step, count, updates);
    if (!updates.has_counts) continue;
    for (int i = 0; i < count; ++i) {
      if (!updates.has_penalties[i] || !is_last_of(updates, i, count, true)) continue;
      rebuild_counts(p, step, slot_update_at(step, updates.offset[i]));
    }
  }
  __syncthreads();
}

}  // namespace
}  // namespace pyserve::gpu
