// The arguments of linear, checked.
#pragma once

#include <optional>

#include "../check.h"

namespace pyserve {

struct LinearArgs {
  View x, weight, out;
  const void* bias = nullptr;  // null: none

  int64_t m() const { return x.size(0); }
  int64_t n() const { return weight.size(0); }
  int64_t k() const { return x.size(1); }
};

inline LinearArgs linear_args(const ViewReader& read, const Tensor& x, const Tensor& weight,
                              const std::optional<Tensor>& bias, const Tensor& out) {
  LinearArgs args{read("x", x, 2), read("weight", weight, 2), read("out", out, 2)};
  check_size(args.weight, 1, args.k());
  check_size(args.out, 0, args.m());
  check_size(args.out, 1, args.n());
  check_same_dtype(args.weight, args.x);
  check_same_dtype(args.out, args.x);
  if (bias.has_value()) {
    const View view = read("bias", *bias, 1);
    check_size(view, 0, args.n());
    check_same_dtype(view, args.x);
    args.bias = view.data;
  }
  return args;
}

}  // namespace pyserve
