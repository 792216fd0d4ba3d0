// The CUDA side of linear_fp8, linear_w8a8 and dequantise_fp8: checks the arguments and calls the
// launchers of few_rows_fp8.cu, gemm_w8a8_sm90a.cu and dequantise_fp8.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/linear_fp8.h"
#include "gpu/core/bind.h"
#include "gpu/linear/bind_fp8.h"
#include "gpu/linear/bind_params.h"
#include "gpu/linear/dispatch.h"
#include "gpu/linear/fp8.h"
#include "gpu/linear/w8a8.h"

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

// Whether linear_fp8 can serve these tensors, and is assumed to be faster than dequantising the
// weight and calling cuBLAS.
bool serves_linear_fp8(const Tensor& x, const Tensor& weight) {
  const ViewReader read{"serves_linear_fp8", Place::kCuda};
  const View rows = read("x", x, 2);
  const View bytes = read("weight", weight, 2, ScalarType::Byte);
  return rows.size(0) <= gpu::kMaxFp8Rows && bytes.size(1) % 16 == 0;
}

void linear_w8a8(const Tensor& x, const Tensor& weight, const Tensor& scales, int64_t scale_rows,
                 int64_t scale_columns, const std::optional<Tensor>& bias, const Tensor& out,
                 const Tensor& scratch, int64_t epilogue) {
  const ViewReader read{"linear_w8a8", Place::kCuda};
  const std::optional<Tensor> none;
  const LinearFp8Args args = linear_fp8_args(read, x, weight, scales, scale_rows, scale_columns,
                                             bias, out, epilogue, {none, none, none, none});
  const View room = read("scratch", scratch, 1);
  check_same_dtype(room, args.x);
  if (args.m() == 0 || args.n() == 0) return;
  check_fp8_size(read.op, args.matrix);
  gpu::LinearParams params = linear_params(args, args.epilogue, 0.0);
  params.weight = args.matrix.bytes;
  params.weight_stride = args.matrix.k;
  const gpu::Fp8Scale scale = fp8_scale(args.matrix);
  bool serves = false;
  check_launch(read.op, gpu::can_linear_w8a8(params, scale, &serves));
  PYSERVE_CHECK(serves, read.op, ": not on this card, or not of ", args.n(), " by ", args.k(),
                " with scales of ", scale_rows, " by ", scale_columns);
  const int64_t num_bytes = 2 * room.size(0);
  PYSERVE_CHECK(num_bytes >= gpu::w8_row_bytes(args.k()), read.op, ": scratch has ", num_bytes,
                " bytes, a row takes ", gpu::w8_row_bytes(args.k()));
  check_launch(read.op,
               gpu::launch_linear_w8a8(params, scale, room.data, num_bytes, current_stream(x)));
}

// Whether linear_w8a8 should be used for m rows, assuming tensors aligned as torch allocates them.
bool serves_linear_w8a8(const Tensor& weight, int64_t m, int64_t scale_rows,
                        int64_t scale_columns) {
  const ViewReader read{"serves_linear_w8a8", Place::kCuda};
  const View bytes = read("weight", weight, 2, ScalarType::Byte);
  Fp8Matrix matrix{};
  matrix.n = bytes.size(0), matrix.k = bytes.size(1);
  matrix.scale_rows = scale_rows, matrix.scale_columns = scale_columns;
  PYSERVE_CHECK(scale_rows >= 1 && scale_columns >= 1, read.op, ": scales are of ", scale_rows,
                " by ", scale_columns);
  const gpu::LinearParams params{.weight_stride = matrix.k, .m = m, .n = matrix.n, .k = matrix.k};
  bool serves = false;
  check_launch(read.op, gpu::serves_linear_w8a8(params, fp8_scale(matrix), &serves));
  return serves;
}

// Sets what this process tries in a measurement (LinearTrial); -1 restores the default.
void try_linear_w8a8(const Tensor& weight, int64_t min_rows, int64_t tiling) {
  ViewReader{"try_linear_w8a8", Place::kCuda}("weight", weight, 2, ScalarType::Byte);
  PYSERVE_CHECK(min_rows >= -1, "try_linear_w8a8: min_rows is ", min_rows, ", at least -1");
  PYSERVE_CHECK(tiling >= -1 && tiling <= gpu::kNumW8Tilings, "try_linear_w8a8: tiling is ", tiling,
                ", from -1 to ", gpu::kNumW8Tilings);
  gpu::linear_trial().min_w8a8_rows = min_rows;
  gpu::linear_trial().w8a8_tiling = static_cast<int>(tiling);
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("linear_fp8", TORCH_BOX(&pyserve::linear_fp8));
  m.impl("dequantise_fp8", TORCH_BOX(&pyserve::dequantise_fp8));
  m.impl("serves_linear_fp8", TORCH_BOX(&pyserve::serves_linear_fp8));
  m.impl("linear_w8a8", TORCH_BOX(&pyserve::linear_w8a8));
  m.impl("serves_linear_w8a8", TORCH_BOX(&pyserve::serves_linear_w8a8));
  m.impl("try_linear_w8a8", TORCH_BOX(&pyserve::try_linear_w8a8));
}
