// The tile sizes of grouped_few_rows.cuh for all devices: blocks of up to 8 rows of an expert. An
// expert with more rows has several blocks; the first one brings the weight into L2 for the others.
// On Hopper, where an expert may have more than 8 rows, blocks are of up to 32
// (grouped_few_rows_sm90a.cu).
#include "gpu/experts/grouped_few_rows.cuh"

namespace pyserve::gpu {
namespace {

template <class T, Epilogue kEpilogue, int kTokens>
cudaError_t launch_tokens(const GroupedParams& p, const Device& device, cudaStream_t stream) {
  using Deep = Tiling<1, kTokens == 1 ? 10 : kTokens == 4 ? 9 : 8, kTokens>;
  using Small = Tiling<1, 3, kTokens>;  // fits 99 KB; GDDR memory needs far fewer bytes in flight
  static_assert(Deep::kSmem + sizeof(WorkList) <= 226 * 1024 &&
                Small::kSmem + sizeof(WorkList) <= 98 * 1024);
  if (device.smem_per_block >= 227 * 1024) {
    return launch_grouped_tiled<T, kEpilogue, Deep>(p, device.num_sms, stream);
  }
  return launch_grouped_tiled<T, kEpilogue, Small>(p, device.num_sms, stream);
}

template <class T, Epilogue kEpilogue>
cudaError_t launch_as(const GroupedParams& p, const Device& device, cudaStream_t stream) {
  if (p.max_group == 1) return launch_tokens<T, kEpilogue, 1>(p, device, stream);
  if (p.max_group <= 4) return launch_tokens<T, kEpilogue, 4>(p, device, stream);
  return launch_tokens<T, kEpilogue, 8>(p, device, stream);
}

}  // namespace

cudaError_t launch_grouped_few_rows(const GroupedParams& p, cudaStream_t stream) {
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  if constexpr (kHasSm90a) {
    if (device->is_hopper() && p.max_group > 8) {
      return launch_grouped_few_rows_sm90a(p, *device, stream);
    }
  }
  return dispatch_half(p.dtype, [&]<class T>(T) {
    if (p.epilogue == Epilogue::kSiluMul) {
      return launch_as<T, Epilogue::kSiluMul>(p, *device, stream);
    }
    return launch_as<T, Epilogue::kStore>(p, *device, stream);
  });
}

}  // namespace pyserve::gpu
