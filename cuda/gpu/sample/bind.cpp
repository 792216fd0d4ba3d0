// The sample op on CUDA: checks, then the kernels of sample.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/sample.h"
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
                                 .dtype = sample_dtype(args.logits),
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

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) { m.impl("sample", TORCH_BOX(&pyserve::sample)); }
