// linear_lora on CUDA: a linear of few rows of x and the second of an adapter's two products in one
// kernel (few_rows_lora.cuh). The first product is lora_shrink.
#pragma once

#include "gpu/core/device.h"
#include "gpu/linear/linear.h"
#include "gpu/lora/lora.h"

namespace pyserve::gpu {

// sums[t, j] += sum over r of shrunk[t, p, r] * b[s, j, r] before the norm's factor and the bias,
// where p is the part that row j of weight belongs to; as in ops/lora.py.
struct LinearLora {
  LoraRows rows;  // num_tokens: of x
  LoraShrunk shrunk;
  const void* b;  // [num_slots, num_rows, max_rank]; strides in elements
  int64_t b_slot_stride, b_stride;
  const int32_t* columns;  // [num_parts + 1]
  int32_t num_rows;        // of weight
};

struct LinearLoraParams {
  LinearParams linear;
  LinearLora lora;
  int64_t group_size;  // of 4-bit integers (w4a16.h); 0: weight is plain numbers
};

// Whether there is a kernel for these shapes and alignments on this device: up to 8 rows, and room
// for the adapters in shared memory.
bool can_linear_lora(const LinearLoraParams& params, const Device& device);

// cudaErrorInvalidValue where can_linear_lora is false.
cudaError_t launch_linear_lora(const LinearLoraParams& params, cudaStream_t stream);

// In few_rows_w4a16_lora_sm90a.cu, which exists only in builds for sm_90a: 1 to 8 rows with 4-bit
// integers. With kSiluMul n is a multiple of 16.
bool fits_linear_w4a16_lora_sm90a(const LinearLoraParams& params, const Device& device);
cudaError_t launch_linear_w4a16_lora_sm90a(const LinearLoraParams& params, const Device& device,
                                           cudaStream_t stream);

}  // namespace pyserve::gpu
