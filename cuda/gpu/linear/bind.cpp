// The linear op on CUDA: checks, then the kernels of linear.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "gpu/core/bind.h"
#include "gpu/linear/linear.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "linear";

void linear(const Tensor& x_tensor, const Tensor& weight_tensor,
            const std::optional<Tensor>& bias_tensor, const Tensor& out_tensor) {
  const View x = cuda_view(kOp, "x", x_tensor, 2);
  const View weight = cuda_view(kOp, "weight", weight_tensor, 2);
  const View out = cuda_view(kOp, "out", out_tensor, 2);
  const int64_t m = x.size(0), n = weight.size(0), k = x.size(1);
  check_size(weight, 1, k);
  check_size(out, 0, m);
  check_size(out, 1, n);
  check_same_dtype(weight, x);
  check_same_dtype(out, x);
  const void* bias_data = nullptr;
  if (bias_tensor.has_value()) {
    const View bias = cuda_view(kOp, "bias", *bias_tensor, 1);
    check_size(bias, 0, n);
    check_same_dtype(bias, x);
    bias_data = bias.data;
  }
  const gpu::LinearParams params{.x = x.data,
                                 .x_stride = x.stride(0),
                                 .weight = weight.data,
                                 .weight_stride = weight.stride(0),
                                 .bias = bias_data,
                                 .out = out.data,
                                 .out_stride = out.stride(0),
                                 .m = m,
                                 .n = n,
                                 .k = k,
                                 .dtype = half_dtype(x)};
  check_launch(kOp, gpu::launch_linear(params, current_stream(x_tensor)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) { m.impl("linear", TORCH_BOX(&pyserve::linear)); }
