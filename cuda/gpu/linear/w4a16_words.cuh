// How kernels widen a word of a block, with the zero point of a record: see pyserve/ops/w4a16.py.
#pragma once

#include "common/w4a16.h"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// How a word becomes four pairs of q - z. Pair i consists of the integers at bits 4 i and 4 i + 16;
// it belongs to row g where i is even and to row g + 8 where i is odd. The pair is shifted, masked
// and or-ed into the mantissa of kMagic, kOddPlace bits higher where i is odd. One fma then leaves
// q - z: it multiplies by kOne or kOddFactor and adds a number whose high byte is kMinus or
// kOddMinus and which has z in its mantissa at the matching place.
template <class T>
struct W4Numbers;

template <>
struct W4Numbers<__nv_bfloat16> {  // (128 + q) - (128 + z)
  static constexpr int kOddPlace = 0;
  static constexpr uint32_t kMagic = 0x43004300, kOne = 0x3f803f80, kOddFactor = 0x3f803f80;
  static constexpr uint32_t kMinus = 0xc3, kOddMinus = 0xc3;
};

template <>
struct W4Numbers<__half> {  // (1024 + q) - (1024 + z), and (1024 + 16 q) / 16 - (64 + z)
  static constexpr int kOddPlace = 4;
  static constexpr uint32_t kMagic = 0x64006400, kOne = 0x3c003c00, kOddFactor = 0x2c002c00;
  static constexpr uint32_t kMinus = 0xe4, kOddMinus = 0xd4;
};

template <class T>
__device__ __forceinline__ void widen_word(uint32_t word, const uint32_t (&minus)[2],
                                           uint32_t (&pairs)[4]) {
  using Numbers = W4Numbers<T>;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int odd = i % 2, place = odd * Numbers::kOddPlace;
    const uint32_t shifted = word >> (4 * i - place), mask = 0x000f000fu << place;
    const uint32_t factor = odd ? Numbers::kOddFactor : Numbers::kOne;
    pairs[i] = fma_pair<T>(and_or(shifted, mask, Numbers::kMagic), factor, minus[odd]);
  }
}

// The number that widen_word adds for the zero point in a record's word: half 0 is row g, half 1 is
// row g + 8.
template <class T>
__device__ __forceinline__ uint32_t minus_of(uint32_t word, int half) {
  using Numbers = W4Numbers<T>;
  // Two 16-bit numbers with that high byte and with z, the low byte of a record's word, below it.
  return __byte_perm(word << half * Numbers::kOddPlace,
                     half ? Numbers::kOddMinus : Numbers::kMinus, 0x4040);
}

__device__ __forceinline__ float scale_of(uint32_t word) {
  return __uint_as_float(word & ~kW4ZeroMask);
}

}  // namespace pyserve::gpu
