// linear for 9 to 32 rows of x in one pass over the weight: few_rows.cuh, cut for the shared memory
// of Hopper.
//
// What bounds it beside the weight's bytes is L2, of which an H200 gives some 9.5 TB/s: x is read
// again for each group. With 32 weight rows a group it is half of the weight's bytes at 16 rows, as
// at 8 rows with 16, where memory still gives 4.2 TB/s; at 32 rows it is as much as the weight.
#include "gpu/linear/few_rows_sm90a.h"

#include "gpu/linear/few_rows.cuh"

namespace pyserve::gpu {
namespace {

template <class T, Epilogue kEpilogue>
cudaError_t launch_as(const LinearParams& p, const Device& device, cudaStream_t stream) {
  using Tall = Tiling<2, 4, 16>;
  using Wide = Tiling<2, 3, 32>;
  static_assert(Tall::kSmem <= 227 * 1024 && Wide::kSmem <= 227 * 1024 &&
                Wide::kTokens == kMaxRowsSm90a);
  if (p.m > Tall::kTokens) return launch_tiled<T, kEpilogue, Wide>(p, device.num_sms, stream);
  return launch_tiled<T, kEpilogue, Tall>(p, device.num_sms, stream);
}

}  // namespace

cudaError_t launch_few_rows_sm90a(const LinearParams& params, const Device& device,
                                  cudaStream_t stream) {
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return dispatch_epilogue(params.epilogue, [&](auto epilogue) {
      return launch_as<T, decltype(epilogue)::value>(params, device, stream);
    });
  });
}

}  // namespace pyserve::gpu
