// linear with what adapters add to its rows (pyserve/ops/lora.py), in one kernel for few rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu/core/device.h"
#include "gpu/linear/linear.h"
#include "gpu/lora/lora.h"

namespace pyserve::gpu {

// What is shrunk, 8 bytes each: a sum, and the number of the launch that it is of.
struct LoraSums {
  uint64_t* data;  // [num_splits, num_tokens, num_parts, max_rank]; strides in elements
  int64_t split_stride, stride, part_stride;
  int32_t num_splits;  // that k is cut into

  __host__ __device__ uint64_t* at(int split, int token, int part, int row) const {
    return data + split * split_stride + token * stride + part * part_stride + row;
  }
};

struct LinearLora {
  LoraRows rows;  // of the rows of x
  const void* a;  // [num_slots, num_parts, max_rank, k]; strides in elements
  int64_t a_slot_stride, a_part_stride, a_stride;
  const float* scales;  // [num_slots, num_parts]
  int64_t scales_stride;
  LoraSums sums;      // zeros at first, and of these launches alone
  const void* b;      // [num_slots, num_rows, max_rank], num_rows being those of weight
  int64_t b_slot_stride, b_stride;
  int32_t num_rows;
  const int32_t* columns;  // [num_parts + 1]: each part's first row of weight
  uint64_t* counter;       // as sums

  // Of shared memory, for so many rows of x: what was shrunk, what each row of x uses, and the slots.
  int smem_bytes() const {
    const int64_t m = rows.num_tokens, num_sums = m * rows.num_parts * rows.max_rank;
    const int64_t num_partial = 8 * 8 * (m < 16 ? m : 16);  // warps, rows of A, rows of x
    const int64_t num_words = m + 2 * rows.num_slots * rows.num_parts + rows.num_parts + 2;
    return static_cast<int>(
        ((num_sums > num_partial ? num_sums : num_partial) + num_words + 3) / 4 * 16);
  }
};

// What a kernel is asked for: of plain numbers with group_size 0, else of 4-bit integers in groups
// of it, as launch_linear and launch_linear_w4a16 have them.
struct LinearLoraParams {
  LinearParams linear;
  LinearLora lora;
  int64_t group_size = 0;
};

// Whether launch_linear_lora can: on this card, with x, A and B aligned to 16 bytes, with so many
// rows, and with as many parts and as high a rank as its shared memory holds.
bool can_linear_lora(const LinearLoraParams& params, const Device& device);
// Where it can. On a device no two of these launches may run at a time, as on two streams.
cudaError_t launch_linear_lora(const LinearLoraParams& params, cudaStream_t stream);

// few_rows_lora_sm90a.cu and few_rows_w4a16_lora_sm90a.cu, which only builds for sm_90a have: what
// they ask for beside alignment, and their launches.
bool fits_linear_lora_sm90a(const LinearLora& lora);
cudaError_t launch_linear_lora_sm90a(const LinearParams& params, const LinearLora& lora,
                                     const Device& device, cudaStream_t stream);
bool fits_linear_w4a16_lora_sm90a(const LinearLora& lora, int64_t group_size);
cudaError_t launch_linear_w4a16_lora_sm90a(const LinearParams& params, const LinearLora& lora,
                                           int64_t group_size, const Device& device,
                                           cudaStream_t stream);

}  // namespace pyserve::gpu
