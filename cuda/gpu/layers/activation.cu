// silu_mul and gelu_tanh_mul: out [num_tokens, n] = activation(gate) * up from gate_up [num_tokens,
// 2 n] = gate | up, in bfloat16 or float16, with the activations of core/gate.cuh.
//
// Work: the grid is tokens x column tiles, and each thread takes one vector of 8 elements (one
// element where rows are not aligned to 16 bytes). CTAs are small, so that even one token of a
// large model reaches dozens of SMs; the 2,048 threads of an SM have 64 KB of loads in flight.
// Bound by bytes: 6 per element of out.
// Numerics: float32, one rounding.
#include "gpu/layers/activation.h"

#include "gpu/core/gate.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kThreads = 128;

template <Activation kActivation>
__device__ __forceinline__ float activate(float gate, float up) {
  return kActivation == Activation::kSilu ? silu_mul(gate, up) : gelu_tanh_mul(gate, up);
}

// kWidth is the number of elements per thread: kVec or 1. The CTA's index is token * tiles + tile.
template <class T, int kWidth, Activation kActivation>
__global__ void __launch_bounds__(kThreads) gate_kernel(GateParams p, unsigned tiles) {
  const int64_t token = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t column = (tile * kThreads + threadIdx.x) * kWidth;
  pdl_launch_dependents();
  pdl_wait();
  if (column >= p.n) return;
  const T* gate = static_cast<const T*>(p.gate_up) + token * p.gate_up_stride + column;
  T* out = static_cast<T*>(p.out) + token * p.out_stride + column;
  if constexpr (kWidth == kVec) {
    const uint4 gates = load_vec(gate), ups = load_vec(gate + p.n);
    float g[kVec], u[kVec];
    unpack<T>(gates, g);
    unpack<T>(ups, u);
#pragma unroll
    for (int i = 0; i < kVec; ++i) g[i] = activate<kActivation>(g[i], u[i]);
    store_vec(out, pack<T>(g));
  } else {
    *out = from_float<T>(activate<kActivation>(to_float(gate[0]), to_float(gate[p.n])));
  }
}

template <class T, int kWidth, Activation kActivation>
cudaError_t launch_gate_kernel(const GateParams& p, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((p.n + kThreads * kWidth - 1) / (kThreads * kWidth));
  return launch_chained(gate_kernel<T, kWidth, kActivation>,
                        static_cast<unsigned>(p.num_tokens * tiles), kThreads, 0, stream, p, tiles);
}

template <class T, int kWidth>
cudaError_t launch_width(const GateParams& p, cudaStream_t stream) {
  return p.activation == Activation::kSilu
             ? launch_gate_kernel<T, kWidth, Activation::kSilu>(p, stream)
             : launch_gate_kernel<T, kWidth, Activation::kGeluTanh>(p, stream);
}

template <class T>
cudaError_t launch_gate_as(const GateParams& p, cudaStream_t stream) {
  const bool is_aligned = p.n % kVec == 0 && is_vec_aligned(p.gate_up, p.gate_up_stride) &&
                          is_vec_aligned(p.out, p.out_stride);
  return is_aligned ? launch_width<T, kVec>(p, stream) : launch_width<T, 1>(p, stream);
}

}  // namespace

cudaError_t launch_gate(const GateParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.n == 0) return cudaSuccess;
  return dispatch_half(params.dtype, [&]<class T>(T) { return launch_gate_as<T>(params, stream); });
}

}  // namespace pyserve::gpu
