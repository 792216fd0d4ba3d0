// linear_lora on CUDA: checks of the arguments, then the kernel (few_rows_lora.cuh).
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/linear_lora.h"
#include "gpu/core/bind.h"
#include "gpu/linear/bind_params.h"
#include "gpu/linear/linear_lora.h"
#include "gpu/lora/bind_params.h"

namespace pyserve {
namespace {

gpu::LinearLoraParams lora_params(const LinearLoraArgs& args, double eps) {
  const LoraExpandArgs& lora = args.lora;
  gpu::LinearLoraParams params{
      .linear = linear_params(args.linear, args.epilogue, eps),
      .lora = {.rows = lora_rows(lora.starts, lora.ranks, lora.max_rank(), lora.num_tokens()),
               .shrunk = lora_shrunk(lora.shrunk),
               .b = lora.b.data,
               .b_slot_stride = lora.b.stride(0),
               .b_stride = lora.b.stride(1),
               .columns = lora.columns.ptr<int32_t>(),
               .num_rows = static_cast<int32_t>(lora.b.size(1))},
      .group_size = args.group_size};
  params.linear.weight = args.weight;
  params.linear.weight_stride = args.weight_stride;
  return params;
}

void linear_lora(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& out, int64_t epilogue, const Tensor& shrunk, const Tensor& b,
                 const Tensor& starts, const Tensor& ranks, const Tensor& columns,
                 const std::optional<Tensor>& x_squares, double eps,
                 const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& scaled,
                 const std::optional<Tensor>& squares) {
  const ViewReader read{"linear_lora", Place::kCuda};
  const LinearLoraArgs args =
      linear_lora_args(read, x, weight, bias, out, epilogue, {shrunk, b, starts, ranks, columns},
                       {x_squares, norm_weight, scaled, squares});
  check_launch(read.op, gpu::launch_linear_lora(lora_params(args, eps), current_stream(x)));
}

// Whether linear_lora serves these shapes and alignments.
bool serves_linear_lora(const Tensor& x, const Tensor& weight, const Tensor& out, int64_t epilogue,
                        const Tensor& shrunk, const Tensor& b, const Tensor& starts,
                        const Tensor& ranks, const Tensor& columns) {
  const ViewReader read{"serves_linear_lora", Place::kCuda};
  const std::optional<Tensor> none;
  const LinearLoraArgs args =
      linear_lora_args(read, x, weight, none, out, epilogue, {shrunk, b, starts, ranks, columns},
                       {none, none, none, none});
  const gpu::Device* device = nullptr;
  check_launch(read.op, gpu::current_device(&device));
  return gpu::can_linear_lora(lora_params(args, 0.0), *device);
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("linear_lora", TORCH_BOX(&pyserve::linear_lora));
  m.impl("serves_linear_lora", TORCH_BOX(&pyserve::serves_linear_lora));
}
