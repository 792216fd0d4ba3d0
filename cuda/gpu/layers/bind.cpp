// The CUDA side of rms_norm, add_rms_norm, rope_write_kv and silu_mul: arguments are checked and
// handed to the kernels of norm.cu, rope.cu and activation.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "gpu/layers/activation.h"
#include "gpu/core/bind.h"
#include "gpu/layers/norm.h"
#include "gpu/layers/rope.h"

namespace pyserve {
namespace {

// ---- norm ---------------------------------------------------------------------------------------

void norm(const char* op, const Tensor& x_tensor, const Tensor* residual_tensor,
          const Tensor& weight_tensor, double eps, const Tensor& out_tensor) {
  const View x = cuda_view(op, "x", x_tensor, -1);
  const View weight = cuda_view(op, "weight", weight_tensor, 1);
  const View out = cuda_view(op, "out", out_tensor, -1);
  const int64_t hidden = x.size(x.dim - 1);
  check_size(weight, 0, hidden);
  check_same_dtype(weight, x);
  check_same_dtype(out, x);
  check_same_sizes(out, x);
  gpu::NormParams params{};
  params.dtype = half_dtype(x);
  if (residual_tensor != nullptr) {
    const View residual = cuda_view(op, "residual", *residual_tensor, -1);
    check_same_dtype(residual, x);
    check_same_sizes(residual, x);
    if (num_elements(x) == 0) return;
    params.residual = residual.data;
    params.residual_stride = rows_of(residual).stride;
  }
  if (num_elements(x) == 0) return;
  const Rows x_rows = rows_of(x), out_rows = rows_of(out);
  params.x = x.data;
  params.x_stride = x_rows.stride;
  params.weight = weight.data;
  params.out = out.data;
  params.out_stride = out_rows.stride;
  params.num_rows = x_rows.count;
  params.hidden = hidden;
  params.eps = static_cast<float>(eps);
  check_launch(op, gpu::launch_norm(params, current_stream(x_tensor)));
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  norm("rms_norm", x, nullptr, weight, eps, out);
}

void add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                  const Tensor& out) {
  norm("add_rms_norm", x, &residual, weight, eps, out);
}

// ---- rope_write_kv ------------------------------------------------------------------------------

constexpr const char* kRope = "rope_write_kv";

const void* norm_weight_of(const std::optional<Tensor>& weight, const char* name, const View& qkv,
                           int64_t head_dim) {
  if (!weight.has_value()) return nullptr;
  const View view = cuda_view(kRope, name, *weight, 1);
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
  const View qkv = cuda_view(kRope, "qkv", qkv_tensor, 2);
  const View positions = cuda_view(kRope, "positions", positions_tensor, 1, ScalarType::Int);
  const View cos_sin = cuda_view(kRope, "cos_sin", cos_sin_tensor, 2, ScalarType::Float);
  const View slots = cuda_view(kRope, "slot_mapping", slot_mapping_tensor, 1, ScalarType::Long);
  const View key_cache = cuda_view(kRope, "key_cache", key_cache_tensor, 4);
  const View value_cache = cuda_view(kRope, "value_cache", value_cache_tensor, 4);
  const int64_t num_tokens = qkv.size(0), head_dim = key_cache.size(3);
  const int64_t rotary_dim = cos_sin.size(1);
  PYSERVE_CHECK(num_heads > 0 && num_kv_heads > 0, kRope, ": num_heads ", num_heads,
                " and num_kv_heads ", num_kv_heads, " must be positive");
  PYSERVE_CHECK(head_dim > 0 && head_dim <= gpu::kMaxRopeHeadDim, kRope, ": head_dim ", head_dim,
                " is outside [1, ", gpu::kMaxRopeHeadDim, "]");
  check_size(qkv, 1, (num_heads + 2 * num_kv_heads) * head_dim);
  check_size(positions, 0, num_tokens);
  check_size(slots, 0, num_tokens);
  check_size(key_cache, 2, num_kv_heads);
  check_same_sizes(value_cache, key_cache);
  check_same_dtype(key_cache, qkv);
  check_same_dtype(value_cache, qkv);
  PYSERVE_CHECK(rotary_dim % 2 == 0 && rotary_dim <= head_dim, kRope, ": rotary_dim ", rotary_dim,
                " must be even and at most head_dim ", head_dim);
  const gpu::RopeParams params{
      .qkv = qkv.data,
      .qkv_stride = qkv.stride(0),
      .positions = positions.ptr<int32_t>(),
      .cos_sin = cos_sin.ptr<float>(),
      .cos_sin_stride = cos_sin.stride(0),
      .max_position = cos_sin.size(0),
      .slot_mapping = slots.ptr<int64_t>(),
      .q_norm_weight = norm_weight_of(q_norm_weight, "q_norm_weight", qkv, head_dim),
      .k_norm_weight = norm_weight_of(k_norm_weight, "k_norm_weight", qkv, head_dim),
      .eps = static_cast<float>(eps),
      .key_cache = key_cache.data,
      .key_block_stride = key_cache.stride(0),
      .key_token_stride = key_cache.stride(1),
      .key_head_stride = key_cache.stride(2),
      .value_cache = value_cache.data,
      .value_block_stride = value_cache.stride(0),
      .value_token_stride = value_cache.stride(1),
      .value_head_stride = value_cache.stride(2),
      .num_kv_slots = key_cache.size(0) * key_cache.size(1),
      .block_size = key_cache.size(1),
      .num_tokens = num_tokens,
      .num_heads = static_cast<int32_t>(num_heads),
      .num_kv_heads = static_cast<int32_t>(num_kv_heads),
      .head_dim = static_cast<int32_t>(head_dim),
      .rotary_dim = static_cast<int32_t>(rotary_dim),
      .dtype = half_dtype(qkv)};
  check_launch(kRope, gpu::launch_rope_write_kv(params, current_stream(qkv_tensor)));
}

// ---- silu_mul -----------------------------------------------------------------------------------

void silu_mul(const Tensor& gate_up_tensor, const Tensor& out_tensor) {
  constexpr const char* kOp = "silu_mul";
  const View gate_up = cuda_view(kOp, "gate_up", gate_up_tensor, 2);
  const View out = cuda_view(kOp, "out", out_tensor, 2);
  const int64_t num_tokens = out.size(0), n = out.size(1);
  check_size(gate_up, 0, num_tokens);
  check_size(gate_up, 1, 2 * n);
  check_same_dtype(out, gate_up);
  const gpu::SiluMulParams params{.gate_up = gate_up.data,
                                  .gate_up_stride = gate_up.stride(0),
                                  .out = out.data,
                                  .out_stride = out.stride(0),
                                  .num_tokens = num_tokens,
                                  .n = n,
                                  .dtype = half_dtype(gate_up)};
  check_launch(kOp, gpu::launch_silu_mul(params, current_stream(gate_up_tensor)));
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&pyserve::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&pyserve::add_rms_norm));
  m.impl("rope_write_kv", TORCH_BOX(&pyserve::rope_write_kv));
  m.impl("silu_mul", TORCH_BOX(&pyserve::silu_mul));
}
