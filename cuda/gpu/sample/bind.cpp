// The sample op on CUDA: checks, then the kernels of sample.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/step.h"
#include "gpu/core/bind.h"
#include "gpu/sample/sample.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "sample";

gpu::Dtype sample_dtype(const View& logits) {
  if (logits.dtype == ScalarType::Float) return gpu::Dtype::kFloat32;
  if (logits.dtype == ScalarType::BFloat16) return gpu::Dtype::kBfloat16;
  PYSERVE_CHECK(logits.dtype == ScalarType::Half, kOp,
                ": logits must be float32, bfloat16 or float16, got ",
                torch::headeronly::toString(logits.dtype));
  return gpu::Dtype::kFloat16;
}

void sample(const Tensor& logits_tensor, const Tensor& sample_slots_tensor,
            const Tensor& slots_tensor, const Tensor& token_counts_tensor,
            const std::optional<Tensor>& workspace_tensor, const Tensor& sampled_tensor) {
  const View logits = cuda_view(kOp, "logits", logits_tensor, 2);
  const View sample_slots =
      cuda_view(kOp, "sample_slots", sample_slots_tensor, 1, ScalarType::Int, LastDim::kStrided);
  const View slots = cuda_view(kOp, "slots", slots_tensor, 2, ScalarType::Int);
  const View token_counts =
      cuda_view(kOp, "token_counts", token_counts_tensor, 2, ScalarType::Short);
  const View sampled = cuda_view(kOp, "sampled", sampled_tensor, 1, ScalarType::Int);
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  PYSERVE_CHECK(vocab_size > 0 && vocab_size <= gpu::kMaxSampleVocab, kOp, ": a vocabulary of ",
                vocab_size, ", at most ", gpu::kMaxSampleVocab);
  PYSERVE_CHECK(num_rows <= 1 << 20, kOp, ": ", num_rows, " rows, at most ", 1 << 20);
  check_size(sample_slots, 0, num_rows);
  check_size(sampled, 0, num_rows);
  check_size(slots, 1, kSlotWords);
  check_size(token_counts, 0, slots.size(0));
  check_size(token_counts, 1, vocab_size);
  PYSERVE_CHECK(workspace_tensor.has_value(), kOp, ": needs a workspace on CUDA");
  const View workspace = cuda_view(kOp, "workspace", *workspace_tensor, 1, ScalarType::Long);
  const int64_t wanted = gpu::sample_workspace_words(num_rows, vocab_size);
  PYSERVE_CHECK(workspace.size(0) >= wanted, kOp, ": a workspace of ", workspace.size(0),
                " words for ", num_rows, " rows, needs ", wanted);
  const gpu::SampleParams params{.logits = logits.data,
                                 .logits_stride = logits.stride(0),
                                 .dtype = sample_dtype(logits),
                                 .sample_slots = sample_slots.ptr<int32_t>(),
                                 .sample_slots_stride = sample_slots.stride(0),
                                 .slots = slots.ptr<int32_t>(),
                                 .slots_stride = slots.stride(0),
                                 .num_slots = slots.size(0),
                                 .token_counts = token_counts.ptr<int16_t>(),
                                 .token_counts_stride = token_counts.stride(0),
                                 .sampled = sampled.ptr<int32_t>(),
                                 .num_rows = static_cast<int32_t>(num_rows),
                                 .vocab_size = static_cast<int32_t>(vocab_size),
                                 .workspace = workspace.ptr<uint64_t>()};
  check_launch(kOp, gpu::launch_sample(params, current_stream(logits_tensor)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) { m.impl("sample", TORCH_BOX(&pyserve::sample)); }
