// The schema of every op of pyserve, written once for all backends. Each implementation is in a
// file of its backend that ends in STABLE_TORCH_LIBRARY_IMPL. pyserve/ops/__init__.py describes
// shapes and meaning, and pyserve/ops/reference.py has the plain-torch twin of each op. All ops
// write to tensors that they are given and allocate none, so that a CUDA graph can capture them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pyserve, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out, float offset=0.0) -> ()");
  m.def(
      "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, Tensor(b!) out, "
      "float offset=0.0, Tensor? x_weight=None) -> ()");
  m.def(
      "rope_write_kv(Tensor(a!) qkv, Tensor positions, Tensor cos_sin, Tensor slot_mapping, "
      "Tensor? q_norm_weight, Tensor? k_norm_weight, float eps, int num_heads, int num_kv_heads, "
      "Tensor(b!) key_cache, Tensor(c!) value_cache, float norm_offset=0.0, "
      "Tensor? q_scales=None) -> ()");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, Tensor? x_squares=None, "
      "float eps=0.0) -> ()");
  m.def(
      "linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) residual, "
      "Tensor? norm_weight=None, Tensor(b!)? scaled=None, Tensor(c!)? squares=None) -> ()");
  m.def(
      "linear_silu_mul(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, "
      "Tensor? x_squares=None, float eps=0.0) -> ()");
  m.def("serves_linear(Tensor weight, int m, int epilogue) -> bool");
  m.def(
      "linear_w4a16(Tensor x, Tensor packed, Tensor? bias, Tensor(a!) out, int epilogue=0, "
      "Tensor? x_squares=None, float eps=0.0, Tensor? norm_weight=None, Tensor(b!)? scaled=None, "
      "Tensor(c!)? squares=None) -> ()");
  m.def("dequantise_w4a16(Tensor packed, Tensor(a!) out) -> ()");
  m.def("serves_linear_w4a16(Tensor x, Tensor packed) -> bool");
  m.def("try_linear_w4a16(Tensor packed, int max_rows, int tiling=-1) -> ()");
  m.def(
      "grouped_linear_w4a16(Tensor x, Tensor packed, Tensor? order, Tensor offsets, "
      "int max_group, Tensor(a!)? sorted_x, Tensor(b!) out) -> ()");
  m.def(
      "linear_fp8(Tensor x, Tensor weight, Tensor scales, int scale_rows, int scale_columns, "
      "Tensor? bias, Tensor(a!) out, int epilogue=0, Tensor? x_squares=None, float eps=0.0, "
      "Tensor? norm_weight=None, Tensor(b!)? scaled=None, Tensor(c!)? squares=None) -> ()");
  m.def(
      "dequantise_fp8(Tensor weight, Tensor scales, int scale_rows, int scale_columns, "
      "Tensor(a!) out) -> ()");
  m.def("serves_linear_fp8(Tensor x, Tensor weight) -> bool");
  m.def(
      "linear_w8a8(Tensor x, Tensor weight, Tensor scales, int scale_rows, int scale_columns, "
      "Tensor? bias, Tensor(a!) out, Tensor(b!) scratch, int epilogue=0) -> ()");
  m.def(
      "serves_linear_w8a8(Tensor weight, int m, int scale_rows, int scale_columns) -> bool");
  m.def("try_linear_w8a8(Tensor weight, int min_rows, int tiling=-1) -> ()");
  m.def(
      "grouped_linear_fp8(Tensor x, Tensor weight, Tensor scales, int scale_rows, "
      "int scale_columns, Tensor? order, Tensor offsets, int max_group, "
      "Tensor(a!) out) -> ()");
  m.def(
      "lora_shrink(Tensor x, Tensor a, Tensor starts, Tensor ranks, Tensor scales, "
      "Tensor(a!) out, Tensor? x_squares=None, float eps=0.0) -> ()");
  m.def(
      "lora_expand(Tensor shrunk, Tensor b, Tensor starts, Tensor ranks, Tensor columns, "
      "Tensor(a!) out) -> ()");
  m.def(
      "lora_expand_silu_mul(Tensor shrunk, Tensor b, Tensor starts, Tensor ranks, Tensor columns, "
      "Tensor(a!) gate_up, Tensor(b!) out) -> ()");
  m.def(
      "linear_lora(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, int epilogue, "
      "Tensor shrunk, Tensor b, Tensor starts, Tensor ranks, Tensor columns, "
      "Tensor? x_squares=None, float eps=0.0, Tensor? norm_weight=None, Tensor(b!)? scaled=None, "
      "Tensor(c!)? squares=None) -> ()");
  m.def(
      "serves_linear_lora(Tensor x, Tensor weight, Tensor out, int epilogue, Tensor shrunk, "
      "Tensor b, Tensor starts, Tensor ranks, Tensor columns) -> bool");
  m.def("silu_mul(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def("gelu_tanh_mul(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def(
      "route(Tensor x, Tensor router, Tensor? correction_bias, Tensor slot_mapping, "
      "bool is_sigmoid, bool is_normalized, float scale, int num_groups, int top_groups, "
      "Tensor(a!) logits, Tensor(b!) weights, Tensor(c!) places, Tensor(d!) order, "
      "Tensor(e!) offsets) -> ()");
  m.def(
      "grouped_linear(Tensor x, Tensor weight, Tensor offsets, int max_group, "
      "Tensor(a!) out) -> ()");
  m.def(
      "grouped_linear_silu_mul(Tensor x, Tensor weight, Tensor order, Tensor offsets, "
      "Tensor(a!) sorted_x, Tensor(b!) out) -> ()");
  m.def(
      "combine_experts(Tensor rows, Tensor places, Tensor weights, Tensor? shared, "
      "bool is_adding, Tensor(a!) out) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor block_table, "
      "Tensor row_slots, Tensor cu_seqlens_q, Tensor seq_lens, float softmax_scale, int window, "
      "int max_query_len, Tensor? work, Tensor(a!)? workspace, Tensor(b!) out, "
      "float softcap=0.0) -> ()");
  m.def(
      "rope_attention(Tensor q, Tensor qkv, Tensor cos_sin, Tensor(a!) key_cache, "
      "Tensor(b!) value_cache, Tensor block_table, Tensor row_slots, Tensor cu_seqlens_q, "
      "Tensor seq_lens, float softmax_scale, int window, Tensor work, Tensor(c!) workspace, "
      "Tensor(d!) out, float softcap=0.0) -> ()");
  m.def(
      "plan_attention(Tensor cu_seqlens_q, Tensor seq_lens, int num_heads, int num_kv_heads, "
      "int window, Tensor(a!) work) -> ()");
  m.def(
      "rope_write_latent(Tensor q, Tensor compressed, Tensor positions, Tensor cos_sin, "
      "Tensor slot_mapping, Tensor norm_weight, float eps, bool has_pairs, Tensor(a!) rotated, "
      "Tensor(b!) latent_cache) -> ()");
  m.def(
      "latent_attention(Tensor q, Tensor latent_cache, Tensor block_table, Tensor row_slots, "
      "Tensor cu_seqlens_q, Tensor seq_lens, float softmax_scale, int max_query_len, Tensor? work, "
      "Tensor(a!)? workspace, Tensor(b!) out) -> ()");
  m.def("batched_linear(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
  m.def(
      "plan_step(Tensor step_input, Tensor(a!) slots, Tensor(b!) block_table, "
      "Tensor(c!) token_counts, int block_size, Tensor(d!) input_ids, Tensor(e!) positions, "
      "Tensor(f!) slot_mapping, Tensor(g!) row_slots, Tensor(h!) cu_seqlens_q, "
      "Tensor(i!) seq_lens, Tensor(j!) sample_rows) -> ()");
  m.def(
      "sample(Tensor logits, Tensor sample_slots, Tensor(a!) slots, Tensor(b!) token_counts, "
      "Tensor(c!)? workspace, Tensor(d!) sampled) -> ()");
  m.def("apply_bitmask(Tensor(a!) logits, Tensor bitmask, Tensor rows) -> ()");
  m.def(
      "logprobs(Tensor logits, Tensor rows, Tensor token_ids, bool is_normalized, "
      "Tensor(a!) token_logprobs, Tensor(b!) token_ranks, Tensor(c!) top_ids, "
      "Tensor(d!) top_logprobs) -> ()");
  // Ops between ranks. peers is the table of common/peers.h: int64 [kPeerWords] on the host.
  m.def(
      "all_reduce_add_norm(Tensor partial, Tensor(a!) residual, Tensor weight, float eps, "
      "float offset, Tensor(b!) out, Tensor peers) -> ()");
  m.def("all_reduce_one_shot(Tensor(a!) x, Tensor peers) -> ()");
  m.def("all_reduce_two_shot(Tensor(a!) x, Tensor peers) -> ()");
  m.def("gather_rows(Tensor local, Tensor(a!)? out, Tensor peers) -> ()");
  m.def("broadcast_tokens(Tensor(a!) tokens, Tensor peers) -> ()");
}
