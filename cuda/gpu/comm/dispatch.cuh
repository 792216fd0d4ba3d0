// Kernels are compiled for each number of ranks, so that a thread can load the data of all other
// ranks at once into registers.
#pragma once

#include <type_traits>

#include "gpu/core/launch.cuh"

namespace pyserve::gpu {

// Calls fn(T{}, std::integral_constant<int, tp_size>{}).
template <class Fn>
cudaError_t dispatch_peers(Dtype dtype, int32_t tp_size, Fn&& fn) {
  return dispatch_half(dtype, [&]<class T>(T) {
    if (tp_size == 2) return fn(T{}, std::integral_constant<int, 2>{});
    if (tp_size == 4) return fn(T{}, std::integral_constant<int, 4>{});
    if (tp_size == 8) return fn(T{}, std::integral_constant<int, 8>{});
    return cudaErrorInvalidValue;
  });
}

}  // namespace pyserve::gpu
