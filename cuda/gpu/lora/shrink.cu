// lora_shrink: out[split, t, p, r], summed over the splits, = scales[s, p] * sum over i of x[t, i]
// * a[s, p, r, i], where s is the slot of token t's adapter and r runs up to the rank of part p.
//   x [num_tokens, k] and a [num_slots, num_parts, max_rank, k], bfloat16 or float16
//   out float32 [num_splits, num_tokens, num_parts, max_rank]
// If x_squares is given, x lacks the factor of an RMSNorm (common/epilogue.h), which is applied
// here.
//
// Many tokens go to shrink_many.cu.
// Work: a CTA takes some tokens of one slot, some rows of A (those of all parts one after the
// other) and one split of k. The grid depends on shapes alone; CTAs beyond the last tile end at
// once. The 8 warps of a CTA share its k: warp w takes every 8th piece of 32 columns. Products are
// mma m16n8k16, whose 16 of k may stand in any order that both operands share, so a lane loads 16
// bytes of a row and feeds two mma with them. Up to 64 tokens, a CTA takes 16 tokens by 8 rows of
// A, or by 16 or 32 rows where A has more. Time then depends on reading A: many SMs should read it,
// though there should not be more CTAs than run at a time, and a warp should have all of its loads
// in flight at once. That is why k is split too. Up to 8 tokens (half an mma) the lanes hold no
// others, so that with 85 registers a CTA finds room beside a CTA of the linear in front, which has
// 38,912 of an SM's registers and 171 KB of its shared memory. With more tokens a CTA takes 32 tokens by 16 rows,
// because A would otherwise be read again for each 16 tokens. The first pieces of A are loaded
// before pdl_wait().
// Numerics: float32 sums, added over the warps in order. The order of a sum depends on k and on the
// number of splits alone.
// Bound by bytes, 2 * k for each row of A and of x; for one token, rank 16 and k 4096 by the
// latency of a launch.
#include "gpu/core/vec.cuh"
#include "gpu/lora/shrink.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kHalfTokens = 8;          // up to here the second half of an mma's tokens is unused
constexpr int kFewTokens = 64;          // up to here a CTA takes the 16 tokens of one mma
constexpr int kPiece = 32;              // a piece: columns of k that a warp takes at once
constexpr int kStep = kWarps * kPiece;  // distance from one piece of a warp to its next

// Elements i .. i + 7 of a row; zeros from column `end` on, and where the row does not exist.
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

// What a lane holds at a time: kDepth pieces of its warp, for kTokenTiles x kRowTiles mma each.
// kIsHalf: tokens 8 to 15 of a tile do not exist.
template <class T, int kTokenTiles, int kRowTiles, int kDepth, bool kIsAligned, bool kIsHalf>
struct Pieces {
  uint4 a[kDepth][kRowTiles], low[kDepth][kTokenTiles], high[kDepth][kIsHalf ? 1 : kTokenTiles];

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

  // `x` is the row of token `group` of the tile; the lane takes that token and those 8, 16, ...
  // further on, of `count` tokens.
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
        if constexpr (kIsHalf) {
          high[d][m] = {};
        } else {
          high[d][m] = load_piece<T, kIsAligned>(x + (token + 8) * stride,
                                                 token + 8 + group < count, column + d * kStep, end);
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

// CTAs per SM; with two, ptxas spills registers for sm_120.
template <bool kIsHalf>
constexpr int resident() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  return kIsHalf ? 2 : 1;
#else
  return kIsHalf ? 3 : 2;
#endif
}

template <class T, int kTokenTiles, int kRowTiles, int kDepth, bool kIsAligned,
          bool kIsHalf = false>
__global__ void __launch_bounds__(kThreads, resident<kIsHalf>())
    shrink_kernel(LoraShrinkParams p, int row_blocks, int split_columns) {
  constexpr int kTokens = kMmaTokens * kTokenTiles, kRows = 8 * kRowTiles;
  constexpr int kLog2Tokens = kTokenTiles == 1 ? 4 : 5;
  static_assert(1 << kLog2Tokens == kTokens);
  static_assert(kThreads % kRows == 0, "a thread writes one row's sums");
  static_assert(!kIsHalf || kTokenTiles == 1);
  constexpr int kTileTokens = kIsHalf ? kMmaTokens / 2 : kMmaTokens;
  __shared__ float partial[kWarps][kTileTokens][kRows + 1];
  __shared__ float factors[kTokens];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = lane / 4, place = lane % 4;  // the lane's indices in an mma's fragments
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
  const int begin = split * split_columns + warp * kPiece + place * kVec;
  const int end = min((split + 1) * split_columns, static_cast<int>(p.k));
  Pieces<T, kTokenTiles, kRowTiles, kDepth, kIsAligned, kIsHalf> pieces;
  pieces.load_a(a, has_a, begin, end);
  const Row own_row = row_of(p.rows, tile.slot, first_row + threadIdx.x % kRows);
  const float scale =
      own_row.is_there ? p.scales[tile.slot * p.scales_stride + own_row.part] : 0.0f;
  pdl_wait();
  const T* x = static_cast<const T*>(p.x) + (tile.begin + group) * p.x_stride;
  pieces.load_x(x, p.x_stride, tile.count, begin, end);
  for (int token = warp; token < tile.count; token += kWarps) {
    const float factor = norm_factor(p, tile.begin + token);
    if (lane == 0) factors[token] = factor;
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
      if constexpr (!kIsHalf) {
        partial[warp][group + 8][row] = sums[m][n][2];
        partial[warp][group + 8][row + 1] = sums[m][n][3];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTileTokens * kRows; i += kThreads) {
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

template <class T, int kTokenTiles, int kRowTiles, int kDepth, bool kIsAligned,
          bool kIsHalf = false>
cudaError_t launch_tiles(const LoraShrinkParams& p, cudaStream_t stream) {
  constexpr int kTokens = kMmaTokens * kTokenTiles, kRows = 8 * kRowTiles;
  const int row_blocks = (p.rows.num_parts * p.rows.max_rank + kRows - 1) / kRows;
  const int64_t num_pieces = (p.k + kPiece - 1) / kPiece, num_splits = p.out.num_splits;
  const int split_columns = static_cast<int>((num_pieces + num_splits - 1) / num_splits) * kPiece;
  const int64_t num_tiles = num_token_tiles(p.rows.num_tokens, kTokens, p.rows.num_slots);
  return launch_chained(shrink_kernel<T, kTokenTiles, kRowTiles, kDepth, kIsAligned, kIsHalf>,
                        static_cast<unsigned>(num_tiles * num_splits * row_blocks), kThreads, 0,
                        stream, p, row_blocks, split_columns);
}

template <class T>
cudaError_t launch_as(const LoraShrinkParams& p, cudaStream_t stream) {
  const bool is_aligned = p.k % kVec == 0 && is_vec_aligned(p.x, p.x_stride) &&
                          is_vec_aligned(p.a, p.a_slot_stride | p.a_part_stride | p.a_stride);
  if (!is_aligned) return launch_tiles<T, 1, 1, 1, false>(p, stream);
  if (p.rows.num_tokens <= kFewTokens) {
    const int num_rows = p.rows.num_parts * p.rows.max_rank;
    const int64_t num_tiles = num_token_tiles(p.rows.num_tokens, kMmaTokens, p.rows.num_slots);
    const bool is_small = num_tiles <= 2 ? num_rows <= 64 : num_rows <= 16;
    if (p.rows.num_tokens <= kHalfTokens && is_small) {
      return launch_tiles<T, 1, 1, 4, true, true>(p, stream);
    }
    if (num_rows <= 16) return launch_tiles<T, 1, 1, 4, true>(p, stream);
    if (num_rows <= 64) return launch_tiles<T, 1, 2, 4, true>(p, stream);
    return launch_tiles<T, 1, 4, 2, true>(p, stream);
  }
  if (p.rows.num_tokens > kManyTokens || p.out.num_splits == 1) {
    return launch_lora_shrink_many(p, stream);
  }
  return launch_tiles<T, 2, 2, 2, true>(p, stream);
}

}  // namespace

cudaError_t launch_lora_shrink(const LoraShrinkParams& params, cudaStream_t stream) {
  if (params.rows.num_tokens == 0) return cudaSuccess;
  return dispatch_half(params.dtype, [&]<class T>(T) { return launch_as<T>(params, stream); });
}

}  // namespace pyserve::gpu
