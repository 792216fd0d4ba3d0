// silu_mul and gelu_tanh_mul on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"

namespace pyserve::gpu {

enum class Activation : int32_t { kSilu, kGeluTanh };

struct GateParams {
  const void* gate_up;  // [num_tokens, 2 * n] = gate | up; strides of rows in elements
  int64_t gate_up_stride;
  void* out;  // [num_tokens, n]
  int64_t out_stride;
  int64_t num_tokens, n;
  Activation activation;
  Dtype dtype;  // 16 bits
};

cudaError_t launch_gate(const GateParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
