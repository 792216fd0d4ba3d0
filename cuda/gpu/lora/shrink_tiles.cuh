// The kernel of lora_shrink for all but many tokens: shrink.cu.
#pragma once

#include "gpu/core/vec.cuh"
#include "gpu/lora/shrink.cuh"

namespace pyserve::gpu {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kHalfTokens = 8;          // up to here tiles are of half of one mma's tokens
constexpr int kFewTokens = 64;          // up to here of one mma
constexpr int kManyTokens = 512;        // beyond, tokens are shrink_many.cu's
constexpr int kPiece = 32;              // columns of k that a warp takes at once
constexpr int kStep = kWarps * kPiece;  // from one piece of a warp to its next

// 8 elements of a row from column i on; zeros from column end on, and where there is no row.
template <class T, bool kIsAligned>
__device__ __forceinline__ uint4 load_piece(const T* row, bool is_there, int i, int end) {
  if constexpr (kIsAligned) {
    return is_there && i < end ? load_vec(row + i) : uint4{};
  } else {
    float x[kVec] = {};
    if (is_there) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (i + j < end) x[j] = to_float(row[i + j]);
      }
    }
    return pack<T>(x);
  }
}

// mma of so many tokens.
template <int kTokens>
constexpr int kTokenTilesOf = (kTokens + kMmaTokens - 1) / kMmaTokens;

// What a lane multiplies at a time: kDepth pieces of a warp, each kTokens tokens by kRowTiles mma.
template <class T, int kTokens, int kRowTiles, int kDepth, bool kIsAligned>
struct Pieces {
  static constexpr int kTokenTiles = kTokenTilesOf<kTokens>;
  uint4 a[kDepth][kRowTiles], low[kDepth][kTokenTiles], high[kDepth][kTokenTiles];

  __device__ __forceinline__ void load_a(const T* const (&rows)[kRowTiles],
                                         const bool (&has_row)[kRowTiles], int column, int end) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        a[d][n] = load_piece<T, kIsAligned>(rows[n], has_row[n], column + d * kStep, end);
      }
    }
  }

  // x: of the first token of the lane's, which are kMmaTokens / 2 apart; `count` of them.
  __device__ __forceinline__ void load_x(const T* x, int64_t stride, int count, int column,
                                         int end) {
    const int group = threadIdx.x % kWarpSize / 4;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
        const int token = m * kMmaTokens;
        low[d][m] = load_piece<T, kIsAligned>(x + token * stride, token + group < count,
                                              column + d * kStep, end);
        high[d][m] = uint4{};
        if constexpr (kTokens > kHalfTokens) {
          high[d][m] =
              load_piece<T, kIsAligned>(x + (token + 8) * stride, token + 8 + group < count,
                                        column + d * kStep, end);
        }
      }
    }
  }

  __device__ __forceinline__ void add_products(float (&sums)[kTokenTiles][kRowTiles][4]) const {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
        for (int m = 0; m < kTokenTiles; ++m) {
          const uint32_t first[4] = {low[d][m].x, high[d][m].x, low[d][m].y, high[d][m].y};
          const uint32_t second[4] = {low[d][m].z, high[d][m].z, low[d][m].w, high[d][m].w};
          mma_16816<T>(sums[m][n], first, a[d][n].x, a[d][n].y);
          mma_16816<T>(sums[m][n], second, a[d][n].z, a[d][n].w);
        }
      }
    }
  }
};

// CTAs an SM; of two, ptxas spills for sm_120.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kResident = 1;
#else
constexpr int kResident = 2;
#endif

// A and x are loaded from where they lie.
struct InPlace {
  static constexpr bool kIsStaged = false;
};

template <class T, int kTokens, int kRowTiles, int kDepth, bool kIsAligned, class Source>
__global__ void __launch_bounds__(kThreads, kResident)
    shrink_kernel(LoraShrinkParams p, int row_blocks, int split_columns) {
  constexpr int kTokenTiles = kTokenTilesOf<kTokens>, kRows = 8 * kRowTiles;
  constexpr int kSumTokens = kTokens < kMmaTokens ? kTokens : kMmaTokens;  // of an mma
  constexpr int kLog2Tokens = kTokens == 8 ? 3 : kTokens == 16 ? 4 : 5;
  static_assert(1 << kLog2Tokens == kTokens);
  static_assert(kThreads % kRows == 0, "a thread writes one row's sums");
  __shared__ float partial[kWarps][kSumTokens][kRows + 1];
  __shared__ float factors[kTokens];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = lane / 4, place = lane % 4;  // of an mma's fragments
  const int first_row = blockIdx.x % row_blocks * kRows;
  const int split = blockIdx.x / row_blocks % p.out.num_splits;
  pdl_launch_dependents();
  const TokenTile tile =
      token_tile<false>(p.rows, blockIdx.x / row_blocks / p.out.num_splits, kLog2Tokens);
  if (tile.count == 0 || !has_rows(p.rows, tile.slot, first_row, kRows)) {
    pdl_wait();
    return;
  }
  const T* a[kRowTiles];
  bool has_a[kRowTiles];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    const Row row = row_of(p.rows, tile.slot, first_row + 8 * n + group);
    has_a[n] = row.is_there;
    a[n] = static_cast<const T*>(p.a) + tile.slot * p.a_slot_stride + row.part * p.a_part_stride +
           row.index * p.a_stride;
  }
  const int split_begin = split * split_columns, begin = split_begin + warp * kPiece + place * kVec;
  const int end = min(split_begin + split_columns, static_cast<int>(p.k));
  Pieces<T, kTokens, kRowTiles, kDepth, kIsAligned> pieces;
  Source source;
  if constexpr (Source::kIsStaged) {
    source.begin(split_columns);
    source.copy_a(p, tile.slot, first_row, kRows, split_begin, end);
  } else {
    pieces.load_a(a, has_a, begin, end);
  }
  const Row own_row = row_of(p.rows, tile.slot, first_row + threadIdx.x % kRows);
  const float scale =
      own_row.is_there ? p.scales[tile.slot * p.scales_stride + own_row.part] : 0.0f;
  pdl_wait();
  const T* x;
  if constexpr (Source::kIsStaged) {
    source.copy_x(p, tile, kRows, split_begin, end);
  } else {
    x = static_cast<const T*>(p.x) + (tile.begin + group) * p.x_stride;
    pieces.load_x(x, p.x_stride, tile.count, begin, end);
  }
  for (int token = warp; token < tile.count; token += kWarps) {
    const float factor = norm_factor(p, tile.begin + token);
    if (lane == 0) factors[token] = factor;
  }
  if constexpr (Source::kIsStaged) {
    source.wait();
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) a[n] = source.row(8 * n + group) - split_begin;
    x = source.row(kRows + group) - split_begin;
    pieces.load_a(a, has_a, begin, end);
    pieces.load_x(x, 0, tile.count, begin, end);
  }
  float sums[kTokenTiles][kRowTiles][4] = {};
#pragma unroll 1
  for (int i = begin; i - place * kVec < end; i += kDepth * kStep) {
    pieces.add_products(sums);
    pieces.load_a(a, has_a, i + kDepth * kStep, end);
    pieces.load_x(x, p.x_stride, tile.count, i + kDepth * kStep, end);
  }
#pragma unroll
  for (int m = 0; m < kTokenTiles; ++m) {
    if (m > 0) __syncthreads();
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const int row = 8 * n + 2 * place;
      partial[warp][group][row] = sums[m][n][0];
      partial[warp][group][row + 1] = sums[m][n][1];
      if constexpr (kTokens > kHalfTokens) {
        partial[warp][group + 8][row] = sums[m][n][2];
        partial[warp][group + 8][row + 1] = sums[m][n][3];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kSumTokens * kRows; i += kThreads) {
      const int own = i / kRows, token = m * kMmaTokens + own;
      if (token >= tile.count || !own_row.is_there) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w][own][i % kRows];
      float* out = p.out.data + split * p.out.split_stride + (tile.begin + token) * p.out.stride;
      out[own_row.part * p.out.part_stride + own_row.index] = sum * (scale * factors[token]);
    }
  }
}

// Columns of k that a split has at most: whole pieces.
inline int split_columns_of(const LoraShrinkParams& p) {
  const int64_t num_pieces = (p.k + kPiece - 1) / kPiece, num_splits = p.out.num_splits;
  return static_cast<int>((num_pieces + num_splits - 1) / num_splits) * kPiece;
}

}  // namespace pyserve::gpu
