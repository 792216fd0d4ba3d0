// The parameters of the fp8 launchers, from an op's checked arguments.
#pragma once

#include <algorithm>

#include "common/args/linear_fp8.h"
#include "gpu/linear/fp8.h"

namespace pyserve {

constexpr int64_t kMaxFp8Size = int64_t{1} << 30;

inline gpu::Fp8Scale fp8_scale(const Fp8Matrix& matrix) {
  return {matrix.scales, static_cast<int>(std::min(matrix.scale_rows, kMaxFp8Size)),
          static_cast<int>(std::min(matrix.scale_columns, kMaxFp8Size)),
          static_cast<int>(matrix.num_groups())};
}

inline void check_fp8_size(const char* op, const Fp8Matrix& matrix) {
  PYSERVE_CHECK(matrix.n < kMaxFp8Size && matrix.k < kMaxFp8Size, op, ": weight is ", matrix.n,
                " by ", matrix.k, ", each must be less than ", kMaxFp8Size);
}

// The requirements of few_rows_fp8.cuh: rows that can be read 16 bytes at a time, and one scale per
// stage.
inline void check_fp8_rows(const char* op, const View& x, const Fp8Matrix& matrix) {
  check_fp8_size(op, matrix);
  PYSERVE_CHECK(matrix.k > 0 && matrix.k % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(matrix.bytes) % 16 == 0,
                op, ": rows of weight must be aligned to 16 bytes, of ", matrix.k, " columns");
  PYSERVE_CHECK(reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride(0) % 8 == 0, op,
                ": the rows of x must be aligned to 16 bytes");
  PYSERVE_CHECK(matrix.num_groups() == 1 || matrix.scale_columns % 128 == 0, op,
                ": scale_columns is ", matrix.scale_columns, ", no multiple of 128");
}

}  // namespace pyserve
