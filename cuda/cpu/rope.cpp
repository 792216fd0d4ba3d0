// rope_write_kv: rotary embedding (Su et al. 2021, NeoX halves), per-head RMSNorm of q and k before
// it where a weight is given, and the write of k and v to the paged KV cache.
//   qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] = q | k | v; q is written in place
//   cos_sin float32 [max_position, rotary_dim] = cosines | sines
// Tokens are split over threads. A head is normed and rotated in a float32 buffer on the stack and
// rounded once. Positions and KV slots are checked before anything is written.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "../common/check.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr const char* kOp = "rope_write_kv";

struct RopeParams {
  int64_t num_heads, num_kv_heads, head_dim, rotary_half;
  const void* q_norm_weight;  // null: no norm
  const void* k_norm_weight;
  float eps;
};

// One head in float32; the buffer has room for a whole last vector.
struct Head {
  alignas(64) float x[kMaxHeadDim + kLanes];
};

template <class T>
void load_head(const T* in, int64_t n, Head& head) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(head.x + i, load(in + i));
  if (i < n) store(head.x + i, load_first(in + i, n - i));
}

template <class T>
void norm_head(const T* weight, float eps, int64_t n, Head& head) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) squares = fma(load(head.x + i), load(head.x + i), squares);
  if (i < n) squares = fma(load(head.x + i), load(head.x + i), squares);  // zeros behind the end
  const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    store(head.x + i, load(head.x + i) * factor * load(weight + i));
  }
  if (i < n) store(head.x + i, load(head.x + i) * factor * load_first(weight + i, n - i));
}

void rotate_head(const float* cos, const float* sin, int64_t half, Head& head) {
  float* low = head.x;
  float* high = head.x + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(low + i), b = load(high + i), c = load(cos + i), s = load(sin + i);
    store(low + i, fma(a, c, -(b * s)));
    store(high + i, fma(b, c, a * s));
  }
  for (; i < half; ++i) {
    const float a = low[i], b = high[i];
    low[i] = a * cos[i] - b * sin[i];
    high[i] = b * cos[i] + a * sin[i];
  }
}

template <class T>
void store_head(const Head& head, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(head.x + i));
  if (i < n) store_first(out + i, load(head.x + i), n - i);
}

template <class T>
void rope_head(const T* in, const void* norm_weight, const float* cos_sin, const RopeParams& p,
               T* out) {
  Head head;
  load_head(in, p.head_dim, head);
  if (norm_weight != nullptr) {
    norm_head(static_cast<const T*>(norm_weight), p.eps, p.head_dim, head);
  }
  rotate_head(cos_sin, cos_sin + p.rotary_half, p.rotary_half, head);
  store_head(head, p.head_dim, out);
}

template <class T>
void rope_tokens(const View& qkv, const View& positions, const View& cos_sin,
                 const View& slot_mapping, const View& key_cache, const View& value_cache,
                 const RopeParams& p) {
  const int64_t block_size = key_cache.size(1);
  const double cost = 0.25 * static_cast<double>(qkv.size(1));
  parallel_for(qkv.size(0), cost, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      T* q = qkv.ptr<T>() + token * qkv.stride(0);
      const T* k = q + p.num_heads * p.head_dim;
      const T* v = k + p.num_kv_heads * p.head_dim;
      const float* row = cos_sin.ptr<float>() + positions.ptr<int32_t>()[token] * cos_sin.stride(0);
      for (int64_t head = 0; head < p.num_heads; ++head) {
        rope_head(q + head * p.head_dim, p.q_norm_weight, row, p, q + head * p.head_dim);
      }
      const int64_t slot = slot_mapping.ptr<int64_t>()[token];
      if (slot < 0) continue;
      const int64_t block = slot / block_size, offset = slot % block_size;
      T* key = key_cache.ptr<T>() + block * key_cache.stride(0) + offset * key_cache.stride(1);
      T* value =
          value_cache.ptr<T>() + block * value_cache.stride(0) + offset * value_cache.stride(1);
      for (int64_t head = 0; head < p.num_kv_heads; ++head) {
        rope_head(k + head * p.head_dim, p.k_norm_weight, row, p, key + head * key_cache.stride(2));
        std::memcpy(value + head * value_cache.stride(2), v + head * p.head_dim,
                    p.head_dim * sizeof(T));
      }
    }
  });
}

void check_ranges(const View& positions, const View& slot_mapping, int64_t max_position,
                  int64_t num_kv_slots) {
  for (int64_t i = 0; i < positions.size(0); ++i) {
    const int64_t position = positions.ptr<int32_t>()[i], slot = slot_mapping.ptr<int64_t>()[i];
    PYSERVE_CHECK(position >= 0 && position < max_position, kOp, ": position ", position,
                  " is outside [0, ", max_position, ")");
    PYSERVE_CHECK(slot >= -1 && slot < num_kv_slots, kOp, ": KV slot ", slot, " is outside [-1, ",
                  num_kv_slots, ")");
  }
}

const void* norm_weight_of(const std::optional<Tensor>& weight, const char* name, const View& qkv,
                           int64_t head_dim) {
  if (!weight.has_value()) return nullptr;
  const View view = cpu_view(kOp, name, *weight, 1);
  check_size(view, 0, head_dim);
  check_same_dtype(view, qkv);
  return view.data;
}

void rope_write_kv(const Tensor& qkv_tensor, const Tensor& positions_tensor,
                   const Tensor& cos_sin_tensor, const Tensor& slot_mapping_tensor,
                   const std::optional<Tensor>& q_norm_weight,
                   const std::optional<Tensor>& k_norm_weight, double eps, int64_t num_heads,
                   int64_t num_kv_heads, const Tensor& key_cache_tensor,
                   const Tensor& value_cache_tensor) {
  const View qkv = cpu_view(kOp, "qkv", qkv_tensor, 2);
  const View positions = cpu_view(kOp, "positions", positions_tensor, 1, ScalarType::Int);
  const View cos_sin = cpu_view(kOp, "cos_sin", cos_sin_tensor, 2, ScalarType::Float);
  const View slot_mapping = cpu_view(kOp, "slot_mapping", slot_mapping_tensor, 1, ScalarType::Long);
  const View key_cache = cpu_view(kOp, "key_cache", key_cache_tensor, 4);
  const View value_cache = cpu_view(kOp, "value_cache", value_cache_tensor, 4);
  const int64_t num_tokens = qkv.size(0), head_dim = key_cache.size(3);
  PYSERVE_CHECK(num_heads > 0 && num_kv_heads > 0, kOp, ": num_heads ", num_heads,
                " and num_kv_heads ", num_kv_heads, " must be positive");
  PYSERVE_CHECK(head_dim > 0 && head_dim <= kMaxHeadDim, kOp, ": head_dim ", head_dim,
                " is outside [1, ", kMaxHeadDim, "]");
  check_size(qkv, 1, (num_heads + 2 * num_kv_heads) * head_dim);
  check_size(positions, 0, num_tokens);
  check_size(slot_mapping, 0, num_tokens);
  check_size(key_cache, 2, num_kv_heads);
  check_same_sizes(value_cache, key_cache);
  check_same_dtype(key_cache, qkv);
  check_same_dtype(value_cache, qkv);
  const int64_t rotary_dim = cos_sin.size(1);
  PYSERVE_CHECK(rotary_dim % 2 == 0 && rotary_dim <= head_dim, kOp, ": rotary_dim ", rotary_dim,
                " must be even and at most head_dim ", head_dim);
  check_ranges(positions, slot_mapping, cos_sin.size(0), key_cache.size(0) * key_cache.size(1));
  const RopeParams params{num_heads,
                          num_kv_heads,
                          head_dim,
                          rotary_dim / 2,
                          norm_weight_of(q_norm_weight, "q_norm_weight", qkv, head_dim),
                          norm_weight_of(k_norm_weight, "k_norm_weight", qkv, head_dim),
                          static_cast<float>(eps)};
  dispatch_float<float, Bf16>(qkv, [&]<class T>(T) {
    rope_tokens<T>(qkv, positions, cos_sin, slot_mapping, key_cache, value_cache, params);
  });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("rope_write_kv", TORCH_BOX(&pyserve::rope_write_kv));
}
