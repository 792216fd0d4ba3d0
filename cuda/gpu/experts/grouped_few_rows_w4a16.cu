// Chooses the kernel for a grouped linear of 4-bit integers, and has the tile sizes of
// grouped_few_rows_w4a16.cuh for all devices: blocks of up to 8 rows of an expert. An expert with
// more rows has several blocks; the first one brings the weight into L2 for the others.
#include "gpu/experts/grouped_few_rows_w4a16.cuh"

#include "gpu/experts/grouped_w4a16.h"

namespace pyserve::gpu {
namespace {

template <int kGroupSize>
// GDDR memory needs far fewer bytes in flight than HBM.
using Small = W4Tiling<kGroupSize, 1, 2, 99>;
// On Hopper: from so many rows per expert on average, one pass over its matrix by the kernel for
// many rows is faster than passes for 16 rows each.
constexpr int kManyRows = 12;
static_assert(kGroupedW4Smem<Small<32>> + sizeof(WorkList) <= 99 * 1024);

}  // namespace

cudaError_t launch_grouped_w4a16(const GroupedParams& p, int64_t group_size, cudaStream_t stream) {
  if (p.is_empty()) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  if constexpr (kHasSm90a) {
    if (device->is_hopper()) {
      const bool is_many = p.max_group > kMaxW4RowsSm90a && p.mean_rows() >= kManyRows;
      if (is_many && can_gemm_grouped_w4a16_sm90a(p)) {
        GroupedParams sorted = p;
        const cudaError_t error = launch_sort_rows(sorted, stream);
        if (error != cudaSuccess) return error;
        return launch_grouped_gemm_w4a16_sm90a(sorted, group_size, *device, stream);
      }
      return launch_grouped_few_rows_w4a16_sm90a(p, group_size, *device, stream);
    }
  }
  return launch_grouped_w4a16_as<Small>(p, group_size, device->num_sms, stream);
}

}  // namespace pyserve::gpu
