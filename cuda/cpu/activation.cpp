// silu_mul (Shazeer 2020): out = gate / (1 + exp(-gate)) * up, gate_up [num_tokens, 2 * n].
// One pass over memory; rows are split over threads.
#include <torch/csrc/stable/library.h>

#include "../common/args/activation.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

template <class T>
void silu_mul_row(const T* gate, const T* up, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(out + i, silu_mul(load(gate + i), load(up + i)));
  }
  if (i < n) {
    store_first(out + i, silu_mul(load_first(gate + i, n - i), load_first(up + i, n - i)), n - i);
  }
}

void silu_mul_op(const Tensor& gate_up_tensor, const Tensor& out_tensor) {
  const SiluMulArgs args = silu_mul_args({"silu_mul", Place::kCpu}, gate_up_tensor, out_tensor);
  const View &gate_up = args.gate_up, &out = args.out;
  const int64_t num_tokens = out.size(0), n = out.size(1);
  dispatch_float<float, Bf16>(gate_up, [&]<class T>(T) {
    parallel_for(num_tokens, static_cast<double>(n) * 0.5, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = gate_up.ptr<T>() + row * gate_up.stride(0);
        silu_mul_row<T>(gate, gate + n, out.ptr<T>() + row * out.stride(0), n);
      }
    });
  });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) { m.impl("silu_mul", TORCH_BOX(&pyserve::silu_mul_op)); }
