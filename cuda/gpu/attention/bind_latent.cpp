// The CUDA side of latent_attention: checks the arguments and calls the launcher of latent.cu.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>

#include "common/args/latent.h"
#include "gpu/attention/attention.h"
#include "gpu/attention/bind_params.h"
#include "gpu/core/bind.h"

namespace pyserve {
namespace {

// The number of equal tiles of at most kDecodeRows heads, as layers/latent_attention.py computes
// it.
int num_head_tiles(int64_t num_heads) {
  int num_tiles = 1;
  while (num_heads % num_tiles != 0 || num_heads / num_tiles > gpu::kDecodeRows) ++num_tiles;
  return num_tiles;
}

void latent_attention(const Tensor& q, const Tensor& latent_cache, const Tensor& block_table,
                      const Tensor& row_slots, const Tensor& cu_seqlens_q, const Tensor& seq_lens,
                      double softmax_scale, int64_t max_query_len,
                      const std::optional<Tensor>& work_tensor,
                      const std::optional<Tensor>& workspace_tensor, const Tensor& out) {
  const ViewReader read{"latent_attention", Place::kCuda};
  const char* op = read.op;
  PYSERVE_CHECK(work_tensor.has_value() && workspace_tensor.has_value(), op,
                ": CUDA needs a plan (work and workspace)");
  const LatentAttentionArgs args = latent_attention_args(
      read, q, latent_cache, block_table, row_slots, cu_seqlens_q, seq_lens, softmax_scale, out);
  const View &cache = args.latent_cache, &blocks = args.block_table;
  const View work = read("work", *work_tensor, 1, ScalarType::Int);
  const View workspace = read("workspace", *workspace_tensor, 1, ScalarType::Float);
  const gpu::Dtype dtype = half_dtype(args.q);
  const int64_t num_tokens = args.num_tokens(), num_heads = args.num_heads();
  const int64_t num_rows = args.num_rows(), block_size = args.block_size();
  PYSERVE_CHECK(args.latent_size() == gpu::kLatentSize &&
                    args.width() == gpu::kLatentSize + gpu::kLatentRopeDim,
                op, ": latents of ", args.latent_size(), " of ", args.width(), " are not ",
                gpu::kLatentSize, " of ", gpu::kLatentSize + gpu::kLatentRopeDim);
  PYSERVE_CHECK(std::has_single_bit(static_cast<uint64_t>(block_size)), op, ": block_size ",
                block_size, " is not a power of two");
  PYSERVE_CHECK(max_query_len >= 0, op, ": max_query_len ", max_query_len);
  for (const View* view : {&args.q, &cache, &args.out}) check_alignment(*view);
  for (const View* view : {&args.row_slots, &args.cu_seqlens_q, &args.seq_lens}) {
    check_contiguous(*view);
  }
  // Positions, packed rows, token indices and the grid are 32-bit; offsets are not.
  PYSERVE_CHECK(std::max({num_tokens * num_heads, num_rows, blocks.size(0), cache.size(0),
                          blocks.size(1) * block_size}) < kMaxInt / gpu::kPrefillRows,
                op, ": more than 2^24 positions, blocks or packed rows");
  const gpu::AttentionDevice device = device_of(op);
  const int num_tiles = num_head_tiles(num_heads);
  check_plan(work, workspace, device, num_tokens, num_rows, static_cast<int>(num_heads), num_tiles,
             gpu::kLatentSize);
  if (num_tokens == 0 || num_rows == 0) return;
  const gpu::AttentionParams params{
      .q = args.q.data,
      .q_token_stride = args.q.stride(0),
      .q_head_stride = args.q.stride(1),
      .out = args.out.data,
      .out_token_stride = args.out.stride(0),
      .out_head_stride = args.out.stride(1),
      .key_cache = cache.data,
      .key_block_stride = cache.stride(0),
      .key_token_stride = cache.stride(1),
      .block_table = blocks.ptr<int32_t>(),
      .block_table_stride = blocks.stride(0),
      .row_slots = args.row_slots.ptr<int32_t>(),
      .cu_seqlens_q = args.cu_seqlens_q.ptr<int32_t>(),
      .seq_lens = args.seq_lens.ptr<int32_t>(),
      .num_tokens = static_cast<int32_t>(num_tokens),
      .num_rows = static_cast<int32_t>(num_rows),
      .num_heads = static_cast<int32_t>(num_heads),
      .num_kv_heads = num_tiles,
      .head_dim = gpu::kLatentSize,
      .block_size_log2 = std::countr_zero(static_cast<uint64_t>(block_size)),
      .softmax_scale = static_cast<float>(softmax_scale),
      .max_query_len = static_cast<int32_t>(std::min(max_query_len, num_tokens)),
      .work = work.ptr<int32_t>(),
      .workspace = workspace.ptr<float>(),
      .num_slots = static_cast<int32_t>(blocks.size(0)),
      .num_blocks = static_cast<int32_t>(cache.size(0)),
      .max_blocks_per_seq = static_cast<int32_t>(blocks.size(1)),
      .device = device,
  };
  check_launch(op, gpu::launch_latent_attention(params, dtype, current_stream(q)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("latent_attention", TORCH_BOX(&pyserve::latent_attention));
}
