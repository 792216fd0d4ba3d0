// Grouped linears of 4-bit integers on CUDA: see pyserve/ops/quantised.py.
#pragma once

#include "gpu/experts/experts.h"
#include "gpu/linear/w4a16.h"

namespace pyserve::gpu {

// As launch_grouped, with matrices laid out as in pyserve/ops/w4a16.py: weight_stride is the number
// of words of a strip and expert_stride that of an expert, and experts lie one behind the other. k
// is a multiple of group_size, and with kSiluMul n is one of 16. x, its rows and weight are aligned
// to 16 bytes. sorted_x may be null. grouped_few_rows_w4a16.cuh serves it; on Hopper, for many rows
// per expert, grouped_gemm_w4a16_sm90a.cu where it can.
cudaError_t launch_grouped_w4a16(const GroupedParams& params, int64_t group_size,
                                 cudaStream_t stream);

// In grouped_few_rows_w4a16_sm90a.cu, which exists only in builds for sm_90a.
cudaError_t launch_grouped_few_rows_w4a16_sm90a(const GroupedParams& params, int64_t group_size,
                                                const Device& device, cudaStream_t stream);

// In grouped_gemm_w4a16_sm90a.cu, likewise. The rows of x must be sorted by expert.
bool can_gemm_grouped_w4a16_sm90a(const GroupedParams& params);
cudaError_t launch_grouped_gemm_w4a16_sm90a(const GroupedParams& params, int64_t group_size,
                                            const Device& device, cudaStream_t stream);

}  // namespace pyserve::gpu
