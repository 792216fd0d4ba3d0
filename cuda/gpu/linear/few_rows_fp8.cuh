// linear with e4m3 weights (pyserve/ops/fp8.py) for few rows of x: out [m, n] = x [m, k] times
// weight [n, k]^T with a scale per block of weight; x and out are bfloat16 or float16. It works
// like few_rows.cuh and uses its words, with half the bytes to stream, which are widened to 16 bits
// on the way.
//
// A stage of a warp is 128 columns of k of the weight rows and of all rows of x. In each half of 64
// columns, four lanes share a row. Lane t of the four takes 16 neighbouring columns: 16 bytes of
// weight and 32 bytes of x. An mma.sync may take its columns of k in any order that both operands
// share, so no shuffles are needed. The four columns in a 32-bit word form two pairs, the even and
// the odd ones, and both pairs go into one mma.
// Instructions: to widen a word of four takes 7 in float16 and 9 in bfloat16, where each pair needs
// an fma. 16 rows by 128 columns are 2 KB. At an SM's share of 4.47 TB/s these arrive in 106
// clocks, in which an SM can issue 424 instructions; the kernel needs about 150.
// Numerics: float32 sums over the 128 columns of a stage, which share one scale; these times the
// scale are added in the order of the stages and then of the warps; the rest is as in few_rows.cuh.
// A row's result does not depend on the other rows of x.
// Bound by bytes: n * k. Figures: fp8.h.
#pragma once

#include <algorithm>

#include "gpu/linear/few_rows.cuh"
#include "gpu/linear/fp8.h"
#include "gpu/linear/fp8_numbers.cuh"

namespace pyserve::gpu {

// The tile sizes of a CTA. kTokens, at most 8, is the number of rows of x that it has room for.
template <int kRowTiles_, int kStages_, int kTokens_>
struct Fp8Tiling {
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kStages = kStages_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kDepth = 128;  // columns of k in a stage of one warp; they share a scale
  static constexpr int kWarps = 8;

  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kTokenTiles = 1;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kChunks = 8;  // chunks of 16 bytes in a row of weight, or in half a row of x
  static constexpr int kRowBytes = 128;
  static constexpr int kHalves = 2;  // halves of a row of x in a stage
  static constexpr int kXBytes = kTokens * kRowBytes;  // bytes of one half
  static constexpr int kStageBytes = kRows * kRowBytes + kHalves * kXBytes;

  static constexpr int kPassTokens = kTokens;
  static constexpr int kBuffers = 2;
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kSumFloats = kWarps * kPassTokens * kSumStride;
  static constexpr int kSmem = kWarps * kStages * kStageBytes + kBuffers * kSumFloats * 4;

  static constexpr int kLaneRows = kWarpSize / kChunks;
  static_assert(kTokens <= 8);
};

// Where a chunk of a row of weight lies in a stage. Eight lanes read 4 chunks of 2 rows at a time;
// the swizzle puts these into different banks.
__device__ __forceinline__ uint32_t fp8_offset(int row, int chunk) {
  return row * 128 + (chunk ^ (row & 1) * 4) * 16;
}

// The scales of a stage for the rows of this lane's fragments.
template <class Tile>
using Fp8Scales = float[Tile::kRowTiles][2];

// sums += scale * weight x^T over the stage at this address of shared memory.
template <class T, class Tile>
__device__ __forceinline__ void multiply_fp8_stage(uint32_t stage, const Fp8Scales<Tile>& scales,
                                                   Sums<Tile>& sums) {
  const int lane = threadIdx.x % kWarpSize, row = lane / 4, quarter = lane % 4;
  const uint32_t x = stage + Tile::kRows * Tile::kRowBytes +
                     chunk_offset<Tile>(min(row, Tile::kTokens - 1), 2 * quarter);
  Sums<Tile> stage_sums = {};
#pragma unroll
  for (int half = 0; half < Tile::kHalves; ++half) {
    uint4 of_x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) of_x[i] = load_shared((x ^ i * 16) + half * Tile::kXBytes);
    const uint32_t columns[8] = {of_x[0].x, of_x[0].y, of_x[0].z, of_x[0].w,
                                 of_x[1].x, of_x[1].y, of_x[1].z, of_x[1].w};
    uint4 rows[Tile::kRowTiles][2];
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int at = 16 * tile + 8 * lower + row;
        rows[tile][lower] = load_shared(stage + fp8_offset(at, 4 * half + quarter));
      }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t first = columns[2 * step], second = columns[2 * step + 1];
      const uint32_t even = __byte_perm(first, second, 0x5410);
      const uint32_t odd = __byte_perm(first, second, 0x7632);
#pragma unroll
      for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
        uint32_t a[4];
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const uint4& bytes = rows[tile][lower];
          const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
          widen_bytes<T>(words[step], a[lower], a[2 + lower]);
        }
        mma_16816<T>(stage_sums[tile][0], a, even, odd);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[tile][0][i] = fmaf(stage_sums[tile][0][i], scales[tile][i / 2], sums[tile][0][i]);
    }
  }
}

// The weight, of which each lane copies its chunks and loads the scales of its rows.
template <class T, class Rows, class Tile>
struct Fp8Rows {
  const unsigned char* weight;
  int64_t stride;  // bytes from one row to the next
  Fp8Scale scale;
  int n, k;  // n counts columns of out

  // Copies the rows for columns [column, column_end) of out, from column k0 of k on.
  __device__ __forceinline__ void copy(uint32_t stage, int column, int column_end, int k0) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int lane_row = lane / Tile::kChunks, lane_chunk = lane % Tile::kChunks;
    const int from_k = k0 + warp * Tile::kDepth + lane_chunk * 16;
    const bool is_in_k = from_k < k;
#pragma unroll
    for (int i = 0; i < Tile::kRows; i += Tile::kLaneRows) {
      const int row = i + lane_row, is_up = Rows::kIsPaired && i >= Rows::kColumns;
      const int of_out = column + row - is_up * Rows::kColumns;
      const unsigned char* from = weight + (of_out + is_up * n) * stride + from_k;
      if (of_out < column_end) {
        cp_async_16(stage + fp8_offset(row, lane_chunk), is_in_k ? from : weight, is_in_k);
      }
    }
  }

  __device__ __forceinline__ void ask(int column, int k0, Fp8Scales<Tile>& scales) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = min((k0 + warp * Tile::kDepth) / scale.columns, scale.num_groups - 1);
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int row = 16 * tile + 8 * lower + lane / 4;
        const int is_up = Rows::kIsPaired && row >= Rows::kColumns;
        const int of_out = min(column + row - is_up * Rows::kColumns, n - 1);
        const int64_t at = (of_out + is_up * n) / scale.rows * int64_t{scale.num_groups} + group;
        scales[tile][lower] = scale.data[at] * Fp8Numbers<T>::kFactor;
      }
    }
  }
};

// m <= kTokens; k > 0 and a multiple of 16; x and weight are aligned to 16 bytes; 2 n and k fit an
// int. The weight's stride is in bytes.
template <class T, Epilogue kEpilogue, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_fp8_kernel(LinearParams p, Fp8Scale scale, Shares shares) {
  using Rows = RowTile<kEpilogue, Tile::kRows>;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  __shared__ float factors[Tile::kTokens];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int num_tokens = static_cast<int>(p.m);
  const int n = static_cast<int>(p.n), k = static_cast<int>(p.k);
  const uint32_t ring = smem_address(dynamic_smem) + warp * Tile::kStages * Tile::kStageBytes;
  float* all_sums =
      reinterpret_cast<float*>(dynamic_smem + Tile::kWarps * Tile::kStages * Tile::kStageBytes);
  const auto* x = static_cast<const uint16_t*>(p.x);
  const Fp8Rows<T, Rows, Tile> matrix{static_cast<const unsigned char*>(p.weight), p.weight_stride,
                                      scale, n, k};
  const Groups<Rows, Tile> groups(shares, n);
  constexpr int kStepDepth = Tile::kWarps * Tile::kDepth;  // of k, for all warps together

  const int lane_row = lane / Tile::kChunks, lane_chunk = lane % Tile::kChunks;
  struct Piece {  // of the CTA's work: a group's first column and a position in k
    int column, k;
  };
  const auto fetch_x = [&](int k0, uint32_t stage) {
#pragma unroll
    for (int half = 0; half < Tile::kHalves; ++half) {
      const int column = k0 + warp * Tile::kDepth + half * 64 + lane_chunk * kVec;
      const uint32_t to = stage + Tile::kRows * Tile::kRowBytes + half * Tile::kXBytes +
                          chunk_offset<Tile>(lane_row, lane_chunk);
      copy_rows<Tile, Tile::kTokens>(to, column < k ? x + p.x_stride * lane_row + column : x,
                                     p.x_stride, num_tokens - lane_row, column < k);
    }
  };
  // Starts to copy a piece, if there is one left, and moves on to the next. It always commits a
  // group of copies, so that waits can count groups.
  const auto fetch = [&](Piece& piece, int stage, bool has_weight, bool has_x) {
    if (piece.column < n) {
      const uint32_t to = ring + stage * Tile::kStageBytes;
      if (has_weight) matrix.copy(to, piece.column, groups.end(piece.column), piece.k);
      if (has_x) fetch_x(piece.k, to);
      piece.k += kStepDepth;
      if (piece.k >= k) piece = {groups.next(piece.column), 0};
    }
    cp_async_commit();
  };
  // The scales of the next stage, which are loaded before the current stage is multiplied.
  Fp8Scales<Tile> scales;
  const Piece first{groups.first(), 0};
  Piece next = first;
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetch(next, stage, true, false);
  if (first.column < n) matrix.ask(first.column, 0, scales);
  pdl_wait();
  pdl_launch_dependents();
  next = first;
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetch(next, stage, false, true);
  for (int token = warp; token < num_tokens; token += Tile::kWarps) {
    const float factor = norm_factor(p, token);  // read only behind the first group's barrier
    if (lane == 0) factors[token] = factor;
  }

  constexpr int kPassResults = Tile::kPassTokens * Rows::kColumns;
  constexpr int kResults = (kPassResults + Tile::kThreads - 1) / Tile::kThreads;  // per thread
  int stage = 0, buffer = 0, place = threadIdx.x;
  for (int column0 = groups.first(); column0 < n; column0 = groups.next(column0)) {
    Result<T> results[kResults];
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const int index = place + i * Tile::kThreads;
      results[i].token = index / Rows::kColumns;
      results[i].row = index % Rows::kColumns;
      results[i].template ask<kEpilogue>(p, column0 + results[i].row, groups.end(column0));
    }
    place = (place + kWarpSize) % Tile::kThreads;  // results go to other warps in each group

    Sums<Tile> sums = {};
#pragma unroll 1
    for (int k0 = 0; k0 < k; k0 += kStepDepth) {
      // Counts copy groups, of which the first stages have two each.
      cp_async_wait<Tile::kStages - 2>();
      // All lanes' copies have landed, and all lanes have read the stage that is refilled now.
      __syncwarp();
      fetch(next, stage == 0 ? Tile::kStages - 1 : stage - 1, true, true);
      Fp8Scales<Tile> of_stage;
#pragma unroll
      for (int i = 0; i < 2 * Tile::kRowTiles; ++i) of_stage[i / 2][i % 2] = scales[i / 2][i % 2];
      const bool is_last = k0 + kStepDepth >= k;
      const int column = is_last ? groups.next(column0) : column0;
      if (column < n) matrix.ask(column, is_last ? 0 : k0 + kStepDepth, scales);
      multiply_fp8_stage<T, Tile>(ring + stage * Tile::kStageBytes, of_stage, sums);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    float* group_sums = all_sums + buffer * Tile::kSumFloats;
    put_sums<Tile>(group_sums + warp * Tile::kPassTokens * Tile::kSumStride, 0, num_tokens, sums);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      finish_result<T, kEpilogue, Tile>(p, results[i], group_sums, 0, factors,
                                        column0 + results[i].row);
    }
    buffer = (buffer + 1) % Tile::kBuffers;
  }
  cp_async_wait<0>();
}

// Launches for p.m <= kTokens, with one CTA per SM.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_fp8_tiled(const LinearParams& p, const Fp8Scale& scale, int num_sms,
                             cudaStream_t stream) {
  constexpr auto kKernel = linear_fp8_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, Tile::kSmem>();
  if (error != cudaSuccess) return error;
  constexpr int kColumns = RowTile<kEpilogue, Tile::kRows>::kColumns;
  constexpr int kTileColumns = kColumns / Tile::kRowTiles;
  const int64_t num_tiles = (p.n + kTileColumns - 1) / kTileColumns;
  const int num_ctas = static_cast<int>(std::min<int64_t>(num_tiles, num_sms));
  const Shares shares(p.n, kColumns, kTileColumns, num_ctas);
  return launch_chained(kKernel, static_cast<unsigned>(num_ctas), Tile::kThreads, Tile::kSmem,
                        stream, p, scale, shares);
}

}  // namespace pyserve::gpu
