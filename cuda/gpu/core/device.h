// The constants of the current device. They are queried once and kept, because every launcher needs
// them in every call and a step makes hundreds of launches.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <utility>

namespace pyserve::gpu {

// Whether this build has the kernels of the files *_sm90a.cu, which are compiled for sm_90a alone.
// A launcher calls such a kernel as below, so that builds without sm_90a do not need the symbol and
// other devices never run it:
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
  int smem_per_block;  // the most dynamic shared memory that a block may ask for, in bytes
  int smem_per_sm;  // in bytes

  bool is_hopper() const { return major == 9 && minor == 0; }
};

constexpr int kMaxDevices = 64;

// Points `device` to the constants of the current device. They stay at that address for the rest of
// the process.
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
  const Device* first = nullptr;  // set where another thread has published its answer first
  *device = new Device(asked);
  if (!known[index].compare_exchange_strong(first, *device, std::memory_order_acq_rel)) {
    delete *device;
    *device = first;
  }
  return cudaSuccess;
}

}  // namespace pyserve::gpu
