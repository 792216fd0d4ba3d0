// Which kernel serves a linear. Nothing else decides this.
#pragma once

#include "gpu/core/device.h"
#include "gpu/linear/fp8.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

enum class LinearKernel : int32_t {
  kNone,     // cuBLAS is faster, and it is for the caller to call it
  kFewRows,  // linear.cu: reads the weight once for each 8 rows of x, on Hopper 32
  kGemmSm90a,  // gemm_sm90a.cu: for more than 64 rows
};

// The fastest kernel for these shapes on this device. Null pointers stand for tensors that are
// aligned as torch allocates them.
LinearKernel choose_linear(const LinearParams& params, const Device& device);

// What a measurement asks of this process; negative means the default. Set only while nothing is
// being launched.
struct LinearTrial {
  int64_t max_w4a16_rows = -1;  // serves_linear_w4a16 says yes up to so many rows of x
  // The tiling of gemm_w4a16_sm90a.cu for more than 16 rows, counted from 1; any other value means
  // the one with the least estimate.
  int w4a16_tiling = -1;
  int64_t min_w8a8_rows = -1;  // serves_linear_w8a8 says yes from so many rows of x on
  int w8a8_tiling = -1;        // the same for gemm_w8a8_sm90a.cu
};
LinearTrial& linear_trial();

// Whether launch_linear is faster than cuBLAS on the current device.
cudaError_t serves_linear(const LinearParams& params, bool* serves);

// Whether, on the current device, launch_linear_w4a16 multiplies m rows of k columns faster than
// dequantising the integers (pyserve/ops/w4a16.py) and multiplying by the result (w4a16.h).
cudaError_t serves_linear_w4a16(int64_t m, int64_t k, bool* serves);

// Whether launch_linear_w8a8 (w8a8.h) can serve this on the current device; and whether it should
// for params.m rows.
cudaError_t can_linear_w8a8(const LinearParams& params, const Fp8Scale& scale, bool* can);
cudaError_t serves_linear_w8a8(const LinearParams& params, const Fp8Scale& scale, bool* serves);

}  // namespace pyserve::gpu
