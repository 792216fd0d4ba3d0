// The launcher of latent_attention; the kernels are in latent_kernel.cuh and latent_merge.cuh.
#include "gpu/attention/latent_kernel.cuh"

namespace pyserve::gpu {

cudaError_t launch_latent_attention(const AttentionParams& params, Dtype dtype,
                                    cudaStream_t stream) {
  return dispatch_half(dtype, [&]<class T>(T) { return latent::launch_latent<T>(params, stream); });
}

}  // namespace pyserve::gpu
