// The CUDA side of rms_norm, add_rms_norm, rope_write_kv, silu_mul and gelu_tanh_mul: checks the
// arguments and calls the launchers of norm.cu, rope.cu and activation.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/args/activation.h"
#include "common/args/norm.h"
#include "common/args/rope.h"
#include "gpu/core/bind.h"
#include "gpu/layers/activation.h"
#include "gpu/layers/norm.h"
#include "gpu/layers/rope.h"

namespace pyserve {
namespace {

// ---- norm ---------------------------------------------------------------------------------------

void norm(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps,
          const Tensor& out, double offset, const std::optional<Tensor>& x_weight = std::nullopt) {
  const NormArgs args = norm_args({op, Place::kCuda}, x, residual, weight, out, x_weight);
  const gpu::Dtype dtype = half_dtype(args.x);
  if (num_elements(args.x) == 0) return;
  const Rows x_rows = rows_of(args.x), out_rows = rows_of(args.out);
  const Rows residual_rows = rows_of(args.residual);
  const gpu::NormParams params{.x = args.x.data,
                               .x_stride = x_rows.stride,
                               .residual = residual == nullptr ? nullptr : args.residual.data,
                               .residual_stride = residual_rows.stride,
                               .weight = args.weight.data,
                               .x_weight = x_weight.has_value() ? args.x_weight.data : nullptr,
                               .out = args.out.data,
                               .out_stride = out_rows.stride,
                               .num_rows = x_rows.count,
                               .hidden = args.weight.size(0),
                               .eps = static_cast<float>(eps),
                               .offset = static_cast<float>(offset),
                               .dtype = dtype};
  check_launch(op, gpu::launch_norm(params, current_stream(x)));
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out, double offset) {
  norm("rms_norm", x, nullptr, weight, eps, out, offset);
}

void add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                  const Tensor& out, double offset, const std::optional<Tensor>& x_weight) {
  norm("add_rms_norm", x, &residual, weight, eps, out, offset, x_weight);
}

// ---- rope_write_kv ------------------------------------------------------------------------------

constexpr const char* kRope = "rope_write_kv";

void rope_write_kv(const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin,
                   const Tensor& slot_mapping, const std::optional<Tensor>& q_norm_weight,
                   const std::optional<Tensor>& k_norm_weight, double eps, int64_t num_heads,
                   int64_t num_kv_heads, const Tensor& key_cache, const Tensor& value_cache,
                   double norm_offset, const std::optional<Tensor>& q_scales) {
  const RopeArgs args =
      rope_args({kRope, Place::kCuda}, qkv, positions, cos_sin, slot_mapping, q_norm_weight,
                k_norm_weight, num_heads, num_kv_heads, key_cache, value_cache, q_scales);
  const View &keys = args.key_cache, &values = args.value_cache;
  const gpu::RopeParams params{.qkv = args.qkv.data,
                               .qkv_stride = args.qkv.stride(0),
                               .positions = args.positions.ptr<int32_t>(),
                               .cos_sin = args.cos_sin.ptr<float>(),
                               .cos_sin_stride = args.cos_sin.stride(0),
                               .max_position = args.cos_sin.size(0),
                               .slot_mapping = args.slot_mapping.ptr<int64_t>(),
                               .q_norm_weight = args.q_norm_weight,
                               .k_norm_weight = args.k_norm_weight,
                               .eps = static_cast<float>(eps),
                               .norm_offset = static_cast<float>(norm_offset),
                               .q_scales = args.q_scales,
                               .key_cache = keys.data,
                               .key_block_stride = keys.stride(0),
                               .key_token_stride = keys.stride(1),
                               .key_head_stride = keys.stride(2),
                               .value_cache = values.data,
                               .value_block_stride = values.stride(0),
                               .value_token_stride = values.stride(1),
                               .value_head_stride = values.stride(2),
                               .num_kv_slots = args.num_kv_slots(),
                               .block_size = keys.size(1),
                               .num_tokens = args.num_tokens(),
                               .num_heads = static_cast<int32_t>(num_heads),
                               .num_kv_heads = static_cast<int32_t>(num_kv_heads),
                               .head_dim = static_cast<int32_t>(args.head_dim()),
                               .rotary_dim = static_cast<int32_t>(args.rotary_dim()),
                               .dtype = half_dtype(args.qkv)};
  check_launch(kRope, gpu::launch_rope_write_kv(params, current_stream(qkv)));
}

// ---- silu_mul and gelu_tanh_mul -----------------------------------------------------------------

void gate(const char* op, const Tensor& gate_up, const Tensor& out, gpu::Activation activation) {
  const ActivationArgs args = activation_args({op, Place::kCuda}, gate_up, out);
  const gpu::GateParams params{.gate_up = args.gate_up.data,
                               .gate_up_stride = args.gate_up.stride(0),
                               .out = args.out.data,
                               .out_stride = args.out.stride(0),
                               .num_tokens = args.out.size(0),
                               .n = args.out.size(1),
                               .activation = activation,
                               .dtype = half_dtype(args.gate_up)};
  check_launch(op, gpu::launch_gate(params, current_stream(gate_up)));
}

void silu_mul(const Tensor& gate_up, const Tensor& out) {
  gate("silu_mul", gate_up, out, gpu::Activation::kSilu);
}

void gelu_tanh_mul(const Tensor& gate_up, const Tensor& out) {
  gate("gelu_tanh_mul", gate_up, out, gpu::Activation::kGeluTanh);
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&pyserve::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&pyserve::add_rms_norm));
  m.impl("rope_write_kv", TORCH_BOX(&pyserve::rope_write_kv));
  m.impl("silu_mul", TORCH_BOX(&pyserve::silu_mul));
  m.impl("gelu_tanh_mul", TORCH_BOX(&pyserve::gelu_tanh_mul));
}
