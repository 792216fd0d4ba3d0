// rms_norm and add_rms_norm on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"

namespace pyserve::gpu {

// For the kernels that hold a row in registers: threads per block, vectors of 16 bytes per thread,
// and elements per row.
constexpr int kMaxNormThreads = 1024;
constexpr int kNormVecs = 2;
constexpr int kMaxNormHidden = kNormVecs * 8 * kMaxNormThreads;

struct NormParams {
  const void* x;  // row strides are in elements
  int64_t x_stride;
  void* residual;  // null: x itself is normed
  int64_t residual_stride;
  const void* weight;    // [hidden]
  const void* x_weight;  // null: x is added as it is; else its norm by x_weight is added
  void* out;           // [num_rows, hidden], may be x
  int64_t out_stride;
  int64_t num_rows, hidden;
  float eps;
  float offset;  // added to the weight
  Dtype dtype;  // 16 bits
};

cudaError_t launch_norm(const NormParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
