// The activations of gated MLPs (Shazeer 2020), shared by every kernel that applies one so that all
// give the same bits. exp and the division are the fast versions, which are off by a few ulp of
// float32.
#pragma once

#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

constexpr float kLog2OfE = 1.44269504f;

// silu(gate) * up, where silu(gate) = gate / (1 + exp(-gate)).
__device__ __forceinline__ float silu_mul(float gate, float up) {
  return __fdividef(gate, 1.0f + exp2_approx(-gate * kLog2OfE)) * up;
}

// gelu(gate) * up with the tanh approximation of gelu (Hendrycks and Gimpel 2016). With u =
// sqrt(2/pi) (x + 0.044715 x^3), x (1 + tanh(u)) / 2 equals x / (1 + exp(-2u)).
__device__ __forceinline__ float gelu_tanh_mul(float gate, float up) {
  const float twice_u = gate * fmaf(gate * gate, 0.0713548163f, 1.59576912f);
  return __fdividef(gate, 1.0f + exp2_approx(-twice_u * kLog2OfE)) * up;
}

}  // namespace pyserve::gpu
