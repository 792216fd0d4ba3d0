// Prefill attention for head_dim 64 and 128 by mma.sync (prefill_kernel.cuh), and the choice
// between the prefill kernels.
#include "gpu/attention/prefill_kernel.cuh"

#include "gpu/attention/attention.h"
#include "gpu/core/device.h"

namespace pyserve::gpu {
namespace prefill {
namespace {

// Two blocks of four warps per SM, with steps of 64 keys where the shared memory allows it (sm_90),
// else of 32 (sm_80). For head_dim 128 on devices with small shared memory (sm_86, 89, 120) it is
// one block of eight warps: their tensor cores are slow enough to wait for twice as many fragment
// loads.
template <class T, int kHeadDim>
cudaError_t launch_typed(const AttentionParams& p, cudaStream_t stream) {
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  using Large = Config<T, kHeadDim, 4, 64>;
  using Medium = Config<T, kHeadDim, 4, 32>;
  if (fits_twice<Large>(*device)) return launch_config<Large>(p, stream);
  if constexpr (kHeadDim == 128) {
    if (!fits_twice<Medium>(*device)) {
      return launch_config<Config<T, kHeadDim, 8, 64>>(p, stream);
    }
  }
  return launch_config<Medium>(p, stream);
}

}  // namespace
}  // namespace prefill

cudaError_t launch_prefill_attention(const AttentionParams& p, Dtype dtype, cudaStream_t stream) {
  if constexpr (kHasSm90a) {
    const Device* device = nullptr;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
    if (device->is_hopper() && prefill_sm90a_serves(p)) {
      return launch_prefill_attention_sm90a(p, dtype, stream);
    }
  }
  const bool is_general = p.softcap != 0.0f || (p.head_dim != 64 && p.head_dim != 128);
  if (is_general) return prefill::launch_general(p, dtype, stream);
  return dispatch_half(dtype, [&]<class T>(T) {
    return p.head_dim == 64 ? prefill::launch_typed<T, 64>(p, stream)
                            : prefill::launch_typed<T, 128>(p, stream);
  });
}

}  // namespace pyserve::gpu
