// linear_lora on CUDA: a linear of few rows of x and the second of an adapter's two products in one
// kernel (few_rows_lora.cuh). The first product is lora_shrink.
#pragma once

#include "gpu/core/device.h"
#include "gpu/linear/linear.h"
#include "gpu/lora/lora.h"

namespace pyserve::gpu {

constexpr int kMaxLoraTokens = 8;
constexpr int kMaxLoraParts = 4;  // of a linear; those that exist have up to 3
constexpr int kMaxLoraRank = 512;

// The first product of the adapters of the linear that reads the result, whose tokens use the same
// slots: out[split, t, p, r], summed over the splits, = scales[s, p] * sum over j of value[t, j] *
// a[s, p, r, j]. value is `scaled` where a norm follows, else what is stored.
struct LoraNext {
  const void* a;  // [num_slots, num_parts, max_rank, n]; null: there is nothing to do
  int64_t a_slot_stride, a_part_stride, a_stride;
  const int32_t* ranks;  // [num_slots, num_parts]
  int64_t ranks_stride;
  const float* scales;  // [num_slots, num_parts]
  int64_t scales_stride;
  int32_t num_parts, max_rank;
  LoraShrunk out;  // of linear_lora_splits() splits
};

// sums[t, j] += sum over r of shrunk[t, p, r] * b[s, j, r] before the norm's factor and the bias,
// where p is the part that row j of weight belongs to; as in ops/lora.py.
struct LinearLora {
  LoraRows rows;  // num_tokens: of x
  LoraShrunk shrunk;
  const void* b;  // [num_slots, num_rows, max_rank]; strides in elements
  int64_t b_slot_stride, b_stride;
  const int32_t* columns;  // [num_parts + 1]
  int32_t num_rows;        // of weight
  LoraNext next;
};

struct LinearLoraParams {
  LinearParams linear;
  LinearLora lora;
  int64_t group_size;  // of 4-bit integers (w4a16.h); 0: weight is plain numbers
};

// Whether there is a kernel for these shapes and alignments on this device: up to 8 rows, and room
// for the adapters in shared memory.
bool can_linear_lora(const LinearLoraParams& params, const Device& device);

// The splits that a launch with these leaves for lora.next, whose `out` need not be given; 0: it
// cannot.
int64_t linear_lora_splits(const LinearLoraParams& params, const Device& device);

// cudaErrorInvalidValue where can_linear_lora is false, or lora.next.out has other splits than
// linear_lora_splits says.
cudaError_t launch_linear_lora(const LinearLoraParams& params, cudaStream_t stream);

// In few_rows_w4a16_lora_sm90a.cu, which exists only in builds for sm_90a: 1 to 8 rows with 4-bit
// integers. With kSiluMul n is a multiple of 16.
bool fits_linear_w4a16_lora_sm90a(const LinearLoraParams& params, const Device& device);
int64_t linear_w4a16_lora_splits_sm90a(const LinearLoraParams& params, const Device& device);
cudaError_t launch_linear_w4a16_lora_sm90a(const LinearLoraParams& params, const Device& device,
                                           cudaStream_t stream);

}  // namespace pyserve::gpu
