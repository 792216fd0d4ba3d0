// The CUDA side of lora_shrink, lora_expand and lora_expand_silu_mul: checks the arguments and
// calls the launchers of shrink.cu and expand.cu, which hand many tokens to shrink_many.cu and
// expand_many.cu.
#include <torch/csrc/stable/library.h>

#include "common/args/activation.h"
#include "gpu/core/bind.h"
#include "gpu/lora/bind_params.h"

namespace pyserve {
namespace {

void lora_shrink(const Tensor& x, const Tensor& a, const Tensor& starts, const Tensor& ranks,
                 const Tensor& scales, const Tensor& out, const std::optional<Tensor>& x_squares,
                 double eps) {
  constexpr const char* kOp = "lora_shrink";
  const LoraShrinkArgs args =
      lora_shrink_args({kOp, Place::kCuda}, x, a, starts, ranks, scales, out, x_squares);
  const gpu::LoraShrinkParams params{
      .rows = lora_rows(args.starts, args.ranks, args.max_rank(), args.num_tokens()),
      .x = args.x.data,
      .x_stride = args.x.stride(0),
      .a = args.a.data,
      .a_slot_stride = args.a.stride(0),
      .a_part_stride = args.a.stride(1),
      .a_stride = args.a.stride(2),
      .scales = args.scales.ptr<float>(),
      .scales_stride = args.scales.stride(0),
      .x_squares = args.x_squares.data,
      .x_squares_stride = args.x_squares.stride,
      .eps = static_cast<float>(eps),
      .out = lora_shrunk(args.out),
      .k = args.k(),
      .dtype = half_dtype(args.x)};
  check_launch(kOp, gpu::launch_lora_shrink(params, current_stream(x)));
}

// Everything except gate_up. `out` is the tensor that is written, which for lora_expand_silu_mul is
// not the one that is added to.
gpu::LoraExpandParams expand_params(const LoraExpandArgs& args, const View& out) {
  return {.rows = lora_rows(args.starts, args.ranks, args.max_rank(), args.num_tokens()),
          .shrunk = lora_shrunk(args.shrunk),
          .b = args.b.data,
          .b_slot_stride = args.b.stride(0),
          .b_stride = args.b.stride(1),
          .columns = args.columns.ptr<int32_t>(),
          .gate_up = nullptr,
          .gate_up_stride = 0,
          .out = out.data,
          .out_stride = out.stride(0),
          .n = out.size(1),
          .dtype = half_dtype(out)};
}

void lora_expand(const Tensor& shrunk, const Tensor& b, const Tensor& starts, const Tensor& ranks,
                 const Tensor& columns, const Tensor& out) {
  constexpr const char* kOp = "lora_expand";
  const LoraExpandArgs args =
      lora_expand_args({kOp, Place::kCuda}, shrunk, b, starts, ranks, columns, "out", out);
  check_launch(kOp, gpu::launch_lora_expand(expand_params(args, args.out), current_stream(out)));
}

void lora_expand_silu_mul(const Tensor& shrunk, const Tensor& b, const Tensor& starts,
                          const Tensor& ranks, const Tensor& columns, const Tensor& gate_up,
                          const Tensor& out) {
  constexpr const char* kOp = "lora_expand_silu_mul";
  const ViewReader read{kOp, Place::kCuda};
  const LoraExpandArgs args =
      lora_expand_args(read, shrunk, b, starts, ranks, columns, "gate_up", gate_up);
  gpu::LoraExpandParams params =
      expand_params(args, activation_args(read, gate_up, out).out);
  params.gate_up = args.out.data;
  params.gate_up_stride = args.out.stride(0);
  check_launch(kOp, gpu::launch_lora_expand(params, current_stream(out)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("lora_shrink", TORCH_BOX(&pyserve::lora_shrink));
  m.impl("lora_expand", TORCH_BOX(&pyserve::lora_expand));
  m.impl("lora_expand_silu_mul", TORCH_BOX(&pyserve::lora_expand_silu_mul));
}
