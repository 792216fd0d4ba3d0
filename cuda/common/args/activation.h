// The arguments of silu_mul and gelu_tanh_mul, checked.
#pragma once

#include "../check.h"

namespace pyserve {

struct ActivationArgs {
  View gate_up, out;
};

inline ActivationArgs activation_args(const ViewReader& read, const Tensor& gate_up,
                                      const Tensor& out) {
  const ActivationArgs args{read("gate_up", gate_up, 2), read("out", out, 2)};
  check_size(args.gate_up, 0, args.out.size(0));
  check_size(args.gate_up, 1, 2 * args.out.size(1));
  check_same_dtype(args.out, args.gate_up);
  return args;
}

}  // namespace pyserve
