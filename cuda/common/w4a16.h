// How a matrix of 4-bit integers lies in memory: pyserve/ops/w4a16.py says it, here are its numbers.
#pragma once

#include <cstdint>

#include "check.h"

namespace pyserve {

constexpr int64_t kStripRows = 16;
constexpr int64_t kW4BlockColumns = 64;
constexpr int64_t kW4BlockWords = 128;
constexpr int64_t kW4RecordWords = 16;
constexpr uint32_t kW4ZeroMask = 0xff;  // of a record's word; the rest is the scale

// What follows from the group size.
struct W4Format {
  int64_t group_size, unit_blocks, unit_records;

  int64_t unit_columns() const { return unit_blocks * kW4BlockColumns; }
  int64_t unit_words() const {
    return unit_blocks * kW4BlockWords + unit_records * kW4RecordWords;
  }
};

constexpr W4Format kW4Formats[] = {{32, 1, 2}, {64, 1, 1}, {128, 2, 1}};

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

}  // namespace pyserve
