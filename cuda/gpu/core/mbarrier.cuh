// Barriers in shared memory that count arrivals and bytes (sm_90): how warps with different tasks,
// and the copies of tma.cuh, wait for each other. One is 8 bytes, addressed by its 32-bit window
// address, and has phases 0, 1, 0, ...: a phase ends when as many have arrived as it was made for
// and all announced bytes are there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// By one thread, before any other use; then barriers_ready() and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(num_arrivals)
               : "memory");
}

// Makes the barriers this thread has set up visible to the copy engine.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and announces that copies will bring `bytes` in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;\n"
               :
               : "r"(barrier), "r"(bytes)
               : "memory");
}

// Whose stores a wait makes visible.
enum class Scope { kCta, kCluster };

#define PYSERVE_TRY_WAIT(SCOPE)                                                    \
  asm volatile(                                                                    \
      "{\n.reg .pred p;\n"                                                         \
      "mbarrier.try_wait.parity.acquire." SCOPE ".shared::cta.b64 p, [%1], %2;\n"  \
      "selp.u32 %0, 1, 0, p;\n}\n"                                                 \
      : "=r"(has_ended)                                                            \
      : "r"(barrier), "r"(phase)                                                   \
      : "memory")

// Whether `phase` has ended; sleeps a little before it says no.
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

// Waits until `phase` has ended. A new barrier is in phase 0, so that its phase 1 counts as ended:
// who fills a ring waits for phase 1 of each "empty" barrier first, who reads it for phase 0.
template <Scope kScope = Scope::kCta>
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t phase) {
#ifdef PYSERVE_BOUNDED_WAITS  // of test builds: a wait of more than a second becomes an error
  const long long begin = clock64();
  while (!mbarrier_try_wait<kScope>(barrier, phase)) {
    const uint32_t is_late = clock64() - begin > (1ll << 31);
    asm volatile(  // a store to address 0; a trap would make take_registers (wgmma.cuh) void
        "{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.u32 [%1], %0;\n}\n"
        :
        : "r"(is_late), "l"(uint64_t{0}));
  }
#else
  while (!mbarrier_try_wait<kScope>(barrier, phase)) {
  }
#endif
}

// The same for what other CTAs of the cluster have stored by store_cluster.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t phase) {
  mbarrier_wait<Scope::kCluster>(barrier, phase);
}

// Barrier `id` (1 .. 15; 0 is __syncthreads) of `num_threads` threads of whole warps: waits for
// all.
__device__ __forceinline__ void named_barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}

// A place in a ring of kNumStages, and the phase of that stage's barrier that its user waits for.
template <int kNumStages>
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;

  // By at most as many steps as there are stages.
  __device__ __forceinline__ void advance(int steps = 1) {
    stage += steps;
    if (stage >= kNumStages) {
      stage -= kNumStages;
      phase ^= 1;
    }
  }
};

}  // namespace pyserve::gpu
