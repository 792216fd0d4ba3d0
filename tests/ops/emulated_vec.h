// As of gpu/core/vec.cuh and ptx.cuh: pairs and vectors of 16-bit elements.
#pragma once

#include "emulated.h"

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};

namespace pyserve::gpu {

template <class T>
uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}
template <class T>
float2 unpack_pair(uint32_t pair) {
  return {element<T>(pair, 0), element<T>(pair, 1)};
}
template <class T>
void unpack(const uint4& packed, float (&x)[kVec]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  for (int i = 0; i < kVec; ++i) x[i] = element<T>(words[i / 2], i % 2);
}
template <class T>
uint4 pack(const float (&x)[kVec]) {
  return {pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]), pack_pair<T>(x[4], x[5]),
          pack_pair<T>(x[6], x[7])};
}
template <class T>
uint4 load_vec(const T* from) {
  uint4 value;
  std::memcpy(&value, from, 16);
  return value;
}
template <class T>
void store_vec(T* to, const uint4& value) {
  std::memcpy(to, &value, 16);
}

}  // namespace pyserve::gpu
