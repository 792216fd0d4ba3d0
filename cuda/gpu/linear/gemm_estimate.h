// How long a product in the frame of gemm_frame.cuh takes on Hopper, from what it has to do.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gpu/core/device.h"

namespace pyserve::gpu::gemm {

// Of an H200, as measured: multiplications and bytes of L2 a clock and SM, bytes of memory a clock,
// clocks beside the products of a tile.
constexpr double kProducts = 2048 / 1.1, kL2Bytes = 40, kMemoryBytes = 2440, kTileClocks = 2500;

inline int pieces(int64_t whole, int part) {
  return static_cast<int>((whole + part - 1) / part);
}

// How many clusters, a CTA on an SM, run at a time.
inline int num_resident(const Device& device, int cluster) { return device.num_sms / cluster; }

// The longest of three, and a fifth of the next, as they hinder each other; then what nothing hides.
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
