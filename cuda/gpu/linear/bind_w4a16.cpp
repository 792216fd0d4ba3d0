// The CUDA side of the ops on 4-bit integers: checks the arguments and calls the launchers.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/linear_w4a16.h"
#include "gpu/core/bind.h"
#include "gpu/linear/bind_params.h"
#include "gpu/linear/dispatch.h"
#include "gpu/linear/w4a16.h"

namespace pyserve {
namespace {

void check_packed(const char* op, const W4Matrix& matrix) {
  PYSERVE_CHECK(reinterpret_cast<uintptr_t>(matrix.words) % 16 == 0, op,
                ": packed must be aligned to 16 bytes");
}

void linear_w4a16(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                  const Tensor& out, int64_t epilogue, const std::optional<Tensor>& x_squares,
                  double eps, const std::optional<Tensor>& norm_weight,
                  const std::optional<Tensor>& scaled, const std::optional<Tensor>& squares) {
  const ViewReader read{"linear_w4a16", Place::kCuda};
  const LinearW4Args args = linear_w4_args(read, x, packed, bias, out, epilogue,
                                           {x_squares, norm_weight, scaled, squares});
  check_packed(read.op, args.matrix);
  PYSERVE_CHECK(reinterpret_cast<uintptr_t>(args.x.data) % 16 == 0 && args.x.stride(0) % 8 == 0,
                read.op, ": the rows of x must be aligned to 16 bytes");
  gpu::LinearParams params = linear_params(args, args.epilogue, eps);
  params.weight = args.matrix.words;
  params.weight_stride = args.matrix.strip_words();
  check_launch(read.op, gpu::launch_linear_w4a16(params, args.matrix.format.group_size,
                                                 current_stream(x)));
}

void dequantise_w4a16(const Tensor& packed, const Tensor& out) {
  const ViewReader read{"dequantise_w4a16", Place::kCuda};
  const DequantiseW4Args args = dequantise_w4_args(read, packed, out);
  const W4Matrix& matrix = args.matrix;
  check_packed(read.op, matrix);
  PYSERVE_CHECK(reinterpret_cast<uintptr_t>(args.out.data) % 16 == 0 && args.out.stride(0) % 8 == 0,
                read.op, ": the rows of out must be aligned to 16 bytes");
  const gpu::DequantiseW4Params params{.packed = matrix.words,
                                       .num_units = matrix.num_units,
                                       .unit_blocks = static_cast<int>(matrix.format.unit_blocks),
                                       .unit_records = static_cast<int>(matrix.format.unit_records),
                                       .unit_words = static_cast<int>(matrix.format.unit_words()),
                                       .out = args.out.data,
                                       .out_stride = args.out.stride(0),
                                       .num_rows = args.out.size(0),
                                       .k = args.out.size(1),
                                       .dtype = half_dtype(args.out)};
  check_launch(read.op, gpu::launch_dequantise_w4a16(params, current_stream(packed)));
}

bool serves_linear_w4a16(const Tensor& x, const Tensor& /*packed*/) {
  const View rows = ViewReader{"serves_linear_w4a16", Place::kCuda}("x", x, 2);
  bool serves = false;
  check_launch("serves_linear_w4a16",
               gpu::serves_linear_w4a16(rows.size(0), rows.size(1), &serves));
  return serves;
}

// Sets what this process tries in a measurement (LinearTrial); -1 restores the default.
void try_linear_w4a16(const Tensor& packed, int64_t max_rows, int64_t tiling) {
  w4_matrix(ViewReader{"try_linear_w4a16", Place::kCuda}, packed);
  PYSERVE_CHECK(max_rows >= -1, "try_linear_w4a16: max_rows is ", max_rows, ", at least -1");
  PYSERVE_CHECK(tiling >= -1 && tiling <= gpu::kNumW4Tilings, "try_linear_w4a16: tiling is ",
                tiling, ", from -1 to ", gpu::kNumW4Tilings);
  gpu::linear_trial().max_w4a16_rows = max_rows;
  gpu::linear_trial().w4a16_tiling = static_cast<int>(tiling);
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("linear_w4a16", TORCH_BOX(&pyserve::linear_w4a16));
  m.impl("dequantise_w4a16", TORCH_BOX(&pyserve::dequantise_w4a16));
  m.impl("serves_linear_w4a16", TORCH_BOX(&pyserve::serves_linear_w4a16));
  m.impl("try_linear_w4a16", TORCH_BOX(&pyserve::try_linear_w4a16));
}
