// Accesses to memory that several devices read and write at the same time. Every access to another
// rank's buffer, and to this rank's own buffer where others write it, is one of these: relaxed at
// system scope. Such an access goes to the memory itself, past L1, and is never torn within 4 bytes
// (8 bytes in the 64-bit form). A vector of 16 bytes counts as four such accesses in any order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pyserve::gpu {

__device__ __forceinline__ void store_system(void* target, const uint4& value) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
__device__ __forceinline__ void store_system(void* target, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(target), "l"(value) : "memory");
}
__device__ __forceinline__ void store_system(void* target, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(target), "r"(value) : "memory");
}
__device__ __forceinline__ void store_system(void* target, uint16_t value) {
  asm volatile("st.relaxed.sys.global.u16 [%0], %1;" ::"l"(target), "h"(value) : "memory");
}

template <class Value>
__device__ __forceinline__ Value load_system(const void* source);

template <>
__device__ __forceinline__ uint4 load_system<uint4>(const void* source) {
  uint4 value;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source)
               : "memory");
  return value;
}
template <>
__device__ __forceinline__ uint64_t load_system<uint64_t>(const void* source) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(source) : "memory");
  return value;
}
template <>
__device__ __forceinline__ uint32_t load_system<uint32_t>(const void* source) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}
template <>
__device__ __forceinline__ uint16_t load_system<uint16_t>(const void* source) {
  uint16_t value;
  asm volatile("ld.relaxed.sys.global.u16 %0, [%1];" : "=h"(value) : "l"(source) : "memory");
  return value;
}

// Stores a flag behind everything that this thread has written or read; behind a barrier, behind
// everything of its block. A reader that sees the flag by load_acquire sees those writes too.
__device__ __forceinline__ void store_release(void* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const void* flag) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ int64_t now_ns() {
  int64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
}

}  // namespace pyserve::gpu
