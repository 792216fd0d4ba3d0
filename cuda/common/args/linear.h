// The arguments of linear, linear_add and linear_silu_mul, checked.
#pragma once

#include <optional>

#include "../check.h"
#include "../epilogue.h"

namespace pyserve {

struct LinearArgs {
  View x, weight, out;
  const void* bias = nullptr;  // null: none

  int64_t m() const { return x.size(0); }
  int64_t n() const { return out.size(1); }
  int64_t k() const { return x.size(1); }
};

// `out` is the residual of linear_add.
inline LinearArgs linear_args(const ViewReader& read, Epilogue epilogue, const Tensor& x,
                              const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& out) {
  const char* out_name = epilogue == Epilogue::kAdd ? "residual" : "out";
  LinearArgs args{read("x", x, 2), read("weight", weight, 2), read(out_name, out, 2)};
  check_size(args.weight, 1, args.k());
  check_size(args.out, 0, args.m());
  if (epilogue == Epilogue::kSiluMul) {
    check_size(args.weight, 0, 2 * args.n());
  } else {
    check_size(args.out, 1, args.weight.size(0));
  }
  check_same_dtype(args.weight, args.x);
  check_same_dtype(args.out, args.x);
  if (bias.has_value()) {
    const View view = read("bias", *bias, 1);
    check_size(view, 0, args.weight.size(0));
    check_same_dtype(view, args.x);
    args.bias = view.data;
  }
  return args;
}

}  // namespace pyserve
