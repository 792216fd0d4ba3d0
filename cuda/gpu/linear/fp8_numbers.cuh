// How kernels widen four e4m3 in a word to 16-bit numbers: see pyserve/ops/fp8.py.
#pragma once

#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// Widens the four e4m3 of a word to two pairs of 16-bit numbers: bytes 0 and 2, and bytes 1 and 3.
// The bits of an e4m3 are moved to the sign, the low end of the wider exponent and the high end of
// the mantissa. As the exponent's bias differs, the result is 2^-8 (float16) or 2^-120 (bfloat16)
// times the number, denormals included. For float16 the factor kFactor goes into the scale. For
// bfloat16 an fma multiplies it back, because float32 sums could not hold such small products. A
// NaN becomes 480.
template <class T>
struct Fp8Numbers;

template <>
struct Fp8Numbers<__half> {
  static constexpr int kPlace = 7;  // bit of the mantissa's last digit
  static constexpr float kFactor = 256.0f;
  static constexpr uint32_t kMask = 0x3f803f80;
  static __device__ __forceinline__ uint32_t whole(uint32_t pair) { return pair; }
};

template <>
struct Fp8Numbers<__nv_bfloat16> {
  static constexpr int kPlace = 4;
  static constexpr float kFactor = 1.0f;
  static constexpr uint32_t kMask = 0x07f007f0;
  static __device__ __forceinline__ uint32_t whole(uint32_t pair) {
    return fma_pair<__nv_bfloat16>(pair, 0x7b807b80, 0x80008000);  // times 2^120, plus -0
  }
};

template <class T>
__device__ __forceinline__ void widen_bytes(uint32_t word, uint32_t& even, uint32_t& odd) {
  using Numbers = Fp8Numbers<T>;
  constexpr uint32_t kSigns = 0x80008000;
  constexpr int kDown = 8 - Numbers::kPlace;
  even = Numbers::whole(and_or(word << 8, kSigns, word << Numbers::kPlace & Numbers::kMask));
  odd = Numbers::whole(and_or(word, kSigns, word >> kDown & Numbers::kMask));
}

}  // namespace pyserve::gpu
