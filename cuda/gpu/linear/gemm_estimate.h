// An estimate of how long a product in the frame of gemm_frame.cuh takes on Hopper, computed from
// its work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gpu/core/device.h"

namespace pyserve::gpu::gemm {

// Measured on an H200: multiply-adds per clock and SM, bytes from L2 per clock and SM, bytes from
// memory per clock, and clocks per tile besides the products.
constexpr double kProducts = 2048 / 1.1, kL2Bytes = 40, kMemoryBytes = 2440, kTileClocks = 2500;

inline int pieces(int64_t whole, int part) {
  return static_cast<int>((whole + part - 1) / part);
}

// How many clusters run at a time, with one CTA per SM.
inline int num_resident(const Device& device, int cluster) { return device.num_sms / cluster; }

// The clocks that three resources need. The time is the longest of the three plus a fifth of the
// second longest, because they hinder each other, plus a fixed time that nothing hides.
struct Clocks {
  double compute, cache, memory;

  double us() const {
    constexpr double kClocksPerUs = 1800, kFixedUs = 3.5;
    double each[] = {compute, cache, memory};
    std::sort(each, each + 3);
    return (each[2] + 0.2 * each[1]) / kClocksPerUs + kFixedUs;
  }
};

}  // namespace pyserve::gpu::gemm
