// Decode attention of head_dim 96 and 256, and of 128 with capped scores: kernels that look at
// their arguments for a cap and for rope. They wait for memory, not for a branch, and one for each
// would take four times as long to compile.
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
