// The element types that kernels are chosen by.
#pragma once

#include <cstdint>

namespace pyserve::gpu {

enum class Dtype : int32_t { kFloat32, kBfloat16, kFloat16 };

}  // namespace pyserve::gpu
