// The rotation of one pair of elements (Su et al. 2021), the same to the bit wherever it is done.
#pragma once

namespace pyserve::gpu {

// (x, y) turned by the angle of this cosine and sine.
__device__ __forceinline__ float2 rotate(float x, float y, float cosine, float sine) {
  return {__fmaf_rn(x, cosine, -__fmul_rn(y, sine)), __fmaf_rn(y, cosine, __fmul_rn(x, sine))};
}

}  // namespace pyserve::gpu
