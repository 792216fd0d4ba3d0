// How kernels are launched. Errors come back as codes, and shared memory beyond 48 KB is requested
// once per kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <utility>

#include "gpu/core/device.h"
#include "gpu/core/dtype.h"
#include "gpu/core/pdl.cuh"

namespace pyserve::gpu {

// Every kernel declares its dynamic shared memory under this one name:
//   extern __shared__ __align__(128) unsigned char dynamic_smem[];

// Launches kernel<<<grid, block, smem_bytes, stream>>>(args...). An empty grid, which CUDA would
// refuse, launches nothing and is a success.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
                   cudaStream_t stream, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

// Whether the machine code of this file's kernels that `device` runs contains the instructions of
// pdl.cuh. It does where code was compiled for sm_90 or later of the device's own major version.
// For any other major version the driver translates PTX, which may be of an older architecture and
// so lack them.
constexpr bool is_chained_on(const Device& device) {
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    if (arch >= 900 && arch / 100 == device.major &&
        arch <= 100 * device.major + 10 * device.minor) {
      return true;
    }
  }
  return false;
}

// As launch, for a kernel that keeps the rules of pdl.cuh: it may start while the kernel before it
// in the stream still runs. With `cluster` > 1, each `cluster` neighbouring CTAs form a thread
// block cluster; this is allowed only where is_chained_on(device) holds.
template <class... Params, class... Args>
cudaError_t launch_chained_clusters(void (*kernel)(Params...), dim3 grid, unsigned cluster,
                                    dim3 block, size_t smem_bytes, cudaStream_t stream,
                                    Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (is_chained_on(*device)) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <class... Params, class... Args>
cudaError_t launch_chained(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
                           cudaStream_t stream, Args&&... args) {
  return launch_chained_clusters(kernel, grid, 1, block, smem_bytes, stream,
                                 std::forward<Args>(args)...);
}

// Allows `kKernel` to have kSmemBytes of dynamic shared memory; the driver is asked once per
// process. Every kernel with dynamic shared memory goes through here, because
// tests/ops/test_cuda_build.py makes its table of shared memory from the names of these static
// variables.
template <auto kKernel, size_t kSmemBytes>
cudaError_t allow_smem() {
  static std::atomic<bool> is_allowed{false};
  if (is_allowed.load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSmemBytes));
  if (error == cudaSuccess) is_allowed.store(true, std::memory_order_relaxed);
  return error;
}

// Calls fn(T{}) with the C++ type of a 16-bit dtype.
template <class Fn>
cudaError_t dispatch_half(Dtype dtype, Fn&& fn) {
  if (dtype == Dtype::kBfloat16) return fn(__nv_bfloat16{});
  if (dtype == Dtype::kFloat16) return fn(__half{});
  return cudaErrorInvalidValue;
}

}  // namespace pyserve::gpu
