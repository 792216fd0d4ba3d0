// rope_write_kv on a CPU: rotary embedding of q and k (Su et al. 2021; the elements i and i +
// rotary_dim / 2 are rotated together), and the write of k and v to the paged KV cache. Where norm
// weights are given, each head of q and k goes through an RMSNorm first; where q_scales are given,
// q is multiplied by that of its position afterwards. float32 or bfloat16.
//   qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] = q | k | v; q is written in place
//   cos_sin float32 [max_position, rotary_dim] = cosines | sines
// Tokens are split over threads. A head is normed and rotated in a float32 buffer on the stack and
// rounded once. All positions and KV slots are checked before anything is written.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../common/args/rope.h"
#include "parallel.h"
#include "rope_head.h"
#include "vec.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "rope_write_kv";

struct Heads {
  int64_t num_heads, num_kv_heads, head_dim, rotary_half;
  float eps, norm_offset;
};

template <class T>
void rope_head(const T* in, const void* norm_weight, const float* cos_sin, float scale,
               const Heads& p, T* out) {
  Head head;
  load_head(in, p.head_dim, head);
  if (norm_weight != nullptr) {
    norm_head(static_cast<const T*>(norm_weight), p.norm_offset, p.eps, p.head_dim, head);
  }
  rotate_head(cos_sin, cos_sin + p.rotary_half, p.rotary_half, head);
  if (scale != 1.0f) {
    for (int64_t i = 0; i < p.head_dim; i += kLanes) store(head.x + i, load(head.x + i) * scale);
  }
  store_head(head, p.head_dim, out);
}

template <class T>
void rope_tokens(const RopeArgs& args, const Heads& p) {
  const View &qkv = args.qkv, &cos_sin = args.cos_sin;
  const View &key_cache = args.key_cache, &value_cache = args.value_cache;
  const int64_t block_size = key_cache.size(1);
  const double cost = 0.25 * static_cast<double>(qkv.size(1));
  parallel_for(qkv.size(0), cost, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      T* q = qkv.ptr<T>() + token * qkv.stride(0);
      const T* k = q + p.num_heads * p.head_dim;
      const T* v = k + p.num_kv_heads * p.head_dim;
      const int64_t position = args.positions.ptr<int32_t>()[token];
      const float* row = cos_sin.ptr<float>() + position * cos_sin.stride(0);
      const float q_scale = args.q_scales == nullptr ? 1.0f : args.q_scales[position];
      for (int64_t head = 0; head < p.num_heads; ++head) {
        rope_head(q + head * p.head_dim, args.q_norm_weight, row, q_scale, p,
                  q + head * p.head_dim);
      }
      const int64_t slot = args.slot_mapping.ptr<int64_t>()[token];
      if (slot < 0) continue;
      const int64_t block = slot / block_size, offset = slot % block_size;
      T* key = key_cache.ptr<T>() + block * key_cache.stride(0) + offset * key_cache.stride(1);
      T* value =
          value_cache.ptr<T>() + block * value_cache.stride(0) + offset * value_cache.stride(1);
      for (int64_t head = 0; head < p.num_kv_heads; ++head) {
        rope_head(k + head * p.head_dim, args.k_norm_weight, row, 1.0f, p,
                  key + head * key_cache.stride(2));
        std::memcpy(value + head * value_cache.stride(2), v + head * p.head_dim,
                    p.head_dim * sizeof(T));
      }
    }
  });
}

void rope_write_kv(const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin,
                   const Tensor& slot_mapping, const std::optional<Tensor>& q_norm_weight,
                   const std::optional<Tensor>& k_norm_weight, double eps, int64_t num_heads,
                   int64_t num_kv_heads, const Tensor& key_cache, const Tensor& value_cache,
                   double norm_offset, const std::optional<Tensor>& q_scales) {
  const RopeArgs args =
      rope_args({kOp, Place::kCpu}, qkv, positions, cos_sin, slot_mapping, q_norm_weight,
                k_norm_weight, num_heads, num_kv_heads, key_cache, value_cache, q_scales);
  check_ranges(args.positions, args.slot_mapping, args.cos_sin.size(0), args.num_kv_slots());
  const Heads heads{num_heads,
                    num_kv_heads,
                    args.head_dim(),
                    args.rotary_dim() / 2,
                    static_cast<float>(eps),
                    static_cast<float>(norm_offset)};
  dispatch_float<float, Bf16>(args.qkv, [&]<class T>(T) { rope_tokens<T>(args, heads); });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("rope_write_kv", TORCH_BOX(&pyserve::rope_write_kv));
}
