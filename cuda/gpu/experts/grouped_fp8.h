// grouped linears of 8-bit floats on CUDA: see pyserve/ops/quantised.py.
#pragma once

#include "gpu/experts/experts.h"
#include "gpu/linear/fp8.h"

namespace pyserve::gpu {

// As launch_grouped, by grouped_few_rows_fp8.cuh whatever rows an expert has; weight is 8-bit, its
// strides are in bytes, k is a multiple of 16. Scales of the experts lie scale_stride apart;
// scale.columns is a multiple of 128, or there is one group.
cudaError_t launch_grouped_fp8(const GroupedParams& params, const Fp8Scale& scale,
                               int64_t scale_stride, cudaStream_t stream);

}  // namespace pyserve::gpu
