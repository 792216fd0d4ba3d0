// plan_step: applies a packed StepInput (common/step.h) to the slots and derives the batch metadata
// of the step. Nothing of the buffer is trusted: what the CPU op refuses is a trap here.
//
// One CTA, so that the phases can follow each other: slot updates (a warp each; the token counts of
// one slot by all threads), block updates, rows (a thread each, prefix sums of their lengths), the
// tokens of rows with more than one (a thread each, its row by binary search). Updates of one place
// count in their order: the last one wins.
// Floor: the latency of about four dependent loads.
#include <cfloat>

#include "common/step.h"
#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/step/plan_step.h"

namespace pyserve::gpu {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBatch = kThreads;    // updates that are applied at once
constexpr int kHashBuckets = 4096;  // of block updates
constexpr int kCachedRows = 4096;   // whose token ranges lie in shared memory
constexpr int64_t kSlotUpdateHead = int64_t{kSlotUpdateWords} + kSlotHeaderWords;

// Words of the slot updates that are copied to shared memory, where one thread follows their chain.
constexpr int kWindowWords = 4096;

struct SlotUpdates {
  int32_t window[kWindowWords];
  int32_t offset[kBatch];  // words
  int32_t slot[kBatch];
  bool has_penalties[kBatch];
};

struct Shared {
  union {
    SlotUpdates updates;
    uint32_t latest[kHashBuckets];  // 1 + the last block update whose place has this hash
    struct {
      int32_t begin[kCachedRows + 1];        // first token of each row
      uint32_t is_used[kMaxPlanSlots / 32];  // bit of each slot that has a row
    } rows;
  };
  int64_t warp_sums[kWarps];
  int64_t next;  // word of the next slot update
  bool has_counts;
};

__device__ __forceinline__ void require(bool condition) {
  if (!condition) __trap();
}

// Header words, checked: sections lie inside the buffer and in order.
struct Step {
  const int32_t* words;
  int64_t magic;
  int64_t num_words, num_rows, num_tokens, num_samples;
  int64_t rows_at, tokens_at, block_updates_at, slot_updates_at;
  int64_t num_block_updates, num_slot_updates, max_query_len;
};

__device__ inline Step checked_step(const PlanStepParams& p) {
  const int32_t* w = p.step_input;
  const Step step{w,
                  w[kHeaderMagic],
                  w[kHeaderNumWords],
                  w[kHeaderNumRows],
                  w[kHeaderNumTokens],
                  w[kHeaderNumSamples],
                  w[kHeaderRowsOffset],
                  w[kHeaderTokensOffset],
                  w[kHeaderBlockUpdatesOffset],
                  w[kHeaderSlotUpdatesOffset],
                  w[kHeaderNumBlockUpdates],
                  w[kHeaderNumSlotUpdates],
                  w[kHeaderMaxQueryLen]};
  require(step.magic == kStepMagic);
  require(step.num_words >= kHeaderWords && step.num_words <= p.num_words);
  require(step.num_rows >= 0 && step.num_rows <= p.num_rows);
  require(step.num_tokens >= 0 && step.num_tokens <= p.num_tokens);
  int64_t end = kHeaderWords;
  auto section = [&](int64_t offset, int64_t count, int64_t words) {
    require(count >= 0 && offset >= end && offset <= step.num_words - count * words);
    end = offset + count * words;
  };
  section(step.rows_at, step.num_rows, kRowWords);
  section(step.tokens_at, 0, 0);
  section(step.block_updates_at, step.num_block_updates, kBlockUpdateWords);
  section(step.slot_updates_at, step.num_slot_updates, kSlotUpdateWords);
  return step;
}

// ---- slot updates -------------------------------------------------------------------------------

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

// Finds the records of up to kBatch updates from s.next on; they are chained by their lengths.
__device__ inline void find_updates(const Step& step, int count, Shared& s) {
  const int64_t begin = s.next;
  const int num_staged = static_cast<int>(min(step.num_words - begin, int64_t{kWindowWords}));
  for (int i = threadIdx.x; i < num_staged; i += kThreads) {
    s.updates.window[i] = step.words[begin + i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t at = begin;
    for (int i = 0; i < count; ++i) {
      require(at + kSlotUpdateHead <= step.num_words);
      s.updates.offset[i] = static_cast<int32_t>(at);
      const int64_t word = at + kSlotUpdateNumWords;
      const int64_t size =
          word - begin < num_staged ? s.updates.window[word - begin] : step.words[word];
      require(size >= kSlotUpdateHead && size <= step.num_words - at);
      at += size;
    }
    s.next = at;
    s.has_counts = false;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int32_t* record = step.words + s.updates.offset[i];
    s.updates.slot[i] = record[kSlotUpdateSlot];
    s.updates.has_penalties[i] = record[int{kSlotUpdateWords} + int{kSlotHasPenalties}] != 0;
    if (s.updates.has_penalties[i]) s.has_counts = true;
  }
  __syncthreads();
}

__device__ inline void check_ids(const int32_t* ids, int64_t n, int64_t vocab_size, int rank,
                                 int num_threads) {
  for (int64_t i = rank; i < n; i += num_threads) require(ids[i] >= 0 && ids[i] < vocab_size);
}

__device__ inline void check_sampling(const int32_t* header) {
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
}

// Whether a later update of this batch replaces what update i does to its slot; a whole warp.
__device__ inline bool is_replaced(const SlotUpdates& updates, int i, int count,
                                   bool only_by_counts) {
  bool found = false;
  for (int j = i + 1 + static_cast<int>(threadIdx.x % kWarpSize); j < count; j += kWarpSize) {
    found |= updates.slot[j] == updates.slot[i] && (updates.has_penalties[j] || !only_by_counts);
  }
  return __any_sync(kFullMask, found) != 0;
}

// Checks update i and writes its slot row; a whole warp.
__device__ inline void apply_slot_update(const PlanStepParams& p, const Step& step, int i,
                                         int count, const SlotUpdates& updates) {
  const int lane = threadIdx.x % kWarpSize;
  const SlotUpdate u = slot_update_at(step, updates.offset[i]);
  require(u.slot >= 0 && u.slot < p.num_slots);
  require(u.num_bias >= 0 && u.num_bias <= kMaxLogitBias);
  require(u.num_stop >= 0 && u.num_stop <= kMaxStopTokenIds);
  require(u.num_prompt >= 0 && u.num_output >= 0);
  require(u.num_words ==
          kSlotUpdateHead + 2 * u.num_bias + u.num_stop + u.num_prompt + u.num_output);
  const int32_t* header = step.words + u.header();
  require(header[kSlotLastToken] >= -1 && header[kSlotLastToken] < p.vocab_size);
  require(header[kSlotNumComputed] >= 0);
  check_sampling(header);
  check_ids(step.words + u.bias_ids(), u.num_bias, p.vocab_size, lane, kWarpSize);
  check_ids(step.words + u.stop_ids(), u.num_stop + u.num_prompt + u.num_output, p.vocab_size, lane,
            kWarpSize);
  for (int64_t j = lane; j < u.num_bias; j += kWarpSize) {
    const float value = __int_as_float(step.words[u.bias_values() + j]);
    require(value >= -FLT_MAX && value <= FLT_MAX);
  }
  if (is_replaced(updates, i, count, false)) return;
  int32_t* row = p.slots + u.slot * p.slots_stride;
  for (int word = lane; word < kSlotWords; word += kWarpSize) {
    int32_t value = 0;
    if (word < kSlotHeaderWords) {
      value = header[word];
    } else if (word < kSlotBiasValues) {
      const int at = word - kSlotBiasIds;
      if (at < u.num_bias) value = step.words[u.bias_ids() + at];
    } else if (word < kSlotStopIds) {
      const int at = word - kSlotBiasValues;
      if (at < u.num_bias) value = step.words[u.bias_values() + at];
    } else if (word - kSlotStopIds < u.num_stop) {
      value = step.words[u.stop_ids() + word - kSlotStopIds];
    }
    row[word] = value;
  }
}

// The 32-bit word that holds a count, and where in it. Where the tensor's size is odd, the last
// word reaches 2 bytes beyond it, inside its allocation; those are left as they are.
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

// Counts the output's tokens, saturating, and marks the prompt's; all threads.
__device__ inline void rebuild_counts(const PlanStepParams& p, const Step& step,
                                      const SlotUpdate& u) {
  int16_t* counts = p.token_counts + u.slot * p.token_counts_stride;
  zero_counts(counts, p.vocab_size);
  __syncthreads();
  // At most kMaxTokenCount tokens at a time: no 16-bit count overflows before it is cut back.
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

__device__ inline void apply_slot_updates(const PlanStepParams& p, const Step& step, Shared& s) {
  if (threadIdx.x == 0) s.next = step.slot_updates_at;
  for (int64_t done = 0; done < step.num_slot_updates; done += kBatch) {
    __syncthreads();
    const int count = static_cast<int>(min(step.num_slot_updates - done, int64_t{kBatch}));
    find_updates(step, count, s);
    for (int i = threadIdx.x / kWarpSize; i < count; i += kWarps) {
      apply_slot_update(p, step, i, count, s.updates);
    }
    __syncthreads();
    if (!s.has_counts) continue;
    for (int i = 0; i < count; ++i) {
      if (!s.updates.has_penalties[i] || is_replaced(s.updates, i, count, true)) continue;
      rebuild_counts(p, step, slot_update_at(step, s.updates.offset[i]));
    }
  }
  __syncthreads();
}

// ---- block updates ------------------------------------------------------------------------------

// Of several updates of one place the last must win. Each thread takes one update: it is the last
// if no later one has the same hash; else the thread looks through all later ones.
__device__ inline void apply_block_updates(const PlanStepParams& p, const Step& step, Shared& s) {
  const int32_t* updates = step.words + step.block_updates_at;
  for (int64_t done = 0; done < step.num_block_updates; done += kBatch) {
    const int count = static_cast<int>(min(step.num_block_updates - done, int64_t{kBatch}));
    for (int i = threadIdx.x; i < kHashBuckets; i += kThreads) s.latest[i] = 0;
    __syncthreads();
    const int i = threadIdx.x;
    const int32_t* batch = updates + done * kBlockUpdateWords;
    int32_t slot = 0, index = 0, block_id = 0;
    uint32_t* latest = nullptr;
    if (i < count) {
      slot = batch[i * kBlockUpdateWords + kBlockUpdateSlot];
      index = batch[i * kBlockUpdateWords + kBlockUpdateIndex];
      block_id = batch[i * kBlockUpdateWords + kBlockUpdateBlockId];
      require(slot >= 0 && slot < p.num_slots && index >= 0 && index < p.max_blocks_per_seq &&
              block_id >= 0);
      const uint32_t hash =
          static_cast<uint32_t>(slot) * 0x9E3779B1u + static_cast<uint32_t>(index) * 0x85EBCA77u;
      latest = &s.latest[(hash ^ hash >> 15) % kHashBuckets];
      atomicMax(latest, static_cast<uint32_t>(i + 1));
    }
    __syncthreads();
    if (i < count) {
      bool is_last = true;
      const int end = *latest == static_cast<uint32_t>(i + 1) ? i : count;
      for (int j = i + 1; j < end && is_last; ++j) {
        const int32_t* other = batch + j * kBlockUpdateWords;
        is_last = other[kBlockUpdateSlot] != slot || other[kBlockUpdateIndex] != index;
      }
      if (is_last) p.block_table[slot * p.block_table_stride + index] = block_id;
    }
    __syncthreads();
  }
}

// ---- rows and tokens ----------------------------------------------------------------------------

__device__ __forceinline__ int64_t kv_slot(const PlanStepParams& p, int64_t slot, int64_t position,
                                           int log2_block_size) {
  const int64_t index =
      log2_block_size >= 0 ? position >> log2_block_size : position / p.block_size;
  const int64_t offset = position - index * p.block_size;
  return p.block_table[slot * p.block_table_stride + index] * p.block_size + offset;
}

// Tokens and samples of rows are summed up as one number. Of the kThreads rows that are summed at
// once each has fewer than 2^31 tokens.
constexpr int kSampleShift = 48;
static_assert(int64_t{kThreads} << 31 < int64_t{1} << kSampleShift);

// Plans row r, except the tokens of a row that has several. All threads must call it.
__device__ inline void plan_row(const PlanStepParams& p, const Step& step, int64_t r,
                                int log2_block_size, int64_t& num_tokens, int& num_samples,
                                Shared& s) {
  const bool is_row = r < step.num_rows;
  const int32_t* row = step.words + step.rows_at + r * kRowWords;
  int32_t slot = 0, query_len = 0, offset = 0;
  bool is_sampled = false;
  if (is_row) {
    slot = row[kRowSlot];
    query_len = row[kRowQueryLen];
    offset = row[kRowTokensOffset];
    is_sampled = row[kRowSample] != 0;
    require(slot >= 0 && slot < p.num_slots);
    require(query_len > 0 && query_len <= min(step.num_tokens, step.max_query_len));
    const uint32_t bit = 1u << (slot % 32);
    require((atomicOr(&s.rows.is_used[slot / 32], bit) & bit) == 0);  // no other row has this slot
  }
  int64_t total;
  const int64_t before =
      block_exclusive_sum(s.warp_sums, query_len + (int64_t{is_sampled} << kSampleShift), total);
  constexpr int64_t kTokens = (int64_t{1} << kSampleShift) - 1;
  if (is_row) {
    const int64_t begin = num_tokens + (before & kTokens), end = begin + query_len;
    require(end <= step.num_tokens);
    int32_t* state = p.slots + slot * p.slots_stride;
    const int64_t start = state[kSlotNumComputed], seq_len = start + query_len;
    require(start >= 0 && seq_len <= INT32_MAX && seq_len <= p.max_blocks_per_seq * p.block_size);
    require(offset == -1
                ? query_len == 1
                : offset >= 0 && step.tokens_at + offset + query_len <= step.block_updates_at);
    if (query_len == 1) {
      const int32_t id = offset == -1 ? state[kSlotLastToken] : step.words[step.tokens_at + offset];
      require(id >= 0 && id < p.vocab_size);
      p.input_ids[begin] = id;
      p.positions[begin] = static_cast<int32_t>(start);
      p.slot_mapping[begin] = kv_slot(p, slot, start, log2_block_size);
    }
    state[kSlotNumComputed] = static_cast<int32_t>(seq_len);
    p.row_slots[r] = static_cast<int32_t>(slot);
    p.seq_lens[r] = static_cast<int32_t>(seq_len);
    p.cu_seqlens_q[r + 1] = static_cast<int32_t>(end);
    if (r < kCachedRows) s.rows.begin[r + 1] = static_cast<int32_t>(end);
    if (is_sampled) {
      int32_t* sample = p.sample_rows + 2 * (num_samples + (before >> kSampleShift));
      sample[0] = static_cast<int32_t>(end - 1);
      sample[1] = static_cast<int32_t>(slot);
    }
  }
  num_tokens += total & kTokens;
  num_samples += static_cast<int>(total >> kSampleShift);
}

// The tokens of rows with more than one.
__device__ inline void plan_tokens(const PlanStepParams& p, const Step& step, int log2_block_size,
                                   const Shared& s) {
  const int32_t* ends = step.num_rows <= kCachedRows ? s.rows.begin : p.cu_seqlens_q;
  const int num_rows = static_cast<int>(step.num_rows);
  for (int64_t token = threadIdx.x; token < step.num_tokens; token += kThreads) {
    int low = 0, high = num_rows;  // ends[low] <= token < ends[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (ends[middle] <= token ? low : high) = middle;
    }
    const int64_t begin = ends[low], query_len = ends[low + 1] - begin;
    if (query_len == 1) continue;
    const int32_t* row = step.words + step.rows_at + int64_t{low} * kRowWords;
    const int64_t i = token - begin, slot = row[kRowSlot];
    const int64_t position = p.seq_lens[low] - query_len + i;
    const int32_t id = step.words[step.tokens_at + row[kRowTokensOffset] + i];
    require(id >= 0 && id < p.vocab_size);
    p.input_ids[token] = id;
    p.positions[token] = static_cast<int32_t>(position);
    p.slot_mapping[token] = kv_slot(p, slot, position, log2_block_size);
  }
}

__device__ inline void pad(const PlanStepParams& p, const Step& step) {
  for (int64_t i = step.num_tokens + threadIdx.x; i < p.num_tokens; i += kThreads) {
    p.input_ids[i] = 0;
    p.positions[i] = 0;
    p.slot_mapping[i] = -1;
  }
  for (int64_t i = step.num_rows + threadIdx.x; i < p.num_rows; i += kThreads) {
    p.row_slots[i] = -1;
    p.seq_lens[i] = 0;
    p.cu_seqlens_q[i + 1] = static_cast<int32_t>(step.num_tokens);
  }
  for (int64_t i = 2 * step.num_samples + threadIdx.x; i < 2 * p.num_rows; i += kThreads) {
    p.sample_rows[i] = -1;
  }
}

__global__ void __launch_bounds__(kThreads)
    plan_step_kernel(PlanStepParams p, int log2_block_size) {
  __shared__ Shared s;
  pdl_launch_dependents();  // nothing to wait for: it is launched the usual way, behind a copy
  const Step step = checked_step(p);
  require(step.num_samples >= 0 && step.num_samples <= step.num_rows);
  if (step.num_slot_updates > 0) apply_slot_updates(p, step, s);
  if (step.num_block_updates > 0) apply_block_updates(p, step, s);
  for (int i = threadIdx.x; i < (p.num_slots + 31) / 32; i += kThreads) s.rows.is_used[i] = 0;
  if (threadIdx.x == 0) s.rows.begin[0] = p.cu_seqlens_q[0] = 0;
  pad(p, step);
  __syncthreads();
  int64_t num_tokens = 0;
  int num_samples = 0;
  for (int64_t first = 0; first < step.num_rows; first += kThreads) {
    plan_row(p, step, first + threadIdx.x, log2_block_size, num_tokens, num_samples, s);
  }
  require(num_tokens == step.num_tokens && num_samples == step.num_samples);
  if (step.num_tokens == step.num_rows) return;
  __syncthreads();
  plan_tokens(p, step, log2_block_size, s);
}

}  // namespace

cudaError_t launch_plan_step(const PlanStepParams& params, cudaStream_t stream) {
  int log2_block_size = -1;
  for (int bit = 0; bit < 62; ++bit) {
    if (params.block_size == int64_t{1} << bit) log2_block_size = bit;
  }
  return launch(&plan_step_kernel, dim3(1), dim3(kThreads), 0, stream, params, log2_block_size);
}

}  // namespace pyserve::gpu
