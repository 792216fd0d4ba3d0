// What every bind*.cpp needs: torch's current stream, the element type as the kernels know it, and
// the error of a launch. The checks of an op's arguments are in common/args and are the same on
// every device.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/check.h"
#include "gpu/core/dtype.h"

// Declared weak, because the function lives in libtorch_cuda: a package with the CUDA ops must also
// load beside a torch for the CPU, where the symbol is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace pyserve {

// The stream on which torch launches work for the tensor's device.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  PYSERVE_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "torch is built without CUDA");
  PYSERVE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                "cannot get the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline gpu::Dtype half_dtype(const View& view) {
  PYSERVE_CHECK(view.dtype == ScalarType::BFloat16 || view.dtype == ScalarType::Half, view.op, ": ",
                view.name, " must be bfloat16 or float16, got ",
                torch::headeronly::toString(view.dtype));
  return view.dtype == ScalarType::BFloat16 ? gpu::Dtype::kBfloat16 : gpu::Dtype::kFloat16;
}

inline void check_launch(const char* op, cudaError_t error) {
  PYSERVE_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace pyserve
