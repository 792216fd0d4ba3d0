// The arguments of lora_shrink, lora_expand and lora_expand_silu_mul, checked. The values of
// starts, ranks and columns are checked by the kernel.
#pragma once

#include <optional>

#include "linear.h"

namespace pyserve {

struct LoraShrinkArgs {
  View x, a, starts, ranks, scales, out;
  Squares x_squares;  // of the RMSNorm of x, which becomes a factor; null: none

  int64_t num_tokens() const { return x.size(0); }
  int64_t num_slots() const { return a.size(0); }
  int64_t num_parts() const { return a.size(1); }
  int64_t max_rank() const { return a.size(2); }
  int64_t k() const { return x.size(1); }
  int64_t num_splits() const { return out.size(0); }
};

struct LoraExpandArgs {
  View shrunk, b, starts, ranks, columns, out;  // out is added to

  int64_t num_tokens() const { return out.size(0); }
  int64_t num_slots() const { return b.size(0); }
  int64_t num_parts() const { return shrunk.size(2); }
  int64_t num_splits() const { return shrunk.size(0); }
  int64_t max_rank() const { return b.size(2); }
  int64_t n() const { return out.size(1); }
};

inline void check_splits(const View& shrunk) {
  PYSERVE_CHECK(shrunk.size(0) >= 1, shrunk.op, ": ", shrunk.name, " has no splits");
}

// Checks everything but the columns of b, which must be those of the linear.
inline void check_lora_expand(const LoraExpandArgs& args) {
  check_same_dtype(args.b, args.out);
  check_splits(args.shrunk);
  check_size(args.shrunk, 1, args.num_tokens());
  check_size(args.shrunk, 3, args.max_rank());
  check_size(args.starts, 0, args.num_slots() + 1);
  check_size(args.ranks, 0, args.num_slots());
  check_size(args.ranks, 1, args.num_parts());
  check_size(args.columns, 0, args.num_parts() + 1);
}

inline LoraShrinkArgs lora_shrink_args(const ViewReader& read, const Tensor& x, const Tensor& a,
                                       const Tensor& starts, const Tensor& ranks,
                                       const Tensor& scales, const Tensor& out,
                                       const std::optional<Tensor>& x_squares) {
  constexpr auto kInt = ScalarType::Int;
  LoraShrinkArgs args{read("x", x, 2),
                            read("a", a, 4),
                            read("starts", starts, 1, kInt),
                            read("ranks", ranks, 2, kInt),
                            read("scales", scales, 2, ScalarType::Float),
                            read("out", out, 4, ScalarType::Float)};
  check_same_dtype(args.a, args.x);
  check_size(args.a, 3, args.k());
  check_size(args.starts, 0, args.num_slots() + 1);
  check_size(args.ranks, 0, args.num_slots());
  check_size(args.ranks, 1, args.num_parts());
  check_same_sizes(args.scales, args.ranks);
  check_splits(args.out);
  check_size(args.out, 1, args.num_tokens());
  check_size(args.out, 2, args.num_parts());
  check_size(args.out, 3, args.max_rank());
  if (x_squares.has_value()) {
    args.x_squares = squares_of(read, "x_squares", *x_squares, args.num_tokens(), args.k());
  }
  return args;
}

inline LoraExpandArgs lora_expand_args(const ViewReader& read, const Tensor& shrunk,
                                       const Tensor& b, const Tensor& starts, const Tensor& ranks,
                                       const Tensor& columns, const char* out_name,
                                       const Tensor& out) {
  constexpr auto kInt = ScalarType::Int;
  const LoraExpandArgs args{read("shrunk", shrunk, 4, ScalarType::Float),
                            read("b", b, 3),
                            read("starts", starts, 1, kInt),
                            read("ranks", ranks, 2, kInt),
                            read("columns", columns, 1, kInt),
                            read(out_name, out, 2)};
  check_size(args.b, 1, args.n());
  check_lora_expand(args);
  return args;
}

}  // namespace pyserve
