// Linears with e4m3 weights on CUDA; the weights are laid out as in pyserve/ops/fp8.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

// The scales of a matrix: element (row, column) uses data[row / rows, column / columns] of data [.,
// num_groups].
struct Fp8Scale {
  const float* data;
  int rows, columns, num_groups;
};

struct DequantiseFp8Params {
  const uint8_t* weight;  // [n, k], contiguous
  Fp8Scale scale;
  void* out;  // [n, k]; the last dim contiguous, stride in elements
  int64_t out_stride;
  int64_t n, k;
  bool is_aligned;  // k is a multiple of 16; rows of weight and out are aligned to 16 bytes
  Dtype dtype;      // 16 bits
};

cudaError_t launch_dequantise_fp8(const DequantiseFp8Params& params, cudaStream_t stream);

// linear and its epilogues by few_rows_fp8.cuh, in passes of 8 rows of x. In params, `weight` is
// e4m3 and weight_stride in bytes. k is a multiple of 16 and not 0. x, its rows and weight are
// aligned to 16 bytes. scale.columns is a multiple of 128, or there is one group.
cudaError_t launch_linear_fp8(const LinearParams& params, const Fp8Scale& scale,
                              cudaStream_t stream);

// launch_linear_fp8 is used for up to so many rows of x; more rows are left to dequantise_fp8 and
// cuBLAS. On an H200, in us, at 32 rows, launch_linear_fp8 / the other way: [28672, 4096] 153 /
// 193; [4096, 14336] 76 / 102; [4096, 4096] 26 / 32; [6144, 4096] 46 / 40. At 64 rows
// launch_linear_fp8 would take twice as long, the other way 199, 112, 33, 42.
constexpr int64_t kMaxFp8Rows = 32;

}  // namespace pyserve::gpu
