// The tile sizes of grouped_few_rows_fp8.cuh for all devices: blocks of up to 8 rows of an expert.
// An expert with more rows has several blocks; the first one brings the weight into L2 for the
// others.
#include "gpu/experts/grouped_few_rows_fp8.cuh"

#include "gpu/experts/grouped_fp8.h"

namespace pyserve::gpu {
namespace {

template <class T, Epilogue kEpilogue, int kTokens>
cudaError_t launch_tokens(const GroupedParams& p, const Fp8Scale& scale, int64_t scale_stride,
                          const Device& device, cudaStream_t stream) {
  using Deep = Fp8Tiling<2, kTokens == 4 ? 5 : 4, kTokens>;
  // GDDR memory needs far fewer bytes in flight.
  using Small = Fp8Tiling<1, kTokens == 4 ? 3 : 2, kTokens>;
  static_assert(Deep::kSmem + sizeof(WorkList) <= 232448 &&
                Small::kSmem + sizeof(WorkList) <= 98 * 1024);
  if (device.smem_per_block >= 227 * 1024) {
    return launch_grouped_fp8_tiled<T, kEpilogue, Deep>(p, scale, scale_stride, device.num_sms,
                                                        stream);
  }
  return launch_grouped_fp8_tiled<T, kEpilogue, Small>(p, scale, scale_stride, device.num_sms,
                                                       stream);
}

template <class T, Epilogue kEpilogue>
cudaError_t launch_as(const GroupedParams& p, const Fp8Scale& scale, int64_t scale_stride,
                      const Device& device, cudaStream_t stream) {
  if (p.max_group <= 4) {
    return launch_tokens<T, kEpilogue, 4>(p, scale, scale_stride, device, stream);
  }
  return launch_tokens<T, kEpilogue, 8>(p, scale, scale_stride, device, stream);
}

}  // namespace

cudaError_t launch_grouped_fp8(const GroupedParams& p, const Fp8Scale& scale, int64_t scale_stride,
                               cudaStream_t stream) {
  if (p.is_empty()) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  return dispatch_half(p.dtype, [&]<class T>(T) {
    if (p.epilogue == Epilogue::kSiluMul) {
      return launch_as<T, Epilogue::kSiluMul>(p, scale, scale_stride, *device, stream);
    }
    return launch_as<T, Epilogue::kStore>(p, scale, scale_stride, *device, stream);
  });
}

}  // namespace pyserve::gpu
