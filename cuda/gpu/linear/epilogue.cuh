// The end of every linear kernel: what an Epilogue makes of a sum. All kernels share it, so that
// their results for a shape differ only by the order of their sums.
#pragma once

#include <type_traits>

#include "gpu/core/launch.cuh"
#include "gpu/core/gate.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

// A result in float32, which the caller rounds once. `sum` includes its bias. `other` is what out
// holds (kAdd), or the sum of the matching row of up, bias included (kSiluMul); with kStore it is
// not used.
template <Epilogue kEpilogue>
__device__ __forceinline__ float finish(float sum, float other) {
  if constexpr (kEpilogue == Epilogue::kAdd) {
    return other + sum;
  } else if constexpr (kEpilogue == Epilogue::kSiluMul) {
    return silu_mul(sum, other);
  } else {
    return sum;
  }
}

// Which rows of weight a tile of kRows rows holds for columns [column, ...) of out. With kSiluMul
// they are kRows / 2 rows of gate and then the matching rows of up.
template <Epilogue kEpilogue, int kRows>
struct RowTile {
  static constexpr bool kIsPaired = kEpilogue == Epilogue::kSiluMul;
  static constexpr int kColumns = kIsPaired ? kRows / 2 : kRows;  // columns of out per tile
};

// Calls fn(std::integral_constant<Epilogue, ...>{}).
template <class Fn>
cudaError_t dispatch_epilogue(Epilogue epilogue, Fn&& fn) {
  switch (epilogue) {
    case Epilogue::kStore: return fn(std::integral_constant<Epilogue, Epilogue::kStore>{});
    case Epilogue::kAdd: return fn(std::integral_constant<Epilogue, Epilogue::kAdd>{});
    case Epilogue::kSiluMul: return fn(std::integral_constant<Epilogue, Epilogue::kSiluMul>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyserve::gpu
