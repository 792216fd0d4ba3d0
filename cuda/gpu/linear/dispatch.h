// Which kernel takes a linear. This is the only place where that is decided.
#pragma once

#include "gpu/core/device.h"
#include "gpu/linear/fp8.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

enum class LinearKernel : int32_t {
  kNone,     // cuBLAS is faster: the caller's to call
  kFewRows,  // linear.cu: one pass over the weight for 8 rows, on Hopper 32, more for more
  kGemmSm90a,  // gemm_sm90a.cu: more than 64 rows
};

// What is fastest for these shapes on this card. With null pointers: for tensors aligned as torch
// allocates them.
LinearKernel choose_linear(const LinearParams& params, const Device& device);

// What a measurement asks for in this process, while nothing is launched; negative: nothing.
struct LinearTrial {
  int64_t max_w4a16_rows = -1;  // of x, up to which serves_linear_w4a16 says yes
  // Of gemm_w4a16_sm90a.cu, for more than 16 rows: one counted from 1, else that of least estimate.
  int w4a16_tiling = -1;
  int64_t min_w8a8_rows = -1;  // of x, from which serves_linear_w8a8 says yes
  int w8a8_tiling = -1;        // of gemm_w8a8_sm90a.cu, likewise
};
LinearTrial& linear_trial();

// Whether launch_linear is the faster way, on the current device.
cudaError_t serves_linear(const LinearParams& params, bool* serves);

// Whether launch_linear_w4a16 multiplies m rows of k by 4-bit integers (pyserve/ops/w4a16.py) faster
// than they are made plain numbers and multiplied (w4a16.h), on the current device.
cudaError_t serves_linear_w4a16(int64_t m, int64_t k, bool* serves);

// Whether launch_linear_w8a8 (w8a8.h) can, on the current device; and is taken for params.m rows.
cudaError_t can_linear_w8a8(const LinearParams& params, const Fp8Scale& scale, bool* can);
cudaError_t serves_linear_w8a8(const LinearParams& params, const Fp8Scale& scale, bool* serves);

}  // namespace pyserve::gpu
