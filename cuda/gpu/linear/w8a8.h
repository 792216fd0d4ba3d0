// Linears of 8-bit floats by x rounded to 8-bit floats too, on the FP8 matrix units: see
// pyserve/ops/fp8.py. gemm_w8a8_sm90a.cu, which only builds for sm_90a have (kHasSm90a).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>

#include "gpu/core/device.h"
#include "gpu/linear/fp8.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

constexpr int64_t kW8GroupColumns = 128;  // of x, that share a scale

// Rows of x from which launch_linear_w8a8 is taken: none, until a card has measured it.
constexpr int64_t kMinW8Rows = std::numeric_limits<int64_t>::max();
constexpr int kNumW8Tilings = 9;

// Whether it can: scales of blocks of 128 columns and of 64 rows or a multiple of them (which up begins
// with, too), or of whole rows, one or all.
bool can_gemm_w8a8_sm90a(const LinearParams& params, const Fp8Scale& scale);

// Bytes of scratch that a row of x takes.
constexpr int64_t w8_row_bytes(int64_t k) {
  return k + 4 * ((k + kW8GroupColumns - 1) / kW8GroupColumns);
}

// linear and its epilogues. Of params `weight` is 8-bit and weight_stride in bytes. x is rounded in
// `scratch`, aligned to 16 bytes: as many rows at a time as it has room for, one at least.
cudaError_t launch_gemm_w8a8_sm90a(const LinearParams& params, const Fp8Scale& scale, void* scratch,
                                   int64_t scratch_bytes, const Device& device,
                                   cudaStream_t stream);

// The same where the current device has them, else cudaErrorNotSupported.
cudaError_t launch_linear_w8a8(const LinearParams& params, const Fp8Scale& scale, void* scratch,
                               int64_t scratch_bytes, cudaStream_t stream);

}  // namespace pyserve::gpu
