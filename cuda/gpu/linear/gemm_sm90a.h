// linear_silu_mul for many rows on Hopper: gemm_sm90a.cu, which exists only in builds for sm_90a
// (kHasSm90a).
#pragma once

#include "gpu/core/device.h"
#include "gpu/core/vec.cuh"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

// Whether launch_gemm_sm90a can serve this: kSiluMul, with rows that are whole aligned vectors of
// 16 bytes.
inline bool can_gemm_sm90a(const LinearParams& p) {
  constexpr int64_t kLimit = int64_t{1} << 30;  // coordinates of tensor maps have 32 bits
  return p.epilogue == Epilogue::kSiluMul && !p.has_norm() && p.k >= 512 && p.k % kVec == 0 &&
         p.n % kVec == 0 && p.m < kLimit && p.n < kLimit && p.k < kLimit &&
         is_vec_aligned(p.x, p.x_stride) && is_vec_aligned(p.weight, p.weight_stride) &&
         is_vec_aligned(p.out, p.out_stride) && reinterpret_cast<uintptr_t>(p.bias) % 4 == 0;
}

// Whether its tiles are estimated to be faster than cuBLAS for this shape.
bool is_gemm_sm90a_faster(const LinearParams& params, const Device& device);

cudaError_t launch_gemm_sm90a(const LinearParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
