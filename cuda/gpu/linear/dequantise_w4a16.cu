// The matrix of a W4A16 linear as plain numbers: out[r, c] = (q - z) * s, see pyserve/ops/w4a16.py.
//
// For more rows of x than a kernel of the integers serves: a slice of the matrix at a time, which
// stays in L2 until cuBLAS has multiplied by it. A CTA takes a unit of a strip, 16 rows by up to 128
// columns: each warp a block, each lane the 4 words of its fragments, 16 bytes of integers that
// become 4 x 8 numbers. A lane's neighbouring columns (e) are a pair; 4 lanes (t) and both halves (u)
// make 32 bytes of a row, so that a warp writes whole sectors.
// Floor: bytes, 4.25 bits read and 16 written an element.
// Numerics: q - z is exact, one product in float32, one rounding.
#include "gpu/linear/w4a16.h"

#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"

namespace pyserve::gpu {
namespace {

template <class T>
__global__ void __launch_bounds__(2 * kWarpSize) dequantise_w4a16_kernel(DequantiseW4Params p) {
  const int lane = threadIdx.x % kWarpSize, block = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int64_t strip = blockIdx.x / p.num_units, unit = blockIdx.x % p.num_units;
  const uint32_t* words = p.packed + (strip * p.num_units + unit) * p.unit_words;
  const uint32_t* records = words + p.unit_blocks * kW4BlockWords;
  pdl_launch_dependents();
  const uint4 loaded = *reinterpret_cast<const uint4*>(words + block * kW4BlockWords + 4 * lane);
  const uint32_t steps[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  // Of the rows g and g + 8, of the first and the last group of the block.
  float scales[2][2], zeros[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const int record = group * (p.unit_records - 1);
      const uint32_t word = records[record * kW4RecordWords + 8 * half + g];
      scales[half][group] = __uint_as_float(word & ~kW4ZeroMask);
      zeros[half][group] = static_cast<float>(word & kW4ZeroMask);
    }
  }
  pdl_wait();
  T* out = static_cast<T*>(p.out);
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = strip * kStripRows + 8 * half + g;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const uint32_t pair = steps[s] >> (4 * (half + 2 * u));
        const float scale = scales[half][s / 2], zero = zeros[half][s / 2];
        const float low = (static_cast<float>(pair & 15) - zero) * scale;
        const float high = (static_cast<float>(pair >> 16 & 15) - zero) * scale;
        const int64_t column = (unit * p.unit_blocks + block) * kW4BlockColumns + 16 * s + 8 * u +
                               2 * t;
        if (row < p.num_rows && column < p.k) {
          *reinterpret_cast<uint32_t*>(out + row * p.out_stride + column) = pack_pair<T>(low, high);
        }
      }
    }
  }
}

}  // namespace

cudaError_t launch_dequantise_w4a16(const DequantiseW4Params& params, cudaStream_t stream) {
  const int64_t num_strips = (params.num_rows + kStripRows - 1) / kStripRows;
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return launch_chained(dequantise_w4a16_kernel<T>,
                          static_cast<unsigned>(num_strips * params.num_units),
                          static_cast<unsigned>(params.unit_blocks * kWarpSize), 0, stream, params);
  });
}

}  // namespace pyserve::gpu
