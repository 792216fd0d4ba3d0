// Calls the launchers that choose a kernel by the card, on a CUDA runtime put on here that is a
// card of given limits, and fails where a launch would be refused. Prints the kernels that were
// launched. Arguments: compute capability, as 90; number of SMs; bytes of shared memory of a block,
// of an SM.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "gpu/attention/attention.h"
#include "gpu/experts/experts.h"
#include "gpu/experts/grouped_fp8.h"
#include "gpu/experts/grouped_w4a16.h"
#include "gpu/linear/dispatch.h"
#include "gpu/linear/fp8.h"
#include "gpu/linear/linear_lora.h"
#include "gpu/linear/w4a16.h"
#include "gpu/linear/w8a8.h"
#include "gpu/lora/lora.h"

namespace {

using pyserve::gpu::Dtype;
using pyserve::gpu::Epilogue;

int capability, num_sms, smem_per_block, smem_per_sm, num_questions;
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
  std::vector<int64_t> row_counts = {65, 96, 128, 192, 256, 384, 512, 1024, 2048};
  for (int64_t m = 1; m <= 40; ++m) row_counts.push_back(m);
  for (const int64_t m : row_counts) {
    for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16}) {
      pyserve::gpu::LinearParams p{};
      p.x = p.weight = p.out = memory;
      p.x_stride = p.weight_stride = p.k = 4096;
      p.out_stride = p.n = 14336;
      p.m = m;
      p.dtype = dtype;
      for (Epilogue epilogue : {Epilogue::kStore, Epilogue::kAdd, Epilogue::kSiluMul}) {
        p.epilogue = epilogue;
        require(launch_linear(p, nullptr), "linear", m, 0);
      }
    }
  }
}

void launch_loras() {
  alignas(16) static char memory[16];
  auto* ints = reinterpret_cast<int32_t*>(memory);
  auto* floats = reinterpret_cast<float*>(memory);
  for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16}) {
    for (const int max_rank : {7, 16, 24, 512}) {
      const pyserve::gpu::LoraRows rows{ints, ints, 2, 8, 2, max_rank, 4096};
      const pyserve::gpu::LoraShrunk shrunk{floats, 8192 * max_rank, 2 * max_rank, max_rank, 1};
      pyserve::gpu::LoraShrinkParams down{};
      down.rows = rows;
      down.x = down.a = memory;
      down.out = shrunk;
      down.x_stride = down.a_stride = down.k = 4096;
      down.a_part_stride = 4096 * max_rank;
      down.a_slot_stride = 8192 * max_rank;
      down.dtype = dtype;
      require(launch_lora_shrink_many(down, nullptr), "lora_shrink", 4096, max_rank);
      pyserve::gpu::LoraExpandParams up{};
      up.rows = rows;
      up.shrunk = shrunk;
      up.b = up.out = memory;
      up.b_stride = max_rank;
      up.b_slot_stride = 4096 * max_rank;
      up.out_stride = up.n = 2048;
      up.dtype = dtype;
      for (const void* gate_up : {static_cast<const void*>(nullptr), up.b}) {
        up.gate_up = gate_up;
        up.gate_up_stride = 4096;
        for (const int num_tokens : {64, 4096}) {  // expand.cu's and expand_many.cu's
          up.rows.num_tokens = num_tokens;
          require(launch_lora_expand(up, nullptr), "lora_expand", num_tokens, max_rank);
        }
      }
    }
  }
}

void launch_w4a16_linear(int64_t m, int64_t group_size, Dtype dtype, Epilogue epilogue) {
  alignas(16) static char memory[16];
  pyserve::gpu::LinearParams p{};
  p.x = p.weight = p.out = memory;
  p.x_stride = p.k = 4096;
  p.out_stride = p.n = 6144;
  p.weight_stride = 32 * 272;
  p.m = m;
  p.dtype = dtype;
  p.epilogue = epilogue;
  require(launch_linear_w4a16(p, group_size, nullptr), "linear_w4a16", m, 0);
}

void launch_w4a16_linears() {
  for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16}) {
    for (Epilogue epilogue : {Epilogue::kStore, Epilogue::kAdd, Epilogue::kSiluMul}) {
      for (int64_t group_size : {32, 64, 128}) {
        for (int64_t m : {1, 4, 8, 9, 16, 17, 24, 33, 64, 70, 100, 256}) {
          launch_w4a16_linear(m, group_size, dtype, epilogue);
        }
      }
      for (int tiling = pyserve::gpu::kNumW4Tilings; tiling >= 0; --tiling) {
        pyserve::gpu::linear_trial().w4a16_tiling = tiling;
        for (int64_t group_size : {64, 128}) launch_w4a16_linear(64, group_size, dtype, epilogue);
      }
    }
  }
}

void launch_lora_linears() {
  alignas(16) static char memory[16];
  pyserve::gpu::LinearLoraParams params{};
  pyserve::gpu::LinearParams& p = params.linear;
  pyserve::gpu::LinearLora& l = params.lora;
  p.x = p.weight = l.b = p.out = memory;
  p.x_stride = p.weight_stride = p.k = 4096;
  p.out_stride = p.n = 6144;
  l.shrunk = {reinterpret_cast<float*>(memory), 0, 48, 16, 8};
  l.rows.num_slots = 8, l.rows.num_parts = 3, l.rows.max_rank = 16;
  l.b_stride = 16, l.b_slot_stride = 6144 * 16, l.num_rows = 6144;
  for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16}) {
    for (Epilogue epilogue : {Epilogue::kStore, Epilogue::kAdd, Epilogue::kSiluMul}) {
      for (int group_size : {0, 32, 64, 128}) {
        if (group_size != 0 && capability != 90) continue;
        for (int64_t m = 1; m <= 8; ++m) {
          p.dtype = dtype, p.epilogue = epilogue, p.m = l.rows.num_tokens = m;
          params.group_size = group_size;
          require(launch_linear_lora(params, nullptr), "linear_lora", m, group_size);
        }
      }
    }
  }
}

// Its rows, dtype and epilogue aside.
pyserve::gpu::LinearParams fp8_linear() {
  alignas(16) static char memory[16];
  pyserve::gpu::LinearParams p{};
  p.x = p.weight = p.out = memory;
  p.x_stride = p.weight_stride = p.k = 4096;
  p.out_stride = p.n = 6144;
  return p;
}

constexpr pyserve::gpu::Fp8Scale kFp8Scale{nullptr, 128, 128, 32};

void launch_w8a8_linears() {
  if (capability != 90) return;
  pyserve::gpu::LinearParams p = fp8_linear();
  for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16}) {
    for (Epilogue epilogue : {Epilogue::kStore, Epilogue::kAdd, Epilogue::kSiluMul}) {
      for (int tiling = pyserve::gpu::kNumW8Tilings; tiling >= 0; --tiling) {
        pyserve::gpu::linear_trial().w8a8_tiling = tiling;
        for (int64_t m : {17, 64, 512, 8192}) {
          p.m = m, p.dtype = dtype, p.epilogue = epilogue;
          const int64_t scratch_bytes = 600 * pyserve::gpu::w8_row_bytes(p.k);
          require(launch_linear_w8a8(p, kFp8Scale, p.out, scratch_bytes, nullptr), "linear_w8a8", m, 0);
        }
      }
    }
  }
}

void launch_fp8_linears() {
  pyserve::gpu::LinearParams p = fp8_linear();
  for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16}) {
    for (Epilogue epilogue : {Epilogue::kStore, Epilogue::kAdd, Epilogue::kSiluMul}) {
      for (int64_t m : {1, 4, 5, 8, 9, 16, 30}) {
        p.m = m, p.dtype = dtype, p.epilogue = epilogue;
        require(launch_linear_fp8(p, kFp8Scale, nullptr), "linear_fp8", m, 0);
      }
    }
  }
}

void launch_grouped_w4a16s(pyserve::gpu::GroupedParams p) {
  for (int64_t group_size : {32, 64, 128}) {
    const int64_t unit_words = group_size == 32 ? 160 : group_size == 64 ? 144 : 272;
    p.weight_stride = p.k / std::max<int64_t>(group_size, 64) * unit_words;
    p.expert_stride = p.weight_rows() / 16 * p.weight_stride;
    require(launch_grouped_w4a16(p, group_size, nullptr), "grouped w4a16", p.max_group, 0);
  }
}

void launch_experts() {
  alignas(16) static char memory[16];
  for (const int num_tokens : {1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64, 150, 3000}) {
    for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16}) {
      for (const int num_experts : {8, 512}) {
        pyserve::gpu::GroupedParams p{};
        p.x = p.weight = p.out = p.sorted_x = memory;
        p.order = p.offsets = reinterpret_cast<int32_t*>(memory);
        p.x_stride = p.weight_stride = p.sorted_x_stride = p.k = 4096;
        p.out_stride = p.n = 1024;
        p.top_k = 2;
        p.max_group = num_tokens;
        p.max_rows = 2 * num_tokens;
        p.num_experts = num_experts;
        p.dtype = dtype;
        for (Epilogue epilogue : {Epilogue::kStore, Epilogue::kSiluMul}) {
          p.epilogue = epilogue;
          p.expert_stride = int64_t{p.weight_rows()} * p.weight_stride;
          require(launch_grouped(p, nullptr), "grouped linear", num_tokens, 0);
          const pyserve::gpu::Fp8Scale scale{nullptr, 128, 128, 32};
          require(launch_grouped_fp8(p, scale, 1024, nullptr), "grouped fp8", num_tokens, 0);
          launch_grouped_w4a16s(p);
        }
        pyserve::gpu::RouteParams route{};
        route.num_tokens = num_tokens;
        route.num_experts = route.num_logits = num_experts;
        route.hidden = 4096;
        route.top_k = 2;
        route.num_groups = route.top_groups = 1;
        route.dtype = dtype;
        require(launch_route(route, nullptr), "route", num_tokens, 0);
      }
    }
  }
}

void launch_attentions() {
  const pyserve::gpu::Device* device = nullptr;
  require(current_device(&device), "current_device", 0, 0);
  if (device->is_hopper() != (capability == 90)) std::exit(1);
  pyserve::gpu::AttentionParams p{};
  p.device = attention_device(*device);
  p.num_tokens = 2048;
  p.num_rows = 8;
  p.num_heads = 32;
  p.softmax_scale = 0.1f;
  p.max_query_len = 1024;
  for (int num_kv_heads : {1, 8, 32}) {
    for (int head_dim : {64, 96, 128, 256}) {
      for (int i = 0; i < 4; ++i) {
        p.num_kv_heads = num_kv_heads;
        p.head_dim = head_dim;
        p.block_size_log2 = 4 + i % 2;  // of which one kernel serves only the first
        p.softcap = i / 2 * 50.0f;
        if (!pyserve::gpu::serves_attention(head_dim, p.softcap)) continue;
        for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16}) {
          require(launch_paged_attention(p, dtype, nullptr), "attention", num_kv_heads, head_dim);
          float cos_sin = 0.0f;
          pyserve::gpu::DecodeRope rope{};
          rope.cos_sin = &cos_sin;
          require(launch_rope_decode_attention(p, rope, dtype, nullptr), "rope attention",
                  num_kv_heads, head_dim);
        }
      }
    }
  }
}

void launch_latent_attentions() {
  const pyserve::gpu::Device* device = nullptr;
  require(current_device(&device), "current_device", 0, 0);
  pyserve::gpu::AttentionParams p{};
  p.device = attention_device(*device);
  p.num_tokens = 2048;
  p.num_rows = 8;
  p.max_query_len = 1024;
  p.head_dim = pyserve::gpu::kLatentSize;
  for (int num_tiles : {1, 2, 8}) {
    p.num_kv_heads = num_tiles;
    p.num_heads = 16 * num_tiles;
    for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16}) {
      require(launch_latent_attention(p, dtype, nullptr), "latent attention", num_tiles, 0);
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
  ++num_questions;
  if (attribute == cudaDevAttrComputeCapabilityMajor) {
    *value = capability / 10;
  } else if (attribute == cudaDevAttrComputeCapabilityMinor) {
    *value = capability % 10;
  } else if (attribute == cudaDevAttrMultiProcessorCount) {
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

CUresult encode_nothing() { return CUDA_SUCCESS; }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&encode_nothing);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  if (config->numAttrs != 0 && capability < 90) return cudaErrorInvalidValue;  // no such launches
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
  capability = std::atoi(argv[1]);
  num_sms = std::atoi(argv[2]);
  smem_per_block = std::atoi(argv[3]);
  smem_per_sm = std::atoi(argv[4]);
  launch_linears();
  launch_w4a16_linears();
  launch_lora_linears();
  launch_fp8_linears();
  launch_w8a8_linears();
  launch_experts();
  launch_loras();
  const int num_first = num_questions;
  launch_attentions();
  launch_latent_attentions();
  if (num_questions != num_first) {
    std::fprintf(stderr, "the card was asked again, %d times\n", num_questions - num_first);
    return 1;
  }
}
