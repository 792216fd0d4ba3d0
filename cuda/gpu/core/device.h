// What the current card is. It is asked once: launchers need these constants in every call, and a
// step has hundreds.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <utility>

namespace pyserve::gpu {

// Whether this build has the kernels of the files *_sm90a.cu, which are compiled for that
// architecture alone. A launcher calls one of them in this way, so that no other build needs it and
// no other card runs it:
//   if constexpr (kHasSm90a) {
//     if (device->is_hopper()) return launch_something_sm90a(params, stream);
//   }
#ifdef PYSERVE_SM90A
constexpr bool kHasSm90a = true;
#else
constexpr bool kHasSm90a = false;
#endif

struct Device {
  int major, minor;  // compute capability
  int num_sms;
  int smem_per_block;  // bytes of shared memory that a block may ask for
  int smem_per_sm;

  bool is_hopper() const { return major == 9 && minor == 0; }
};

constexpr int kMaxDevices = 64;

// Points `device` to the current device's constants, which stay where they are.
inline cudaError_t current_device(const Device** device) {
  static std::atomic<const Device*> known[kMaxDevices];
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  if (index >= kMaxDevices) return cudaErrorInvalidDevice;
  *device = known[index].load(std::memory_order_acquire);
  if (*device != nullptr) return cudaSuccess;
  Device asked{};
  for (const auto& [value, attribute] :
       {std::pair{&asked.major, cudaDevAttrComputeCapabilityMajor},
        std::pair{&asked.minor, cudaDevAttrComputeCapabilityMinor},
        std::pair{&asked.num_sms, cudaDevAttrMultiProcessorCount},
        std::pair{&asked.smem_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
        std::pair{&asked.smem_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor}}) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, index);
    if (error != cudaSuccess) return error;
  }
  const Device* first = nullptr;  // the answer of the thread that asked first
  *device = new Device(asked);
  if (!known[index].compare_exchange_strong(first, *device, std::memory_order_acq_rel)) {
    delete *device;
    *device = first;
  }
  return cudaSuccess;
}

}  // namespace pyserve::gpu
