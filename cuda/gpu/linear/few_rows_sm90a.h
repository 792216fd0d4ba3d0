// linear for 9 to 32 rows on Hopper: few_rows_sm90a.cu, which exists only in builds for sm_90a.
#pragma once

#include "gpu/core/device.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

constexpr int64_t kMaxRowsSm90a = 32;

// For 1 to kMaxRowsSm90a rows; otherwise as launch_few_rows. k is not 0, and x and weight are
// aligned to 16 bytes.
cudaError_t launch_few_rows_sm90a(const LinearParams& params, const Device& device,
                                  cudaStream_t stream);

}  // namespace pyserve::gpu
