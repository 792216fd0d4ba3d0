// The checks that the bind files of attention share.
#pragma once

#include <cstdint>
#include <limits>

#include "gpu/attention/attention.h"
#include "gpu/core/bind.h"

namespace pyserve {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

inline gpu::AttentionDevice device_of(const char* op) {
  const gpu::Device* device = nullptr;
  check_launch(op, gpu::current_device(&device));
  return gpu::attention_device(*device);
}

// Checks that every row can be read and written 16 bytes at a time.
inline void check_alignment(const View& view) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int64_t i = 0; i < view.dim - 1; ++i) {
    aligned = aligned && (view.size(i) <= 1 || view.stride(i) % 8 == 0);
  }
  PYSERVE_CHECK(aligned, view.op, ": ", view.name, " is not aligned to 16 bytes in all its rows");
}

// Checks that the two tensors of a plan are contiguous and large enough for any lengths of the
// rows.
inline void check_plan(const View& work, const View& workspace, gpu::AttentionDevice device,
                       int64_t num_tokens, int64_t num_rows, int num_heads, int num_kv_heads,
                       int head_dim) {
  check_contiguous(work);
  check_contiguous(workspace);
  const int num_ranges = gpu::num_decode_ranges(device, num_kv_heads);
  const int64_t num_items =
      num_rows + num_ranges +
      gpu::max_prefill_items(device, num_tokens, num_rows, num_heads, num_kv_heads);
  const int64_t work_words = gpu::decode_items_offset(num_ranges) + num_items * gpu::kItemWords;
  const int64_t workspace_words =
      gpu::partial_words(num_ranges, num_kv_heads, gpu::kDecodeRows, head_dim) +
      gpu::partial_words(gpu::num_prefill_chunks(device, num_kv_heads), num_kv_heads,
                         gpu::kPrefillRows, head_dim);
  PYSERVE_CHECK(work.size(0) >= work_words && workspace.size(0) >= workspace_words, work.op,
                ": work ", work.size(0), " and workspace ", workspace.size(0), " must have ",
                work_words, " and ", workspace_words, " words");
}

}  // namespace pyserve
