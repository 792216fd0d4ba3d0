// The CUDA side of paged_attention, rope_attention and plan_attention: checks the arguments and
// calls the launchers of decode.cu, prefill.cu and plan.cu.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <optional>

#include "common/args/attention.h"
#include "gpu/attention/attention.h"
#include "gpu/attention/bind_params.h"
#include "gpu/core/bind.h"

namespace pyserve {
namespace {

constexpr double kMaxSoftcap = 1000;  // at this cap the error of cap_score is 3e-7 of it

// Checks the arguments of paged_attention and turns them into the parameters of its kernels.
gpu::AttentionParams attention_params(const ViewReader& read, const AttentionArgs& args,
                                      double softmax_scale, double softcap, int64_t window,
                                      int64_t max_query_len, const Tensor& work_tensor,
                                      const Tensor& workspace_tensor) {
  const char* op = read.op;
  const View &keys = args.key_cache, &values = args.value_cache, &blocks = args.block_table;
  const View work = read("work", work_tensor, 1, ScalarType::Int);
  const View workspace = read("workspace", workspace_tensor, 1, ScalarType::Float);
  const int64_t num_tokens = args.num_tokens, num_heads = args.num_heads;
  const int64_t num_rows = args.num_rows, num_kv_heads = args.num_kv_heads;
  const int64_t head_dim = args.head_dim, block_size = args.block_size;
  PYSERVE_CHECK(gpu::serves_attention(head_dim, 0), op, ": head_dim ", head_dim,
                " is none of 64, 96, 128, 256");
  PYSERVE_CHECK(gpu::serves_attention(head_dim, softcap), op, ": a softcap, ", softcap,
                ", has no kernel at head_dim ", head_dim);
  PYSERVE_CHECK(softcap <= kMaxSoftcap, op, ": a softcap, ", softcap, ", is above ", kMaxSoftcap);
  PYSERVE_CHECK(block_size > 0 && std::has_single_bit(static_cast<uint64_t>(block_size)), op,
                ": block_size ", block_size, " is not a power of two");
  PYSERVE_CHECK(window >= 0 && max_query_len >= 0, op, ": window ", window, ", max_query_len ",
                max_query_len);
  args.check(softmax_scale, window, softcap, gpu::kPrefillRows);
  for (const View* view : {&args.q, &keys, &values, &args.out}) check_alignment(*view);
  for (const View* view : {&args.row_slots, &args.cu_seqlens_q, &args.seq_lens}) {
    check_contiguous(*view);
  }
  // Positions, packed rows and token indices are 32-bit on the device; offsets are not.
  PYSERVE_CHECK(std::max({num_tokens * num_heads, num_rows, blocks.size(0), keys.size(0),
                          blocks.size(1) * block_size}) < kMaxInt,
                op, ": more than 2^31 positions, blocks or packed rows");

  const gpu::AttentionDevice device = device_of(op);
  const int kv_heads = static_cast<int>(num_kv_heads);
  check_plan(work, workspace, device, num_tokens, num_rows, static_cast<int>(num_heads), kv_heads,
             static_cast<int>(head_dim));

  return {
      .q = args.q.data,
      .q_token_stride = args.q.stride(0),
      .q_head_stride = args.q.stride(1),
      .out = args.out.data,
      .out_token_stride = args.out.stride(0),
      .out_head_stride = args.out.stride(1),
      .key_cache = keys.data,
      .key_block_stride = keys.stride(0),
      .key_token_stride = keys.stride(1),
      .key_head_stride = keys.stride(2),
      .value_cache = values.data,
      .value_block_stride = values.stride(0),
      .value_token_stride = values.stride(1),
      .value_head_stride = values.stride(2),
      .block_table = blocks.ptr<int32_t>(),
      .block_table_stride = blocks.stride(0),
      .row_slots = args.row_slots.ptr<int32_t>(),
      .cu_seqlens_q = args.cu_seqlens_q.ptr<int32_t>(),
      .seq_lens = args.seq_lens.ptr<int32_t>(),
      .num_tokens = static_cast<int32_t>(num_tokens),
      .num_rows = static_cast<int32_t>(num_rows),
      .num_heads = static_cast<int32_t>(num_heads),
      .num_kv_heads = kv_heads,
      .head_dim = static_cast<int32_t>(head_dim),
      .block_size_log2 = std::countr_zero(static_cast<uint64_t>(block_size)),
      .window = static_cast<int32_t>(std::min(window, kMaxInt)),
      .softmax_scale = static_cast<float>(softmax_scale),
      .softcap = static_cast<float>(softcap),
      .max_query_len = static_cast<int32_t>(std::min(max_query_len, num_tokens)),
      .work = work.ptr<int32_t>(),
      .workspace = workspace.ptr<float>(),
      .num_slots = static_cast<int32_t>(blocks.size(0)),
      .num_blocks = static_cast<int32_t>(keys.size(0)),
      .max_blocks_per_seq = static_cast<int32_t>(blocks.size(1)),
      .device = device,
  };
}

void paged_attention(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache,
                     const Tensor& block_table, const Tensor& row_slots, const Tensor& cu_seqlens_q,
                     const Tensor& seq_lens, double softmax_scale, int64_t window,
                     int64_t max_query_len, const std::optional<Tensor>& work,
                     const std::optional<Tensor>& workspace, const Tensor& out, double softcap) {
  const ViewReader read{"paged_attention", Place::kCuda};
  PYSERVE_CHECK(work.has_value() && workspace.has_value(), read.op,
                ": CUDA needs a plan (work and workspace)");
  const AttentionArgs args(read, q, key_cache, value_cache, block_table, row_slots, cu_seqlens_q,
                           seq_lens, out);
  const gpu::Dtype dtype = half_dtype(args.q);
  const gpu::AttentionParams params = attention_params(
      read, args, softmax_scale, softcap, window, max_query_len, *work, *workspace);
  if (args.num_tokens == 0 || args.num_rows == 0) return;
  check_launch(read.op, gpu::launch_paged_attention(params, dtype, current_stream(q)));
}

void rope_attention(const Tensor& q, const Tensor& qkv_tensor, const Tensor& cos_sin_tensor,
                    const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                    const Tensor& row_slots, const Tensor& cu_seqlens_q, const Tensor& seq_lens,
                    double softmax_scale, int64_t window, const Tensor& work,
                    const Tensor& workspace, const Tensor& out, double softcap) {
  const ViewReader read{"rope_attention", Place::kCuda};
  const AttentionArgs args(read, q, key_cache, value_cache, block_table, row_slots, cu_seqlens_q,
                           seq_lens, out);
  const View qkv = read("qkv", qkv_tensor, 2);
  const View cos_sin = read("cos_sin", cos_sin_tensor, 2, ScalarType::Float);
  const gpu::Dtype dtype = half_dtype(args.q);
  check_heads(read.op, args.num_heads, args.num_kv_heads, gpu::kDecodeRows);
  const int64_t max_query_len = gpu::kDecodeRows / (args.num_heads / args.num_kv_heads);
  const gpu::AttentionParams params =
      attention_params(read, args, softmax_scale, softcap, window, max_query_len, work, workspace);
  const int64_t num_heads = args.num_heads, num_kv_heads = args.num_kv_heads;
  const int64_t head_dim = args.head_dim;
  check_same_dtype(qkv, args.q);
  check_alignment(qkv);
  check_size(qkv, 0, args.num_tokens);
  check_size(qkv, 1, (num_heads + 2 * num_kv_heads) * head_dim);
  check_size(cos_sin, 1, head_dim);
  PYSERVE_CHECK(reinterpret_cast<uintptr_t>(cos_sin.data) % 16 == 0 && cos_sin.stride(0) % 4 == 0,
                read.op, ": cos_sin is not aligned to 16 bytes in all its rows");
  if (args.num_tokens == 0 || args.num_rows == 0) return;
  const auto* rows = static_cast<const uint16_t*>(qkv.data);
  const gpu::DecodeRope rope{.keys = rows + num_heads * head_dim,
                             .values = rows + (num_heads + num_kv_heads) * head_dim,
                             .token_stride = qkv.stride(0),
                             .cos_sin = cos_sin.ptr<float>(),
                             .cos_sin_stride = cos_sin.stride(0),
                             .max_position = cos_sin.size(0)};
  check_launch(read.op,
               gpu::launch_rope_decode_attention(params, rope, dtype, current_stream(q)));
}

constexpr const char* kPlan = "plan_attention";

void plan_attention(const Tensor& cu_seqlens_q_tensor, const Tensor& seq_lens_tensor,
                    int64_t num_heads, int64_t num_kv_heads, int64_t window,
                    const Tensor& work_tensor) {
  const char* op = kPlan;
  const ViewReader read{op, Place::kCuda};
  const View starts = read("cu_seqlens_q", cu_seqlens_q_tensor, 1, ScalarType::Int);
  const View seq_lens = read("seq_lens", seq_lens_tensor, 1, ScalarType::Int);
  const View work = read("work", work_tensor, 1, ScalarType::Int);
  const int64_t num_rows = seq_lens.size(0);
  check_heads(op, num_heads, num_kv_heads, gpu::kPrefillRows);
  PYSERVE_CHECK(window >= 0, op, ": window ", window);
  check_size(starts, 0, num_rows + 1);
  for (const View& view : {starts, seq_lens, work}) check_contiguous(view);
  PYSERVE_CHECK(reinterpret_cast<uintptr_t>(work.data) % 16 == 0, op,
                ": work is not aligned to 16 bytes");
  const gpu::AttentionPlanParams params{
      .cu_seqlens_q = starts.ptr<int32_t>(),
      .seq_lens = seq_lens.ptr<int32_t>(),
      .num_rows = static_cast<int32_t>(num_rows),
      .num_heads = static_cast<int32_t>(num_heads),
      .num_kv_heads = static_cast<int32_t>(num_kv_heads),
      .window = static_cast<int32_t>(std::min(window, kMaxInt)),
      .device = device_of(op),
      .work = work.ptr<int32_t>(),
      .work_words = work.size(0),
  };
  // The number of items depends on the rows, so the kernel itself checks that they fit.
  const int num_ranges = gpu::num_decode_ranges(params.device, params.num_kv_heads);
  PYSERVE_CHECK(work.size(0) >= gpu::decode_items_offset(num_ranges), op, ": work ", work.size(0),
                " is too small");
  check_launch(op, gpu::launch_plan_attention(params, current_stream(work_tensor)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&pyserve::paged_attention));
  m.impl("rope_attention", TORCH_BOX(&pyserve::rope_attention));
  m.impl("plan_attention", TORCH_BOX(&pyserve::plan_attention));
}
