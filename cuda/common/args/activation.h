// The arguments of silu_mul, checked.
#pragma once

#include "../check.h"

namespace pyserve {

struct SiluMulArgs {
  View gate_up, out;
};

inline SiluMulArgs silu_mul_args(const ViewReader& read, const Tensor& gate_up, const Tensor& out) {
  const SiluMulArgs args{read("gate_up", gate_up, 2), read("out", out, 2)};
  check_size(args.gate_up, 0, args.out.size(0));
  check_size(args.gate_up, 1, 2 * args.out.size(1));
  check_same_dtype(args.out, args.gate_up);
  return args;
}

}  // namespace pyserve
