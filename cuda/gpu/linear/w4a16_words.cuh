// What kernels make of a word of a block and of a record: see pyserve/ops/w4a16.py.
#pragma once

#include "common/w4a16.h"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// How a word becomes four pairs of q - z: pair i is the integers at bits 4 i and 4 i + 16, of row g
// where i is even, of row g + 8 where it is odd. Shifted and masked they are or-ed into the
// mantissa of kMagic, where i is odd kOddPlace bits further up. One fma, by kOne or kOddFactor,
// leaves q - z: what it adds has kMinus or kOddMinus for its high byte, and z likewise in its
// mantissa.
template <class T>
struct W4Numbers;

template <>
struct W4Numbers<__nv_bfloat16> {  // 128 + q - (128 + z)
  static constexpr int kOddPlace = 0;
  static constexpr uint32_t kMagic = 0x43004300, kOne = 0x3f803f80, kOddFactor = 0x3f803f80;
  static constexpr uint32_t kMinus = 0xc3, kOddMinus = 0xc3;
};

template <>
struct W4Numbers<__half> {  // 1024 + q - (1024 + z), and (1024 + 16 q) / 16 - (64 + z)
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

// What widen_word adds for the zero point of a record's word: of row g, or half 1, of row g + 8.
template <class T>
__device__ __forceinline__ uint32_t minus_of(uint32_t word, int half) {
  using Numbers = W4Numbers<T>;
  // Twice that byte, and below it z: the low byte of a record's word.
  return __byte_perm(word << half * Numbers::kOddPlace,
                     half ? Numbers::kOddMinus : Numbers::kMinus, 0x4040);
}

__device__ __forceinline__ float scale_of(uint32_t word) {
  return __uint_as_float(word & ~kW4ZeroMask);
}

}  // namespace pyserve::gpu
