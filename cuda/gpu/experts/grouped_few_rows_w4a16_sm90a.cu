// The tile sizes of grouped_few_rows_w4a16.cuh for Hopper's shared memory: blocks of up to 8 or 16
// rows of an expert, as in few_rows_w4a16_sm90a.cu.
#include "gpu/experts/grouped_few_rows_w4a16.cuh"

#include "gpu/experts/grouped_w4a16.h"

namespace pyserve::gpu {
namespace {

template <int kGroupSize>
using Deep = W4Tiling<kGroupSize, 1, kGroupSize == 128 ? 6 : 5, 227>;
template <int kGroupSize>
using Wide = W4Tiling<kGroupSize, 2, kGroupSize == 32 ? 3 : 4, 227>;
template <class Tile>
constexpr bool kIsFitting = kGroupedW4Smem<Tile> + sizeof(WorkList) <= 227 * 1024;
static_assert(kIsFitting<Deep<32>> && kIsFitting<Deep<64>> && kIsFitting<Deep<128>> &&
              kIsFitting<Wide<32>> && kIsFitting<Wide<64>> && kIsFitting<Wide<128>>);

}  // namespace

cudaError_t launch_grouped_few_rows_w4a16_sm90a(const GroupedParams& p, int64_t group_size,
                                                const Device& device, cudaStream_t stream) {
  if (p.max_group > Deep<128>::kTokens) {
    return launch_grouped_w4a16_as<Wide>(p, group_size, device.num_sms, stream);
  }
  return launch_grouped_w4a16_as<Deep>(p, group_size, device.num_sms, stream);
}

}  // namespace pyserve::gpu
