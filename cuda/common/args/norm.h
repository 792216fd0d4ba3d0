// The arguments of rms_norm and add_rms_norm, checked.
#pragma once

#include <optional>

#include "../check.h"

namespace pyserve {

struct NormArgs {
  View x, weight, out;
  View residual;  // a copy of x where the op has none
  View x_weight;  // a copy of weight where x itself is not normed first
};

// `residual` is null for rms_norm.
inline NormArgs norm_args(const ViewReader& read, const Tensor& x, const Tensor* residual,
                          const Tensor& weight, const Tensor& out,
                          const std::optional<Tensor>& x_weight = std::nullopt) {
  NormArgs args{read("x", x, -1), read("weight", weight, 1), read("out", out, -1), {}, {}};
  check_size(args.weight, 0, args.x.size(args.x.dim - 1));
  check_same_dtype(args.weight, args.x);
  check_same_dtype(args.out, args.x);
  check_same_sizes(args.out, args.x);
  args.residual = args.x;
  if (residual != nullptr) {
    args.residual = read("residual", *residual, -1);
    check_same_dtype(args.residual, args.x);
    check_same_sizes(args.residual, args.x);
  }
  args.x_weight = args.weight;
  if (x_weight.has_value()) {
    args.x_weight = read("x_weight", *x_weight, 1);
    check_size(args.x_weight, 0, args.weight.size(0));
    check_same_dtype(args.x_weight, args.x);
  }
  return args;
}

}  // namespace pyserve
