// linear for 33 to 128 rows on Hopper: skinny_sm90a.cu, which only builds for sm_90a have.
#pragma once

#include "gpu/core/vec.cuh"
#include "gpu/linear/dispatch.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

// Whether launch_skinny_sm90a can: rows of 16-byte vectors.
inline bool can_skinny_sm90a(const LinearParams& p) {
  constexpr int64_t kLimit = int64_t{1} << 30;  // coordinates of tensor maps, and numbers of stages
  const bool is_norm_aligned =
      p.norm_weight == nullptr ||
      (is_vec_aligned(p.norm_weight, 0) && is_vec_aligned(p.scaled, p.scaled_stride));
  return p.m <= kMaxSkinnyRows && p.k >= 64 && p.k % kVec == 0 && p.n % kVec == 0 &&
         p.k < kLimit && p.weight_rows() < kLimit && p.weight_rows() / 64 * (p.k / 64) < kLimit &&
         is_vec_aligned(p.x, p.x_stride) && is_vec_aligned(p.weight, p.weight_stride) &&
         is_vec_aligned(p.out, p.out_stride) && is_norm_aligned;
}

cudaError_t launch_skinny_sm90a(const LinearParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
