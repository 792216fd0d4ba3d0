// silu_mul: out = gate / (1 + exp(-gate)) * up (Shazeer 2020), and gelu_tanh_mul, which uses the
// tanh approximation of gelu instead. gate_up is [num_tokens, 2 * n], out [num_tokens, n], float32
// or bfloat16. One pass over memory; the rows are split over threads.
#include <torch/csrc/stable/library.h>

#include "activate.h"

namespace pyserve {
namespace {

void silu_mul_op(const Tensor& gate_up, const Tensor& out) {
  activate(activation_args({"silu_mul", Place::kCpu}, gate_up, out),
           [](Vec gate, Vec up) { return silu_mul(gate, up); });
}

void gelu_tanh_mul_op(const Tensor& gate_up, const Tensor& out) {
  activate(activation_args({"gelu_tanh_mul", Place::kCpu}, gate_up, out),
           [](Vec gate, Vec up) { return gelu_tanh_mul(gate, up); });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&pyserve::silu_mul_op));
  m.impl("gelu_tanh_mul", TORCH_BOX(&pyserve::gelu_tanh_mul_op));
}
