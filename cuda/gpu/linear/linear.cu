// linear for few rows of x in any build: the tile sizes of few_rows.cuh for up to 8 rows per pass
// over the weight on all devices, and the loop over passes. On Hopper a pass has up to 32 rows
// (few_rows_sm90a.cu). Rows that are not aligned to 16 bytes go to a plain kernel with one warp per
// result.
#include "gpu/linear/few_rows.cuh"

#include "gpu/linear/few_rows_sm90a.h"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {
namespace {

// One warp per result; any alignment and any k.
template <class T, Epilogue kEpilogue>
__global__ void __launch_bounds__(256) linear_plain_kernel(LinearParams p) {
  pdl_wait();
  pdl_launch_dependents();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t index = int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  if (index >= p.m * p.n) return;
  const int64_t token = index % p.m, column = index / p.m;
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  const float factor = norm_factor(p, token);
  auto sum_of = [&](int64_t row) {
    const T* weight = static_cast<const T*>(p.weight) + row * p.weight_stride;
    float sum = 0.0f;
    for (int64_t i = lane; i < p.k; i += kWarpSize) {
      sum = fmaf(to_float(x[i]), to_float(weight[i]), sum);
    }
    sum = lane_sum(sum);
    sum *= factor;
    return p.bias == nullptr ? sum : sum + to_float(static_cast<const T*>(p.bias)[row]);
  };
  const float sum = sum_of(column);
  float other = 0.0f;
  if constexpr (kEpilogue == Epilogue::kSiluMul) other = sum_of(p.n + column);
  T* target = static_cast<T*>(p.out) + token * p.out_stride + column;
  if (lane != 0) return;
  if constexpr (kEpilogue == Epilogue::kAdd) other = to_float(*target);
  *target = from_float<T>(finish<kEpilogue>(sum, other));
}

template <class T, Epilogue kEpilogue, int kTokens>
cudaError_t launch_tokens(const LinearParams& p, const Device& device, cudaStream_t stream) {
  using Deep = Tiling<1, kTokens == 1 ? 10 : kTokens == 4 ? 9 : 8, kTokens>;
  using Small = Tiling<1, 3, kTokens>;  // fits 99 KB; GDDR memory needs far fewer bytes in flight
  static_assert(Deep::kSmem <= 227 * 1024 && Small::kSmem <= 99 * 1024);
  if (device.smem_per_block >= Tiling<1, 8, 8>::kSmem) {
    return launch_tiled<T, kEpilogue, Deep>(p, device.num_sms, stream);
  }
  return launch_tiled<T, kEpilogue, Small>(p, device.num_sms, stream);
}

// For at most max_pass_rows rows of x.
template <class T, Epilogue kEpilogue>
cudaError_t launch_pass(const LinearParams& p, const Device& device, cudaStream_t stream) {
  if (p.m == 1) return launch_tokens<T, kEpilogue, 1>(p, device, stream);
  if (p.m <= 4) return launch_tokens<T, kEpilogue, 4>(p, device, stream);
  if (p.m <= 8) return launch_tokens<T, kEpilogue, 8>(p, device, stream);
  if constexpr (kHasSm90a) return launch_few_rows_sm90a(p, device, stream);
  return cudaErrorInvalidValue;
}

template <class T, Epilogue kEpilogue>
cudaError_t launch_few_rows_as(const LinearParams& params, cudaStream_t stream) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (params.k == 0 || params.k % kVec != 0 || params.k >= kLimit || params.n >= kLimit ||
      !is_vec_aligned(params.x, params.x_stride) ||
      !is_vec_aligned(params.weight, params.weight_stride)) {
    if (params.norm_weight != nullptr) return cudaErrorInvalidValue;
    const int64_t num_ctas = (params.m * params.n + 7) / 8;
    return launch_chained(linear_plain_kernel<T, kEpilogue>, static_cast<unsigned>(num_ctas), 256,
                          0, stream, params);
  }
  const Device* device = nullptr;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  const int64_t max_pass_rows = kHasSm90a && device->is_hopper() ? kMaxRowsSm90a : 8;
  for (int64_t token = 0; token < params.m && error == cudaSuccess; token += max_pass_rows) {
    LinearParams p = params.from_row(token);
    p.m = std::min(params.m - token, max_pass_rows);
    error = launch_pass<T, kEpilogue>(p, *device, stream);
  }
  return error;
}

}  // namespace

cudaError_t launch_few_rows(const LinearParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return dispatch_epilogue(params.epilogue, [&](auto epilogue) {
      return launch_few_rows_as<T, decltype(epilogue)::value>(params, stream);
    });
  });
}

}  // namespace pyserve::gpu
