// The CUDA side of route, grouped_linear, grouped_linear_silu_mul and combine_experts, which only a
// CPU computes so far: they are refused by name.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/check.h"

namespace pyserve {
namespace {

void refuse(const char* op) {
  PYSERVE_CHECK(false, op, " is computed on the CPU only so far");
}

void route(const Tensor& /*x*/, const Tensor& /*router*/,
           const std::optional<Tensor>& /*correction_bias*/, const Tensor& /*slot_mapping*/,
           bool /*is_sigmoid*/, bool /*is_normalized*/, double /*scale*/, int64_t /*num_groups*/,
           int64_t /*top_groups*/, const Tensor& /*logits*/, const Tensor& /*weights*/,
           const Tensor& /*places*/, const Tensor& /*order*/, const Tensor& /*offsets*/) {
  refuse("route");
}

void grouped_linear(const Tensor& /*x*/, const Tensor& /*weight*/, const Tensor& /*offsets*/,
                    int64_t /*max_group*/, const Tensor& /*out*/) {
  refuse("grouped_linear");
}

void grouped_linear_silu_mul(const Tensor& /*x*/, const Tensor& /*weight*/,
                             const Tensor& /*order*/, const Tensor& /*offsets*/,
                             const Tensor& /*sorted_x*/, const Tensor& /*out*/) {
  refuse("grouped_linear_silu_mul");
}

void combine_experts(const Tensor& /*rows*/, const Tensor& /*places*/, const Tensor& /*weights*/,
                     const std::optional<Tensor>& /*shared*/, bool /*is_adding*/,
                     const Tensor& /*out*/) {
  refuse("combine_experts");
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CUDA, m) {
  m.impl("route", TORCH_BOX(&pyserve::route));
  m.impl("grouped_linear", TORCH_BOX(&pyserve::grouped_linear));
  m.impl("grouped_linear_silu_mul", TORCH_BOX(&pyserve::grouped_linear_silu_mul));
  m.impl("combine_experts", TORCH_BOX(&pyserve::combine_experts));
}
