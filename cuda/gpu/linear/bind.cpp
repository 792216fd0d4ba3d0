// The CUDA side of linear, linear_add and linear_silu_mul: checks the arguments and launches the
// kernel that dispatch.h chooses.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/linear.h"
#include "gpu/core/bind.h"
#include "gpu/linear/bind_params.h"
#include "gpu/linear/dispatch.h"

namespace pyserve {
namespace {

void launch(const ViewReader& read, const LinearArgs& args, Epilogue epilogue, double eps,
            cudaStream_t stream) {
  gpu::LinearParams params = linear_params(args, epilogue, eps);
  params.weight = args.weight.data;
  params.weight_stride = args.weight.stride(0);
  check_launch(read.op, gpu::launch_linear(params, stream));
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& out, const std::optional<Tensor>& x_squares, double eps) {
  const ViewReader read{"linear", Place::kCuda};
  LinearArgs args = linear_args(read, Epilogue::kStore, x, weight, bias, out);
  read_x_squares(read, x_squares, args);
  launch(read, args, Epilogue::kStore, eps, current_stream(x));
}

void linear_add(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const Tensor& residual, const std::optional<Tensor>& norm_weight,
                const std::optional<Tensor>& scaled, const std::optional<Tensor>& squares) {
  const ViewReader read{"linear_add", Place::kCuda};
  LinearArgs args = linear_args(read, Epilogue::kAdd, x, weight, bias, residual);
  read_norm(read, norm_weight, scaled, squares, args);
  launch(read, args, Epilogue::kAdd, 0.0, current_stream(x));
}

void linear_silu_mul(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& out, const std::optional<Tensor>& x_squares, double eps) {
  const ViewReader read{"linear_silu_mul", Place::kCuda};
  LinearArgs args = linear_args(read, Epilogue::kSiluMul, x, weight, bias, out);
  read_x_squares(read, x_squares, args);
  launch(read, args, Epilogue::kSiluMul, eps, current_stream(x));
}

// Whether linear, or the op with another epilogue, is faster than cuBLAS for m rows of x.
bool serves_linear(const Tensor& weight_tensor, int64_t m, int64_t epilogue_number) {
  const View weight = ViewReader{"serves_linear", Place::kCuda}("weight", weight_tensor, 2);
  PYSERVE_CHECK(epilogue_number >= 0 && epilogue_number <= 2 && m >= 0, "serves_linear: epilogue ",
                epilogue_number, ", m ", m);
  const auto epilogue = static_cast<Epilogue>(epilogue_number);
  const gpu::LinearParams params{.x_stride = weight.size(1),
                                 .weight = weight.data,
                                 .weight_stride = weight.stride(0),
                                 .out_stride = weight.size(0) / rows_per_column(epilogue),
                                 .m = m,
                                 .n = weight.size(0) / rows_per_column(epilogue),
                                 .k = weight.size(1),
                                 .dtype = half_dtype(weight),
                                 .epilogue = epilogue};
  bool serves = false;
  check_launch("serves_linear", gpu::serves_linear(params, &serves));
  return serves;
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("linear", TORCH_BOX(&pyserve::linear));
  m.impl("linear_add", TORCH_BOX(&pyserve::linear_add));
  m.impl("linear_silu_mul", TORCH_BOX(&pyserve::linear_silu_mul));
  m.impl("serves_linear", TORCH_BOX(&pyserve::serves_linear));
}
