// Prefill attention for head_dim 96 and 256, and for 128 with capped scores, by mma.sync
// (prefill_kernel.cuh). These kernels read from their arguments whether there is a cap.
//
// With head_dim 256 a warp has only 16 rows, whose sums take 128 registers per thread. Each
// fragment of keys and values is then read for the product of only 16 rows, for which shared memory
// allows 80 % of the products of an sm_80. 128 rows with keys and values take 130 KB (sm_80,
// sm_90); devices with less shared memory take 64 rows. For head_dim 96, and for 128 with a cap,
// one configuration each fits every device.
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
