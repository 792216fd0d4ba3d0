// The ops around latent_attention: rope_write_latent, which norms and rotates what the cache keeps
// of a token, and batched_linear, whose matrices lead into the latent and out of it. float32 or
// bfloat16.
//   rope_write_latent: q, rotated [num_tokens, num_heads, rope_dim]; compressed
//     [num_tokens, latent_size + rope_dim] = latent | rotated part of the key; cos_sin float32
//     [max_position, rope_dim] = cosines | sines
//   batched_linear: x [m, batch, k], weight [batch, n, k], out [m, batch, n]
// Rows are normed and rotated in a float32 buffer on the stack and rounded once. Where neighbouring
// elements are rotated together (has_pairs), a row is first reordered into two halves, and stays
// so. q and k are reordered alike, so their products agree.
#include "../common/args/latent.h"

#include <torch/csrc/stable/library.h>

#include <type_traits>
#include <vector>

#include "linear_groups.h"
#include "parallel.h"
#include "rope_head.h"
#include "vec.h"

namespace pyserve {
namespace {

template <class T>
void rope_row(const T* in, const float* cos_sin, int64_t rope_dim, bool has_pairs, T* out) {
  Head head;
  const int64_t half = rope_dim / 2;
  if (has_pairs) {
    int64_t i = 0;
    if constexpr (std::is_same_v<T, Bf16>) {
      for (; i + kLanes <= half; i += kLanes) {
        Vec even, odd;
        load_pair(in + 2 * i, even, odd);
        store(head.x + i, even);
        store(head.x + half + i, odd);
      }
    }
    for (; i < half; ++i) {
      head.x[i] = to_float(in[2 * i]);
      head.x[half + i] = to_float(in[2 * i + 1]);
    }
  } else {
    load_head(in, rope_dim, head);
  }
  rotate_head(cos_sin, cos_sin + half, half, head);
  store_head(head, rope_dim, out);
}

template <class T>
void rope_tokens(const RopeLatentArgs& args, float eps, bool has_pairs) {
  const View &cache = args.latent_cache, &q = args.q, &rotated = args.rotated;
  const int64_t block_size = cache.size(1), latent_size = args.latent_size(),
                rope_dim = args.rope_dim();
  const double cost = static_cast<double>(args.num_heads() * rope_dim) + 0.5 * latent_size;
  parallel_for(args.num_tokens(), cost, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t position = args.positions.ptr<int32_t>()[token];
      const float* row = args.cos_sin.ptr<float>() + position * args.cos_sin.stride(0);
      for (int64_t head = 0; head < args.num_heads(); ++head) {
        rope_row(q.ptr<T>() + token * q.stride(0) + head * q.stride(1), row, rope_dim, has_pairs,
                 rotated.ptr<T>() + token * rotated.stride(0) + head * rotated.stride(1));
      }
      const int64_t slot = args.slot_mapping.ptr<int64_t>()[token];
      if (slot < 0) continue;
      const T* in = args.compressed.ptr<T>() + token * args.compressed.stride(0);
      T* kept = cache.ptr<T>() + slot / block_size * cache.stride(0) +
                slot % block_size * cache.stride(1);
      Head latent;
      load_head(in, latent_size, latent);
      norm_head(args.norm_weight.ptr<T>(), 0.0f, eps, latent_size, latent);
      store_head(latent, latent_size, kept);
      rope_row(in + latent_size, row, rope_dim, has_pairs, kept + latent_size);
    }
  });
}

void rope_write_latent(const Tensor& q, const Tensor& compressed, const Tensor& positions,
                       const Tensor& cos_sin, const Tensor& slot_mapping, const Tensor& norm_weight,
                       double eps, bool has_pairs, const Tensor& rotated,
                       const Tensor& latent_cache) {
  const RopeLatentArgs args =
      rope_latent_args({"rope_write_latent", Place::kCpu}, q, compressed, positions, cos_sin,
                       slot_mapping, norm_weight, rotated, latent_cache);
  check_ranges(args.positions, args.slot_mapping, args.cos_sin.size(0),
               args.latent_cache.size(0) * args.latent_cache.size(1));
  dispatch_float<float, Bf16>(
      args.q, [&]<class T>(T) { rope_tokens<T>(args, static_cast<float>(eps), has_pairs); });
}

void batched_linear(const Tensor& x, const Tensor& weight, const Tensor& out) {
  const BatchedLinearArgs args =
      batched_linear_args({"batched_linear", Place::kCpu}, x, weight, out);
  if (args.m() == 0) return;
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) {
    std::vector<Group<T>> groups;
    for (int64_t i = 0; i < args.batch(); ++i) {
      groups.push_back({.shape = {.m = args.m(),
                                  .n = args.n(),
                                  .k = args.k(),
                                  .x_stride = args.x.stride(0),
                                  .weight_stride = args.weight.stride(1),
                                  .out_stride = args.out.stride(0)},
                        .matrix = {args.weight.ptr<T>() + i * args.weight.stride(0), nullptr},
                        .x = args.x.ptr<T>() + i * args.x.stride(1),
                        .out = args.out.ptr<T>() + i * args.out.stride(1)});
    }
    linear_groups<Epilogue::kStore, T>(groups, args.n());
  });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("rope_write_latent", TORCH_BOX(&pyserve::rope_write_latent));
  m.impl("batched_linear", TORCH_BOX(&pyserve::batched_linear));
}
