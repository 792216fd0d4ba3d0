// The activations of gated MLPs (Shazeer 2020), the same wherever they are taken. exp and the division
// are the fast ones, a few ulp of float32.
#pragma once

#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

constexpr float kLog2OfE = 1.44269504f;

// silu(gate) * up: gate / (1 + exp(-gate)) * up.
__device__ __forceinline__ float silu_mul(float gate, float up) {
  return __fdividef(gate, 1.0f + exp2_approx(-gate * kLog2OfE)) * up;
}

// gelu(gate) * up by the tanh approximation (Hendrycks and Gimpel 2016): x (1 + tanh(u)) / 2 is
// x / (1 + exp(-2u)), where u = sqrt(2/pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu_tanh_mul(float gate, float up) {
  const float twice_u = gate * fmaf(gate * gate, 0.0713548163f, 1.59576912f);
  return __fdividef(gate, 1.0f + exp2_approx(-twice_u * kLog2OfE)) * up;
}

}  // namespace pyserve::gpu
