// How scores become the exponents of their weights, with or without a cap.
#pragma once

#include <cuda_runtime.h>

#include "gpu/attention/attention.h"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// A score s, as the product of q and k gives it, has the weight exp2(log2 * s - largest). With a
// softcap, s is first replaced by cap_score(s, cap_rate).
struct ScoreScale {
  float log2;
  float cap_rate;  // 0: no cap
};

template <bool kMayCap>
__host__ __device__ __forceinline__ ScoreScale score_scale(const AttentionParams& p) {
  constexpr float kLog2E = 1.4426950408889634f;
  if (!kMayCap || p.softcap == 0.0f) return {p.softmax_scale * kLog2E, 0.0f};
  return {p.softcap * kLog2E, 2.0f * kLog2E * p.softmax_scale / p.softcap};
}

// tanh(score * softmax_scale / softcap) as 1 - 2 / (e^2x + 1), with an error of at most 3e-7.
// tanh.approx would be off by 5e-4 of the score, and the score goes into an exponent.
__device__ __forceinline__ float cap_score(float score, float cap_rate) {
  return 1.0f - __fdividef(2.0f, exp2_approx(score * cap_rate) + 1.0f);
}

}  // namespace pyserve::gpu
