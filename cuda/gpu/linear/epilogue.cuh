// The end of every linear kernel: what an Epilogue makes of a sum. It is one for all kernels, so
// that which of them served a shape shows in the order of the sums alone.
#pragma once

#include <type_traits>

#include "gpu/core/launch.cuh"
#include "gpu/core/gate.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/linear/linear.h"

namespace pyserve::gpu {

// A result in float32, to be rounded once. `sum` has its bias; `other` is, with kAdd, what stands
// in out; with kSiluMul, the sum of the row of up, with its bias; with kStore, anything.
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

// The rows of weight that a tile of `kRows` holds for results [column, ...) of a row of out: with
// kSiluMul kRows / 2 of gate, then the rows of up that go with them.
template <Epilogue kEpilogue, int kRows>
struct RowTile {
  static constexpr bool kIsPaired = kEpilogue == Epilogue::kSiluMul;
  static constexpr int kColumns = kIsPaired ? kRows / 2 : kRows;  // of out
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
