// lora_shrink: the sum over splits of out[split, t, p, r] = scales[s, p] * sum over i of x[t, i] *
// a[s, p, r, i], s being the slot of t's adapter and r below the part's rank.
//   x [num_tokens, k], a [num_slots, num_parts, max_rank, k], out float32 [num_splits, num_tokens,
//   num_parts, max_rank]
// Where x is what a norm is a factor of (common/epilogue.h), so is it here.
//
// A CTA takes some tokens of one slot by some rows of A, those of all parts one after the other, by
// one split of k; CTAs beyond what there is end at once, so the grid depends on shapes alone. Its 8
// warps share k: warp w takes every 8th piece of 32 columns. A product is mma m16n8k16, whose
// columns of k may stand in any order that both sides agree on: so each lane loads 16 bytes of a
// row and feeds two steps with them. Few tokens take 16 by 8 rows a CTA, as many CTAs as there are:
// what counts then is that many SMs ask for A, and that a warp asks for all of its part at once; so
// k is split too. Many tokens take 32 by 32, as A would be read again for each 16 tokens else, and
// x for each 8 rows.
// Numerics: float32 sums, one warp's after the other. The order of a sum depends on k and on the
// number of splits alone.
// Floor: bytes, 2 * k of each row of A and of x; of one token, rank 16 and k 4096 the latency of a
// launch.
#include "common/epilogue.h"
#include "gpu/core/block.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/lora/segments.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPiece = 32;  // columns of k that a warp takes at once

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

// What the norm before multiplies the sums of a token by; all lanes of a warp call it.
__device__ __forceinline__ float norm_factor(const LoraShrinkParams& p, int64_t token) {
  if (p.x_squares == nullptr) return 1.0f;
  const int count = static_cast<int>((p.k + kSquaresColumns - 1) / kSquaresColumns);
  float sum = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    sum += p.x_squares[token * p.x_squares_stride + i];
  }
  return rsqrtf(lane_sum(sum) / static_cast<float>(p.k) + p.eps);
}

// Row `row` of all parts' A together.
struct Row {
  int part, index;
  bool is_there;
};

__device__ __forceinline__ Row row_of(const LoraRows& rows, int slot, int row) {
  const int part = row / rows.max_rank, index = row % rows.max_rank;
  return {part, index, part < rows.num_parts && index < rank_of(rows, slot, part)};
}

// Whether any of rows [first, first + count) is there.
__device__ __forceinline__ bool has_rows(const LoraRows& rows, int slot, int first, int count) {
  bool any = false;
  for (int part = first / rows.max_rank; part < rows.num_parts; ++part) {
    const int begin = part * rows.max_rank;
    if (begin >= first + count) break;
    any |= max(first - begin, 0) < rank_of(rows, slot, part);
  }
  return any;
}

template <class T, int kTokenTiles, int kRowTiles, bool kIsAligned>
__global__ void __launch_bounds__(kThreads, 2)
    shrink_kernel(LoraShrinkParams p, int row_blocks, int split_columns) {
  constexpr int kTokens = kMmaTokens * kTokenTiles, kRows = 8 * kRowTiles;
  constexpr int kUnroll = kIsAligned && kRowTiles == 1 ? 4 : 1;
  __shared__ float partial[kWarps][kMmaTokens][kRows + 1];
  __shared__ float factors[kTokens];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = lane / 4, place = lane % 4;  // of an mma's fragments
  const int first_row = blockIdx.x % row_blocks * kRows;
  const int split = blockIdx.x / row_blocks % p.out.num_splits;
  pdl_launch_dependents();
  pdl_wait();
  const TokenTile tile =
      token_tile<false>(p.rows, blockIdx.x / row_blocks / p.out.num_splits, kTokens);
  if (tile.count == 0 || !has_rows(p.rows, tile.slot, first_row, kRows)) return;

  const T* x = static_cast<const T*>(p.x) + (tile.begin + group) * p.x_stride;
  const T* a[kRowTiles];
  bool has_a[kRowTiles];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    const Row row = row_of(p.rows, tile.slot, first_row + 8 * n + group);
    has_a[n] = row.is_there;
    a[n] = static_cast<const T*>(p.a) + tile.slot * p.a_slot_stride + row.part * p.a_part_stride +
           row.index * p.a_stride;
  }
  float sums[kTokenTiles][kRowTiles][4] = {};
  const int begin = split * split_columns;
  const int end = min(begin + split_columns, static_cast<int>(p.k));
#pragma unroll kUnroll
  for (int i = begin + warp * kPiece; i < end; i += kWarps * kPiece) {
    const int column = i + place * kVec;
    uint4 low[kTokenTiles], high[kTokenTiles];
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
      const int token = m * kMmaTokens + group;
      const T* row = x + m * kMmaTokens * p.x_stride;
      low[m] = load_piece<T, kIsAligned>(row, token < tile.count, column, end);
      const bool has_high = token + 8 < tile.count;
      high[m] = load_piece<T, kIsAligned>(row + 8 * p.x_stride, has_high, column, end);
    }
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const uint4 b = load_piece<T, kIsAligned>(a[n], has_a[n], column, end);
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
        const uint32_t first[4] = {low[m].x, high[m].x, low[m].y, high[m].y};
        const uint32_t second[4] = {low[m].z, high[m].z, low[m].w, high[m].w};
        mma_16816<T>(sums[m][n], first, b.x, b.y);
        mma_16816<T>(sums[m][n], second, b.z, b.w);
      }
    }
  }
  for (int token = warp; token < tile.count; token += kWarps) {
    const float factor = norm_factor(p, tile.begin + token);
    if (lane == 0) factors[token] = factor;
  }
#pragma unroll
  for (int m = 0; m < kTokenTiles; ++m) {
    if (m > 0) __syncthreads();
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const int row = 8 * n + 2 * place;
      partial[warp][group][row] = sums[m][n][0];
      partial[warp][group][row + 1] = sums[m][n][1];
      partial[warp][group + 8][row] = sums[m][n][2];
      partial[warp][group + 8][row + 1] = sums[m][n][3];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kMmaTokens * kRows; i += kThreads) {
      const int own = i / kRows, token = m * kMmaTokens + own;
      const Row row = row_of(p.rows, tile.slot, first_row + i % kRows);
      if (token >= tile.count || !row.is_there) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w][own][i % kRows];
      const float scale = p.scales[tile.slot * p.scales_stride + row.part] * factors[token];
      float* out = p.out.data + split * p.out.split_stride + (tile.begin + token) * p.out.stride;
      out[row.part * p.out.part_stride + row.index] = sum * scale;
    }
  }
}

template <class T, int kTokenTiles, int kRowTiles, bool kIsAligned>
cudaError_t launch_tiles(const LoraShrinkParams& p, cudaStream_t stream) {
  constexpr int kTokens = kMmaTokens * kTokenTiles, kRows = 8 * kRowTiles;
  const int row_blocks = (p.rows.num_parts * p.rows.max_rank + kRows - 1) / kRows;
  const int64_t num_pieces = (p.k + kPiece - 1) / kPiece, num_splits = p.out.num_splits;
  const int split_columns = static_cast<int>((num_pieces + num_splits - 1) / num_splits) * kPiece;
  const int64_t num_tiles = num_token_tiles(p.rows.num_tokens, kTokens, p.rows.num_slots);
  return launch_chained(shrink_kernel<T, kTokenTiles, kRowTiles, kIsAligned>,
                        static_cast<unsigned>(num_tiles * num_splits * row_blocks), kThreads, 0,
                        stream, p, row_blocks, split_columns);
}

template <class T>
cudaError_t launch_as(const LoraShrinkParams& p, cudaStream_t stream) {
  const bool is_aligned = p.k % kVec == 0 && is_vec_aligned(p.x, p.x_stride) &&
                          is_vec_aligned(p.a, p.a_slot_stride | p.a_part_stride | p.a_stride);
  if (!is_aligned) return launch_tiles<T, 1, 1, false>(p, stream);
  if (p.rows.num_tokens <= kFewTokens) return launch_tiles<T, 1, 1, true>(p, stream);
  return launch_tiles<T, 2, 4, true>(p, stream);
}

}  // namespace

cudaError_t launch_lora_shrink(const LoraShrinkParams& params, cudaStream_t stream) {
  if (params.rows.num_tokens == 0) return cudaSuccess;
  return dispatch_half(params.dtype, [&]<class T>(T) { return launch_as<T>(params, stream); });
}

}  // namespace pyserve::gpu
