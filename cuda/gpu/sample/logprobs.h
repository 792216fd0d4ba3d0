// The launcher of logprobs and its parameters.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"

namespace pyserve::gpu {

struct LogprobsParams {
  const void* logits;  // [num_rows, vocab_size], vocab contiguous; strides in elements
  int64_t logits_stride;
  Dtype dtype;
  const int32_t* rows;  // -1: no row is asked for here
  int64_t rows_stride;
  const int32_t* token_ids;  // -1: no token
  int64_t token_ids_stride;
  float* token_logprobs;  // [num_asked]
  int64_t token_logprobs_stride;
  int32_t* token_ranks;  // [num_asked]
  int64_t token_ranks_stride;
  int32_t* top_ids;  // [num_asked, kTopLogprobs]
  int64_t top_ids_stride;
  float* top_logprobs;  // [num_asked, kTopLogprobs]
  int64_t top_logprobs_stride;
  int32_t num_rows, num_asked, vocab_size;
  bool is_normalized;
};

cudaError_t launch_logprobs(const LogprobsParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
