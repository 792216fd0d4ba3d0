// plan_step on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyserve::gpu {

constexpr int64_t kMaxPlanSlots = 131072;

struct PlanStepParams {
  const int32_t* step_input;  // common/step.h
  int64_t num_words;          // length of step_input in words
  int32_t* slots;             // [num_slots, kSlotWords]; strides in elements
  int64_t slots_stride, num_slots;
  int32_t* block_table;  // [num_slots, max_blocks_per_seq]
  int64_t block_table_stride, max_blocks_per_seq;
  int16_t* token_counts;  // [num_slots, vocab_size]
  int64_t token_counts_stride, vocab_size;
  int64_t block_size;
  int32_t* input_ids;     // [num_tokens]
  int32_t* positions;     // [num_tokens]
  int64_t* slot_mapping;  // [num_tokens]
  int32_t* row_slots;     // [num_rows]
  int32_t* cu_seqlens_q;  // [num_rows + 1]
  int32_t* seq_lens;      // [num_rows]
  int32_t* sample_rows;   // [num_rows, 2]
  int64_t num_tokens, num_rows;
};

cudaError_t launch_plan_step(const PlanStepParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
