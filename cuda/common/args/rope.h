// The arguments of rope_write_kv, checked. The values of positions and slots are checked by the
// kernel.
#pragma once

#include <optional>

#include "../check.h"
#include "../limits.h"

namespace pyserve {

struct RopeArgs {
  View qkv, positions, cos_sin, slot_mapping, key_cache, value_cache;
  const void* q_norm_weight = nullptr;  // null: no norm
  const void* k_norm_weight = nullptr;
  const float* q_scales = nullptr;  // [max_position]; null: q is not scaled

  int64_t num_tokens() const { return qkv.size(0); }
  int64_t head_dim() const { return key_cache.size(3); }
  int64_t rotary_dim() const { return cos_sin.size(1); }
  int64_t num_kv_slots() const { return key_cache.size(0) * key_cache.size(1); }
};

inline const void* head_norm_weight(const ViewReader& read, const char* name,
                                    const std::optional<Tensor>& weight, const RopeArgs& args) {
  if (!weight.has_value()) return nullptr;
  const View view = read(name, *weight, 1);
  check_size(view, 0, args.head_dim());
  check_same_dtype(view, args.qkv);
  return view.data;
}

inline RopeArgs rope_args(const ViewReader& read, const Tensor& qkv, const Tensor& positions,
                          const Tensor& cos_sin, const Tensor& slot_mapping,
                          const std::optional<Tensor>& q_norm_weight,
                          const std::optional<Tensor>& k_norm_weight, int64_t num_heads,
                          int64_t num_kv_heads, const Tensor& key_cache, const Tensor& value_cache,
                          const std::optional<Tensor>& q_scales) {
  RopeArgs args{read("qkv", qkv, 2),
                read("positions", positions, 1, ScalarType::Int),
                read("cos_sin", cos_sin, 2, ScalarType::Float),
                read("slot_mapping", slot_mapping, 1, ScalarType::Long),
                read("key_cache", key_cache, 4),
                read("value_cache", value_cache, 4)};
  const int64_t head_dim = args.head_dim(), rotary_dim = args.rotary_dim();
  PYSERVE_CHECK(num_heads > 0 && num_kv_heads > 0, read.op, ": num_heads ", num_heads,
                " and num_kv_heads ", num_kv_heads, " must be positive");
  PYSERVE_CHECK(head_dim > 0 && head_dim <= kMaxHeadDim, read.op, ": head_dim ", head_dim,
                " is outside [1, ", kMaxHeadDim, "]");
  check_size(args.qkv, 1, (num_heads + 2 * num_kv_heads) * head_dim);
  check_size(args.positions, 0, args.num_tokens());
  check_size(args.slot_mapping, 0, args.num_tokens());
  check_size(args.key_cache, 2, num_kv_heads);
  check_same_sizes(args.value_cache, args.key_cache);
  check_same_dtype(args.key_cache, args.qkv);
  check_same_dtype(args.value_cache, args.qkv);
  PYSERVE_CHECK(rotary_dim % 2 == 0 && rotary_dim <= head_dim, read.op, ": rotary_dim ", rotary_dim,
                " must be even and at most head_dim ", head_dim);
  args.q_norm_weight = head_norm_weight(read, "q_norm_weight", q_norm_weight, args);
  args.k_norm_weight = head_norm_weight(read, "k_norm_weight", k_norm_weight, args);
  if (q_scales.has_value()) {
    const View scales = read("q_scales", *q_scales, 1, ScalarType::Float);
    check_size(scales, 0, args.cos_sin.size(0));
    args.q_scales = scales.ptr<float>();
  }
  return args;
}

}  // namespace pyserve
