// linear of 4-bit integers for up to 8 rows of x in one pass: few_rows_w4a16.cuh, cut for every
// card. More rows take several passes, on Hopper of up to 16 rows each (few_rows_w4a16_sm90a.cu).
#include "gpu/linear/few_rows_w4a16.cuh"

namespace pyserve::gpu {
namespace {

// Two stages and 8 rows of x are what 99 KB hold: GDDR needs far less in flight than HBM.
template <int kGroupSize>
using Small = W4Tiling<kGroupSize, 1, 2, 99>;

}  // namespace

cudaError_t launch_linear_w4a16(const LinearParams& params, int64_t group_size,
                                cudaStream_t stream) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (params.k == 0 || params.k >= kLimit || params.n >= kLimit ||
      params.epilogue != Epilogue::kStore || params.has_norm() ||
      !is_vec_aligned(params.x, params.x_stride) || !is_vec_aligned(params.weight, 0)) {
    return cudaErrorInvalidValue;
  }
  const Device* device = nullptr;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess || params.n == 0) return error;
  const bool is_hopper = kHasSm90a && device->is_hopper();
  const int64_t max_pass_rows = is_hopper ? kMaxW4RowsSm90a : Small<128>::kTokens;
  for (int64_t token = 0; token < params.m && error == cudaSuccess; token += max_pass_rows) {
    LinearParams p = params;
    p.x = static_cast<const uint16_t*>(params.x) + token * params.x_stride;
    p.out = static_cast<uint16_t*>(params.out) + token * params.out_stride;
    p.m = std::min(params.m - token, max_pass_rows);
    if constexpr (kHasSm90a) {
      if (is_hopper) {
        error = launch_linear_w4a16_sm90a(p, group_size, *device, stream);
        continue;
      }
    }
    error = dispatch_half(p.dtype, [&]<class T>(T) {
      return dispatch_group_size(group_size, [&](auto size) {
        return launch_w4a16_tiled<T, Small<decltype(size)::value>>(p, device->num_sms, stream);
      });
    });
  }
  return error;
}

}  // namespace pyserve::gpu
