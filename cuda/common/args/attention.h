// The arguments of paged_attention with the checks that hold on every device. The values in the
// tensors, such as slots and lengths, are checked by the kernel. Which head_dim and block_size are
// supported is checked by each device.
#pragma once

#include "../check.h"

namespace pyserve {

inline void check_heads(const char* op, int64_t num_heads, int64_t num_kv_heads,
                        int64_t max_group) {
  PYSERVE_CHECK(num_kv_heads > 0 && num_heads > 0 && num_heads % num_kv_heads == 0, op, ": ",
                num_heads, " heads are not a multiple of ", num_kv_heads, " KV heads");
  PYSERVE_CHECK(num_heads / num_kv_heads <= max_group, op, ": ", num_heads / num_kv_heads,
                " heads a KV head, at most ", max_group);
}

struct AttentionArgs {
  View q, key_cache, value_cache, block_table, row_slots, cu_seqlens_q, seq_lens, out;
  int64_t num_tokens, num_heads, head_dim, num_rows, block_size, num_kv_heads;

  AttentionArgs(const ViewReader& read, const Tensor& q_tensor, const Tensor& key_cache_tensor,
                const Tensor& value_cache_tensor, const Tensor& block_table_tensor,
                const Tensor& row_slots_tensor, const Tensor& cu_seqlens_q_tensor,
                const Tensor& seq_lens_tensor, const Tensor& out_tensor)
      : q(read("q", q_tensor, 3)),
        key_cache(read("key_cache", key_cache_tensor, 4)),
        value_cache(read("value_cache", value_cache_tensor, 4)),
        block_table(read("block_table", block_table_tensor, 2, ScalarType::Int)),
        row_slots(read("row_slots", row_slots_tensor, 1, ScalarType::Int)),
        cu_seqlens_q(read("cu_seqlens_q", cu_seqlens_q_tensor, 1, ScalarType::Int)),
        seq_lens(read("seq_lens", seq_lens_tensor, 1, ScalarType::Int)),
        out(read("out", out_tensor, 3)),
        num_tokens(q.size(0)),
        num_heads(q.size(1)),
        head_dim(q.size(2)),
        num_rows(row_slots.size(0)),
        block_size(key_cache.size(1)),
        num_kv_heads(key_cache.size(2)) {}

  void check(double softmax_scale, int64_t window, double softcap, int64_t max_group) const {
    check_heads(q.op, num_heads, num_kv_heads, max_group);
    PYSERVE_CHECK(softmax_scale > 0, q.op, ": softmax_scale ", softmax_scale, " must be positive");
    PYSERVE_CHECK(softcap >= 0, q.op, ": softcap ", softcap, " must be 0 or more");
    PYSERVE_CHECK(block_size > 0 && window >= 0, q.op, ": block_size ", block_size, ", window ",
                  window);
    check_size(key_cache, 3, head_dim);
    check_same_sizes(value_cache, key_cache);
    check_same_sizes(out, q);
    check_same_dtype(key_cache, q);
    check_same_dtype(value_cache, q);
    check_same_dtype(out, q);
    check_size(seq_lens, 0, num_rows);
    check_size(cu_seqlens_q, 0, num_rows + 1);
  }
};

}  // namespace pyserve
