// linear on CUDA: out[t, j] = sum over i of x[t, i] * weight[j, i], plus bias[j], or what an
// epilogue makes of these sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/epilogue.h"
#include "gpu/core/dtype.h"

namespace pyserve::gpu {

using pyserve::Epilogue;

struct LinearParams {
  const void* x;  // [m, k]; strides in elements, the last dim contiguous
  int64_t x_stride;
  const void* weight;  // [weight_rows(), k]
  int64_t weight_stride;
  const void* bias;  // [weight_rows()] or null
  void* out;         // [m, n]
  int64_t out_stride;
  int64_t m, n, k;
  Dtype dtype;  // 16 bits
  Epilogue epilogue = Epilogue::kStore;

  // The RMSNorm in front, as a factor of the sums (common/epilogue.h). Only the kernels for few
  // rows have it.
  const float* x_squares = nullptr;  // [m, num_squares(k)], or null
  int64_t x_squares_stride = 0;
  float eps = 0.0f;
  // With kAdd, the RMSNorm that follows. Only the kernels for few rows have it, and only with k and
  // rows aligned.
  const void* norm_weight = nullptr;  // [n], or null
  void* scaled = nullptr;             // [m, n]
  int64_t scaled_stride = 0;
  float* squares = nullptr;  // [m, num_squares(n)]
  int64_t squares_stride = 0;

  bool has_norm() const { return x_squares != nullptr || norm_weight != nullptr; }

  // The same for rows of x from `row` on. m is not reduced.
  LinearParams from_row(int64_t row) const {
    LinearParams p = *this;
    p.x = static_cast<const uint16_t*>(x) + row * x_stride;
    p.out = static_cast<uint16_t*>(out) + row * out_stride;
    if (x_squares != nullptr) p.x_squares += row * x_squares_stride;
    if (norm_weight != nullptr) {
      p.scaled = static_cast<uint16_t*>(scaled) + row * scaled_stride;
      p.squares += row * squares_stride;
    }
    return p;
  }

  int64_t weight_rows() const { return rows_per_column(epilogue) * n; }
};

// Launches the kernel that dispatch.h chooses. Any shape, alignment and number of rows; out
// overlaps none of the other tensors.
cudaError_t launch_linear(const LinearParams& params, cudaStream_t stream);

// In linear.cu; m and n are not 0. It takes any alignment and number of rows, but is made for m <=
// 8, on Hopper 32.
cudaError_t launch_few_rows(const LinearParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
