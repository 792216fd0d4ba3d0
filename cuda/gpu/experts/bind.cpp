// The CUDA side of route, grouped_linear, grouped_linear_silu_mul and combine_experts: checks the
// arguments and calls the launchers of this folder.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/experts.h"
#include "gpu/core/bind.h"
#include "gpu/experts/bind_grouped.h"
#include "gpu/experts/experts.h"

namespace pyserve {
namespace {

constexpr int64_t kVec = 8;  // elements in 16 bytes, which the kernels read at a time
constexpr int64_t kMaxInt = int64_t{1} << 30;

// Rows that a kernel reads 16 bytes at a time.
void check_vectors(const View& view) {
  bool is_aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int64_t i = 0; i + 1 < view.dim; ++i) is_aligned &= view.stride(i) % kVec == 0;
  PYSERVE_CHECK(view.size(view.dim - 1) % kVec == 0 && is_aligned, view.op, ": rows of ", view.name,
                " must be whole vectors of 16 bytes, aligned to them");
  for (int64_t i = 0; i < view.dim; ++i) {
    PYSERVE_CHECK(view.size(i) < kMaxInt, view.op, ": size ", i, " of ", view.name, " is ",
                  view.size(i));
  }
}

void route(const Tensor& x, const Tensor& router, const std::optional<Tensor>& correction_bias,
           const Tensor& slot_mapping, bool is_sigmoid, bool is_normalized, double scale,
           int64_t num_groups, int64_t top_groups, const Tensor& logits, const Tensor& weights,
           const Tensor& places, const Tensor& order, const Tensor& offsets) {
  const ViewReader read{"route", Place::kCuda};
  const RouteArgs args = route_args(read, x, router, correction_bias, slot_mapping, logits,
                                    weights, places, order, offsets);
  const RouteRule rule = route_rule(read.op, args.num_experts(), args.top_k(), is_sigmoid,
                                    is_normalized, scale, num_groups, top_groups);
  check_vectors(args.x);
  check_vectors(args.router);
  PYSERVE_CHECK(args.num_tokens() * args.top_k() < kMaxInt, read.op, ": ", args.num_tokens(),
                " tokens");
  const gpu::RouteParams params{.x = args.x.data,
                                .x_stride = args.x.stride(0),
                                .router = args.router.data,
                                .router_stride = args.router.stride(0),
                                .correction_bias = args.correction_bias,
                                .slot_mapping = args.slot_mapping.ptr<int64_t>(),
                                .logits = args.logits.ptr<float>(),
                                .logits_stride = args.logits.stride(0),
                                .weights = args.weights.ptr<float>(),
                                .weights_stride = args.weights.stride(0),
                                .places = args.places.ptr<int32_t>(),
                                .places_stride = args.places.stride(0),
                                .order = args.order.ptr<int32_t>(),
                                .offsets = args.offsets.ptr<int32_t>(),
                                .num_tokens = static_cast<int>(args.num_tokens()),
                                .hidden = static_cast<int>(args.x.size(1)),
                                .num_experts = static_cast<int>(args.num_experts()),
                                .top_k = static_cast<int>(args.top_k()),
                                .num_logits = static_cast<int>(args.router.size(0)),
                                .has_gate = args.has_shared_gate(),
                                .is_sigmoid = rule.is_sigmoid,
                                .is_normalized = rule.is_normalized,
                                .scale = rule.scale,
                                .num_groups = rule.num_groups,
                                .top_groups = rule.top_groups,
                                .dtype = half_dtype(args.x)};
  check_launch(read.op, gpu::launch_route(params, current_stream(x)));
}

void grouped(const ViewReader& read, const GroupedArgs& args, Epilogue epilogue,
             cudaStream_t stream) {
  check_vectors(args.x);
  check_vectors(args.weight);
  check_vectors(args.out);
  gpu::GroupedParams params = grouped_params(args, epilogue);
  params.weight = args.weight.data;
  params.expert_stride = args.weight.stride(0);
  params.weight_stride = args.weight.stride(1);
  PYSERVE_CHECK(params.num_experts <= kMaxExperts, read.op, ": ", params.num_experts, " experts");
  PYSERVE_CHECK(params.k > 0, read.op, ": x has no columns");
  check_launch(read.op, gpu::launch_grouped(params, stream));
}

void grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets,
                    int64_t max_group, const Tensor& out) {
  const ViewReader read{"grouped_linear", Place::kCuda};
  GroupedArgs args = grouped_args(read, Epilogue::kStore, x, weight, offsets, out);
  read_in_order(max_group, args);
  grouped(read, args, Epilogue::kStore, current_stream(x));
}

void grouped_linear_silu_mul(const Tensor& x, const Tensor& weight, const Tensor& order,
                             const Tensor& offsets, const Tensor& sorted_x, const Tensor& out) {
  const ViewReader read{"grouped_linear_silu_mul", Place::kCuda};
  GroupedArgs args = grouped_args(read, Epilogue::kSiluMul, x, weight, offsets, out);
  read_order(read, order, args);
  read_sorted_x(read, sorted_x, args);
  grouped(read, args, Epilogue::kSiluMul, current_stream(x));
}

void combine_experts(const Tensor& rows, const Tensor& places, const Tensor& weights,
                     const std::optional<Tensor>& shared, bool is_adding, const Tensor& out) {
  const ViewReader read{"combine_experts", Place::kCuda};
  const CombineArgs args = combine_args(read, rows, places, weights, shared, out);
  check_vectors(args.rows);
  check_vectors(args.out);
  if (args.has_shared) check_vectors(args.shared);
  const gpu::CombineParams params{.rows = args.rows.data,
                                  .rows_stride = args.rows.stride(0),
                                  .places = args.places.ptr<int32_t>(),
                                  .places_stride = args.places.stride(0),
                                  .weights = args.weights.ptr<float>(),
                                  .weights_stride = args.weights.stride(0),
                                  .shared = args.has_shared ? args.shared.data : nullptr,
                                  .shared_stride = args.has_shared ? args.shared.stride(0) : 0,
                                  .out = args.out.data,
                                  .out_stride = args.out.stride(0),
                                  .num_tokens = static_cast<int>(args.out.size(0)),
                                  .top_k = static_cast<int>(args.top_k()),
                                  .n = static_cast<int>(args.out.size(1)),
                                  .has_gate = args.has_shared_gate(),
                                  .is_adding = is_adding,
                                  .dtype = half_dtype(args.out)};
  check_launch(read.op, gpu::launch_combine_experts(params, current_stream(out)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("route", TORCH_BOX(&pyserve::route));
  m.impl("grouped_linear", TORCH_BOX(&pyserve::grouped_linear));
  m.impl("grouped_linear_silu_mul", TORCH_BOX(&pyserve::grouped_linear_silu_mul));
  m.impl("combine_experts", TORCH_BOX(&pyserve::combine_experts));
}
