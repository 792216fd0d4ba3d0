// The linear op on CUDA: checks, then the kernels of linear.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/linear.h"
#include "gpu/core/bind.h"
#include "gpu/linear/linear.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "linear";

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& out) {
  const LinearArgs args = linear_args({kOp, Place::kCuda}, x, weight, bias, out);
  const gpu::LinearParams params{.x = args.x.data,
                                 .x_stride = args.x.stride(0),
                                 .weight = args.weight.data,
                                 .weight_stride = args.weight.stride(0),
                                 .bias = args.bias,
                                 .out = args.out.data,
                                 .out_stride = args.out.stride(0),
                                 .m = args.m(),
                                 .n = args.n(),
                                 .k = args.k(),
                                 .dtype = half_dtype(args.x)};
  check_launch(kOp, gpu::launch_linear(params, current_stream(x)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) { m.impl("linear", TORCH_BOX(&pyserve::linear)); }
