// What kernels make of four e4m3 in a word: see pyserve/ops/fp8.py.
#pragma once

#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// Two pairs of 16-bit numbers, of bytes 0 and 2, and of 1 and 3. Their bits are those of e4m3 at the
// end of the wider exponent, whose bias makes a number 2^-8 or 2^-120 of itself, denormals included.
// Of float16 that is left to the scale, kFactor; of bfloat16 an fma takes it back, as float32 sums
// could not hold what is that small. A NaN counts as 480.
template <class T>
struct Fp8Numbers;

template <>
struct Fp8Numbers<__half> {
  static constexpr int kPlace = 7;  // of the mantissa's last bit
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
    return fma_pair<__nv_bfloat16>(pair, 0x7b807b80, 0x80008000);  // 2^120, and -0
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
