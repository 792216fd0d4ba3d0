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

// What linear_lora_splits needs.
gpu::LoraNext next_params(const View& a) {
  return {.a = a.data,
          .a_slot_stride = a.stride(0),
          .a_part_stride = a.stride(1),
          .a_stride = a.stride(2),
          .num_parts = static_cast<int32_t>(a.size(1)),
          .max_rank = static_cast<int32_t>(a.size(2))};
}

gpu::LoraNext next_params(const LoraNextArgs& args) {
  if (args.a.data == nullptr) return {};
  gpu::LoraNext next = next_params(args.a);
  next.ranks = args.ranks.ptr<int32_t>();
  next.ranks_stride = args.ranks.stride(0);
  next.scales = args.scales.ptr<float>();
  next.scales_stride = args.scales.stride(0);
  next.out = lora_shrunk(args.out);
  return next;
}

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
               .num_rows = static_cast<int32_t>(lora.b.size(1)),
               .next = next_params(args.next)},
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
                 const std::optional<Tensor>& squares, const std::optional<Tensor>& next_a,
                 const std::optional<Tensor>& next_ranks, const std::optional<Tensor>& next_scales,
                 const std::optional<Tensor>& next_shrunk) {
  const ViewReader read{"linear_lora", Place::kCuda};
  LinearLoraArgs args =
      linear_lora_args(read, x, weight, bias, out, epilogue, {shrunk, b, starts, ranks, columns},
                       {x_squares, norm_weight, scaled, squares});
  args.next = lora_next_args(read, {next_a, next_ranks, next_scales, next_shrunk}, args.lora);
  check_launch(read.op, gpu::launch_linear_lora(lora_params(args, eps), current_stream(x)));
}

// The splits that linear_lora leaves for a linear with next_a; 0: it cannot.
int64_t linear_lora_splits(const Tensor& x, const Tensor& weight, const Tensor& out,
                           int64_t epilogue, const Tensor& shrunk, const Tensor& b,
                           const Tensor& starts, const Tensor& ranks, const Tensor& columns,
                           const Tensor& next_a) {
  const ViewReader read{"linear_lora_splits", Place::kCuda};
  const std::optional<Tensor> none;
  const LinearLoraArgs args =
      linear_lora_args(read, x, weight, none, out, epilogue, {shrunk, b, starts, ranks, columns},
                       {none, none, none, none});
  gpu::LinearLoraParams params = lora_params(args, 0.0);
  params.lora.next = next_params(lora_next_a(read, next_a, args.lora));
  const gpu::Device* device = nullptr;
  check_launch(read.op, gpu::current_device(&device));
  return gpu::linear_lora_splits(params, *device);
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
  m.impl("linear_lora_splits", TORCH_BOX(&pyserve::linear_lora_splits));
  m.impl("serves_linear_lora", TORCH_BOX(&pyserve::serves_linear_lora));
}
