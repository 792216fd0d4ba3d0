// linear_lora on CUDA: checks, then the kernel of few_rows_lora.cuh where there is one.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/linear_lora.h"
#include "gpu/core/bind.h"
#include "gpu/linear/bind_params.h"
#include "gpu/linear/linear_lora.h"

namespace pyserve {
namespace {

gpu::LinearLoraParams lora_params(const LinearLoraArgs& args, double eps) {
  gpu::LinearLoraParams params{
      .linear = linear_params(args.linear, args.epilogue, eps),
      .lora = {.rows = {.starts = args.starts.ptr<int32_t>(),
                        .ranks = args.ranks.ptr<int32_t>(),
                        .ranks_stride = args.ranks.stride(0),
                        .num_slots = static_cast<int32_t>(args.num_slots()),
                        .num_parts = static_cast<int32_t>(args.num_parts()),
                        .max_rank = static_cast<int32_t>(args.max_rank()),
                        .num_tokens = args.linear.m()},
               .a = args.a.data,
               .a_slot_stride = args.a.stride(0),
               .a_part_stride = args.a.stride(1),
               .a_stride = args.a.stride(2),
               .scales = args.scales.ptr<float>(),
               .scales_stride = args.scales.stride(0),
               .sums = {.data = args.sums.ptr<uint64_t>(),
                        .split_stride = args.sums.stride(0),
                        .stride = args.sums.stride(1),
                        .part_stride = args.sums.stride(2),
                        .num_splits = static_cast<int32_t>(args.sums.size(0))},
               .b = args.b.data,
               .b_slot_stride = args.b.stride(0),
               .b_stride = args.b.stride(1),
               .num_rows = static_cast<int32_t>(args.b.size(1)),
               .columns = args.columns.ptr<int32_t>(),
               .counter = args.counter.ptr<uint64_t>()},
      .group_size = args.group_size};
  params.linear.weight = args.weight;
  params.linear.weight_stride = args.weight_stride;
  return params;
}

void linear_lora(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& out, int64_t epilogue, const Tensor& a, const Tensor& b,
                 const Tensor& starts, const Tensor& ranks, const Tensor& scales,
                 const Tensor& columns, const Tensor& sums, const Tensor& counter,
                 const std::optional<Tensor>& x_squares, double eps,
                 const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& scaled,
                 const std::optional<Tensor>& squares) {
  const ViewReader read{"linear_lora", Place::kCuda};
  const LinearLoraArgs args = linear_lora_args(
      read, x, weight, bias, out, epilogue,
      {a, b, starts, ranks, scales, columns, sums, counter},
      {x_squares, norm_weight, scaled, squares});
  check_launch(read.op, gpu::launch_linear_lora(lora_params(args, eps), current_stream(x)));
}

// Whether linear_lora can with these.
bool serves_linear_lora(const Tensor& x, const Tensor& weight, const Tensor& out, int64_t epilogue,
                        const Tensor& a, const Tensor& b, const Tensor& starts,
                        const Tensor& ranks, const Tensor& scales, const Tensor& columns,
                        const Tensor& sums, const Tensor& counter) {
  const ViewReader read{"serves_linear_lora", Place::kCuda};
  const std::optional<Tensor> none;
  const LinearLoraArgs args = linear_lora_args(
      read, x, weight, none, out, epilogue,
      {a, b, starts, ranks, scales, columns, sums, counter}, {none, none, none, none});
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
