// The arguments of route, grouped_linear, grouped_linear_silu_mul and combine_experts, checked.
#pragma once

#include <optional>

#include "../check.h"
#include "../epilogue.h"
#include "../limits.h"

namespace pyserve {

// How a router's scores become weights; pyserve/ops/experts.py explains each field.
struct RouteRule {
  bool is_sigmoid, is_normalized;
  float scale;
  int num_groups, top_groups;
};

struct RouteArgs {
  View x, router, slot_mapping;
  const float* correction_bias = nullptr;  // [num_experts], or null
  RouteRule rule;
  View logits, weights, places, order, offsets;

  int64_t num_tokens() const { return x.size(0); }
  int64_t num_experts() const { return offsets.size(0) - 1; }
  int64_t top_k() const { return places.size(1); }
  bool has_shared_gate() const { return router.size(0) > num_experts(); }
};

inline RouteRule route_rule(const char* op, int64_t num_experts, int64_t top_k, bool is_sigmoid,
                            bool is_normalized, double scale, int64_t num_groups,
                            int64_t top_groups) {
  PYSERVE_CHECK(num_experts >= 1 && num_experts <= kMaxExperts, op, ": ", num_experts,
                " experts, the limit is ", kMaxExperts);
  PYSERVE_CHECK(top_k >= 1 && top_k <= kMaxTopExperts && top_k <= num_experts, op, ": ", top_k,
                " of ", num_experts, " experts a token, the limit is ", kMaxTopExperts);
  PYSERVE_CHECK(num_groups >= 1 && num_groups <= kMaxExpertGroups && num_experts % num_groups == 0,
                op, ": ", num_groups, " groups do not divide ", num_experts,
                " experts, or are more than ", kMaxExpertGroups);
  PYSERVE_CHECK(top_groups >= 1 && top_groups <= num_groups &&
                    top_k <= top_groups * (num_experts / num_groups),
                op, ": ", top_k, " experts out of ", top_groups, " of ", num_groups, " groups of ",
                num_experts);
  return {is_sigmoid, is_normalized, static_cast<float>(scale), static_cast<int>(num_groups),
          static_cast<int>(top_groups)};
}

inline RouteArgs route_args(const ViewReader& read, const Tensor& x, const Tensor& router,
                            const std::optional<Tensor>& correction_bias,
                            const Tensor& slot_mapping, const Tensor& logits,
                            const Tensor& weights, const Tensor& places, const Tensor& order,
                            const Tensor& offsets) {
  RouteArgs args{.x = read("x", x, 2),
                 .router = read("router", router, 2),
                 .slot_mapping = read("slot_mapping", slot_mapping, 1, ScalarType::Long),
                 .rule = {},
                 .logits = read("logits", logits, 2, ScalarType::Float),
                 .weights = read("weights", weights, 2, ScalarType::Float),
                 .places = read("places", places, 2, ScalarType::Int),
                 .order = read("order", order, 1, ScalarType::Int),
                 .offsets = read("offsets", offsets, 1, ScalarType::Int)};
  const int64_t num_tokens = args.num_tokens(), num_experts = args.num_experts();
  check_size(args.router, 1, args.x.size(1));
  check_same_dtype(args.router, args.x);
  check_size(args.slot_mapping, 0, num_tokens);
  PYSERVE_CHECK(args.router.size(0) == num_experts || args.router.size(0) == num_experts + 1,
                read.op, ": router has ", args.router.size(0), " rows for ", num_experts,
                " experts");
  check_size(args.logits, 0, num_tokens);
  check_size(args.logits, 1, args.router.size(0));
  check_size(args.places, 0, num_tokens);
  check_size(args.weights, 0, num_tokens);
  check_size(args.weights, 1, args.top_k() + (args.has_shared_gate() ? 1 : 0));
  check_size(args.order, 0, num_tokens * args.top_k());
  if (correction_bias.has_value()) {
    const View view = read("correction_bias", *correction_bias, 1, ScalarType::Float);
    check_size(view, 0, num_experts);
    args.correction_bias = view.ptr<float>();
  }
  return args;
}

// Multiplies each row of x by the matrix of that row's expert. With `order`, x has one row per
// token and `order` lists the assignments (token * top_k + choice) sorted by expert; a kernel may
// gather the rows into `sorted_x`. Without `order` the rows of x are sorted by expert already.
struct GroupedArgs {
  View x, weight, offsets, out, sorted_x;
  const int32_t* order = nullptr;
  int64_t top_k = 1;      // assignments of each row of x
  int64_t max_group = 0;  // upper bound on the rows of any one expert

  int64_t num_experts() const { return offsets.size(0) - 1; }
  int64_t max_rows() const { return out.size(0); }
  int64_t n() const { return out.size(1); }
  int64_t k() const { return x.size(1); }
};

// Reads everything except the weight and the order.
inline GroupedArgs grouped_rows_args(const ViewReader& read, const Tensor& x, const Tensor& offsets,
                                     const Tensor& out) {
  GroupedArgs args{.x = read("x", x, 2),
                   .weight = {},
                   .offsets = read("offsets", offsets, 1, ScalarType::Int),
                   .out = read("out", out, 2),
                   .sorted_x = {}};
  PYSERVE_CHECK(args.num_experts() >= 0, read.op, ": offsets is empty");
  check_same_dtype(args.out, args.x);
  return args;
}

inline GroupedArgs grouped_args(const ViewReader& read, Epilogue epilogue, const Tensor& x,
                                const Tensor& weight, const Tensor& offsets, const Tensor& out) {
  GroupedArgs args = grouped_rows_args(read, x, offsets, out);
  args.weight = read("weight", weight, 3);
  check_size(args.offsets, 0, args.weight.size(0) + 1);
  check_size(args.weight, 1, rows_per_column(epilogue) * args.n());
  check_size(args.weight, 2, args.k());
  check_same_dtype(args.weight, args.x);
  return args;
}

// For ops whose rows of x are sorted by expert already.
inline void read_in_order(int64_t max_group, GroupedArgs& args) {
  check_size(args.x, 0, args.max_rows());
  PYSERVE_CHECK(max_group >= 0, args.x.op, ": max_group is ", max_group);
  args.max_group = max_group;
}

inline void read_order(const ViewReader& read, const Tensor& order, GroupedArgs& args) {
  const View view = read("order", order, 1, ScalarType::Int);
  const int64_t num_tokens = args.x.size(0), num_rows = args.max_rows();
  check_size(view, 0, num_rows);
  PYSERVE_CHECK(num_tokens == 0 ? num_rows == 0 : num_rows % num_tokens == 0, read.op, ": ",
                num_rows, " rows of ", num_tokens, " tokens");
  args.order = view.ptr<int32_t>();
  args.top_k = num_tokens == 0 ? 1 : num_rows / num_tokens;
  args.max_group = num_tokens;
}

inline void read_sorted_x(const ViewReader& read, const Tensor& sorted_x, GroupedArgs& args) {
  args.sorted_x = read("sorted_x", sorted_x, 2);
  check_size(args.sorted_x, 0, args.max_rows());
  check_size(args.sorted_x, 1, args.k());
  check_same_dtype(args.sorted_x, args.x);
}

// Checks the values of offsets and order, which only the CPU ops can read here.
inline void check_groups(const GroupedArgs& args) {
  const char* op = args.offsets.op;
  const auto* offsets = args.offsets.ptr<int32_t>();
  const int64_t count = offsets[args.num_experts()];
  PYSERVE_CHECK(offsets[0] == 0 && count <= args.max_rows(), op, ": offsets from ", offsets[0],
                " to ", count, " for ", args.max_rows(), " rows");
  for (int64_t i = 0; i < args.num_experts(); ++i) {
    const int64_t m = offsets[i + 1] - offsets[i];
    PYSERVE_CHECK(m >= 0 && m <= args.max_group, op, ": expert ", i, " has ", m, " rows, at most ",
                  args.max_group);
  }
  for (int64_t i = 0; args.order != nullptr && i < count; ++i) {
    PYSERVE_CHECK(args.order[i] >= 0 && args.order[i] < args.max_rows(), op, ": order holds ",
                  args.order[i], ", of ", args.max_rows());
  }
}

// An op that is given an order applies kSiluMul (the first linear of the experts). One without it
// finds the rows of x sorted by expert and applies kStore (the second).
struct GroupedEpilogueArgs : GroupedArgs {
  Epilogue epilogue;
};

inline GroupedEpilogueArgs grouped_epilogue_args(const ViewReader& read, const Tensor& x,
                                                 const std::optional<Tensor>& order,
                                                 const Tensor& offsets, int64_t max_group,
                                                 const Tensor& out) {
  GroupedEpilogueArgs args{grouped_rows_args(read, x, offsets, out),
                           order.has_value() ? Epilogue::kSiluMul : Epilogue::kStore};
  if (order.has_value()) {
    read_order(read, *order, args);
  } else {
    read_in_order(max_group, args);
  }
  return args;
}

struct CombineArgs {
  View rows, places, weights, out, shared;
  bool has_shared = false;

  int64_t top_k() const { return places.size(1); }
  bool has_shared_gate() const { return weights.size(1) > top_k(); }
};

inline CombineArgs combine_args(const ViewReader& read, const Tensor& rows, const Tensor& places,
                                const Tensor& weights, const std::optional<Tensor>& shared,
                                const Tensor& out) {
  CombineArgs args{.rows = read("rows", rows, 2),
                   .places = read("places", places, 2, ScalarType::Int),
                   .weights = read("weights", weights, 2, ScalarType::Float),
                   .out = read("out", out, 2),
                   .shared = {}};
  check_size(args.places, 0, args.out.size(0));
  check_size(args.rows, 0, args.places.size(0) * args.top_k());
  check_size(args.rows, 1, args.out.size(1));
  check_size(args.weights, 0, args.out.size(0));
  check_same_dtype(args.rows, args.out);
  PYSERVE_CHECK(args.weights.size(1) == args.top_k() ||
                    (shared.has_value() && args.weights.size(1) == args.top_k() + 1),
                read.op, ": ", args.weights.size(1), " weights for ", args.top_k(), " experts");
  if (shared.has_value()) {
    args.shared = read("shared", *shared, 2);
    check_same_sizes(args.shared, args.out);
    check_same_dtype(args.shared, args.out);
    args.has_shared = true;
  }
  return args;
}

}  // namespace pyserve
