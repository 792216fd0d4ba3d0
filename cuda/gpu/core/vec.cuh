// Vectors of eight 16-bit elements: 16 bytes, the most that a thread loads with one instruction.
#pragma once

#include <type_traits>

#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

constexpr int kVec = 8;  // elements in 16 bytes

template <class T>
__device__ __forceinline__ void unpack(const uint4& packed, float (&x)[kVec]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_pair<T>(words[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[kVec]) {
  return {pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]), pack_pair<T>(x[4], x[5]),
          pack_pair<T>(x[6], x[7])};
}

template <class T>
__device__ __forceinline__ uint4 load_vec(const T* source) {
  return *reinterpret_cast<const uint4*>(source);
}

template <class T>
__device__ __forceinline__ void store_vec(T* target, const uint4& packed) {
  *reinterpret_cast<uint4*>(target) = packed;
}

template <class T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(x);
  } else {
    return __half2float(x);
  }
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// The bits of -inf as an element.
template <class T>
constexpr uint16_t kMinusInfBits = std::is_same_v<T, __nv_bfloat16> ? 0xff80 : 0xfc00;

// Whether rows that begin at `data`, `stride` elements apart, may be read in vectors of 16 bytes.
inline bool is_vec_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kVec == 0;
}

}  // namespace pyserve::gpu
