// The plan_step op on CUDA: checks of the tensors; the buffer's content is checked by the kernel.
#include <torch/csrc/stable/library.h>

#include "common/step.h"
#include "gpu/core/bind.h"
#include "gpu/step/plan_step.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "plan_step";

void plan_step(const Tensor& step_input_tensor, const Tensor& slots_tensor,
               const Tensor& block_table_tensor, const Tensor& token_counts_tensor,
               int64_t block_size, const Tensor& input_ids_tensor, const Tensor& positions_tensor,
               const Tensor& slot_mapping_tensor, const Tensor& row_slots_tensor,
               const Tensor& cu_seqlens_q_tensor, const Tensor& seq_lens_tensor,
               const Tensor& sample_rows_tensor) {
  constexpr auto kInt = ScalarType::Int;
  const View step_input = cuda_view(kOp, "step_input", step_input_tensor, 1, kInt);
  const View slots = cuda_view(kOp, "slots", slots_tensor, 2, kInt);
  const View block_table = cuda_view(kOp, "block_table", block_table_tensor, 2, kInt);
  const View token_counts =
      cuda_view(kOp, "token_counts", token_counts_tensor, 2, ScalarType::Short);
  const View input_ids = cuda_view(kOp, "input_ids", input_ids_tensor, 1, kInt);
  const View positions = cuda_view(kOp, "positions", positions_tensor, 1, kInt);
  const View slot_mapping =
      cuda_view(kOp, "slot_mapping", slot_mapping_tensor, 1, ScalarType::Long);
  const View row_slots = cuda_view(kOp, "row_slots", row_slots_tensor, 1, kInt);
  const View cu_seqlens_q = cuda_view(kOp, "cu_seqlens_q", cu_seqlens_q_tensor, 1, kInt);
  const View seq_lens = cuda_view(kOp, "seq_lens", seq_lens_tensor, 1, kInt);
  const View sample_rows = cuda_view(kOp, "sample_rows", sample_rows_tensor, 2, kInt);
  const int64_t num_slots = slots.size(0), num_rows = row_slots.size(0);
  PYSERVE_CHECK(block_size > 0, kOp, ": block_size ", block_size);
  PYSERVE_CHECK(num_slots <= gpu::kMaxPlanSlots, kOp, ": ", num_slots, " slots, at most ",
                gpu::kMaxPlanSlots);
  PYSERVE_CHECK(step_input.size(0) >= kHeaderWords, kOp, ": bad step input: ", step_input.size(0),
                " words");
  check_size(slots, 1, kSlotWords);
  check_size(block_table, 0, num_slots);
  check_size(token_counts, 0, num_slots);
  check_size(positions, 0, input_ids.size(0));
  check_size(slot_mapping, 0, input_ids.size(0));
  check_size(seq_lens, 0, num_rows);
  check_size(cu_seqlens_q, 0, num_rows + 1);
  check_size(sample_rows, 0, num_rows);
  check_size(sample_rows, 1, 2);
  PYSERVE_CHECK(num_rows <= 1 || sample_rows.stride(0) == 2, kOp,
                ": sample_rows must be contiguous");
  const gpu::PlanStepParams params{.step_input = step_input.ptr<int32_t>(),
                                   .num_words = step_input.size(0),
                                   .slots = slots.ptr<int32_t>(),
                                   .slots_stride = slots.stride(0),
                                   .num_slots = num_slots,
                                   .block_table = block_table.ptr<int32_t>(),
                                   .block_table_stride = block_table.stride(0),
                                   .max_blocks_per_seq = block_table.size(1),
                                   .token_counts = token_counts.ptr<int16_t>(),
                                   .token_counts_stride = token_counts.stride(0),
                                   .vocab_size = token_counts.size(1),
                                   .block_size = block_size,
                                   .input_ids = input_ids.ptr<int32_t>(),
                                   .positions = positions.ptr<int32_t>(),
                                   .slot_mapping = slot_mapping.ptr<int64_t>(),
                                   .row_slots = row_slots.ptr<int32_t>(),
                                   .cu_seqlens_q = cu_seqlens_q.ptr<int32_t>(),
                                   .seq_lens = seq_lens.ptr<int32_t>(),
                                   .sample_rows = sample_rows.ptr<int32_t>(),
                                   .num_tokens = input_ids.size(0),
                                   .num_rows = num_rows};
  check_launch(kOp, gpu::launch_plan_step(params, current_stream(step_input_tensor)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) { m.impl("plan_step", TORCH_BOX(&pyserve::plan_step)); }
