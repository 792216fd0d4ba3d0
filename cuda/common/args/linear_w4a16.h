// The arguments of linear_w4a16 and dequantise_w4a16, checked.
#pragma once

#include <optional>

#include "../check.h"
#include "../w4a16.h"
#include "linear.h"

namespace pyserve {

// `packed` [num_strips, num_units, unit_words], read once.
struct W4Matrix {
  const uint32_t* words;
  int64_t num_strips, num_units;
  W4Format format;

  int64_t strip_words() const { return num_units * format.unit_words(); }
};

inline W4Matrix w4_matrix(const ViewReader& read, const Tensor& packed) {
  const View view = read("packed", packed, 3, ScalarType::Int);
  W4Matrix matrix{view.ptr<uint32_t>(), view.size(0), view.size(1), {}};
  for (const W4Format& format : kW4Formats) {
    if (format.unit_words() == view.size(2)) matrix.format = format;
  }
  PYSERVE_CHECK(matrix.format.group_size != 0, read.op, ": size 2 of packed is ", view.size(2),
                ", expected 160, 144 or 272");
  PYSERVE_CHECK(num_elements(view) == 0 || (view.stride(1) == view.size(2) &&
                                            view.stride(0) == view.size(1) * view.size(2)),
                read.op, ": packed must be contiguous");
  return matrix;
}

// Whether it is that of n rows by k columns.
inline void check_w4_shape(const char* op, const W4Matrix& matrix, int64_t n, int64_t k) {
  const int64_t strips = (n + kStripRows - 1) / kStripRows;
  const int64_t columns = matrix.format.unit_columns();
  PYSERVE_CHECK(matrix.num_strips == strips && matrix.num_units == (k + columns - 1) / columns, op,
                ": packed has ", matrix.num_strips, " strips of ", matrix.num_units,
                " units, which are not those of ", n, " rows by ", k, " columns in groups of ",
                matrix.format.group_size);
  PYSERVE_CHECK(k % matrix.format.group_size == 0, op, ": ", k, " columns are no multiple of the ",
                matrix.format.group_size, " of a group");
}

struct LinearW4Args : LinearArgs {
  W4Matrix matrix;
  Epilogue epilogue;
};

inline Epilogue epilogue_of(const char* op, int64_t number) {
  PYSERVE_CHECK(number >= 0 && number <= 2, op, ": epilogue is ", number, ", not 0, 1 or 2");
  return static_cast<Epilogue>(number);
}

inline LinearW4Args linear_w4_args(const ViewReader& read, const Tensor& x, const Tensor& packed,
                                   const std::optional<Tensor>& bias, const Tensor& out,
                                   int64_t epilogue_number,
                                   const std::optional<Tensor>& x_squares,
                                   const std::optional<Tensor>& norm_weight,
                                   const std::optional<Tensor>& scaled,
                                   const std::optional<Tensor>& squares) {
  const Epilogue epilogue = epilogue_of(read.op, epilogue_number);
  LinearW4Args args{rows_args(read, epilogue, x, out), w4_matrix(read, packed), epilogue};
  const int64_t weight_rows = args.n() * rows_per_column(epilogue);
  check_w4_shape(read.op, args.matrix, weight_rows, args.k());
  read_bias(read, bias, weight_rows, args);
  PYSERVE_CHECK(!x_squares.has_value() || epilogue != Epilogue::kAdd, read.op,
                ": x_squares do not go with an addition");
  PYSERVE_CHECK(!norm_weight.has_value() || epilogue == Epilogue::kAdd, read.op,
                ": norm_weight goes with an addition");
  read_x_squares(read, x_squares, args);
  read_norm(read, norm_weight, scaled, squares, args);
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
