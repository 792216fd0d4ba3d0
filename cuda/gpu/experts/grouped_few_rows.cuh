// grouped_linear and grouped_linear_silu_mul for few rows per expert, in bfloat16 or float16: x
// [rows, k], one matrix [rows_per_column * n, k] per expert, out [rows, n]. The work is to stream
// the matrices of the experts that have rows, once. It is done as in few_rows.cuh for one matrix,
// with the same ring, products and order of sums. Here a CTA works through items; an item is an
// expert, a block of up to kTokens of its rows, and a group of 16 or 32 rows of its weight.
//
// There is one CTA per SM, and items are dealt to the CTAs in turn. The blocks of rows that use the
// same weight rows are neighbours in this order, so only the first block reads them from memory and
// the others find them in L2. Which experts have rows is known only when the kernel in front has
// ended, so nothing can be loaded before that.
//
// Numerics: as few_rows.cuh. A row's result is that of linear, whatever other rows its expert has.
// Floor: rows_per_column * n * k * 2 bytes for each expert that has rows.
#pragma once

#include "gpu/experts/experts.h"
#include "gpu/experts/work_list.cuh"
#include "gpu/linear/few_rows.cuh"

namespace pyserve::gpu {

// Where an item lies: its expert, its first column of out, and its rows.
struct GroupedItem {
  int expert, column;
  int row, num_rows;  // row counts sorted rows of x, which are the rows of out

  template <class Rows, class Tile>
  __device__ static GroupedItem at(const WorkList& list, const WorkPlace& place) {
    const int index = place.item - list.first_item[place.entry];
    const int first = list.first_row[place.entry], count = list.end_row[place.entry] - first;
    int group = index, block = 0;
    if (count > Tile::kTokens) {
      const int num_blocks = (count + Tile::kTokens - 1) / Tile::kTokens;
      group = index / num_blocks;
      block = index - group * num_blocks;
    }
    return {list.expert[place.entry], group * Rows::kColumns, first + block * Tile::kTokens,
            min(Tile::kTokens, count - block * Tile::kTokens)};
  }
};

// Adds up the warps' sums of an item, applies the epilogue and stores the results. All threads call
// this; first_result, different for each, is the index of the thread's first result.
template <class T, Epilogue kEpilogue, class Tile>
__device__ __forceinline__ void finish_item(const GroupedParams& p, const GroupedItem& at,
                                            const Sums<Tile>& sums, float* all_sums, int& buffer,
                                            int first_result) {
  using Rows = RowTile<kEpilogue, Tile::kRows>;
  constexpr int kPassResults = Tile::kPassTokens * Rows::kColumns;
  constexpr int kResults = (kPassResults + Tile::kThreads - 1) / Tile::kThreads;  // per thread
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int pass = 0; pass < Tile::kPasses; ++pass) {
    if (Tile::kBuffers == 1) __syncthreads();  // all threads have read the earlier sums
    float* group_sums = all_sums + buffer * Tile::kSumFloats;
    put_sums<Tile>(group_sums + warp * Tile::kPassTokens * Tile::kSumStride, pass, at.num_rows,
                   sums);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const int index = first_result + i * Tile::kThreads;
      const int pass_token = index / Rows::kColumns, row = index % Rows::kColumns;
      const int token = pass * Tile::kPassTokens + pass_token, column = at.column + row;
      if (index >= kPassResults || token >= at.num_rows || column >= p.n) continue;
      auto sum_of = [&](int weight_row) {
        return sum_of_warps<Tile>(group_sums, pass_token, weight_row);
      };
      const float other = Rows::kIsPaired ? sum_of(row + Rows::kColumns) : 0.0f;
      static_cast<T*>(p.out)[p.out_stride * (at.row + token) + column] =
          from_float<T>(finish<kEpilogue>(sum_of(row), other));
    }
    buffer = (buffer + 1) % Tile::kBuffers;
  }
}

// k > 0 and a multiple of 8; rows are aligned to 16 bytes.
template <class T, Epilogue kEpilogue, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) grouped_few_rows_kernel(GroupedParams p) {
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
  const auto* weight = static_cast<const uint16_t*>(p.weight);
  constexpr int kStepDepth = Tile::kWarps * Tile::kDepth;  // of k, for all warps together
  const int lane_row = lane / Tile::kChunks, lane_chunk = lane % Tile::kChunks;
  const int lane_k = warp * Tile::kDepth + lane_chunk * kVec;
  const uint32_t lane_to = ring + chunk_offset<Tile>(lane_row, lane_chunk);

  pdl_wait();
  pdl_launch_dependents();
  if (warp == 0) {
    list.make(p.offsets, p.num_experts, Tile::kTokens, (n + Rows::kColumns - 1) / Rows::kColumns);
  }
  __syncthreads();

  struct Piece {  // of the CTA's work: an item and a position in k
    WorkPlace place;
    bool is_there;
    int k;
    int num_rows;  // weight rows of one half of the tile, counted from the lane's first
    int num_tokens;
    const uint16_t* weight;
    int tokens[kLaneTokens];  // the rows of x that this lane copies
  };
  const auto go_to = [&](Piece& piece, int item) {
    piece.place.item = item;
    piece.is_there = piece.place.is_there(list);
    piece.k = 0;
    if (!piece.is_there) return;
    const GroupedItem at = GroupedItem::at<Rows, Tile>(list, piece.place);
    piece.num_rows = min(Rows::kColumns, n - at.column) - lane_row;
    piece.num_tokens = at.num_rows;
    piece.weight = weight + p.expert_stride * at.expert +
                   p.weight_stride * (at.column + lane_row) + lane_k;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const int row = at.row + min(lane_row + i * Tile::kLaneRows, at.num_rows - 1);
      piece.tokens[i] = p.order == nullptr ? row : p.order[row] / p.top_k;
    }
  };
  // Starts to copy a piece, if there is one left, and moves on to the next. It always commits a
  // group of copies, so that waits can count groups.
  const auto fetch = [&](Piece& piece, int stage) {
    if (piece.is_there) {
      const uint32_t to = lane_to + stage * Tile::kStageBytes;
      const bool is_in_k = piece.k + lane_k < k;
      const uint16_t* from = is_in_k ? piece.weight : weight;
      copy_rows<Tile, Rows::kColumns>(to, from, p.weight_stride, piece.num_rows, is_in_k);
      if (Rows::kIsPaired) {
        copy_rows<Tile, Rows::kColumns>(to + Rows::kColumns * Tile::kRowBytes,
                                        from + p.weight_stride * n, p.weight_stride,
                                        piece.num_rows, is_in_k);
      }
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        const int row = i * Tile::kLaneRows;
        const uint32_t place =  // the chunk_offset of the lane's row of x
            ((to + Tile::kRows * Tile::kRowBytes) ^ (row & 4) * 16) + row * Tile::kRowBytes;
        const uint16_t* token = x + p.x_stride * piece.tokens[i] + lane_k + piece.k;
        if (lane_row + row < piece.num_tokens) cp_async_16(place, is_in_k ? token : x, is_in_k);
      }
      piece.k += kStepDepth;
      piece.weight += kStepDepth;
      if (piece.k >= k) go_to(piece, piece.place.item + static_cast<int>(gridDim.x));
    }
    cp_async_commit();
  };
  Piece next{WorkPlace(static_cast<int>(blockIdx.x))};
  go_to(next, static_cast<int>(blockIdx.x));
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetch(next, stage);

  int stage = 0, buffer = 0, first_result = threadIdx.x;
  WorkPlace place(static_cast<int>(blockIdx.x));
  for (; place.is_there(list); place.item += static_cast<int>(gridDim.x)) {
    const GroupedItem at = GroupedItem::at<Rows, Tile>(list, place);
    Sums<Tile> sums = {};
#pragma unroll 1
    for (int k0 = 0; k0 < k; k0 += kStepDepth) {
      cp_async_wait<Tile::kStages - 2>();
      // All lanes' copies have landed, and all lanes have read the stage that is refilled now.
      __syncwarp();
      fetch(next, stage == 0 ? Tile::kStages - 1 : stage - 1);
      multiply_stage<T, Tile>(ring + stage * Tile::kStageBytes, sums);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    finish_item<T, kEpilogue, Tile>(p, at, sums, all_sums, buffer, first_result);
    // With few results per item, they go to other warps each time: a warp that stores results
    // starts its next copies later.
    first_result = (first_result + kWarpSize) % Tile::kThreads;
  }
  cp_async_wait<0>();
}

// One CTA per SM.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_grouped_tiled(const GroupedParams& p, int num_sms, cudaStream_t stream) {
  constexpr auto kKernel = grouped_few_rows_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, Tile::kSmem>();
  if (error != cudaSuccess) return error;
  return launch_chained(kKernel, static_cast<unsigned>(num_sms), Tile::kThreads, Tile::kSmem,
                        stream, p);
}

}  // namespace pyserve::gpu
