// The parameters of LoRA kernels from the checked arguments of ops.
#pragma once

#include "common/args/lora.h"
#include "gpu/core/bind.h"
#include "gpu/lora/lora.h"

namespace pyserve {

inline gpu::LoraRows lora_rows(const View& starts, const View& ranks, int64_t max_rank,
                               int64_t num_tokens) {
  return {.starts = starts.ptr<int32_t>(),
          .ranks = ranks.ptr<int32_t>(),
          .ranks_stride = ranks.stride(0),
          .num_slots = static_cast<int32_t>(ranks.size(0)),
          .num_parts = static_cast<int32_t>(ranks.size(1)),
          .max_rank = static_cast<int32_t>(max_rank),
          .num_tokens = num_tokens};
}

inline gpu::LoraShrunk lora_shrunk(const View& shrunk) {
  return {.data = shrunk.ptr<float>(),
          .split_stride = shrunk.stride(0),
          .stride = shrunk.stride(1),
          .part_stride = shrunk.stride(2),
          .num_splits = static_cast<int32_t>(shrunk.size(0))};
}

}  // namespace pyserve
