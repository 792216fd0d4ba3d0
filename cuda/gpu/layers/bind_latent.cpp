// The CUDA side of rope_write_latent and batched_linear: checks the arguments and calls the
// launchers of latent.cu.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <limits>

#include "common/args/latent.h"
#include "gpu/core/bind.h"
#include "gpu/layers/latent.h"

namespace pyserve {
namespace {

void rope_write_latent(const Tensor& q, const Tensor& compressed, const Tensor& positions,
                       const Tensor& cos_sin, const Tensor& slot_mapping, const Tensor& norm_weight,
                       double eps, bool has_pairs, const Tensor& rotated,
                       const Tensor& latent_cache) {
  const ViewReader read{"rope_write_latent", Place::kCuda};
  const RopeLatentArgs args = rope_latent_args(read, q, compressed, positions, cos_sin,
                                               slot_mapping, norm_weight, rotated, latent_cache);
  PYSERVE_CHECK(
      args.num_heads() <= 4096 && args.num_tokens() <= std::numeric_limits<int32_t>::max(), read.op,
      ": ", args.num_tokens(), " tokens, ", args.num_heads(), " heads");
  const View& cache = args.latent_cache;
  const gpu::RopeLatentParams params{
      .q = args.q.data,
      .q_token_stride = args.q.stride(0),
      .q_head_stride = args.q.stride(1),
      .rotated = args.rotated.data,
      .rotated_token_stride = args.rotated.stride(0),
      .rotated_head_stride = args.rotated.stride(1),
      .compressed = args.compressed.data,
      .compressed_stride = args.compressed.stride(0),
      .norm_weight = args.norm_weight.data,
      .positions = args.positions.ptr<int32_t>(),
      .cos_sin = args.cos_sin.ptr<float>(),
      .cos_sin_stride = args.cos_sin.stride(0),
      .max_position = args.cos_sin.size(0),
      .slot_mapping = args.slot_mapping.ptr<int64_t>(),
      .latent_cache = cache.data,
      .block_stride = cache.stride(0),
      .token_stride = cache.stride(1),
      .num_kv_slots = cache.size(0) * cache.size(1),
      .block_size = cache.size(1),
      .num_tokens = args.num_tokens(),
      .num_heads = static_cast<int32_t>(args.num_heads()),
      .latent_size = static_cast<int32_t>(args.latent_size()),
      .rope_dim = static_cast<int32_t>(args.rope_dim()),
      .eps = static_cast<float>(eps),
      .has_pairs = has_pairs,
      .dtype = half_dtype(args.q),
  };
  check_launch(read.op, gpu::launch_rope_write_latent(params, current_stream(q)));
}

void check_vectors(const View& view) {
  PYSERVE_CHECK(reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride(0) % 8 == 0 &&
                    view.stride(1) % 8 == 0 && view.size(2) % 8 == 0,
                view.op, ": rows of ", view.name,
                " must be whole vectors of 16 bytes, aligned to them");
}

void batched_linear(const Tensor& x, const Tensor& weight, const Tensor& out) {
  const ViewReader read{"batched_linear", Place::kCuda};
  const BatchedLinearArgs args = batched_linear_args(read, x, weight, out);
  PYSERVE_CHECK(args.m() <= gpu::kMaxBatchedRows, read.op, ": ", args.m(), " rows, at most ",
                gpu::kMaxBatchedRows);
  PYSERVE_CHECK(args.batch() < 65536 && args.n() < (1 << 20) && args.k() <= kMaxLatentSize, read.op,
                ": ", args.batch(), " matrices [", args.n(), ", ", args.k(), "]");
  check_vectors(args.x);
  check_vectors(args.weight);
  const gpu::BatchedLinearParams params{
      .x = args.x.data,
      .x_stride = args.x.stride(0),
      .x_batch_stride = args.x.stride(1),
      .weight = args.weight.data,
      .weight_batch_stride = args.weight.stride(0),
      .weight_stride = args.weight.stride(1),
      .out = args.out.data,
      .out_stride = args.out.stride(0),
      .out_batch_stride = args.out.stride(1),
      .m = static_cast<int32_t>(args.m()),
      .batch = static_cast<int32_t>(args.batch()),
      .n = static_cast<int32_t>(args.n()),
      .k = static_cast<int32_t>(args.k()),
      .dtype = half_dtype(args.x),
  };
  if (args.m() == 0) return;
  check_launch(read.op, gpu::launch_batched_linear(params, current_stream(x)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("rope_write_latent", TORCH_BOX(&pyserve::rope_write_latent));
  m.impl("batched_linear", TORCH_BOX(&pyserve::batched_linear));
}
