// The launcher of two_shot.cuh. The grid is the same on all ranks, and is small enough to run at
// once on any device.
#include "gpu/comm/two_shot.cuh"

#include <algorithm>

#include "gpu/comm/comm.h"
#include "gpu/comm/dispatch.cuh"

namespace pyserve::gpu {

// How many vectors of a piece justify one more CTA. More CTAs than kMaxFlagCtas do not speed up the
// links.
constexpr int64_t kVecsPerCta = 2 * kTwoShotThreads;

cudaError_t launch_all_reduce_two_shot(const TwoShotParams& params, cudaStream_t stream) {
  if (params.num_vecs == 0) return cudaSuccess;
  const int64_t piece = (params.num_vecs + params.peers.tp_size - 1) / params.peers.tp_size;
  const auto grid = static_cast<unsigned>(
      std::min<int64_t>((piece + kVecsPerCta - 1) / kVecsPerCta, kMaxFlagCtas));
  return dispatch_peers(params.dtype, params.peers.tp_size, [&]<class T>(T, auto tp_size) {
    return launch_chained(all_reduce_two_shot_kernel<T, tp_size()>, grid, kTwoShotThreads, 0,
                          stream, params);
  });
}

}  // namespace pyserve::gpu
