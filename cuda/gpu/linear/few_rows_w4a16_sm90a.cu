// linear of 4-bit integers for 1 to 16 rows of x in one pass: few_rows_w4a16.cuh, cut for the
// shared memory of Hopper.
//
// x of up to 4,096 columns stays there. 16 rows of 14,336 columns are 448 KB: they come with each
// two strips, which is once to each CTA where there are 4,096 rows of weight, an 8B model's `down`.
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
