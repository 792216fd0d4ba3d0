// The arguments of rope_write_latent, latent_attention and batched_linear, checked. The values of
// positions, slots and lengths are checked by the kernel. Which sizes of the latent are supported
// is checked by each device.
#pragma once

#include "../check.h"
#include "../limits.h"

namespace pyserve {

struct RopeLatentArgs {
  View q, compressed, positions, cos_sin, slot_mapping, norm_weight, rotated, latent_cache;

  int64_t num_tokens() const { return q.size(0); }
  int64_t num_heads() const { return q.size(1); }
  int64_t rope_dim() const { return q.size(2); }
  int64_t latent_size() const { return norm_weight.size(0); }
};

inline RopeLatentArgs rope_latent_args(const ViewReader& read, const Tensor& q,
                                       const Tensor& compressed, const Tensor& positions,
                                       const Tensor& cos_sin, const Tensor& slot_mapping,
                                       const Tensor& norm_weight, const Tensor& rotated,
                                       const Tensor& latent_cache) {
  const RopeLatentArgs args{read("q", q, 3),
                            read("compressed", compressed, 2),
                            read("positions", positions, 1, ScalarType::Int),
                            read("cos_sin", cos_sin, 2, ScalarType::Float),
                            read("slot_mapping", slot_mapping, 1, ScalarType::Long),
                            read("norm_weight", norm_weight, 1),
                            read("rotated", rotated, 3),
                            read("latent_cache", latent_cache, 3)};
  const int64_t latent_size = args.latent_size(), rope_dim = args.rope_dim();
  PYSERVE_CHECK(latent_size > 0 && latent_size <= kMaxLatentSize, read.op, ": a latent of ",
                latent_size, " is outside [1, ", kMaxLatentSize, "]");
  PYSERVE_CHECK(rope_dim > 0 && rope_dim <= kMaxLatentRopeDim && rope_dim % 2 == 0, read.op,
                ": a rotated part of ", rope_dim, " must be even and at most ", kMaxLatentRopeDim);
  check_size(args.cos_sin, 1, rope_dim);
  check_size(args.compressed, 0, args.num_tokens());
  check_size(args.compressed, 1, latent_size + rope_dim);
  check_size(args.positions, 0, args.num_tokens());
  check_size(args.slot_mapping, 0, args.num_tokens());
  check_size(args.latent_cache, 2, latent_size + rope_dim);
  check_same_sizes(args.rotated, args.q);
  for (const View* view :
       {&args.compressed, &args.norm_weight, &args.rotated, &args.latent_cache}) {
    check_same_dtype(*view, args.q);
  }
  return args;
}

struct LatentAttentionArgs {
  View q, latent_cache, block_table, row_slots, cu_seqlens_q, seq_lens, out;

  int64_t num_tokens() const { return q.size(0); }
  int64_t num_heads() const { return q.size(1); }
  int64_t width() const { return q.size(2); }
  int64_t latent_size() const { return out.size(2); }
  int64_t num_rows() const { return row_slots.size(0); }
  int64_t block_size() const { return latent_cache.size(1); }
};

inline LatentAttentionArgs latent_attention_args(const ViewReader& read, const Tensor& q,
                                                 const Tensor& latent_cache,
                                                 const Tensor& block_table, const Tensor& row_slots,
                                                 const Tensor& cu_seqlens_q, const Tensor& seq_lens,
                                                 double softmax_scale, const Tensor& out) {
  const LatentAttentionArgs args{read("q", q, 3),
                                 read("latent_cache", latent_cache, 3),
                                 read("block_table", block_table, 2, ScalarType::Int),
                                 read("row_slots", row_slots, 1, ScalarType::Int),
                                 read("cu_seqlens_q", cu_seqlens_q, 1, ScalarType::Int),
                                 read("seq_lens", seq_lens, 1, ScalarType::Int),
                                 read("out", out, 3)};
  const int64_t latent_size = args.latent_size(), width = args.width();
  PYSERVE_CHECK(latent_size > 0 && latent_size <= kMaxLatentSize && latent_size <= width &&
                    width - latent_size <= kMaxLatentRopeDim,
                read.op, ": a latent of ", latent_size, " of ", width, " is outside [1, ",
                kMaxLatentSize, "] or leaves more than ", kMaxLatentRopeDim);
  PYSERVE_CHECK(args.num_heads() > 0 && args.block_size() > 0, read.op, ": ", args.num_heads(),
                " heads, block_size ", args.block_size());
  PYSERVE_CHECK(softmax_scale > 0, read.op, ": softmax_scale ", softmax_scale, " must be positive");
  check_size(args.latent_cache, 2, width);
  check_size(args.out, 0, args.num_tokens());
  check_size(args.out, 1, args.num_heads());
  check_size(args.seq_lens, 0, args.num_rows());
  check_size(args.cu_seqlens_q, 0, args.num_rows() + 1);
  check_same_dtype(args.latent_cache, args.q);
  check_same_dtype(args.out, args.q);
  return args;
}

struct BatchedLinearArgs {
  View x, weight, out;

  int64_t m() const { return x.size(0); }
  int64_t batch() const { return x.size(1); }
  int64_t k() const { return x.size(2); }
  int64_t n() const { return weight.size(1); }
};

inline BatchedLinearArgs batched_linear_args(const ViewReader& read, const Tensor& x,
                                             const Tensor& weight, const Tensor& out) {
  const BatchedLinearArgs args{read("x", x, 3), read("weight", weight, 3), read("out", out, 3)};
  check_size(args.weight, 0, args.batch());
  check_size(args.weight, 2, args.k());
  check_size(args.out, 0, args.m());
  check_size(args.out, 1, args.batch());
  check_size(args.out, 2, args.n());
  check_same_dtype(args.weight, args.x);
  check_same_dtype(args.out, args.x);
  return args;
}

}  // namespace pyserve
