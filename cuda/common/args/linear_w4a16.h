// The arguments of linear_w4a16 and dequantise_w4a16, checked.
#pragma once

#include <optional>

#include "../check.h"
#include "../w4a16.h"
#include "experts.h"
#include "linear.h"

namespace pyserve {

// `packed` [num_strips, num_units, unit_words] as pyserve/ops/w4a16.py lays it out, or those of all
// experts one behind the other.
struct W4Matrix {
  const uint32_t* words;
  int64_t num_strips, num_units;  // of each matrix
  W4Format format;

  int64_t strip_words() const { return num_units * format.unit_words(); }
};

// `count` is the number of stacked matrices; -1 means a single one, without that dim.
inline W4Matrix w4_matrix(const ViewReader& read, const Tensor& packed, int64_t count = -1) {
  const int64_t dim = count < 0 ? 3 : 4;
  const View view = read("packed", packed, dim, ScalarType::Int);
  W4Matrix matrix{view.ptr<uint32_t>(), view.size(dim - 3), view.size(dim - 2), {}};
  for (const W4Format& format : kW4Formats) {
    if (format.unit_words() == view.size(dim - 1)) matrix.format = format;
  }
  PYSERVE_CHECK(matrix.format.group_size != 0, read.op, ": size ", dim - 1, " of packed is ",
                view.size(dim - 1), ", expected 160, 144 or 272");
  if (dim == 4) check_size(view, 0, count);
  check_contiguous(view);
  return matrix;
}

// Checks that the matrix is one of n rows by k columns.
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

inline LinearW4Args linear_w4_args(const ViewReader& read, const Tensor& x, const Tensor& packed,
                                   const std::optional<Tensor>& bias, const Tensor& out,
                                   int64_t epilogue_number, const NormTensors& norm) {
  const Epilogue epilogue = epilogue_of(read.op, epilogue_number);
  LinearW4Args args{rows_args(read, epilogue, x, out), w4_matrix(read, packed), epilogue};
  const int64_t weight_rows = args.n() * rows_per_column(epilogue);
  check_w4_shape(read.op, args.matrix, weight_rows, args.k());
  read_epilogue(read, epilogue, weight_rows, bias, norm, args);
  return args;
}

struct GroupedW4Args : GroupedEpilogueArgs {
  W4Matrix matrix;
};

// sorted_x is room for x in the order of the experts, for kernels that copy x there first.
inline GroupedW4Args grouped_w4_args(const ViewReader& read, const Tensor& packed,
                                     const std::optional<Tensor>& sorted_x,
                                     const GroupedEpilogueArgs& rows) {
  GroupedW4Args args{rows, w4_matrix(read, packed, rows.num_experts())};
  if (sorted_x.has_value()) read_sorted_x(read, *sorted_x, args);
  check_w4_shape(read.op, args.matrix, args.n() * rows_per_column(args.epilogue), args.k());
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
