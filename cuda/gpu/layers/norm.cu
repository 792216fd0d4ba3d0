// rms_norm and add_rms_norm (Zhang and Sennrich 2019): out = x / sqrt(mean(x^2) + eps) * (weight +
// offset), where with a residual x is first added to it, rounded.
//
// One CTA a row, 16 elements a thread, held in registers between the sum and the scaling: a row is
// read once. The norm weight is asked for first, while the kernel before may still run. One
// barrier. Rows that cannot be read 16 bytes at a time, or are longer than 16,384, take a plain
// kernel that reads them twice.
// Numerics: float32, one rounding at the store; the order of the sum depends on `hidden` alone.
// Floor: bytes, 4 a row element (8 with the residual).
#include "gpu/layers/norm.h"

#include <algorithm>

#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kMaxThreads = 1024;

__device__ __forceinline__ float norm_factor(float squares, const NormParams& p) {
  return rsqrtf(squares / static_cast<float>(p.hidden) + p.eps);
}

// Thread i holds vectors i, i + threads, ...: kVecs of them. The last may lie outside of the row.
template <class T, bool kAdd, int kVecs>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(NormParams p) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
  const T* weight = static_cast<const T*>(p.weight);
  const int num_vecs = static_cast<int>(p.hidden / kVec);
  uint4 held[kVecs], added[kVecs], weights[kVecs];
  pdl_launch_dependents();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int vec = threadIdx.x + i * blockDim.x;
    weights[i] = vec < num_vecs ? load_vec(weight + vec * kVec) : uint4{};
  }
  pdl_wait();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int vec = threadIdx.x + i * blockDim.x;
    held[i] = added[i] = uint4{};
    if (vec < num_vecs) {
      held[i] = load_vec(x + vec * kVec);
      if constexpr (kAdd) added[i] = load_vec(residual + vec * kVec);
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    float values[kVec];
    unpack<T>(held[i], values);
    if constexpr (kAdd) {
      float more[kVec];
      unpack<T>(added[i], more);
#pragma unroll
      for (int j = 0; j < kVec; ++j) values[j] += more[j];
      held[i] = pack<T>(values);
      unpack<T>(held[i], values);  // what is normed is the residual as it is kept, rounded
      const int vec = threadIdx.x + i * blockDim.x;
      if (vec < num_vecs) store_vec(residual + vec * kVec, held[i]);
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) squares = fmaf(values[j], values[j], squares);
  }
  const float factor = norm_factor(block_sum<kMaxThreads>(squares), p);
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int vec = threadIdx.x + i * blockDim.x;
    float values[kVec], scales[kVec];
    forget_origin(held[i]);  // packed, they take half the registers over the barrier
    forget_origin(weights[i]);
    unpack<T>(held[i], values);
    unpack<T>(weights[i], scales);
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] = values[j] * factor * (scales[j] + p.offset);
    if (vec < num_vecs) store_vec(out + vec * kVec, pack<T>(values));
  }
}

// Any alignment and any length. A thread reads again only elements that it wrote itself, so that no
// barrier is needed.
template <class T, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads) norm_plain_kernel(NormParams p) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  pdl_launch_dependents();
  pdl_wait();
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    float value = to_float(x[i]);
    if constexpr (kAdd) {
      residual[i] = from_float<T>(value + to_float(residual[i]));
      value = to_float(residual[i]);
    }
    squares = fmaf(value, value, squares);
  }
  const float factor = norm_factor(block_sum<kMaxThreads>(squares), p);
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    const float value = to_float(kAdd ? residual[i] : x[i]);
    out[i] = from_float<T>(value * factor * (to_float(weight[i]) + p.offset));
  }
}

// Threads that share `num_items` between them, `each` at most; whole warps.
unsigned threads_for(int64_t num_items, int64_t each) {
  const int64_t threads = (num_items + each - 1) / each;
  return static_cast<unsigned>(
      std::min<int64_t>((threads + kWarpSize - 1) / kWarpSize * kWarpSize, kMaxThreads));
}

template <class T, bool kAdd, int kVecs>
cudaError_t launch_vecs(const NormParams& p, cudaStream_t stream) {
  return launch_chained(norm_kernel<T, kAdd, kVecs>, static_cast<unsigned>(p.num_rows),
                        threads_for(p.hidden / kVec, kVecs), 0, stream, p);
}

template <class T, bool kAdd>
cudaError_t launch_norm_as(const NormParams& p, cudaStream_t stream) {
  const bool is_aligned = p.hidden % kVec == 0 && is_vec_aligned(p.x, p.x_stride) &&
                          is_vec_aligned(p.out, p.out_stride) && is_vec_aligned(p.weight, 0) &&
                          (!kAdd || is_vec_aligned(p.residual, p.residual_stride));
  if (is_aligned && p.hidden <= 2 * kVec * kMaxThreads) {
    return launch_vecs<T, kAdd, 2>(p, stream);
  }
  return launch_chained(norm_plain_kernel<T, kAdd>, static_cast<unsigned>(p.num_rows),
                        threads_for(p.hidden, 8), 0, stream, p);
}

template <class T>
cudaError_t launch_norm_as(const NormParams& p, cudaStream_t stream) {
  return p.residual != nullptr ? launch_norm_as<T, true>(p, stream)
                               : launch_norm_as<T, false>(p, stream);
}

}  // namespace

cudaError_t launch_norm(const NormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0 || params.hidden == 0) return cudaSuccess;
  return dispatch_half(params.dtype, [&]<class T>(T) { return launch_norm_as<T>(params, stream); });
}

}  // namespace pyserve::gpu
