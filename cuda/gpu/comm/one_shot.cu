// The launchers of one_shot.cuh. A grid never has more CTAs than the device has SMs, so that all of
// its CTAs run at the same time.
#include "gpu/comm/one_shot.cuh"

#include <algorithm>

#include "gpu/comm/comm.h"
#include "gpu/comm/dispatch.cuh"

namespace pyserve::gpu {
namespace {

unsigned num_ctas(const Device& device, int64_t wanted) {
  return static_cast<unsigned>(
      std::min<int64_t>({wanted, int64_t{device.num_sms}, int64_t{kMaxRoundCtas}}));
}

}  // namespace

cudaError_t launch_all_reduce_add_norm(const AllReduceNormParams& params, cudaStream_t stream) {
  const NormParams& norm = params.norm;
  if (norm.num_rows == 0 || norm.hidden == 0) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  return dispatch_peers(norm.dtype, params.peers.tp_size, [&]<class T>(T, auto tp_size) {
    return launch_chained(all_reduce_add_norm_kernel<T, tp_size(), kNormVecs>,
                          num_ctas(*device, norm.num_rows),
                          norm_threads(norm.hidden / kVec, kNormVecs), 0, stream, params);
  });
}

cudaError_t launch_all_reduce_one_shot(const OneShotParams& params, cudaStream_t stream) {
  if (params.num_vecs == 0) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const int64_t wanted = (params.num_vecs + kOneShotThreads - 1) / kOneShotThreads;
  return dispatch_peers(params.dtype, params.peers.tp_size, [&]<class T>(T, auto tp_size) {
    return launch_chained(all_reduce_one_shot_kernel<T, tp_size()>, num_ctas(*device, wanted),
                          kOneShotThreads, 0, stream, params);
  });
}

}  // namespace pyserve::gpu
