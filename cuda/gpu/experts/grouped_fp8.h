// Grouped linears of e4m3 on CUDA: see pyserve/ops/quantised.py.
#pragma once

#include "gpu/experts/experts.h"
#include "gpu/linear/fp8.h"

namespace pyserve::gpu {

// As launch_grouped, with a weight of e4m3 whose strides are in bytes; grouped_few_rows_fp8.cuh
// serves any number of rows. k is a multiple of 16. The scales of neighbouring experts lie
// scale_stride apart; scale.columns is a multiple of 128, or there is one group.
cudaError_t launch_grouped_fp8(const GroupedParams& params, const Fp8Scale& scale,
                               int64_t scale_stride, cudaStream_t stream);

}  // namespace pyserve::gpu
