// dequantise_fp8: the e4m3 matrix of a linear as bfloat16 or float16: out[r, c] = e4m3 * s, with a
// scale s for each block of rows and columns (pyserve/ops/fp8.py).
//
// Used when x has more rows than the fp8 kernels serve: a slice of the matrix is dequantised at a
// time and stays in L2 until cuBLAS has multiplied by it. A thread takes 16 columns of a row, 16
// bytes that become 32, or fewer at the end of a row.
// Bound by bytes: 8 bits read and 16 written per element.
// Numerics: one product in float32 and one rounding; all else is exact.
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/linear/fp8.h"

namespace pyserve::gpu {
namespace {

constexpr int kThreads = 256, kColumns = 16;

__device__ __forceinline__ float number_of(uint32_t byte) {
  const uint32_t sign = (byte & 0x80u) << 24, rest = byte & 0x7fu;
  if (rest == 0x7fu) return __uint_as_float(0x7fc00000u);
  // The bits of e4m3, moved into those of a float32, are 2^-120 times the number. They are denormal
  // where the e4m3 number is, and the product is normal again.
  return __uint_as_float(sign | rest << 20) * 0x1p120f;
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantise_fp8_kernel(DequantiseFp8Params p) {
  const int64_t row_pieces = (p.k + kColumns - 1) / kColumns;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = index / row_pieces, column = index % row_pieces * kColumns;
  const bool is_there = row < p.n;
  pdl_launch_dependents();
  uint32_t words[4] = {};
  const uint8_t* from = p.weight + row * p.k + column;
  const int count = static_cast<int>(min(int64_t{kColumns}, p.k - column));
  float scales[2] = {};  // of the first 8 columns and of the other 8
  if (is_there) {
    const float* of_row = p.scale.data + row / p.scale.rows * p.scale.num_groups;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t group = (column + 8 * i) / p.scale.columns;
      scales[i] = of_row[min(group, int64_t{p.scale.num_groups - 1})];
    }
    if (p.is_aligned) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(from);
      words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (i < count) words[i / 4] |= uint32_t{from[i]} << 8 * (i % 4);
      }
    }
  }
  pdl_wait();
  if (!is_there) return;
  T* to = static_cast<T*>(p.out) + row * p.out_stride + column;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      x[i] = number_of(words[2 * half + i / 4] >> 8 * (i % 4) & 0xffu) * scales[half];
    }
    if (p.is_aligned) {
      store_vec(to + half * kVec, pack<T>(x));
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (half * kVec + i < count) to[half * kVec + i] = from_float<T>(x[i]);
      }
    }
  }
}

}  // namespace

cudaError_t launch_dequantise_fp8(const DequantiseFp8Params& params, cudaStream_t stream) {
  if (params.n == 0 || params.k == 0) return cudaSuccess;
  const int64_t num_pieces = params.n * ((params.k + kColumns - 1) / kColumns);
  const int64_t num_ctas = (num_pieces + kThreads - 1) / kThreads;
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return launch_chained(dequantise_fp8_kernel<T>, static_cast<unsigned>(num_ctas), kThreads, 0,
                          stream, params);
  });
}

}  // namespace pyserve::gpu
