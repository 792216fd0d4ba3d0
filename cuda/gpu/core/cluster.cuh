// CTAs that run at the same time and reach each other's shared memory (sm_90).
#pragma once

#include <cstdint>

namespace pyserve::gpu {

// This CTA's place in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// Where `address` of this CTA's shared memory lies in CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// All threads of the cluster meet: each sees after it what any wrote before it, also to shared
// memory of other CTAs. Whole warps call it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// Arrives at a barrier of a CTA of the cluster, at its cluster_address. It orders nothing between
// CTAs but what wgmma has read before what the copy engine writes next.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Starts to store 16 bytes in a CTA of the cluster, at its cluster_address, aligned; they are counted
// by that CTA's barrier, as what tma_load brings.
__device__ __forceinline__ void store_cluster(uint32_t address, const float4& value,
                                              uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n"
      ::"r"(address),
      "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)), "r"(__float_as_uint(value.z)),
      "r"(__float_as_uint(value.w)), "r"(barrier)
      : "memory");
}

}  // namespace pyserve::gpu
