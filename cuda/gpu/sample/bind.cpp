// The CUDA side of the ops on logits: checks the arguments and calls the launchers of sample.cu,
// bitmask.cu and logprobs.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/bitmask.h"
#include "common/args/logprobs.h"
#include "common/args/sample.h"
#include "gpu/core/bind.h"
#include "gpu/sample/bitmask.h"
#include "gpu/sample/logprobs.h"
#include "gpu/sample/sample.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "sample";

void sample(const Tensor& logits, const Tensor& sample_slots, const Tensor& slots,
            const Tensor& token_counts, const std::optional<Tensor>& workspace_tensor,
            const Tensor& sampled) {
  const ViewReader read{kOp, Place::kCuda};
  const SampleArgs args = sample_args(read, logits, sample_slots, slots, token_counts, sampled);
  const int64_t num_rows = args.num_rows(), vocab_size = args.vocab_size();
  PYSERVE_CHECK(num_rows <= 1 << 20, kOp, ": ", num_rows, " rows, at most ", 1 << 20);
  PYSERVE_CHECK(workspace_tensor.has_value(), kOp, ": needs a workspace on CUDA");
  const View workspace = read("workspace", *workspace_tensor, 1, ScalarType::Long);
  const int64_t wanted = gpu::sample_workspace_words(num_rows, vocab_size);
  PYSERVE_CHECK(workspace.size(0) >= wanted, kOp, ": a workspace of ", workspace.size(0),
                " words for ", num_rows, " rows, needs ", wanted);
  const gpu::SampleParams params{.logits = args.logits.data,
                                 .logits_stride = args.logits.stride(0),
                                 .dtype = half_dtype(args.logits),
                                 .sample_slots = args.sample_slots.ptr<int32_t>(),
                                 .sample_slots_stride = args.sample_slots.stride(0),
                                 .slots = args.slots.ptr<int32_t>(),
                                 .slots_stride = args.slots.stride(0),
                                 .num_slots = args.slots.size(0),
                                 .token_counts = args.token_counts.ptr<int16_t>(),
                                 .token_counts_stride = args.token_counts.stride(0),
                                 .sampled = args.sampled.ptr<int32_t>(),
                                 .num_rows = static_cast<int32_t>(num_rows),
                                 .vocab_size = static_cast<int32_t>(vocab_size),
                                 .workspace = workspace.ptr<uint64_t>()};
  check_launch(kOp, gpu::launch_sample(params, current_stream(logits)));
}

void apply_bitmask(const Tensor& logits, const Tensor& bitmask, const Tensor& rows) {
  constexpr const char* kBitmaskOp = "apply_bitmask";
  const BitmaskArgs args = bitmask_args({kBitmaskOp, Place::kCuda}, logits, bitmask, rows);
  const int64_t most = 65535;  // limit of a grid's second dim
  PYSERVE_CHECK(args.num_masked() <= most && args.num_rows() <= 1 << 20, kBitmaskOp, ": ",
                args.num_masked(), " masks for ", args.num_rows(), " rows, at most ", most, " for ",
                1 << 20);
  const gpu::BitmaskParams params{.logits = args.logits.data,
                                  .logits_stride = args.logits.stride(0),
                                  .dtype = half_dtype(args.logits),
                                  .bitmask = args.bitmask.ptr<int32_t>(),
                                  .bitmask_stride = args.bitmask.stride(0),
                                  .rows = args.rows.ptr<int32_t>(),
                                  .rows_stride = args.rows.stride(0),
                                  .num_rows = static_cast<int32_t>(args.num_rows()),
                                  .num_masked = static_cast<int32_t>(args.num_masked()),
                                  .num_words = static_cast<int32_t>(args.num_words()),
                                  .vocab_size = static_cast<int32_t>(args.vocab_size())};
  check_launch(kBitmaskOp, gpu::launch_bitmask(params, current_stream(logits)));
}

void logprobs(const Tensor& logits, const Tensor& rows, const Tensor& token_ids, bool is_normalized,
              const Tensor& token_logprobs, const Tensor& token_ranks, const Tensor& top_ids,
              const Tensor& top_logprobs) {
  constexpr const char* kLogprobsOp = "logprobs";
  const LogprobsArgs args = logprobs_args({kLogprobsOp, Place::kCuda}, logits, rows, token_ids,
                                          token_logprobs, token_ranks, top_ids, top_logprobs);
  PYSERVE_CHECK(args.num_asked() <= 1 << 20 && args.num_rows() <= 1 << 20, kLogprobsOp, ": ",
                args.num_asked(), " of ", args.num_rows(), " rows, at most ", 1 << 20);
  const gpu::LogprobsParams params{.logits = args.logits.data,
                                   .logits_stride = args.logits.stride(0),
                                   .dtype = half_dtype(args.logits),
                                   .rows = args.rows.ptr<int32_t>(),
                                   .rows_stride = args.rows.stride(0),
                                   .token_ids = args.token_ids.ptr<int32_t>(),
                                   .token_ids_stride = args.token_ids.stride(0),
                                   .token_logprobs = args.token_logprobs.ptr<float>(),
                                   .token_logprobs_stride = args.token_logprobs.stride(0),
                                   .token_ranks = args.token_ranks.ptr<int32_t>(),
                                   .token_ranks_stride = args.token_ranks.stride(0),
                                   .top_ids = args.top_ids.ptr<int32_t>(),
                                   .top_ids_stride = args.top_ids.stride(0),
                                   .top_logprobs = args.top_logprobs.ptr<float>(),
                                   .top_logprobs_stride = args.top_logprobs.stride(0),
                                   .num_rows = static_cast<int32_t>(args.num_rows()),
                                   .num_asked = static_cast<int32_t>(args.num_asked()),
                                   .vocab_size = static_cast<int32_t>(args.vocab_size()),
                                   .is_normalized = is_normalized};
  check_launch(kLogprobsOp, gpu::launch_logprobs(params, current_stream(logits)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("sample", TORCH_BOX(&pyserve::sample));
  m.impl("apply_bitmask", TORCH_BOX(&pyserve::apply_bitmask));
  m.impl("logprobs", TORCH_BOX(&pyserve::logprobs));
}
