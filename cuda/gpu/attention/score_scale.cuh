// How scores become the exponents of their weights, capped or not.
#pragma once

#include <cuda_runtime.h>

#include "gpu/attention/attention.h"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// The weight of a score s, as the product of q and k has it, is exp2(log2 * s - largest). With a
// softcap, s is replaced by cap_score(s, cap_rate) before.
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

// tanh(score * softmax_scale / softcap): 1 - 2 / (e^2x + 1), off by 3e-7 at most. tanh.approx is
// off by 5e-4 of the score, which then stands in an exponent.
__device__ __forceinline__ float cap_score(float score, float cap_rate) {
  return 1.0f - __fdividef(2.0f, exp2_approx(score * cap_rate) + 1.0f);
}

}  // namespace pyserve::gpu
