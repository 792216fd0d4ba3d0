// linear_lora on CUDA: a linear of few rows of x and the second half of what adapters add to it, in
// one kernel (few_rows_lora.cuh); the first half is lora_shrink's.
#pragma once

#include "gpu/core/device.h"
#include "gpu/linear/linear.h"
#include "gpu/lora/lora.h"

namespace pyserve::gpu {

// sums[t, j] += sum over r of shrunk[t, p, r] * b[s, j, r] before the norm's factor and the bias, p
// being the part that row j of weight belongs to; as in ops/lora.py.
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

// Whether there is a kernel for these shapes and alignments on this card.
bool can_linear_lora(const LinearLoraParams& params, const Device& device);

// Where it can.
cudaError_t launch_linear_lora(const LinearLoraParams& params, cudaStream_t stream);

// few_rows_lora_sm90a.cu, which only builds for sm_90a have: 9 to 32 rows.
bool fits_linear_lora_sm90a(const LinearLoraParams& params);
cudaError_t launch_linear_lora_sm90a(const LinearLoraParams& params, const Device& device,
                                     cudaStream_t stream);

// few_rows_w4a16_lora_sm90a.cu, likewise: 1 to kMaxW4RowsSm90a rows by 4-bit integers.
bool fits_linear_w4a16_lora_sm90a(const LinearLoraParams& params);
cudaError_t launch_linear_w4a16_lora_sm90a(const LinearLoraParams& params, const Device& device,
                                           cudaStream_t stream);

}  // namespace pyserve::gpu
