// 8-bit floats of 4 bits of exponent (sm_89 and later).
#pragma once

#include <cstdint>

namespace pyserve::gpu {

// Two numbers, to nearest, ties to even; what is larger than 448 becomes 448, a NaN stays one.
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace pyserve::gpu
