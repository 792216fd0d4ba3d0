// Linears of 8-bit floats on CUDA: matrices that lie as pyserve/ops/fp8.py says.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

// The scale of an element is that of its row / rows and column / columns: data [., num_groups].
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
  bool is_aligned;  // k is a multiple of 16, rows of weight and out are aligned to 16 bytes
  Dtype dtype;      // 16 bits
};

cudaError_t launch_dequantise_fp8(const DequantiseFp8Params& params, cudaStream_t stream);

// linear and its epilogues, by few_rows_fp8.cuh: in passes of 8 rows. Of params `weight` is 8-bit and
// weight_stride in bytes; k is a multiple of 16 and not 0, x and weight are aligned to 16 bytes and so
// are the rows of x; scale.columns is a multiple of 128, or there is one group.
cudaError_t launch_linear_fp8(const LinearParams& params, const Fp8Scale& scale,
                              cudaStream_t stream);

// Rows of x up to which launch_linear_fp8 is taken; more are left to plain numbers. On an H200, us of
// 32 rows by both: [28672, 4096] 153, 193; [4096, 14336] 76, 102; [4096, 4096] 26, 32; [6144, 4096]
// 46, 40. At 64 rows it would take twice as long, they 199, 112, 33, 42.
constexpr int64_t kMaxFp8Rows = 32;

}  // namespace pyserve::gpu
