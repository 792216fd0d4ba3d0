// Chooses the kernel for a grouped linear, and copies rows of x into the order of the experts for
// the kernels that need them sorted.
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/experts/experts.h"

namespace pyserve::gpu {
namespace {

constexpr int kGatherThreads = 128;
// Up to this many rows of an expert, the kernel for few rows takes them as one block and reads the
// expert's matrix once.
constexpr int kFewRows = 32;

// Copies one row per CTA, 16 bytes per thread at a time.
template <class T>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(GroupedParams p) {
  pdl_launch_dependents();
  pdl_wait();
  const int row = static_cast<int>(blockIdx.x);
  if (row >= p.offsets[p.num_experts]) return;
  const T* from = static_cast<const T*>(p.x) + p.x_stride * (p.order[row] / p.top_k);
  T* to = static_cast<T*>(p.sorted_x) + p.sorted_x_stride * row;
  for (int i = static_cast<int>(threadIdx.x) * kVec; i < p.k; i += kGatherThreads * kVec) {
    store_vec(to + i, load_vec(from + i));
  }
}

bool can_gemm(const GroupedParams& p) {
  return p.max_group > kFewRows && p.expert_stride == p.weight_stride * p.weight_rows() &&
         (p.order == nullptr || is_vec_aligned(p.sorted_x, p.sorted_x_stride));
}

}  // namespace

cudaError_t launch_sort_rows(GroupedParams& p, cudaStream_t stream) {
  if (p.order == nullptr) return cudaSuccess;
  const cudaError_t error = dispatch_half(p.dtype, [&]<class T>(T) {
    return launch_chained(gather_kernel<T>, static_cast<unsigned>(p.max_rows), kGatherThreads, 0,
                          stream, p);
  });
  p.x = p.sorted_x;
  p.x_stride = p.sorted_x_stride;
  p.order = nullptr;
  return error;
}

cudaError_t launch_grouped(const GroupedParams& p, cudaStream_t stream) {
  if (p.is_empty()) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  if constexpr (kHasSm90a) {
    if (device->is_hopper() && can_gemm(p)) {
      GroupedParams sorted = p;
      if (const cudaError_t error = launch_sort_rows(sorted, stream); error != cudaSuccess) {
        return error;
      }
      return launch_grouped_gemm_sm90a(sorted, *device, stream);
    }
  }
  return launch_grouped_few_rows(p, stream);
}

}  // namespace pyserve::gpu
