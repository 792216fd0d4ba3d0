// The CUDA side of linear_fp8 and dequantise_fp8: arguments are checked and handed to few_rows_fp8.cu
// and dequantise_fp8.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/linear_fp8.h"
#include "gpu/core/bind.h"
#include "gpu/linear/bind_fp8.h"
#include "gpu/linear/bind_params.h"
#include "gpu/linear/fp8.h"

namespace pyserve {
namespace {

void linear_fp8(const Tensor& x, const Tensor& weight, const Tensor& scales, int64_t scale_rows,
                int64_t scale_columns, const std::optional<Tensor>& bias, const Tensor& out,
                int64_t epilogue, const std::optional<Tensor>& x_squares, double eps,
                const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& scaled,
                const std::optional<Tensor>& squares) {
  const ViewReader read{"linear_fp8", Place::kCuda};
  const LinearFp8Args args =
      linear_fp8_args(read, x, weight, scales, scale_rows, scale_columns, bias, out, epilogue,
                      {x_squares, norm_weight, scaled, squares});
  if (args.m() == 0 || args.n() == 0) return;
  check_fp8_rows(read.op, args.x, args.matrix);
  gpu::LinearParams params = linear_params(args, args.epilogue, eps);
  params.weight = args.matrix.bytes;
  params.weight_stride = args.matrix.k;
  check_launch(read.op,
               gpu::launch_linear_fp8(params, fp8_scale(args.matrix), current_stream(x)));
}

void dequantise_fp8(const Tensor& weight, const Tensor& scales, int64_t scale_rows,
                    int64_t scale_columns, const Tensor& out) {
  const ViewReader read{"dequantise_fp8", Place::kCuda};
  const DequantiseFp8Args args =
      dequantise_fp8_args(read, weight, scales, scale_rows, scale_columns, out);
  check_fp8_size(read.op, args.matrix);
  const bool is_aligned = args.matrix.k % 16 == 0 && args.out.stride(0) % 8 == 0 &&
                          reinterpret_cast<uintptr_t>(args.out.data) % 16 == 0 &&
                          reinterpret_cast<uintptr_t>(args.matrix.bytes) % 16 == 0;
  const gpu::DequantiseFp8Params params{.weight = args.matrix.bytes,
                                        .scale = fp8_scale(args.matrix),
                                        .out = args.out.data,
                                        .out_stride = args.out.stride(0),
                                        .n = args.matrix.n,
                                        .k = args.matrix.k,
                                        .is_aligned = is_aligned,
                                        .dtype = half_dtype(args.out)};
  check_launch(read.op, gpu::launch_dequantise_fp8(params, current_stream(weight)));
}

// Whether linear_fp8 can, and is taken to be faster than plain numbers and cuBLAS.
bool serves_linear_fp8(const Tensor& x, const Tensor& weight) {
  const ViewReader read{"serves_linear_fp8", Place::kCuda};
  const View rows = read("x", x, 2);
  const View bytes = read("weight", weight, 2, ScalarType::Byte);
  return rows.size(0) <= gpu::kMaxFp8Rows && bytes.size(1) % 16 == 0;
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("linear_fp8", TORCH_BOX(&pyserve::linear_fp8));
  m.impl("dequantise_fp8", TORCH_BOX(&pyserve::dequantise_fp8));
  m.impl("serves_linear_fp8", TORCH_BOX(&pyserve::serves_linear_fp8));
}
