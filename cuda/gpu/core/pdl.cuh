// The chain of a step's kernels: programmatic dependent launch (sm_90 and later). A kernel of the
// chain is started by launch_chained (launch.cuh) while the one before it still runs, and waits for
// it on the card, so that its start, and the weights that it asks for first, hide behind the other.
//
// The rules, which every kernel that is started by launch_chained keeps:
// 1. Every thread calls pdl_wait() before it ends, on every path: a kernel that ended without would
//    let its successor pass while its predecessor still runs. After the wait all kernels before
//    this one are complete and what they wrote is visible.
// 2. Before the wait a kernel reads only what no kernel of a step writes (weights, scales, tables)
//    and writes nothing but its own shared memory and registers. Activations, plans, block tables,
//    residuals, counters and the KV cache come after it, unless 4 says otherwise.
// 3. What a kernel of the chain writes is not read by ld.global.nc, also after the wait.
// 4. pdl_launch_dependents() is called by every thread: straight after the wait by kernels that run
//    for long (linear, attention, rope, plans, sampling, logprobs), at the start by those that are
//    short between two of them (norms, activations, masks, latent_merge). So behind a long kernel,
//    which begins its work when all before it is complete, the next one may read what is older than
//    it even before its wait, past L1 (ld.global.cg, cp.async.cg); only attention does so, behind
//    linear, rope or its own first kernel.
// 5. A kernel whose blocks are as many as the SMs takes more than half of an SM's shared memory. A
//    smaller one may get two blocks on one SM and none on another, because the SMs become free one
//    by one: the linears of a step were 25 % slower so. Blocks of which any number may share an SM
//    are best small, to start beside the kernel in front.
//
// A kernel that has neither call, as those of torch and cuBLAS, may stand anywhere in a step: it is
// launched the usual way, after all before it, and the one behind it starts when it is complete.
#pragma once

namespace pyserve::gpu {

// Lets the next kernel start once every block of this one has called it or has ended.
__device__ __forceinline__ void pdl_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before this one are complete; no memory access moves across it.
__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace pyserve::gpu
