// grouped_linear and grouped_linear_silu_mul on a CPU: each row of x times the matrix of its
// expert; and combine_experts: the weighted sum of what a token's experts computed. float32 or
// bfloat16.
//   weight [num_experts, n, k]; rows are sorted by expert, those of expert e are
//   offsets[e] .. offsets[e + 1] - 1
//
// With few tokens the work is to stream the matrices of the experts that have rows, once;
// linear_groups.h does this. combine_experts adds in the order of a token's experts, in float32,
// and rounds once.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "../common/args/experts.h"
#include "linear_groups.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

// The rows of x in the order of the experts; copies them where there is an order.
template <class T>
const View& gather(const GroupedArgs& args, int64_t count) {
  if (args.order == nullptr) return args.x;
  for (int64_t i = 0; i < count; ++i) {
    const T* from = args.x.ptr<T>() + args.order[i] / args.top_k * args.x.stride(0);
    T* to = args.sorted_x.ptr<T>() + i * args.sorted_x.stride(0);
    std::memcpy(to, from, args.k() * sizeof(T));
  }
  return args.sorted_x;
}

// The groups of all experts that have rows.
template <class T>
std::vector<Group<T>> groups_of(const GroupedArgs& args) {
  check_groups(args);
  const auto* offsets = args.offsets.ptr<int32_t>();
  const int64_t count = offsets[args.num_experts()];
  const View& x = gather<T>(args, count);
  std::vector<Group<T>> groups;
  for (int64_t i = 0; i < args.num_experts(); ++i) {
    const int64_t begin = offsets[i];
    if (begin == offsets[i + 1]) continue;
    groups.push_back({.shape = {.m = offsets[i + 1] - begin,
                                .n = args.n(),
                                .k = args.k(),
                                .x_stride = x.stride(0),
                                .weight_stride = args.weight.stride(1),
                                .out_stride = args.out.stride(0)},
                      .matrix = {args.weight.ptr<T>() + i * args.weight.stride(0), nullptr},
                      .x = x.ptr<T>() + begin * x.stride(0),
                      .out = args.out.ptr<T>() + begin * args.out.stride(0)});
  }
  return groups;
}

template <Epilogue kEpilogue, class T>
void grouped(const GroupedArgs& args) {
  std::vector<Group<T>> groups = groups_of<T>(args);
  linear_groups<kEpilogue, T>(groups, args.n());
}

void grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets,
                    int64_t max_group, const Tensor& out) {
  const ViewReader read{"grouped_linear", Place::kCpu};
  GroupedArgs args = grouped_args(read, Epilogue::kStore, x, weight, offsets, out);
  read_in_order(max_group, args);
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) { grouped<Epilogue::kStore, T>(args); });
}

void grouped_linear_silu_mul(const Tensor& x, const Tensor& weight, const Tensor& order,
                             const Tensor& offsets, const Tensor& sorted_x, const Tensor& out) {
  const ViewReader read{"grouped_linear_silu_mul", Place::kCpu};
  GroupedArgs args = grouped_args(read, Epilogue::kSiluMul, x, weight, offsets, out);
  read_order(read, order, args);
  read_sorted_x(read, sorted_x, args);
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) { grouped<Epilogue::kSiluMul, T>(args); });
}

// ---- combine_experts ----------------------------------------------------------------------------

// Combines one vector of columns. `get(from)` and `put(to, sums)` read and write a whole vector, or
// only its first elements.
template <class T, class Get, class Put>
void combine_columns(const CombineArgs& args, int64_t token, int64_t column, bool is_adding,
                     const Get& get, const Put& put) {
  const int32_t* places = args.places.ptr<int32_t>() + token * args.places.stride(0);
  const float* weights = args.weights.ptr<float>() + token * args.weights.stride(0);
  T* out = args.out.ptr<T>() + token * args.out.stride(0) + column;
  Vec sums{};
  for (int64_t j = 0; j < args.top_k(); ++j) {
    if (places[j] < 0) continue;
    const T* row = args.rows.ptr<T>() + places[j] * args.rows.stride(0) + column;
    sums = fma(splat(weights[j]), get(row), sums);
  }
  if (args.has_shared) {
    const T* row = args.shared.ptr<T>() + token * args.shared.stride(0) + column;
    const float weight = args.has_shared_gate() ? weights[args.top_k()] : 1.0f;
    sums = fma(splat(weight), get(row), sums);
  }
  put(out, is_adding ? get(out) + sums : sums);
}

template <class T>
void combine_token(const CombineArgs& args, int64_t token, bool is_adding) {
  const int64_t n = args.out.size(1);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    combine_columns<T>(
        args, token, i, is_adding, [](const T* row) { return load(row); },
        [](T* to, Vec sums) { store(to, sums); });
  }
  if (i == n) return;
  combine_columns<T>(
      args, token, i, is_adding, [&](const T* row) { return load_first(row, n - i); },
      [&](T* to, Vec sums) { store_first(to, sums, n - i); });
}

void combine_experts(const Tensor& rows, const Tensor& places, const Tensor& weights,
                     const std::optional<Tensor>& shared, bool is_adding, const Tensor& out) {
  const ViewReader read{"combine_experts", Place::kCpu};
  const CombineArgs args = combine_args(read, rows, places, weights, shared, out);
  const int64_t num_tokens = args.out.size(0), num_rows = args.rows.size(0);
  for (int64_t i = 0; i < num_tokens * args.top_k(); ++i) {
    const int32_t place = args.places.ptr<int32_t>()[i / args.top_k() * args.places.stride(0) +
                                                     i % args.top_k()];
    PYSERVE_CHECK(place >= -1 && place < num_rows, read.op, ": places holds ", place, ", of ",
                  num_rows, " rows");
  }
  const double cost = 0.3 * static_cast<double>(args.out.size(1) * (args.top_k() + 2));
  dispatch_float<float, Bf16>(args.out, [&]<class T>(T) {
    parallel_for(num_tokens, cost, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) combine_token<T>(args, token, is_adding);
    });
  });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&pyserve::grouped_linear));
  m.impl("grouped_linear_silu_mul", TORCH_BOX(&pyserve::grouped_linear_silu_mul));
  m.impl("combine_experts", TORCH_BOX(&pyserve::combine_experts));
}
