// The launcher of apply_bitmask and its parameters.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"

namespace pyserve::gpu {

struct BitmaskParams {
  void* logits;  // [num_rows, vocab_size], vocab contiguous; strides in elements
  int64_t logits_stride;
  Dtype dtype;
  const int32_t* bitmask;  // [num_masked, num_words]
  int64_t bitmask_stride;
  const int32_t* rows;  // -1: this mask is not used
  int64_t rows_stride;
  int32_t num_rows, num_masked, num_words, vocab_size;
};

cudaError_t launch_bitmask(const BitmaskParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
