// combine_experts: out[t] = sum over j of weights[t, j] * rows[places[t, j]], plus the shared
// expert's row, plus out[t] itself if is_adding. rows [num_tokens * top_k, n] and out [num_tokens,
// n] are bfloat16 or float16, weights float32. One pass over memory with 8 columns per thread and
// one grid row per token.
// Numerics: added in float32 in the order of j, rounded once.
// Bound by bytes: (top_k + 2 or 3) * n * 2 per token.
#include <algorithm>

#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/experts/experts.h"

namespace pyserve::gpu {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ __forceinline__ void add_row(const T* row, float weight, float (&sums)[kVec]) {
  float x[kVec];
  unpack<T>(load_vec(row), x);
#pragma unroll
  for (int i = 0; i < kVec; ++i) sums[i] = fmaf(weight, x[i], sums[i]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineParams p) {
  pdl_launch_dependents();
  pdl_wait();
  const int token = static_cast<int>(blockIdx.y);
  const int index = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int column = index * kVec;
  if (column >= p.n) return;
  const int32_t* places = p.places + p.places_stride * token;
  const float* weights = p.weights + p.weights_stride * token;
  float sums[kVec] = {};
  for (int j = 0; j < p.top_k; ++j) {
    const int place = places[j];
    if (place < 0) continue;
    add_row(static_cast<const T*>(p.rows) + p.rows_stride * place + column, weights[j], sums);
  }
  if (p.shared != nullptr) {
    add_row(static_cast<const T*>(p.shared) + p.shared_stride * token + column,
            p.has_gate ? weights[p.top_k] : 1.0f, sums);
  }
  T* out = static_cast<T*>(p.out) + p.out_stride * token + column;
  if (p.is_adding) {
    float x[kVec];
    unpack<T>(load_vec(out), x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[i] += x[i];
  }
  store_vec(out, pack<T>(sums));
}

}  // namespace

cudaError_t launch_combine_experts(const CombineParams& p, cudaStream_t stream) {
  constexpr int kMaxRows = 65535;  // limit of a grid's second dim
  const unsigned columns = static_cast<unsigned>((p.n / kVec + kThreads - 1) / kThreads);
  return dispatch_half(p.dtype, [&]<class T>(T) {
    cudaError_t error = cudaSuccess;
    for (int token = 0; token < p.num_tokens && error == cudaSuccess; token += kMaxRows) {
      CombineParams part = p;
      part.places += p.places_stride * token;
      part.weights += p.weights_stride * token;
      if (p.shared != nullptr) {
        part.shared = static_cast<const T*>(p.shared) + p.shared_stride * token;
      }
      part.out = static_cast<T*>(p.out) + p.out_stride * token;
      part.num_tokens = std::min(p.num_tokens - token, kMaxRows);
      const dim3 grid(columns, static_cast<unsigned>(part.num_tokens));
      error = launch_chained(combine_kernel<T>, grid, kThreads, 0, stream, part);
    }
    return error;
  });
}

}  // namespace pyserve::gpu
