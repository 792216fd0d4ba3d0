// W4A16 on CUDA: matrices of 4-bit integers, which lie as pyserve/ops/w4a16.py says.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/w4a16.h"
#include "gpu/core/dtype.h"

namespace pyserve::gpu {

struct DequantiseW4Params {
  const uint32_t* packed;  // [strips of num_rows, num_units, unit_words], aligned to 16 bytes
  int64_t num_units;
  int unit_blocks, unit_records, unit_words;
  void* out;  // [num_rows, k]; stride in elements, even
  int64_t out_stride;
  int64_t num_rows, k;
  Dtype dtype;  // 16 bits
};

cudaError_t launch_dequantise_w4a16(const DequantiseW4Params& params, cudaStream_t stream);

}  // namespace pyserve::gpu
