// The ops of a mixture of experts on CUDA: which experts each token goes to, the products of the
// tokens' rows and their experts' matrices, and the weighted sum of the results. See
// pyserve/ops/experts.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/epilogue.h"
#include "common/limits.h"
#include "gpu/core/device.h"
#include "gpu/core/dtype.h"

namespace pyserve::gpu {

using pyserve::Epilogue;

struct RouteParams {
  const void* x;  // [num_tokens, hidden], 16-bit; strides in elements, the last dim contiguous
  int64_t x_stride;
  const void* router;  // [num_experts + has_gate, hidden]
  int64_t router_stride;
  const float* correction_bias;  // [num_experts] or null
  const int64_t* slot_mapping;   // [num_tokens], -1 for padding
  float* logits;                 // [num_tokens, num_experts + has_gate]
  int64_t logits_stride;
  float* weights;  // [num_tokens, top_k + has_gate]
  int64_t weights_stride;
  int32_t* places;  // [num_tokens, top_k]
  int64_t places_stride;
  int32_t* order;    // [num_tokens * top_k]
  int32_t* offsets;  // [num_experts + 1]
  int num_tokens, hidden, num_experts, top_k;
  int num_logits;  // num_experts + has_gate
  bool has_gate, is_sigmoid, is_normalized;
  float scale;
  int num_groups, top_groups;
  Dtype dtype;
};

// hidden is a multiple of 8; x and router are aligned to 16 bytes.
cudaError_t launch_route(const RouteParams& params, cudaStream_t stream);

// A grouped product: rows offsets[e] .. offsets[e + 1] - 1 belong to expert e and are multiplied by
// weight[e]. Row r is row r of x, or with `order` row order[r] / top_k of x.
struct GroupedParams {
  const void* x;
  int64_t x_stride;
  const int32_t* order;  // [max_rows], or null
  int top_k;
  const void* weight;  // [num_experts, rows_per_column * n, k]
  int64_t expert_stride, weight_stride;
  const int32_t* offsets;  // [num_experts + 1]
  void* sorted_x;          // [max_rows, k], room for the sorted rows of x; null without order
  int64_t sorted_x_stride;
  void* out;  // [max_rows, n]
  int64_t out_stride;
  int max_group;  // upper bound on the rows of any one expert
  int max_rows, num_experts, n, k;
  Dtype dtype;
  Epilogue epilogue;  // kStore or kSiluMul

  int weight_rows() const { return static_cast<int>(rows_per_column(epilogue)) * n; }
  bool is_empty() const { return max_rows == 0 || n == 0 || num_experts == 0; }
  // The rows of an expert on average.
  int mean_rows() const { return max_rows / num_experts; }
};

// k and n are multiples of 8; x, weight and out are aligned to 16 bytes.
cudaError_t launch_grouped(const GroupedParams& params, cudaStream_t stream);

// grouped.cu: if there is an order, copies the rows of x in that order to sorted_x, which then
// takes the place of x. The rows of both are whole vectors of 16 bytes, aligned to 16 bytes.
cudaError_t launch_sort_rows(GroupedParams& params, cudaStream_t stream);

// grouped_few_rows.cu: one pass over an expert's matrix for each 8 of its rows, on Hopper for each
// 32.
cudaError_t launch_grouped_few_rows(const GroupedParams& params, cudaStream_t stream);

// grouped_few_rows_sm90a.cu: for where an expert may have more than 8 rows.
cudaError_t launch_grouped_few_rows_sm90a(const GroupedParams& params, const Device& device,
                                          cudaStream_t stream);

// grouped_gemm_sm90a.cu: for many rows of each expert.
cudaError_t launch_grouped_gemm_sm90a(const GroupedParams& params, const Device& device,
                                      cudaStream_t stream);

struct CombineParams {
  const void* rows;  // [num_tokens * top_k, n]
  int64_t rows_stride;
  const int32_t* places;  // [num_tokens, top_k], -1: none
  int64_t places_stride;
  const float* weights;  // [num_tokens, top_k + has_gate]
  int64_t weights_stride;
  const void* shared;  // [num_tokens, n] or null
  int64_t shared_stride;
  void* out;  // [num_tokens, n]
  int64_t out_stride;
  int num_tokens, top_k, n;
  bool has_gate, is_adding;
  Dtype dtype;
};

// n is a multiple of 8; rows, shared and out are aligned to 16 bytes.
cudaError_t launch_combine_experts(const CombineParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
