// Rounds rows of x [m, k], bfloat16 or float16, to e4m3 with one scale per row and 128 columns, for
// gemm_w8a8.cuh. 16 threads take a group of 128 columns, 8 columns each.
// Bound by bytes: 16 bits read and 8 written per element, which mostly stay in L2.
// Numerics: a group's scale is its largest magnitude / 448 in float32, so that the largest becomes
// 448; each element is multiplied by 448 / largest and rounded to nearest.
#pragma once

#include "gpu/core/e4m3.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/linear/w8a8.h"

namespace pyserve::gpu {

constexpr int kQuantiseThreads = 256;
constexpr int kGroupThreads = static_cast<int>(kW8GroupColumns) / kVec;

struct QuantiseRowsParams {
  const void* x;  // [m, k], rows aligned to 16 bytes
  int64_t x_stride;
  uint8_t* out;   // [m, k], contiguous
  float* scales;  // [groups, m]
  int64_t m;
  int k, num_groups;
};

template <class T>
__global__ void __launch_bounds__(kQuantiseThreads) quantise_rows_kernel(QuantiseRowsParams p) {
  constexpr float kMax = 448.0f, kLeast = 0x1p-100f;  // kLeast keeps the quotient finite
  const int64_t index = (int64_t{blockIdx.x} * kQuantiseThreads + threadIdx.x) / kGroupThreads;
  const int64_t row = index / p.num_groups;
  const int group = static_cast<int>(index % p.num_groups);
  const int lane = threadIdx.x % kGroupThreads;
  const int column = group * static_cast<int>(kW8GroupColumns) + lane * kVec;
  const bool is_there = row < p.m && column < p.k;
  pdl_launch_dependents();
  pdl_wait();
  float x[kVec] = {};
  if (is_there) unpack<T>(load_vec(static_cast<const T*>(p.x) + row * p.x_stride + column), x);
  float largest = kLeast;
#pragma unroll
  for (int i = 0; i < kVec; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
  for (int distance = kGroupThreads / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, distance));
  }
  if (!is_there) return;
  if (lane == 0) p.scales[group * p.m + row] = largest / kMax;
  const float factor = kMax / largest;
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kVec; i += 2) {
    words[i / 4] |= pack_e4m3(x[i] * factor, x[i + 1] * factor) << 8 * (i % 4);
  }
  *reinterpret_cast<uint2*>(p.out + row * p.k + column) = {words[0], words[1]};
}

template <class T>
cudaError_t launch_quantise_rows(const QuantiseRowsParams& params, cudaStream_t stream) {
  constexpr int kPieces = kQuantiseThreads / kGroupThreads;
  const int64_t num_ctas = (params.m * params.num_groups + kPieces - 1) / kPieces;
  return launch_chained(quantise_rows_kernel<T>, static_cast<unsigned>(num_ctas), kQuantiseThreads,
                        0, stream, params);
}

}  // namespace pyserve::gpu
