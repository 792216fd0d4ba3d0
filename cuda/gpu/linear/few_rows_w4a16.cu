// linear with 4-bit integers for up to 32 rows of x per pass over the weight: the tile sizes of
// few_rows_w4a16.cuh for all devices, and the choice of kernel. More rows take several passes.
// Hopper has tile sizes of its own (few_rows_w4a16_sm90a.cu), and another kernel for more than 16
// rows (gemm_w4a16_sm90a.cu).
#include "gpu/linear/few_rows_w4a16.cuh"

#include "gpu/linear/dispatch.h"

namespace pyserve::gpu {
namespace {

// Two stages and 8 rows of x fit into 99 KB. GDDR memory needs far fewer bytes in flight than HBM.
template <int kGroupSize>
using Small = W4Tiling<kGroupSize, 1, 2, 99>;
// Two stages and 32 rows of x, with half as many warps, because each warp stores its own pieces of
// x.
template <int kGroupSize>
using Medium = W4Tiling<kGroupSize, 4, 2, 99, 4>;

}  // namespace

cudaError_t launch_linear_w4a16(const LinearParams& params, int64_t group_size,
                                cudaStream_t stream) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  const bool is_paired = params.epilogue == Epilogue::kSiluMul;
  if (params.k == 0 || params.k >= kLimit || params.n >= kLimit ||
      !is_vec_aligned(params.x, params.x_stride) || !is_vec_aligned(params.weight, 0) ||
      (is_paired && params.n % kStripRows != 0)) {
    return cudaErrorInvalidValue;
  }
  const Device* device = nullptr;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess || params.n == 0) return error;
  const bool is_hopper = kHasSm90a && device->is_hopper();
  if constexpr (kHasSm90a) {
    if (is_hopper && params.m > kMaxW4RowsSm90a && can_gemm_w4a16_sm90a(params)) {
      return launch_gemm_w4a16_sm90a(params, group_size, *device, stream);
    }
  }
  const int64_t max_pass_rows = is_hopper ? kMaxW4RowsSm90a : Medium<128>::kTokens;
  for (int64_t token = 0; token < params.m && error == cudaSuccess; token += max_pass_rows) {
    LinearParams p = params.from_row(token);
    p.m = std::min(params.m - token, max_pass_rows);
    if constexpr (kHasSm90a) {
      if (is_hopper) {
        error = launch_linear_w4a16_sm90a(p, group_size, *device, stream);
        continue;
      }
    }
    error = p.m <= Small<128>::kTokens
                ? launch_w4a16_as<Small>(p, group_size, device->num_sms, stream)
                : launch_w4a16_as<Medium>(p, group_size, device->num_sms, stream);
  }
  return error;
}

}  // namespace pyserve::gpu
