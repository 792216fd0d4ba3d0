// W4A16 on CUDA: matrices of 4-bit integers, which lie as pyserve/ops/w4a16.py says.
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

// linear and its epilogues. Of params `weight` is packed and weight_stride the words of a strip; k is
// not 0, x and weight are aligned to 16 bytes and so are the rows of x; with kSiluMul n is a multiple of
// 16. By few_rows_w4a16.cuh, which takes more than 32 rows, on Hopper 16, in several passes; on Hopper
// by gemm_w4a16_sm90a.cu where m is more, it can, and a LinearTrial asks for it.
cudaError_t launch_linear_w4a16(const LinearParams& params, int64_t group_size,
                                cudaStream_t stream);

// few_rows_w4a16_sm90a.cu, which only builds for sm_90a have: up to 16 rows.
constexpr int64_t kMaxW4RowsSm90a = 16;
cudaError_t launch_linear_w4a16_sm90a(const LinearParams& params, int64_t group_size,
                                      const Device& device, cudaStream_t stream);

// gemm_w4a16_sm90a.cu, likewise: any number of rows, where it can.
constexpr int kNumW4Tilings = 19;
constexpr int64_t kMinW4GemmColumns = 256;  // k
bool can_gemm_w4a16_sm90a(const LinearParams& params);
cudaError_t launch_gemm_w4a16_sm90a(const LinearParams& params, int64_t group_size,
                                    const Device& device, cudaStream_t stream);

}  // namespace pyserve::gpu
