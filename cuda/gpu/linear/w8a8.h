// Linears with e4m3 weights and x rounded to e4m3 too, on the FP8 tensor cores: see
// pyserve/ops/fp8.py. The kernels are in gemm_w8a8_sm90a.cu, which exists only in builds for sm_90a
// (kHasSm90a).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/device.h"
#include "gpu/linear/fp8.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

constexpr int64_t kW8GroupColumns = 128;  // columns of x that share a scale

// launch_linear_w8a8 is used from so many rows of x on. Fewer are one pass of the kernel for few
// rows (few_rows_fp8.cuh), which does not round x.
constexpr int64_t kMinW8Rows = 9;
constexpr int kNumW8Tilings = 9;

// Whether launch_gemm_w8a8_sm90a can serve this. The weight's scales must be for blocks of 128
// columns by a multiple of 64 rows (which must also divide the rows of gate, where there is one),
// or be one per row, or one in all.
bool can_gemm_w8a8_sm90a(const LinearParams& params, const Fp8Scale& scale);

// Bytes of scratch that one row of x needs.
constexpr int64_t w8_row_bytes(int64_t k) {
  return k + 4 * ((k + kW8GroupColumns - 1) / kW8GroupColumns);
}

// linear and its epilogues. In params, `weight` is e4m3 and weight_stride in bytes. x is rounded
// into `scratch`, which is aligned to 16 bytes, as many rows at a time as fit; it must have room
// for one row.
cudaError_t launch_gemm_w8a8_sm90a(const LinearParams& params, const Fp8Scale& scale, void* scratch,
                                   int64_t scratch_bytes, const Device& device,
                                   cudaStream_t stream);

// Calls it where the current device has the kernels and they can serve this; else
// cudaErrorNotSupported.
cudaError_t launch_linear_w8a8(const LinearParams& params, const Fp8Scale& scale, void* scratch,
                               int64_t scratch_bytes, cudaStream_t stream);

}  // namespace pyserve::gpu
