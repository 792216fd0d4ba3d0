// The linear ops on CUDA: checks, then the kernel that dispatch.h chooses.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/linear.h"
#include "gpu/core/bind.h"
#include "gpu/linear/dispatch.h"

namespace pyserve {
namespace {

gpu::LinearParams params_of(const LinearArgs& args, Epilogue epilogue) {
  return {.x = args.x.data,
          .x_stride = args.x.stride(0),
          .weight = args.weight.data,
          .weight_stride = args.weight.stride(0),
          .bias = args.bias,
          .out = args.out.data,
          .out_stride = args.out.stride(0),
          .m = args.m(),
          .n = args.n(),
          .k = args.k(),
          .dtype = half_dtype(args.x),
          .epilogue = epilogue};
}

template <Epilogue kEpilogue>
void run(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
         const Tensor& out) {
  const LinearArgs args = linear_args({op, Place::kCuda}, kEpilogue, x, weight, bias, out);
  check_launch(op, gpu::launch_linear(params_of(args, kEpilogue), current_stream(x)));
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& out) {
  run<Epilogue::kStore>("linear", x, weight, bias, out);
}

void linear_add(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const Tensor& residual) {
  run<Epilogue::kAdd>("linear_add", x, weight, bias, residual);
}

void linear_silu_mul(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& out) {
  run<Epilogue::kSiluMul>("linear_silu_mul", x, weight, bias, out);
}

// Whether linear, or the op of another epilogue, is faster than cuBLAS for m rows of x.
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
