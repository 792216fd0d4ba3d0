// Decode attention for head_dim 96 and 256, and for 128 with capped scores. These kernels read from
// their arguments whether there is a cap and whether they do rope. Such a branch costs nothing,
// since they wait for memory; a kernel for each case would take four times as long to compile.
#include "gpu/attention/decode_kernel.cuh"

namespace pyserve::gpu::decode {

cudaError_t launch_general(const Decode& d, Dtype dtype, dim3 grid, cudaStream_t stream) {
  return dispatch_half(dtype, [&]<class T>(T) {
    if (d.p.head_dim == 96) return launch_kind<T, 96, Kind::kGeneral>(d, grid, stream);
    if (d.p.head_dim == 128) return launch_kind<T, 128, Kind::kGeneral>(d, grid, stream);
    if (d.p.head_dim == 256) return launch_kind<T, 256, Kind::kGeneral>(d, grid, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace pyserve::gpu::decode
