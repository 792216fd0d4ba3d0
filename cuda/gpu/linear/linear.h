// linear on CUDA: out[t, j] = sum over i of x[t, i] * weight[j, i], plus bias[j].
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"

namespace pyserve::gpu {

struct LinearParams {
  const void* x;  // [m, k]; strides in elements, the last dim contiguous
  int64_t x_stride;
  const void* weight;  // [n, k]
  int64_t weight_stride;
  const void* bias;  // [n] or null
  void* out;         // [m, n]
  int64_t out_stride;
  int64_t m, n, k;
  Dtype dtype;  // 16 bits
};

cudaError_t launch_linear(const LinearParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
