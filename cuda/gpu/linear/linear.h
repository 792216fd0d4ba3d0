// linear on CUDA: out[t, j] = sum over i of x[t, i] * weight[j, i], plus bias[j]; or what an
// Epilogue makes of these sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/dtype.h"

namespace pyserve::gpu {

// What becomes of the float32 sums s, bias included, before they are rounded, once:
//   kStore    out[t, j] = s[t, j]
//   kAdd      out[t, j] = out[t, j] + s[t, j], in place
//   kSiluMul  out[t, j] = silu(s[t, j]) * s[t, n + j]
enum class Epilogue : int32_t { kStore, kAdd, kSiluMul };

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

  // With kSiluMul n rows of gate, then n rows of up, as the checkpoint has them.
  int64_t weight_rows() const { return epilogue == Epilogue::kSiluMul ? 2 * n : n; }
};

// By the kernel that dispatch.h chooses. Any shape, alignment and number of rows; out overlaps none
// of the inputs.
cudaError_t launch_linear(const LinearParams& params, cudaStream_t stream);

// linear.cu; m and n are not 0. Any alignment, made for m <= 8.
cudaError_t launch_few_rows(const LinearParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
