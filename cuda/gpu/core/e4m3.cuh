// Conversion to e4m3: 8-bit floats with 4 bits of exponent and 3 of mantissa (sm_89 and later).
#pragma once

#include <cstdint>

namespace pyserve::gpu {

// Packs two numbers, rounded to nearest with ties to even. A magnitude above 448 becomes 448, the
// largest finite e4m3; a NaN stays a NaN.
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace pyserve::gpu
