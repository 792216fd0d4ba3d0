// The launchers of rows.cuh.
#include "gpu/comm/rows.cuh"

#include <algorithm>

#include "gpu/comm/comm.h"
#include "gpu/core/launch.cuh"

namespace pyserve::gpu {

constexpr int64_t kBytesPerCta = 2 * 16 * kGatherThreads;

cudaError_t launch_gather_rows(const GatherParams& params, cudaStream_t stream) {
  const int64_t num_bytes = params.num_rows * params.row_bytes;
  if (num_bytes == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>(
      std::min<int64_t>((num_bytes + kBytesPerCta - 1) / kBytesPerCta, kMaxFlagCtas));
  return launch_chained(
      params.is_wide() ? gather_rows_kernel<uint4> : gather_rows_kernel<uint16_t>, grid,
      kGatherThreads, 0, stream, params);
}

cudaError_t launch_broadcast_tokens(const TokensParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  return launch_chained(broadcast_tokens_kernel<kTokenThreads>, 1, kTokenThreads, 0, stream, params);
}

}  // namespace pyserve::gpu
