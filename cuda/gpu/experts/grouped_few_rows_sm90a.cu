// The tile sizes of grouped_few_rows.cuh for Hopper's shared memory: blocks of up to 16 or 32 rows
// of an expert, as in few_rows_sm90a.cu.
#include "gpu/experts/grouped_few_rows.cuh"

namespace pyserve::gpu {
namespace {

template <class T, Epilogue kEpilogue>
cudaError_t launch_as(const GroupedParams& p, const Device& device, cudaStream_t stream) {
  using Tall = Tiling<2, 4, 16>;
  using Wide = Tiling<2, 3, 32>;
  static_assert(Tall::kSmem + sizeof(WorkList) <= 226 * 1024 &&
                Wide::kSmem + sizeof(WorkList) <= 226 * 1024);
  if (p.max_group > Tall::kTokens) {
    return launch_grouped_tiled<T, kEpilogue, Wide>(p, device.num_sms, stream);
  }
  return launch_grouped_tiled<T, kEpilogue, Tall>(p, device.num_sms, stream);
}

}  // namespace

cudaError_t launch_grouped_few_rows_sm90a(const GroupedParams& p, const Device& device,
                                          cudaStream_t stream) {
  return dispatch_half(p.dtype, [&]<class T>(T) {
    if (p.epilogue == Epilogue::kSiluMul) {
      return launch_as<T, Epilogue::kSiluMul>(p, device, stream);
    }
    return launch_as<T, Epilogue::kStore>(p, device, stream);
  });
}

}  // namespace pyserve::gpu
