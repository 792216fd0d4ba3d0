// mbarriers: barriers in shared memory that count arriving threads and arriving bytes (sm_90).
// Warps with different roles, and the TMA copies of tma.cuh, wait for each other through them. A
// barrier takes 8 bytes and is given by its 32-bit shared-memory address. It passes through phases
// numbered 0, 1, 0, 1, ...: a phase ends when the number of arrivals that the barrier was
// initialised with have happened and all bytes announced for the phase have come.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// Called by one thread before any other use of the barrier; barriers_ready() and a block-wide
// barrier must follow.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(num_arrivals)
               : "memory");
}

// Makes the initialisations by this thread visible to the copy engine and to the other CTAs of the
// cluster.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and announces that copies will bring `bytes` more bytes in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;\n"
               :
               : "r"(barrier), "r"(bytes)
               : "memory");
}

// How far away the stores may be that a wait makes visible: in this CTA or anywhere in the cluster.
enum class Scope { kCta, kCluster };

#define PYSERVE_TRY_WAIT(SCOPE)                                                    \
  asm volatile(                                                                    \
      "{\n.reg .pred p;\n"                                                         \
      "mbarrier.try_wait.parity.acquire." SCOPE ".shared::cta.b64 p, [%1], %2;\n"  \
      "selp.u32 %0, 1, 0, p;\n}\n"                                                 \
      : "=r"(has_ended)                                                            \
      : "r"(barrier), "r"(phase)                                                   \
      : "memory")

// Whether `phase` has ended. The hardware may suspend the thread for a while before it answers no.
template <Scope kScope>
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t phase) {
  uint32_t has_ended;
  if constexpr (kScope == Scope::kCta) {
    PYSERVE_TRY_WAIT("cta");
  } else {
    PYSERVE_TRY_WAIT("cluster");
  }
  return has_ended != 0;
}

#undef PYSERVE_TRY_WAIT

// Waits until `phase` has ended. The phase before a new barrier's phase 0 counts as ended, and it
// bears the number 1. In a ring of stages the producer therefore waits first for phase 1 of each
// "empty" barrier, which passes at once, and the consumer for phase 0 of each "full" barrier.
template <Scope kScope = Scope::kCta>
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t phase) {
#ifdef PYSERVE_BOUNDED_WAITS  // in test builds a wait of more than about a second becomes an error
  const long long begin = clock64();
  while (!mbarrier_try_wait<kScope>(barrier, phase)) {
    const uint32_t is_late = clock64() - begin > (1ll << 31);
    // a store to address 0, since a trap would make the compiler ignore take_registers (wgmma.cuh)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.u32 [%1], %0;\n}\n"
        :
        : "r"(is_late), "l"(uint64_t{0}));
  }
#else
  while (!mbarrier_try_wait<kScope>(barrier, phase)) {
  }
#endif
}

// The same, and makes visible what other CTAs of the cluster have written by store_cluster.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t phase) {
  mbarrier_wait<Scope::kCluster>(barrier, phase);
}

// Named barrier `id` (1 .. 15, since __syncthreads uses 0) over `num_threads` threads of whole
// warps.
__device__ __forceinline__ void named_barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}

// A position in a ring of kNumStages stages, with the phase of the stage's barrier to wait for
// next.
template <int kNumStages>
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;

  // Moves on by `steps`, which is at most kNumStages.
  __device__ __forceinline__ void advance(int steps = 1) {
    stage += steps;
    if (stage >= kNumStages) {
      stage -= kNumStages;
      phase ^= 1;
    }
  }
};

}  // namespace pyserve::gpu
