// linear on CUDA: out[t, j] = sum over i of x[t, i] * weight[j, i], plus bias[j]; or what an
// epilogue makes of these sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/epilogue.h"
#include "gpu/core/dtype.h"

namespace pyserve::gpu {

using pyserve::Epilogue;

struct LinearParams {
  const void* x;  // [m, k]; strides in elements, the last dim contiguous
  int64_t x_stride;
  const void* weight;  // [weight_rows(), k]
  int64_t weight_stride;
  const void* bias;  // [weight_rows()] or null
  void* out;         // [m, n]
  int64_t out_stride;
  int64_t m, n, k;
  Dtype dtype;  // 16 bits
  Epilogue epilogue = Epilogue::kStore;

  int64_t weight_rows() const { return rows_per_column(epilogue) * n; }
};

// By the kernel that dispatch.h chooses. Any shape, alignment and number of rows; out overlaps none
// of the other tensors.
cudaError_t launch_linear(const LinearParams& params, cudaStream_t stream);

// linear.cu; m and n are not 0. Any alignment, made for m <= 8.
cudaError_t launch_few_rows(const LinearParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
