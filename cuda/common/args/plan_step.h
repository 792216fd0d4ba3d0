// The arguments of plan_step, checked. The content of step_input is checked by the kernel.
#pragma once

#include "../check.h"
#include "../step.h"

namespace pyserve {

struct PlanStepArgs {
  View step_input, slots, block_table, token_counts;
  View input_ids, positions, slot_mapping, row_slots, cu_seqlens_q, seq_lens, sample_rows;
};

inline PlanStepArgs plan_step_args(const ViewReader& read, const Tensor& step_input,
                                   const Tensor& slots, const Tensor& block_table,
                                   const Tensor& token_counts, int64_t block_size,
                                   const Tensor& input_ids, const Tensor& positions,
                                   const Tensor& slot_mapping, const Tensor& row_slots,
                                   const Tensor& cu_seqlens_q, const Tensor& seq_lens,
                                   const Tensor& sample_rows) {
  constexpr auto kInt = ScalarType::Int;
  const PlanStepArgs args{read("step_input", step_input, 1, kInt),
                          read("slots", slots, 2, kInt),
                          read("block_table", block_table, 2, kInt),
                          read("token_counts", token_counts, 2, ScalarType::Short),
                          read("input_ids", input_ids, 1, kInt),
                          read("positions", positions, 1, kInt),
                          read("slot_mapping", slot_mapping, 1, ScalarType::Long),
                          read("row_slots", row_slots, 1, kInt),
                          read("cu_seqlens_q", cu_seqlens_q, 1, kInt),
                          read("seq_lens", seq_lens, 1, kInt),
                          read("sample_rows", sample_rows, 2, kInt)};
  const int64_t num_slots = args.slots.size(0), num_rows = args.row_slots.size(0);
  PYSERVE_CHECK(block_size > 0, read.op, ": block_size ", block_size);
  check_size(args.slots, 1, kSlotWords);
  check_size(args.block_table, 0, num_slots);
  check_size(args.token_counts, 0, num_slots);
  check_size(args.positions, 0, args.input_ids.size(0));
  check_size(args.slot_mapping, 0, args.input_ids.size(0));
  check_size(args.seq_lens, 0, num_rows);
  check_size(args.cu_seqlens_q, 0, num_rows + 1);
  check_size(args.sample_rows, 0, num_rows);
  check_size(args.sample_rows, 1, 2);
  PYSERVE_CHECK(num_rows <= 1 || args.sample_rows.stride(0) == 2, read.op,
                ": sample_rows must be contiguous");
  PYSERVE_CHECK(args.step_input.size(0) >= kHeaderWords, read.op,
                ": bad step input: ", args.step_input.size(0), " words");
  return args;
}

}  // namespace pyserve
