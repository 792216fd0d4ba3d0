// Linears with 4-bit integers (W4A16) on CUDA; the weights are laid out as in pyserve/ops/w4a16.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/w4a16.h"
#include "gpu/core/device.h"
#include "gpu/core/dtype.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

struct DequantiseW4Params {
  const uint32_t* packed;  // [strips of num_rows, num_units, unit_words], aligned to 16 bytes
  int64_t num_units;
  int unit_blocks, unit_records, unit_words;
  void* out;  // [num_rows, k]; rows aligned to 16 bytes, stride in elements
  int64_t out_stride;
  int64_t num_rows, k;
  Dtype dtype;  // 16 bits
};

cudaError_t launch_dequantise_w4a16(const DequantiseW4Params& params, cudaStream_t stream);

// linear and its epilogues. In params, `weight` is packed and weight_stride is the number of words
// of a strip. k is not 0; x, its rows and weight are aligned to 16 bytes; with kSiluMul n is a
// multiple of 16. few_rows_w4a16.cuh takes up to 32 rows per pass, on Hopper 16. For more than 16
// rows on Hopper, gemm_w4a16_sm90a.cu is used where it can serve them.
cudaError_t launch_linear_w4a16(const LinearParams& params, int64_t group_size,
                                cudaStream_t stream);

// In few_rows_w4a16_sm90a.cu, which exists only in builds for sm_90a: up to 16 rows.
constexpr int64_t kMaxW4RowsSm90a = 16;
cudaError_t launch_linear_w4a16_sm90a(const LinearParams& params, int64_t group_size,
                                      const Device& device, cudaStream_t stream);

// In gemm_w4a16_sm90a.cu, likewise: any number of rows, if it can serve them.
constexpr int kNumW4Tilings = 19;
constexpr int64_t kMinW4GemmColumns = 256;  // least k
bool can_gemm_w4a16_sm90a(const LinearParams& params);
cudaError_t launch_gemm_w4a16_sm90a(const LinearParams& params, int64_t group_size,
                                    const Device& device, cudaStream_t stream);

}  // namespace pyserve::gpu
