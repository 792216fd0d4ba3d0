// linear with 4-bit integers for 1 to 16 rows of x in one pass: the tile sizes of
// few_rows_w4a16.cuh for Hopper's shared memory.
//
// x of up to 4,096 columns stays in shared memory. 16 rows of 14,336 columns are 448 KB, which do
// not fit and are read again for each two strips. For the `down` matrix of an 8B model, with 4,096
// rows of weight, each CTA has two strips at most, so x is still read only once per CTA.
#include "gpu/linear/few_rows_w4a16.cuh"

namespace pyserve::gpu {
namespace {

// Rings of 60 to 108 KB; all stages but one are in flight.
template <int kGroupSize>
using Deep = W4Tiling<kGroupSize, 1, kGroupSize == 32 ? 5 : 6, 227>;
template <int kGroupSize>
using Wide = W4Tiling<kGroupSize, 2, kGroupSize == 32 ? 3 : 4, 227>;
static_assert(Wide<128>::kTokens == kMaxW4RowsSm90a);

}  // namespace

cudaError_t launch_linear_w4a16_sm90a(const LinearParams& p, int64_t group_size,
                                      const Device& device, cudaStream_t stream) {
  if (p.m > Deep<128>::kTokens) return launch_w4a16_as<Wide>(p, group_size, device.num_sms, stream);
  return launch_w4a16_as<Deep>(p, group_size, device.num_sms, stream);
}

}  // namespace pyserve::gpu
