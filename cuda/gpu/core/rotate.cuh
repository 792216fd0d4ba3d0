// The rotation of one pair of elements by rotary position embedding (Su et al. 2021). Every kernel
// that rotates uses this function, so that all give the same bits.
#pragma once

namespace pyserve::gpu {

// (x, y) rotated by the angle with the given cosine and sine.
__device__ __forceinline__ float2 rotate(float x, float y, float cosine, float sine) {
  return {__fmaf_rn(x, cosine, -__fmul_rn(y, sine)), __fmaf_rn(y, cosine, __fmul_rn(x, sine))};
}

}  // namespace pyserve::gpu
