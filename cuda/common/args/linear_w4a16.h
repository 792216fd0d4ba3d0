// The arguments of linear_w4a16 and dequantise_w4a16, checked.
#pragma once

#include <optional>

#include "../check.h"
#include "../w4a16.h"

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
