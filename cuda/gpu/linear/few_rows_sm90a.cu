// linear for 9 to 32 rows of x in one pass over the weight: the tile sizes of few_rows.cuh for
// Hopper's shared memory.
//
// Besides the bytes of the weight, it is bound by L2, which delivers about 9.5 TB/s on an H200,
// because x is read again for each group. At 16 rows of x and groups of 32 weight rows, x adds half
// of the weight's bytes, the same ratio as at 8 rows with groups of 16, where memory still delivers
// 4.2 TB/s. At 32 rows x is as many bytes as the weight.
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
