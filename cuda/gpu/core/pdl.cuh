// Programmatic dependent launch (sm_90 and later), which chains the kernels of a step.
// launch_chained (launch.cuh) lets a kernel start while the kernel before it in the stream still
// runs; the new kernel then waits on the device for the older one. Its launch latency, and the
// loads of weights that it issues before the wait, are thus hidden behind the older kernel.
//
// Every kernel that is started by launch_chained keeps these rules:
// 1. Every thread calls pdl_wait() before it ends, on every path. If a kernel could end without
//    waiting, the kernel after it would pass its own wait while the kernel before both still runs.
//    Threads may leave it out only where other threads of the same grid are certain to wait, as in
//    gemm_frame.cuh (the thread that copies weights) and decode_kernel.cuh (idle blocks). After the
//    wait all kernels before this one are complete and their writes are visible.
// 2. Before the wait a kernel reads only what no kernel of a step writes (weights, scales, tables),
//    and it writes only its own shared memory and registers. Activations, plans, block tables,
//    residuals, counters and the KV cache are touched after the wait; rule 4 has the one exception.
// 3. What a kernel of the chain writes is never read by ld.global.nc, not even after the wait.
// 4. Every block calls pdl_launch_dependents() or ends. Long kernels (linear, attention, rope,
//    plans, sampling, logprobs) call it directly after their wait; short kernels between two long
//    ones (norms, activations, masks, LoRA, routing, latent_merge) call it at their start. Hence,
//    when a kernel starts, everything before the nearest long kernel in front of it is complete.
//    Even before its own wait it may therefore read data that was written before that long kernel,
//    provided it bypasses L1 (ld.global.cg, cp.async.cg). Only attention does this. The long kernel
//    in front of it is a linear (perhaps with LoRA's kernels behind it), rope or its own first
//    kernel.
// 5. A kernel with one block per SM takes more than half of an SM's shared memory. SMs become free
//    one by one, so with less shared memory one SM may get two blocks and another none: the linears
//    of a step were 25 % slower that way. Kernels whose blocks may share an SM in any number should
//    instead have small blocks, which can start beside the kernel in front.
//
// Kernels that make neither call, such as those of torch and cuBLAS, may stand anywhere in a step.
// Such a kernel is launched in the ordinary way after everything before it, and the kernel behind
// it starts when it is complete.
#pragma once

namespace pyserve::gpu {

// Lets the next kernel start once every block of this kernel has made this call or has ended.
__device__ __forceinline__ void pdl_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until all kernels before this one are complete. The compiler moves no memory access across
// it.
__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace pyserve::gpu
