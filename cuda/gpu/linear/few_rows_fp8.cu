// linear with e4m3 weights for up to 8 rows of x per pass over the weight: the tile sizes of
// few_rows_fp8.cuh for all devices, and the loop over passes.
#include "gpu/linear/few_rows_fp8.cuh"

#include "gpu/core/device.h"

namespace pyserve::gpu {
namespace {

constexpr int64_t kPassRows = 8;

template <class T, Epilogue kEpilogue, int kTokens>
cudaError_t launch_tokens(const LinearParams& p, const Fp8Scale& scale, const Device& device,
                          cudaStream_t stream) {
  using Deep = Fp8Tiling<2, kTokens == 4 ? 5 : 4, kTokens>;
  // GDDR memory needs far fewer bytes in flight.
  using Small = Fp8Tiling<1, kTokens == 4 ? 3 : 2, kTokens>;
  static_assert(Deep::kSmem <= 226 * 1024 && Small::kSmem <= 98 * 1024);
  if (device.smem_per_block >= 227 * 1024) {
    return launch_fp8_tiled<T, kEpilogue, Deep>(p, scale, device.num_sms, stream);
  }
  return launch_fp8_tiled<T, kEpilogue, Small>(p, scale, device.num_sms, stream);
}

template <class T, Epilogue kEpilogue>
cudaError_t launch_passes(const LinearParams& params, const Fp8Scale& scale, const Device& device,
                          cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int64_t token = 0; token < params.m && error == cudaSuccess; token += kPassRows) {
    LinearParams p = params.from_row(token);
    p.m = std::min(params.m - token, kPassRows);
    error = p.m <= 4 ? launch_tokens<T, kEpilogue, 4>(p, scale, device, stream)
                     : launch_tokens<T, kEpilogue, 8>(p, scale, device, stream);
  }
  return error;
}

}  // namespace

cudaError_t launch_linear_fp8(const LinearParams& params, const Fp8Scale& scale,
                              cudaStream_t stream) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (params.k == 0 || params.k % 16 != 0 || params.k >= kLimit || params.n >= kLimit ||
      !is_vec_aligned(params.x, params.x_stride) || !is_vec_aligned(params.weight, 0) ||
      params.weight_stride % 16 != 0 || (scale.num_groups > 1 && scale.columns % 128 != 0)) {
    return cudaErrorInvalidValue;
  }
  const Device* device = nullptr;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess || params.n == 0) return error;
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return dispatch_epilogue(params.epilogue, [&](auto epilogue) {
      return launch_passes<T, decltype(epilogue)::value>(params, scale, *device, stream);
    });
  });
}

}  // namespace pyserve::gpu
