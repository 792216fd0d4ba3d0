// The element types for which the kernels are instantiated.
#pragma once

#include <cstdint>

namespace pyserve::gpu {

enum class Dtype : int32_t { kBfloat16, kFloat16 };

}  // namespace pyserve::gpu
