// grouped_few_rows.cuh with matrices of e4m3. The items are the same; copies of weight rows and
// products are those of few_rows_fp8.cuh, so a row's result is that of linear_fp8.
// Floor: rows_per_column * n * k bytes for each expert that has rows.
#pragma once

#include "gpu/experts/experts.h"
#include "gpu/experts/grouped_few_rows.cuh"
#include "gpu/experts/work_list.cuh"
#include "gpu/linear/few_rows_fp8.cuh"

namespace pyserve::gpu {

// As grouped_few_rows_kernel, with k a multiple of 16 and the weight's strides in bytes. The scales
// of neighbouring experts lie scale_stride apart.
template <class T, Epilogue kEpilogue, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    grouped_fp8_kernel(GroupedParams p, Fp8Scale scale, int64_t scale_stride) {
  using Rows = RowTile<kEpilogue, Tile::kRows>;
  constexpr int kLaneTokens = (Tile::kTokens + Tile::kLaneRows - 1) / Tile::kLaneRows;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  __shared__ WorkList list;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int n = p.n, k = p.k;
  const uint32_t ring = smem_address(dynamic_smem) + warp * Tile::kStages * Tile::kStageBytes;
  float* all_sums =
      reinterpret_cast<float*>(dynamic_smem + Tile::kWarps * Tile::kStages * Tile::kStageBytes);
  const auto* x = static_cast<const uint16_t*>(p.x);
  constexpr int kStepDepth = Tile::kWarps * Tile::kDepth;  // of k, for all warps together
  const int lane_row = lane / Tile::kChunks, lane_chunk = lane % Tile::kChunks;

  pdl_wait();
  pdl_launch_dependents();
  if (warp == 0) {
    list.make(p.offsets, p.num_experts, Tile::kTokens, (n + Rows::kColumns - 1) / Rows::kColumns);
  }
  __syncthreads();

  const auto matrix_of = [&](int expert) -> Fp8Rows<T, Rows, Tile> {
    Fp8Scale of_expert = scale;
    of_expert.data += scale_stride * expert;
    return {static_cast<const unsigned char*>(p.weight) + p.expert_stride * expert,
            p.weight_stride, of_expert, n, k};
  };
  struct Piece {  // of the CTA's work: an item and a position in k
    WorkPlace place;
    bool is_there;
    int k, expert, column, num_tokens;
    int tokens[kLaneTokens];  // the rows of x that this lane copies
  };
  const auto go_to = [&](Piece& piece, int item) {
    piece.place.item = item;
    piece.is_there = piece.place.is_there(list);
    piece.k = 0;
    if (!piece.is_there) return;
    const GroupedItem at = GroupedItem::at<Rows, Tile>(list, piece.place);
    piece.expert = at.expert;
    piece.column = at.column;
    piece.num_tokens = at.num_rows;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const int row = at.row + min(lane_row + i * Tile::kLaneRows, at.num_rows - 1);
      piece.tokens[i] = p.order == nullptr ? row : p.order[row] / p.top_k;
    }
  };
  const auto fetch_x = [&](const Piece& piece, uint32_t stage) {
#pragma unroll
    for (int half = 0; half < Tile::kHalves; ++half) {
      const int column = piece.k + warp * Tile::kDepth + half * 64 + lane_chunk * kVec;
      const uint32_t to = stage + Tile::kRows * Tile::kRowBytes + half * Tile::kXBytes;
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        const int row = lane_row + i * Tile::kLaneRows;
        const uint16_t* from = column < k ? x + p.x_stride * piece.tokens[i] + column : x;
        if (row < piece.num_tokens) {
          cp_async_16(to + chunk_offset<Tile>(row, lane_chunk), from, column < k);
        }
      }
    }
  };
  // Starts to copy a piece, if there is one left, and moves on to the next. It always commits a
  // group of copies, so that waits can count groups.
  const auto fetch = [&](Piece& piece, int stage) {
    if (piece.is_there) {
      const uint32_t to = ring + stage * Tile::kStageBytes;
      const int end = min(n, piece.column + Rows::kColumns);
      matrix_of(piece.expert).copy(to, piece.column, end, piece.k);
      fetch_x(piece, to);
      piece.k += kStepDepth;
      if (piece.k >= k) go_to(piece, piece.place.item + static_cast<int>(gridDim.x));
    }
    cp_async_commit();
  };
  Piece next{WorkPlace(static_cast<int>(blockIdx.x))};
  go_to(next, static_cast<int>(blockIdx.x));
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetch(next, stage);

  constexpr int kPassResults = Tile::kPassTokens * Rows::kColumns;
  constexpr int kResults = (kPassResults + Tile::kThreads - 1) / Tile::kThreads;  // per thread
  int stage = 0, buffer = 0, first_result = threadIdx.x;
  WorkPlace place(static_cast<int>(blockIdx.x));
  for (; place.is_there(list); place.item += static_cast<int>(gridDim.x)) {
    const GroupedItem at = GroupedItem::at<Rows, Tile>(list, place);
    const Fp8Rows<T, Rows, Tile> matrix = matrix_of(at.expert);
    Fp8Scales<Tile> scales;
    matrix.ask(at.column, 0, scales);
    Sums<Tile> sums = {};
#pragma unroll 1
    for (int k0 = 0; k0 < k; k0 += kStepDepth) {
      cp_async_wait<Tile::kStages - 2>();
      // All lanes' copies have landed, and all lanes have read the stage that is refilled now.
      __syncwarp();
      fetch(next, stage == 0 ? Tile::kStages - 1 : stage - 1);
      Fp8Scales<Tile> of_stage;
#pragma unroll
      for (int i = 0; i < 2 * Tile::kRowTiles; ++i) of_stage[i / 2][i % 2] = scales[i / 2][i % 2];
      if (k0 + kStepDepth < k) matrix.ask(at.column, k0 + kStepDepth, scales);
      multiply_fp8_stage<T, Tile>(ring + stage * Tile::kStageBytes, of_stage, sums);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    float* group_sums = all_sums + buffer * Tile::kSumFloats;
    put_sums<Tile>(group_sums + warp * Tile::kPassTokens * Tile::kSumStride, 0, at.num_rows, sums);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const int index = first_result + i * Tile::kThreads;
      const int token = index / Rows::kColumns, row = index % Rows::kColumns;
      if (index >= kPassResults || token >= at.num_rows || at.column + row >= n) continue;
      auto sum_of = [&](int weight_row) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < Tile::kWarps; ++w) {
          sum += group_sums[(w * Tile::kPassTokens + token) * Tile::kSumStride + weight_row];
        }
        return sum;
      };
      const float other = Rows::kIsPaired ? sum_of(row + Rows::kColumns) : 0.0f;
      static_cast<T*>(p.out)[p.out_stride * (at.row + token) + at.column + row] =
          from_float<T>(finish<kEpilogue>(sum_of(row), other));
    }
    buffer = (buffer + 1) % Tile::kBuffers;
    // Results go to other warps each time.
    first_result = (first_result + kWarpSize) % Tile::kThreads;
  }
  cp_async_wait<0>();
}

// One CTA per SM.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_grouped_fp8_tiled(const GroupedParams& p, const Fp8Scale& scale,
                                     int64_t scale_stride, int num_sms, cudaStream_t stream) {
  constexpr auto kKernel = grouped_fp8_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, Tile::kSmem>();
  if (error != cudaSuccess) return error;
  return launch_chained(kKernel, static_cast<unsigned>(num_sms), Tile::kThreads, Tile::kSmem,
                        stream, p, scale, scale_stride);
}

}  // namespace pyserve::gpu
