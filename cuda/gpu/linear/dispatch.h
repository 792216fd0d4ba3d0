// Which kernel takes a linear. This is the only place where that is decided.
#pragma once

#include "gpu/core/device.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

enum class LinearKernel : int32_t {
  kNone,     // cuBLAS is faster: the caller's to call
  kFewRows,  // linear.cu: up to 8 rows in one pass over the weight, more in several
  kGemmSm90a,  // gemm_sm90a.cu: more than 64 rows
};

// What is fastest for these shapes on this card. With null pointers: for tensors aligned as torch
// allocates them.
LinearKernel choose_linear(const LinearParams& params, const Device& device);

// Whether launch_linear is the faster way, on the current device.
cudaError_t serves_linear(const LinearParams& params, bool* serves);

}  // namespace pyserve::gpu
