// Calls the launchers that choose a kernel by the card, on a CUDA runtime put on here that is a
// card of given limits, and fails where a launch would be refused. Prints the kernels that were
// launched. Arguments: number of SMs, bytes of shared memory of a block, of an SM.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "gpu/attention/attention.h"
#include "gpu/linear/linear.h"

namespace {

int num_sms, smem_per_block, smem_per_sm;
std::map<const void*, std::string>& names() {  // of kernels, by their host functions
  static std::map<const void*, std::string> map;
  return map;
}
std::map<const void*, size_t> allowed;  // beyond 48 KB

void require(cudaError_t error, const char* what, int64_t m, int head_dim) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s, m %d, head_dim %d: refused\n", what, static_cast<int>(m), head_dim);
  std::exit(1);
}

void launch_linears() {
  alignas(16) static char memory[16];
  for (int64_t m = 1; m <= 20; ++m) {
    for (bool is_bf16 : {false, true}) {
      pyserve::gpu::LinearParams p{};
      p.x = p.weight = p.out = memory;
      p.x_stride = p.weight_stride = p.k = 4096;
      p.out_stride = p.n = 6144;
      p.m = m;
      p.is_bf16 = is_bf16;
      require(launch_linear(p, nullptr), "linear", m, 0);
    }
  }
}

void launch_attentions() {
  using pyserve::gpu::AttentionDtype;
  pyserve::gpu::AttentionParams p{};
  require(attention_device(&p.device), "attention_device", 0, 0);
  p.num_tokens = 2048;
  p.num_rows = 8;
  p.num_heads = 32;
  p.max_query_len = 1024;
  for (int num_kv_heads : {1, 8, 32}) {
    for (int head_dim : {64, 128}) {
      p.num_kv_heads = num_kv_heads;
      p.head_dim = head_dim;
      for (AttentionDtype dtype : {AttentionDtype::kBfloat16, AttentionDtype::kFloat16}) {
        require(launch_paged_attention(p, dtype, nullptr), "attention", num_kv_heads, head_dim);
      }
    }
  }
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}

// What <<<>>> needs, by nvcc's version: launch() is the only way to launch.
void __cudaGetKernel() { std::abort(); }
void __cudaLaunchKernel() { std::abort(); }
void __cudaPopCallConfiguration() { std::abort(); }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  std::abort();
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = num_sms;
  } else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = smem_per_block;
  } else if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor) {
    *value = smem_per_sm;
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > smem_per_block) return cudaErrorInvalidValue;
  allowed[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const size_t bytes = config->dynamicSmemBytes;
  if (bytes > 48 * 1024 && (!allowed.count(kernel) || bytes > allowed[kernel])) {
    return cudaErrorInvalidValue;
  }
  if (grid.y > 65535 || grid.z > 65535 || block.x * block.y * block.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  std::printf("%s\n", names()[kernel].c_str());
  return cudaSuccess;
}

}  // extern "C"

int main(int, char** argv) {
  num_sms = std::atoi(argv[1]);
  smem_per_block = std::atoi(argv[2]);
  smem_per_sm = std::atoi(argv[3]);
  launch_linears();
  launch_attentions();
}
