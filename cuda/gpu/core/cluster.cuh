// Thread block clusters (sm_90): CTAs that run at the same time and can reach each other's shared
// memory.
#pragma once

#include <cstdint>

namespace pyserve::gpu {

// The index of this CTA within its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// The cluster-wide address of the place in the shared memory of CTA `rank` that corresponds to
// `address` in this CTA's own.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// A barrier of all threads of the cluster, called by whole warps. After it, each thread sees what
// any thread of the cluster wrote before it, the shared memory of other CTAs included.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// Arrives at an mbarrier of another CTA of the cluster, given by its cluster_address. The arrival
// does not make this CTA's ordinary stores visible to the other CTA. It is only used to say that
// wgmma has finished reading a stage, which the copy engine may then overwrite.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Starts an asynchronous store of 16 bytes to the shared memory of a CTA of the cluster. `address`
// is a cluster_address, aligned to 16 bytes. The bytes are counted by the mbarrier `barrier` of
// that CTA (also a cluster_address), exactly as those of a tma_load are.
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
