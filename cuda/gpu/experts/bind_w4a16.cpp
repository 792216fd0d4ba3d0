// The CUDA side of grouped_linear_w4a16: checks the arguments and calls the launcher of
// grouped_few_rows_w4a16.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/linear_w4a16.h"
#include "gpu/core/bind.h"
#include "gpu/experts/bind_grouped.h"
#include "gpu/experts/grouped_w4a16.h"

namespace pyserve {
namespace {

constexpr int64_t kMaxInt = int64_t{1} << 30;

void check_aligned_rows(const View& view) {
  PYSERVE_CHECK(reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride(0) % 8 == 0,
                view.op, ": the rows of ", view.name, " must be aligned to 16 bytes");
}

void grouped_linear_w4a16(const Tensor& x, const Tensor& packed,
                          const std::optional<Tensor>& order, const Tensor& offsets,
                          int64_t max_group, const std::optional<Tensor>& sorted_x,
                          const Tensor& out) {
  const ViewReader read{"grouped_linear_w4a16", Place::kCuda};
  const GroupedW4Args args =
      grouped_w4_args(read, packed, sorted_x,
                      grouped_epilogue_args(read, x, order, offsets, max_group, out));
  const W4Matrix& matrix = args.matrix;
  PYSERVE_CHECK(reinterpret_cast<uintptr_t>(matrix.words) % 16 == 0, read.op,
                ": packed must be aligned to 16 bytes");
  check_aligned_rows(args.x);
  PYSERVE_CHECK(args.epilogue == Epilogue::kStore || args.n() % kStripRows == 0, read.op, ": ",
                args.n(), " columns of gate and of up are no multiple of ", kStripRows);
  PYSERVE_CHECK(args.num_experts() <= kMaxExperts && args.max_rows() < kMaxInt &&
                    args.n() < kMaxInt && args.k() < kMaxInt,
                read.op, ": ", args.num_experts(), " experts, ", args.max_rows(), " rows, ",
                args.n(), " by ", args.k());
  PYSERVE_CHECK(args.k() > 0, read.op, ": x has no columns");
  gpu::GroupedParams params = grouped_params(args, args.epilogue);
  params.weight = matrix.words;
  params.expert_stride = matrix.num_strips * matrix.strip_words();
  params.weight_stride = matrix.strip_words();
  check_launch(read.op, gpu::launch_grouped_w4a16(params, matrix.format.group_size,
                                                  current_stream(x)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("grouped_linear_w4a16", TORCH_BOX(&pyserve::grouped_linear_w4a16));
}
