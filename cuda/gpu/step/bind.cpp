// The CUDA side of plan_step: checks the tensors. The content of step_input is checked by the
// kernel.
#include <torch/csrc/stable/library.h>

#include "common/args/plan_step.h"
#include "gpu/core/bind.h"
#include "gpu/step/plan_step.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "plan_step";

void plan_step(const Tensor& step_input, const Tensor& slots, const Tensor& block_table,
               const Tensor& token_counts, int64_t block_size, const Tensor& input_ids,
               const Tensor& positions, const Tensor& slot_mapping, const Tensor& row_slots,
               const Tensor& cu_seqlens_q, const Tensor& seq_lens, const Tensor& sample_rows) {
  const PlanStepArgs args = plan_step_args(
      {kOp, Place::kCuda}, step_input, slots, block_table, token_counts, block_size, input_ids,
      positions, slot_mapping, row_slots, cu_seqlens_q, seq_lens, sample_rows);
  PYSERVE_CHECK(args.slots.size(0) <= gpu::kMaxPlanSlots, kOp, ": ", args.slots.size(0),
                " slots, at most ", gpu::kMaxPlanSlots);
  const gpu::PlanStepParams params{.step_input = args.step_input.ptr<int32_t>(),
                                   .num_words = args.step_input.size(0),
                                   .slots = args.slots.ptr<int32_t>(),
                                   .slots_stride = args.slots.stride(0),
                                   .num_slots = args.slots.size(0),
                                   .block_table = args.block_table.ptr<int32_t>(),
                                   .block_table_stride = args.block_table.stride(0),
                                   .max_blocks_per_seq = args.block_table.size(1),
                                   .token_counts = args.token_counts.ptr<int16_t>(),
                                   .token_counts_stride = args.token_counts.stride(0),
                                   .vocab_size = args.token_counts.size(1),
                                   .block_size = block_size,
                                   .input_ids = args.input_ids.ptr<int32_t>(),
                                   .positions = args.positions.ptr<int32_t>(),
                                   .slot_mapping = args.slot_mapping.ptr<int64_t>(),
                                   .row_slots = args.row_slots.ptr<int32_t>(),
                                   .cu_seqlens_q = args.cu_seqlens_q.ptr<int32_t>(),
                                   .seq_lens = args.seq_lens.ptr<int32_t>(),
                                   .sample_rows = args.sample_rows.ptr<int32_t>(),
                                   .num_tokens = args.input_ids.size(0),
                                   .num_rows = args.row_slots.size(0)};
  check_launch(kOp, gpu::launch_plan_step(params, current_stream(step_input)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) { m.impl("plan_step", TORCH_BOX(&pyserve::plan_step)); }
