// The arguments of linear_w4a16 and dequantise_w4a16, checked.
#pragma once

#include <optional>

#include "../check.h"
#include "../w4a16.h"

namespace pyserve {

struct LinearW4Args {
  View x, out;
  W4Matrix matrix;
  const void* bias = nullptr;  // null: none

  int64_t m() const { return x.size(0); }
  int64_t n() const { return out.size(1); }
  int64_t k() const { return x.size(1); }
};

inline LinearW4Args linear_w4_args(const ViewReader& read, const Tensor& x, const Tensor& packed,
                                   const std::optional<Tensor>& bias, const Tensor& out) {
  LinearW4Args args{read("x", x, 2), read("out", out, 2), w4_matrix(read, packed)};
  check_size(args.out, 0, args.m());
  check_same_dtype(args.out, args.x);
  check_w4_shape(read.op, args.matrix, args.n(), args.k());
  if (bias.has_value()) {
    const View view = read("bias", *bias, 1);
    check_size(view, 0, args.n());
    check_same_dtype(view, args.x);
    args.bias = view.data;
  }
  return args;
}

struct DequantiseW4Args {
  View out;  // [rows, k]
  W4Matrix matrix;
};

inline DequantiseW4Args dequantise_w4_args(const ViewReader& read, const Tensor& packed,
                                           const Tensor& out) {
  DequantiseW4Args args{read("out", out, 2), w4_matrix(read, packed)};
  check_w4_shape(read.op, args.matrix, args.out.size(0), args.out.size(1));
  return args;
}

}  // namespace pyserve
