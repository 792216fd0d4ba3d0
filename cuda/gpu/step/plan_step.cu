// plan_step: applies a packed StepInput (common/step.h, int32) to the slots and the block table,
// and derives the batch metadata of the step: input_ids, positions, slot_mapping, row_slots,
// cu_seqlens_q, seq_lens and sample_rows. Every value of the buffer is checked; where the CPU op
// would throw, this kernel traps.
//
// Work: one CTA, so that barriers can separate the phases. These are the slot updates
// (slot_updates.cuh); the block updates, one thread each; the rows, one thread each, with prefix
// sums over their lengths; and the tokens of rows with more than one, one thread each, which finds
// its row by binary search. Where several updates go to the same place, the last one counts.
// Bound by the latency of about four dependent loads.
#include "common/step.h"
#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/step/plan_step.h"
#include "gpu/step/slot_updates.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kHashBuckets = 4096;  // hash table of the places that block updates write
constexpr int kCachedRows = 4096;   // the token ranges of so many rows are held in shared memory

struct Shared {
  union {
    SlotUpdates updates;
    uint32_t latest[kHashBuckets];  // 1 + the index of the last block update with this hash, or 0
    struct {
      int32_t begin[kCachedRows + 1];        // first token of each row
      uint32_t is_used[kMaxPlanSlots / 32];  // one bit for each slot, set if it has a row
    } rows;
  };
  int64_t warp_sums[kWarps];
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

// ---- block updates ------------------------------------------------------------------------------

// Applies the block updates, one thread each. Where several updates go to the same place, only the
// last may write. An update writes if it is the last one with its hash. If a later one has the same
// hash, its thread compares it with all later updates of the batch.
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

// Numbers of tokens and samples are summed together in one 64-bit number, the samples from bit
// kSampleShift on. A prefix sum covers kThreads rows of fewer than 2^31 tokens each, so the tokens
// stay below that bit.
constexpr int kSampleShift = 48;
static_assert(int64_t{kThreads} << 31 < int64_t{1} << kSampleShift);

// Plans row r, except for the tokens of a row with more than one. All threads must call this.
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

// Plans the tokens of rows with more than one token.
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
  pdl_launch_dependents();  // no wait: this kernel is launched the ordinary way, behind a copy
  const Step step = checked_step(p);
  require(step.num_samples >= 0 && step.num_samples <= step.num_rows);
  if (step.num_slot_updates > 0) apply_slot_updates(p, step, s.updates);
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
