// linear with 4-bit integers for 1 to 16 rows of x in one pass: the tile sizes of
// few_rows_w4a16.cuh for Hopper's shared memory.
//
// x of up to 4,096 columns stays in shared memory. 16 rows of 14,336 columns are 448 KB, which do
// not fit and are read again for each two strips. For the `down` matrix of an 8B model, with 4,096
// rows of weight, each CTA has two strips at most, so x is still read only once per CTA.
#include "gpu/linear/few_rows_w4a16.cuh"

namespace pyserve::gpu {

static_assert(W4WideSm90a<128>::kTokens == kMaxW4RowsSm90a);

cudaError_t launch_linear_w4a16_sm90a(const LinearParams& p, int64_t group_size,
                                      const Device& device, cudaStream_t stream) {
  if (p.m > W4DeepSm90a<128>::kTokens) {
    return launch_w4a16_as<W4WideSm90a>(p, group_size, device.num_sms, stream);
  }
  return launch_w4a16_as<W4DeepSm90a>(p, group_size, device.num_sms, stream);
}

}  // namespace pyserve::gpu
