// Linears of 8-bit floats on CUDA: matrices that lie as pyserve/ops/fp8.py says.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

// The scale of an element is that of its row / rows and column / columns: data [., num_groups].
struct Fp8Scale {
  const float* data;
  int rows, columns, num_groups;
};

struct DequantiseFp8Params {
  const uint8_t* weight;  // [n, k], contiguous
  Fp8Scale scale;
  void* out;  // [n, k]; the last dim contiguous, stride in elements
  int64_t out_stride;
  int64_t n, k;
  bool is_aligned;  // k is a multiple of 16, rows of weight and out are aligned to 16 bytes
  Dtype dtype;      // 16 bits
};

cudaError_t launch_dequantise_fp8(const DequantiseFp8Params& params, cudaStream_t stream);

// linear and its epilogues, by few_rows_fp8.cuh: in passes of 8 rows. Of params `weight` is 8-bit and
// weight_stride in bytes; k is a multiple of 16 and not 0, x and weight are aligned to 16 bytes and so
// are the rows of x; scale.columns is a multiple of 128, or there is one group.
cudaError_t launch_linear_fp8(const LinearParams& params, const Fp8Scale& scale,
                              cudaStream_t stream);

// Rows of x up to which launch_linear_fp8 is taken: two passes read what plain numbers are. More are
// left to them. An estimate: no card has run it.
constexpr int64_t kMaxFp8Rows = 16;

}  // namespace pyserve::gpu
