// dequantise_w4a16: the matrix of 4-bit integers of a linear as bfloat16 or float16: out[r, c] = (q
// - z) * s (pyserve/ops/w4a16.py).
//
// Used when x has more rows than the kernels on integers serve: a slice of the matrix is
// dequantised at a time and stays in L2 until cuBLAS has multiplied by it. A CTA takes one unit of
// a strip, 16 rows by up to 128 columns. Each warp takes a block, and each lane its 4 words there:
// 16 bytes of integers, which become 4 x 8 numbers. Two neighbouring columns (index e in w4a16.py)
// make a pair of 4 bytes in one lane, and 4 lanes (t) together hold 8 columns, which are a 16-byte
// chunk of the output; a row of a block has 8 such chunks. The four lanes exchange pairs until each
// holds two whole chunks. A warp then writes 64 contiguous bytes of a row at a time. Written as 4
// bytes per lane, the stores filled only half of each sector and the kernel reached 1.4 TB/s.
// Bound by bytes: 4.25 bits read and 16 written per element.
// Numerics: q - z is exact; one product in float32 and one rounding.
#include "gpu/linear/w4a16.h"

#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"

namespace pyserve::gpu {
namespace {

// Transposes the 4x4 words of four lanes: lane t gets the words that the four lanes hold at index
// t, in the order of the lanes.
__device__ __forceinline__ void transpose_over_quad(uint32_t (&words)[4]) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int bit = 1; bit <= 2; ++bit) {
    const bool is_upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t other = __shfl_xor_sync(kFullMask, is_upper ? words[i] : words[i | bit], bit);
      (is_upper ? words[i] : words[i | bit]) = other;
    }
  }
}

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
  // For the rows g and g + 8, in the first and the last group of columns of the block.
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
  const int64_t column = (unit * p.unit_blocks + block) * kW4BlockColumns;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = strip * kStripRows + 8 * half + g;
#pragma unroll
    // Chunks of 8 columns: s = chunk / 2, u = chunk % 2.
    for (int chunks = 0; chunks < 8; chunks += 4) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int s = (chunks + i) / 2, u = i % 2;
        const uint32_t pair = steps[s] >> (4 * (half + 2 * u));
        const float scale = scales[half][s / 2], zero = zeros[half][s / 2];
        pairs[i] = pack_pair<T>((static_cast<float>(pair & 15) - zero) * scale,
                                (static_cast<float>(pair >> 16 & 15) - zero) * scale);
      }
      transpose_over_quad(pairs);
      const int64_t begin = column + (chunks + t) * 8;
      if (row < p.num_rows && begin < p.k) {
        *reinterpret_cast<uint4*>(out + row * p.out_stride + begin) =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
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
