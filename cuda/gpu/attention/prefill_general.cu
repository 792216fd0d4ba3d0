// Prefill attention of head_dim 96 and 256, and of 128 with capped scores, by mma.sync:
// prefill_kernel.cuh, with kernels that look at their arguments for a cap.
//
// Of head_dim 256 a warp has 16 rows, whose sums are 128 registers a thread: each fragment of keys
// and values is read for one product of 16 rows, and shared memory then allows 80 % of an sm_80's
// products. 128 rows take 130 KB with keys and values (sm_80, sm_90); the small cards take 64 rows.
// One kernel each for head_dim 96 and for 128 capped, which fit every card.
#include "gpu/attention/prefill_kernel.cuh"

#include "gpu/attention/attention.h"
#include "gpu/core/device.h"

namespace pyserve::gpu::prefill {
namespace {

template <class T>
cudaError_t launch_256(const AttentionParams& p, cudaStream_t stream) {
  using Whole = Config<T, 256, 8, 32, kPrefillRows, true>;
  using Half = Config<T, 256, 4, 32, kPrefillRows / 2, true>;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  return Whole::kSmemBytes <= device->smem_per_block ? launch_config<Whole>(p, stream)
                                                     : launch_config<Half>(p, stream);
}

}  // namespace

cudaError_t launch_general(const AttentionParams& p, Dtype dtype, cudaStream_t stream) {
  return dispatch_half(dtype, [&]<class T>(T) {
    if (p.head_dim == 96) return launch_config<Config<T, 96, 8, 64, kPrefillRows, true>>(p, stream);
    if (p.head_dim == 128) {
      return launch_config<Config<T, 128, 4, 32, kPrefillRows, true>>(p, stream);
    }
    if (p.head_dim == 256) return launch_256<T>(p, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace pyserve::gpu::prefill
