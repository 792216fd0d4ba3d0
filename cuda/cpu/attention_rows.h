// The rows of a step as the attention ops are given them. Anything that would lead out of bounds is
// an error.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/check.h"

namespace pyserve {

// Checks row r and returns its query length; 0 for a padded row. `args` has the views of a step's
// rows, and `cache` [num_blocks, block_size, ...] is what the block table refers to.
template <class Args>
int64_t checked_query_len(const Args& args, const View& cache, int64_t window, int64_t r) {
  const char* op = args.q.op;
  const int64_t begin = args.cu_seqlens_q.template ptr<int32_t>()[r];
  const int64_t end = args.cu_seqlens_q.template ptr<int32_t>()[r + 1];
  const int64_t slot = args.row_slots.template ptr<int32_t>()[r];
  const int64_t seq_len = args.seq_lens.template ptr<int32_t>()[r], block_size = cache.size(1);
  PYSERVE_CHECK(begin >= 0 && begin <= end && end <= args.q.size(0), op, ": row ", r,
                " has queries [", begin, ", ", end, ") of ", args.q.size(0));
  if (slot == -1 || begin == end) return 0;
  PYSERVE_CHECK(slot >= 0 && slot < args.block_table.size(0), op, ": row ", r, " has slot ", slot,
                " of ", args.block_table.size(0));
  PYSERVE_CHECK(seq_len >= end - begin && seq_len <= args.block_table.size(1) * block_size, op,
                ": row ", r, " has ", end - begin, " queries and sequence length ", seq_len);
  const int64_t first = window > 0 ? std::max<int64_t>(0, seq_len - (end - begin) + 1 - window) : 0;
  const int32_t* blocks =
      args.block_table.template ptr<int32_t>() + slot * args.block_table.stride(0);
  uint32_t largest = 0;  // as unsigned, a negative id is the largest
  for (int64_t i = first / block_size; i * block_size < seq_len; ++i) {
    largest = std::max(largest, static_cast<uint32_t>(blocks[i]));
  }
  PYSERVE_CHECK(largest < cache.size(0), op, ": row ", r, " has block id ",
                static_cast<int32_t>(largest), " of ", cache.size(0));
  return end - begin;
}

}  // namespace pyserve
