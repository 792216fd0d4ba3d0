// The arguments of linear_fp8, dequantise_fp8 and grouped_linear_fp8, checked.
#pragma once

#include <optional>

#include "../check.h"
#include "experts.h"
#include "linear.h"

namespace pyserve {

// One matrix [n, k] of e4m3, or those of all experts one behind the other. Each block of scale_rows
// rows by scale_columns columns has one scale: element (r, c) uses scale (r / scale_rows, c /
// scale_columns).
struct Fp8Matrix {
  const uint8_t* bytes;
  const float* scales;
  int64_t count, n, k;
  int64_t scale_rows, scale_columns;

  int64_t num_scale_rows() const { return (n + scale_rows - 1) / scale_rows; }
  int64_t num_groups() const { return (k + scale_columns - 1) / scale_columns; }

  // The scales of the row's groups of columns: [num_groups].
  const float* scales_of(int64_t index, int64_t row) const {
    return scales + (index * num_scale_rows() + row / scale_rows) * num_groups();
  }
  const uint8_t* row(int64_t index, int64_t row) const { return bytes + (index * n + row) * k; }
};

// scale_columns is a multiple of 64, or k: the kernels take 64 columns at a time, and these must
// not cross from one group into the next.
inline Fp8Matrix fp8_matrix(const ViewReader& read, const Tensor& weight, const Tensor& scales,
                            int64_t scale_rows, int64_t scale_columns, bool is_stacked) {
  const int64_t dim = is_stacked ? 3 : 2;
  const View bytes = read("weight", weight, dim, ScalarType::Byte);
  const View factors = read("scales", scales, dim, ScalarType::Float);
  check_contiguous(bytes);
  check_contiguous(factors);
  const Fp8Matrix matrix{bytes.ptr<uint8_t>(),  factors.ptr<float>(), is_stacked ? bytes.size(0) : 1,
                         bytes.size(dim - 2),   bytes.size(dim - 1),  scale_rows,
                         scale_columns};
  PYSERVE_CHECK(scale_rows >= 1, read.op, ": scale_rows is ", scale_rows);
  PYSERVE_CHECK(scale_columns >= 1 && (scale_columns % 64 == 0 || scale_columns >= matrix.k),
                read.op, ": scale_columns is ", scale_columns,
                ", neither a multiple of 64 nor all of ", matrix.k);
  if (is_stacked) check_size(factors, 0, matrix.count);
  check_size(factors, dim - 2, matrix.num_scale_rows());
  check_size(factors, dim - 1, matrix.num_groups());
  return matrix;
}

struct LinearFp8Args : LinearArgs {
  Fp8Matrix matrix;
  Epilogue epilogue;
};

inline LinearFp8Args linear_fp8_args(const ViewReader& read, const Tensor& x, const Tensor& weight,
                                     const Tensor& scales, int64_t scale_rows,
                                     int64_t scale_columns, const std::optional<Tensor>& bias,
                                     const Tensor& out, int64_t epilogue_number,
                                     const NormTensors& norm) {
  const Epilogue epilogue = epilogue_of(read.op, epilogue_number);
  LinearFp8Args args{rows_args(read, epilogue, x, out),
                     fp8_matrix(read, weight, scales, scale_rows, scale_columns, false), epilogue};
  const View bytes = read("weight", weight, 2, ScalarType::Byte);
  check_size(bytes, 0, args.n() * rows_per_column(epilogue));
  check_size(bytes, 1, args.k());
  read_epilogue(read, epilogue, args.matrix.n, bias, norm, args);
  return args;
}

struct GroupedFp8Args : GroupedEpilogueArgs {
  Fp8Matrix matrix;
};

inline GroupedFp8Args grouped_fp8_args(const ViewReader& read, const Tensor& weight,
                                       const Tensor& scales, int64_t scale_rows,
                                       int64_t scale_columns, const GroupedEpilogueArgs& rows) {
  const GroupedFp8Args args{rows, fp8_matrix(read, weight, scales, scale_rows, scale_columns, true)};
  const View bytes = read("weight", weight, 3, ScalarType::Byte);
  check_size(bytes, 0, args.num_experts());
  check_size(bytes, 1, args.n() * rows_per_column(args.epilogue));
  check_size(bytes, 2, args.k());
  return args;
}

struct DequantiseFp8Args {
  View out;  // [n, k]
  Fp8Matrix matrix;
};

inline DequantiseFp8Args dequantise_fp8_args(const ViewReader& read, const Tensor& weight,
                                             const Tensor& scales, int64_t scale_rows,
                                             int64_t scale_columns, const Tensor& out) {
  DequantiseFp8Args args{read("out", out, 2),
                         fp8_matrix(read, weight, scales, scale_rows, scale_columns, false)};
  check_size(args.out, 0, args.matrix.n);
  check_size(args.out, 1, args.matrix.k);
  return args;
}

}  // namespace pyserve
