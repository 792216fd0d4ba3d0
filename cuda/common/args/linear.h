// The arguments of linear, linear_add and linear_silu_mul, checked.
#pragma once

#include <optional>

#include "../check.h"
#include "../epilogue.h"

namespace pyserve {

// The partial sums of squares of an RMSNorm (see epilogue.h), float32 [m, num_squares(columns)];
// null where there is no norm.
struct Squares {
  float* data = nullptr;
  int64_t stride = 0;

  float* row(int64_t t) const { return data + t * stride; }
};

struct LinearArgs {
  View x, weight, out;  // weight is empty where an fp8 or w4a16 op has its own matrix
  const void* bias = nullptr;  // null: none
  Squares x_squares;           // of the RMSNorm of x, which becomes a factor of the sums
  // Only with kAdd: the weight of the RMSNorm that follows, the residual times that weight, and the
  // sums of squares of the residual.
  const void* norm_weight = nullptr;  // null: none
  View scaled;
  Squares squares;

  int64_t m() const { return x.size(0); }
  int64_t n() const { return out.size(1); }
  int64_t k() const { return x.size(1); }
};

// Reads everything except the weight and the bias. With kAdd `out` is the residual.
inline LinearArgs rows_args(const ViewReader& read, Epilogue epilogue, const Tensor& x,
                            const Tensor& out) {
  const char* out_name = epilogue == Epilogue::kAdd ? "residual" : "out";
  LinearArgs args{.x = read("x", x, 2), .out = read(out_name, out, 2)};
  check_size(args.out, 0, args.m());
  check_same_dtype(args.out, args.x);
  return args;
}

inline void read_bias(const ViewReader& read, const std::optional<Tensor>& bias,
                      int64_t weight_rows, LinearArgs& args) {
  if (!bias.has_value()) return;
  const View view = read("bias", *bias, 1);
  check_size(view, 0, weight_rows);
  check_same_dtype(view, args.x);
  args.bias = view.data;
}

inline LinearArgs linear_args(const ViewReader& read, Epilogue epilogue, const Tensor& x,
                              const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& out) {
  LinearArgs args = rows_args(read, epilogue, x, out);
  args.weight = read("weight", weight, 2);
  check_size(args.weight, 1, args.k());
  if (epilogue == Epilogue::kSiluMul) {
    check_size(args.weight, 0, 2 * args.n());
  } else {
    check_size(args.out, 1, args.weight.size(0));
  }
  check_same_dtype(args.weight, args.x);
  read_bias(read, bias, args.weight.size(0), args);
  return args;
}

inline Squares squares_of(const ViewReader& read, const char* name, const Tensor& tensor, int64_t m,
                          int64_t columns) {
  const View view = read(name, tensor, 2, ScalarType::Float);
  check_size(view, 0, m);
  check_size(view, 1, num_squares(columns));
  return {view.ptr<float>(), view.stride(0)};
}

inline void read_x_squares(const ViewReader& read, const std::optional<Tensor>& x_squares,
                           LinearArgs& args) {
  if (x_squares.has_value()) {
    args.x_squares = squares_of(read, "x_squares", *x_squares, args.m(), args.k());
  }
}

// What an op may be given of the RMSNorm in front of it (x_squares) and of the one behind it.
struct NormTensors {
  const std::optional<Tensor>&x_squares, &norm_weight, &scaled, &squares;
};

// Either all three tensors are given or none.
inline void read_norm(const ViewReader& read, const std::optional<Tensor>& norm_weight,
                      const std::optional<Tensor>& scaled, const std::optional<Tensor>& squares,
                      LinearArgs& args) {
  PYSERVE_CHECK(norm_weight.has_value() == scaled.has_value() &&
                    norm_weight.has_value() == squares.has_value(),
                read.op, ": norm_weight, scaled and squares go together");
  if (!norm_weight.has_value()) return;
  const View weight = read("norm_weight", *norm_weight, 1);
  check_size(weight, 0, args.n());
  check_same_dtype(weight, args.x);
  args.norm_weight = weight.data;
  args.scaled = read("scaled", *scaled, 2);
  check_same_sizes(args.scaled, args.out);
  check_same_dtype(args.scaled, args.x);
  args.squares = squares_of(read, "squares", *squares, args.m(), args.n());
}

inline Epilogue epilogue_of(const char* op, int64_t number) {
  PYSERVE_CHECK(number >= 0 && number <= 2, op, ": epilogue is ", number, ", not 0, 1 or 2");
  return static_cast<Epilogue>(number);
}

// Reads everything except the weight, for an op that is given its epilogue as a number.
inline void read_epilogue(const ViewReader& read, Epilogue epilogue, int64_t weight_rows,
                          const std::optional<Tensor>& bias, const NormTensors& norm,
                          LinearArgs& args) {
  read_bias(read, bias, weight_rows, args);
  PYSERVE_CHECK(!norm.x_squares.has_value() || epilogue != Epilogue::kAdd, read.op,
                ": x_squares do not go with an addition");
  PYSERVE_CHECK(!norm.norm_weight.has_value() || epilogue == Epilogue::kAdd, read.op,
                ": norm_weight goes with an addition");
  read_x_squares(read, norm.x_squares, args);
  read_norm(read, norm.norm_weight, norm.scaled, norm.squares, args);
}

}  // namespace pyserve
