// The CUDA side of lora_shrink and lora_expand: arguments are checked and handed to the kernels of
// shrink.cu and expand.cu.
#include <torch/csrc/stable/library.h>

#include "common/args/lora.h"
#include "gpu/core/bind.h"
#include "gpu/lora/lora.h"

namespace pyserve {
namespace {

gpu::LoraRows lora_rows(const View& starts, const View& ranks, int64_t max_rank,
                      int64_t num_tokens) {
  return {.starts = starts.ptr<int32_t>(),
          .ranks = ranks.ptr<int32_t>(),
          .ranks_stride = ranks.stride(0),
          .num_slots = static_cast<int32_t>(ranks.size(0)),
          .num_parts = static_cast<int32_t>(ranks.size(1)),
          .max_rank = static_cast<int32_t>(max_rank),
          .num_tokens = num_tokens};
}

void lora_shrink(const Tensor& x, const Tensor& a, const Tensor& starts, const Tensor& ranks,
                 const Tensor& scales, const Tensor& out) {
  constexpr const char* kOp = "lora_shrink";
  const LoraShrinkArgs args =
      lora_shrink_args({kOp, Place::kCuda}, x, a, starts, ranks, scales, out);
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
      .out = args.out.ptr<float>(),
      .out_stride = args.out.stride(0),
      .out_part_stride = args.out.stride(1),
      .k = args.k(),
      .dtype = half_dtype(args.x)};
  check_launch(kOp, gpu::launch_lora_shrink(params, current_stream(x)));
}

void lora_expand(const Tensor& shrunk, const Tensor& b, const Tensor& starts, const Tensor& ranks,
                 const Tensor& columns, const Tensor& out) {
  constexpr const char* kOp = "lora_expand";
  const LoraExpandArgs args =
      lora_expand_args({kOp, Place::kCuda}, shrunk, b, starts, ranks, columns, out);
  const gpu::LoraExpandParams params{
      .rows = lora_rows(args.starts, args.ranks, args.max_rank(), args.num_tokens()),
      .shrunk = args.shrunk.ptr<float>(),
      .shrunk_stride = args.shrunk.stride(0),
      .shrunk_part_stride = args.shrunk.stride(1),
      .b = args.b.data,
      .b_slot_stride = args.b.stride(0),
      .b_stride = args.b.stride(1),
      .columns = args.columns.ptr<int32_t>(),
      .out = args.out.data,
      .out_stride = args.out.stride(0),
      .n = args.n(),
      .dtype = half_dtype(args.out)};
  check_launch(kOp, gpu::launch_lora_expand(params, current_stream(out)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("lora_shrink", TORCH_BOX(&pyserve::lora_shrink));
  m.impl("lora_expand", TORCH_BOX(&pyserve::lora_expand));
}
