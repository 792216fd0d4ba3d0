// rms_norm and add_rms_norm (Zhang and Sennrich 2019), in bfloat16 or float16, for rows [num_rows,
// hidden]: out = x / sqrt(mean(x^2) + eps) * (weight + offset). With a residual, x is first added
// to it and rounded, and the norm is that of the sum. With x_weight as well, the norm of x by
// x_weight, rounded, is added in place of x.
//
// Work: one CTA per row and 16 elements per thread, which stay in registers between the sum and the
// scaling, so a row is read once. The norm weight is loaded before the wait, while the kernel
// before may still run. Each norm takes one barrier. Rows that cannot be read 16 bytes at a time,
// or have more than 16,384 elements, go to a plain kernel, which reads them twice.
// Numerics: float32, one rounding at the store. The order of the sum depends on `hidden` alone.
// Bound by bytes: 4 per element of a row, 8 with the residual.
#include "gpu/layers/norm.h"

#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/layers/norm_row.cuh"

namespace pyserve::gpu {
namespace {

template <class T, bool kAdd, int kVecs>
__global__ void __launch_bounds__(kMaxNormThreads) norm_kernel(NormParams p) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
  const T* weight = static_cast<const T*>(p.weight);
  const int num_vecs = static_cast<int>(p.hidden / kVec);
  const T* x_weight = static_cast<const T*>(kAdd ? p.x_weight : nullptr);
  uint4 held[kVecs], added[kVecs], weights[kVecs], x_weights[kVecs];
  pdl_launch_dependents();
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int vec = threadIdx.x + i * blockDim.x;
    weights[i] = vec < num_vecs ? load_vec(weight + vec * kVec) : uint4{};
    if (kAdd && x_weight != nullptr) {
      x_weights[i] = vec < num_vecs ? load_vec(x_weight + vec * kVec) : uint4{};
    }
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
  if (kAdd && x_weight != nullptr) {
    float x_squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) x_squares = add_squares<T>(held[i], x_squares);
    const float sum = block_sum<kMaxNormThreads, 1>(x_squares);
    const float factor = norm_factor(sum, p.hidden, p.eps);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) held[i] = normed<T>(held[i], x_weights[i], factor, p.offset);
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if constexpr (kAdd) {
      add_rounded<T>(held[i], added[i]);
      const int vec = threadIdx.x + i * blockDim.x;
      if (vec < num_vecs) store_vec(residual + vec * kVec, held[i]);
    }
    squares = add_squares<T>(held[i], squares);
  }
  const float factor = norm_factor(block_sum<kMaxNormThreads>(squares), p.hidden, p.eps);
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int vec = threadIdx.x + i * blockDim.x;
    const uint4 result = normed<T>(held[i], weights[i], factor, p.offset);
    if (vec < num_vecs) store_vec(out + vec * kVec, result);
  }
}

// The plain kernel, for any alignment and length. What a thread reads again it has written itself,
// so no barrier is needed in between.
template <class T, bool kAdd>
__global__ void __launch_bounds__(kMaxNormThreads) norm_plain_kernel(NormParams p) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  const T* x_weight = static_cast<const T*>(kAdd ? p.x_weight : nullptr);
  pdl_launch_dependents();
  pdl_wait();
  float x_factor = 1.0f;
  if (kAdd && x_weight != nullptr) {
    float x_squares = 0.0f;
    for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
      x_squares = fmaf(to_float(x[i]), to_float(x[i]), x_squares);
    }
    x_factor = norm_factor(block_sum<kMaxNormThreads, 1>(x_squares), p.hidden, p.eps);
  }
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    float value = to_float(x[i]);
    if constexpr (kAdd) {
      if (x_weight != nullptr) {
        value = to_float(from_float<T>(value * x_factor * (to_float(x_weight[i]) + p.offset)));
      }
      residual[i] = from_float<T>(value + to_float(residual[i]));
      value = to_float(residual[i]);
    }
    squares = fmaf(value, value, squares);
  }
  const float factor = norm_factor(block_sum<kMaxNormThreads>(squares), p.hidden, p.eps);
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    const float value = to_float(kAdd ? residual[i] : x[i]);
    out[i] = from_float<T>(value * factor * (to_float(weight[i]) + p.offset));
  }
}

template <class T, bool kAdd, int kVecs>
cudaError_t launch_vecs(const NormParams& p, cudaStream_t stream) {
  return launch_chained(norm_kernel<T, kAdd, kVecs>, static_cast<unsigned>(p.num_rows),
                        norm_threads(p.hidden / kVec, kVecs), 0, stream, p);
}

template <class T, bool kAdd>
cudaError_t launch_norm_as(const NormParams& p, cudaStream_t stream) {
  const bool is_aligned = p.hidden % kVec == 0 && is_vec_aligned(p.x, p.x_stride) &&
                          is_vec_aligned(p.out, p.out_stride) && is_vec_aligned(p.weight, 0) &&
                          is_vec_aligned(p.x_weight, 0) &&
                          (!kAdd || is_vec_aligned(p.residual, p.residual_stride));
  if (is_aligned && p.hidden <= kMaxNormHidden) {
    return launch_vecs<T, kAdd, kNormVecs>(p, stream);
  }
  return launch_chained(norm_plain_kernel<T, kAdd>, static_cast<unsigned>(p.num_rows),
                        norm_threads(p.hidden, 8), 0, stream, p);
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
