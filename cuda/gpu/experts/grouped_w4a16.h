// grouped linears of 4-bit integers on CUDA: see pyserve/ops/quantised.py.
#pragma once

#include "gpu/experts/experts.h"
#include "gpu/linear/w4a16.h"

namespace pyserve::gpu {

// As launch_grouped, by matrices that lie as pyserve/ops/w4a16.py says: weight_stride is the words of
// a strip, expert_stride those of an expert, one behind the other. k is a multiple of group_size, and
// with kSiluMul n of 16; x and weight are aligned to 16 bytes, and so are the rows of x. sorted_x may be
// null. By grouped_few_rows_w4a16.cuh; on Hopper, for many rows of each expert, by
// grouped_gemm_w4a16_sm90a.cu, where it can.
cudaError_t launch_grouped_w4a16(const GroupedParams& params, int64_t group_size,
                                 cudaStream_t stream);

// grouped_few_rows_w4a16_sm90a.cu, which only builds for sm_90a have.
cudaError_t launch_grouped_few_rows_w4a16_sm90a(const GroupedParams& params, int64_t group_size,
                                                const Device& device, cudaStream_t stream);

// grouped_gemm_w4a16_sm90a.cu, likewise: rows of x in the order of the experts.
bool can_gemm_grouped_w4a16_sm90a(const GroupedParams& params);
cudaError_t launch_grouped_gemm_w4a16_sm90a(const GroupedParams& params, int64_t group_size,
                                            const Device& device, cudaStream_t stream);

}  // namespace pyserve::gpu
