// The CUDA side of grouped_linear_fp8: checks the arguments and calls the launcher of
// grouped_few_rows_fp8.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/linear_fp8.h"
#include "gpu/core/bind.h"
#include "gpu/experts/bind_grouped.h"
#include "gpu/experts/grouped_fp8.h"
#include "gpu/linear/bind_fp8.h"

namespace pyserve {
namespace {

void grouped_linear_fp8(const Tensor& x, const Tensor& weight, const Tensor& scales,
                        int64_t scale_rows, int64_t scale_columns,
                        const std::optional<Tensor>& order, const Tensor& offsets,
                        int64_t max_group, const Tensor& out) {
  const ViewReader read{"grouped_linear_fp8", Place::kCuda};
  const GroupedFp8Args args =
      grouped_fp8_args(read, weight, scales, scale_rows, scale_columns,
                       grouped_epilogue_args(read, x, order, offsets, max_group, out));
  const Fp8Matrix& matrix = args.matrix;
  check_fp8_rows(read.op, args.x, matrix);
  PYSERVE_CHECK(args.num_experts() <= kMaxExperts && args.max_rows() < kMaxFp8Size, read.op, ": ",
                args.num_experts(), " experts, ", args.max_rows(), " rows");
  gpu::GroupedParams params = grouped_params(args, args.epilogue);
  params.weight = matrix.bytes;
  params.expert_stride = matrix.n * matrix.k;
  params.weight_stride = matrix.k;
  const int64_t scale_stride = matrix.num_scale_rows() * matrix.num_groups();
  check_launch(read.op, gpu::launch_grouped_fp8(params, fp8_scale(matrix), scale_stride,
                                                current_stream(x)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("grouped_linear_fp8", TORCH_BOX(&pyserve::grouped_linear_fp8));
}
