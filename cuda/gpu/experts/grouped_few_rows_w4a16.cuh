// grouped_few_rows.cuh with matrices of 4-bit integers. The items are of the same kind; copies of
// weight and products are those of few_rows_w4a16.cuh, so a row's result is that of linear_w4a16
// for few rows. An item has two strips (of 16 weight rows); with kSiluMul they are one of gate and
// the matching one of up. Each piece of weight comes with the piece of x that it is multiplied by,
// of the rows that the item has.
//
// Floor: 4.25 bits per element in groups of 128, for each expert that has rows.
#pragma once

#include "gpu/experts/experts.h"
#include "gpu/experts/grouped_few_rows.cuh"
#include "gpu/experts/work_list.cuh"
#include "gpu/linear/few_rows_w4a16.cuh"

namespace pyserve::gpu {

// Shared memory for a W4Tiling here. Each stage has a slot of its own for a piece of x.
template <class Tile>
constexpr int kGroupedW4SlotBytes = Tile::kTokens * Tile::kTokenBytes;
template <class Tile>
constexpr int kGroupedW4Smem = Tile::kRingBytes + Tile::kSumBytes +
                               Tile::kWarps * Tile::kStages * kGroupedW4SlotBytes<Tile>;

// Copies pieces of weight into a warp's ring and pieces of x into its slots: first all of the
// warp's pieces of one item, then those of the CTA's next item.
template <Epilogue kEpilogue, class Tile>
class GroupedW4Fetcher {
 public:
  using Rows = RowTile<kEpilogue, Tile::kRows>;

  // `ring` and `slots` belong to the warp alone.
  __device__ GroupedW4Fetcher(const GroupedParams& p, const WorkList& list, uint32_t ring,
                              uint32_t slots)
      : list_(list), packed_(static_cast<const unsigned char*>(p.weight)),
        expert_bytes_(p.expert_stride * 4), strip_bytes_(p.weight_stride * 4),
        piece_copy_(Rows::kIsPaired ? strip_bytes_ * (p.n / static_cast<int>(kStripRows))
                                    : strip_bytes_),
        x_stride_(p.x_stride), order_(p.order), top_k_(p.top_k), n_(p.n), k_(p.k), ring_(ring),
        slots_(slots), place_(static_cast<int>(blockIdx.x)) {
    const int lane = threadIdx.x % kWarpSize, token = lane / 16, chunk = lane % 16;
    x_ = static_cast<const uint16_t*>(p.x) + chunk * kVec;
    x_to_ = token * Tile::kTokenBytes + (chunk ^ token) * 16;
    begin(static_cast<int>(blockIdx.x));
  }

  // Starts to copy a piece, if there is one left, and moves on to the next. It always commits a
  // group of copies, so that waits can count groups.
  __device__ __forceinline__ void fetch(int stage) {
    if (is_there_) {
      piece_copy_.start(ring_ + stage * Tile::kStageBytes, weight_, num_tiles_,
                        W4PieceCopy<Tile>::is_whole(piece_ * Tile::kDepth, k_));
      fetch_x(slots_ + stage * kGroupedW4SlotBytes<Tile>);
      piece_ += Tile::kWarps;
      weight_ += Tile::kWarps * Tile::kPieceBytes;
      if (piece_ * Tile::kDepth >= k_) begin(place_.item + static_cast<int>(gridDim.x));
    }
    cp_async_commit();
  }

 private:
  __device__ void begin(int item) {
    const int lane = threadIdx.x % kWarpSize;
    place_.item = item;
    piece_ = static_cast<int>(threadIdx.x) / kWarpSize;
    is_there_ = piece_ * Tile::kDepth < k_ && place_.is_there(list_);
    if (!is_there_) return;
    const GroupedItem at = GroupedItem::at<Rows, Tile>(list_, place_);
    constexpr int kRows = static_cast<int>(kStripRows);
    const int strip = at.column / kRows;
    num_tiles_ = Rows::kIsPaired ? Tile::kRowTiles : (n_ + kRows - 1) / kRows - strip;
    num_tokens_ = at.num_rows;
    weight_ = packed_ + at.expert * expert_bytes_ + strip * strip_bytes_ +
              piece_ * Tile::kPieceBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < Tile::kTokens / 2; ++i) {
      const int row = at.row + min(lane / 16 + 2 * i, at.num_rows - 1);
      tokens_[i] = order_ == nullptr ? row : order_[row] / top_k_;
    }
  }

  __device__ __forceinline__ void fetch_x(uint32_t to) {
    const int lane = threadIdx.x % kWarpSize;
    const bool is_in_k = piece_ * Tile::kDepth + lane % 16 * kVec < k_;
    const uint16_t* piece = x_ + piece_ * Tile::kDepth;
#pragma unroll
    for (int i = 0; i < Tile::kTokens / 2; ++i) {
      // Chunk c of row r lies at c ^ r % 8, so the same chunk of 8 rows lies in different banks.
      const uint32_t place = to + (x_to_ ^ (2 * i & 6) * 16) + 2 * i * Tile::kTokenBytes;
      if (lane / 16 + 2 * i < num_tokens_) {
        cp_async_16(place, piece + x_stride_ * tokens_[i], is_in_k);
      }
    }
  }

  const WorkList& list_;
  const unsigned char* packed_;
  int64_t expert_bytes_, strip_bytes_;
  W4PieceCopy<Tile> piece_copy_;
  const uint16_t* x_;  // from this lane's columns on
  int64_t x_stride_;
  const int32_t* order_;
  int top_k_, n_, k_;
  uint32_t ring_, slots_, x_to_;
  WorkPlace place_;
  // Of the item whose pieces are being copied.
  bool is_there_ = false;
  int piece_ = 0, num_tiles_ = 0, num_tokens_ = 0;
  const unsigned char* weight_ = nullptr;
  int tokens_[Tile::kTokens / 2];  // the rows of x that this lane copies
};

// As grouped_few_rows_kernel; the strides of the weight are explained at launch_grouped_w4a16.
template <class T, Epilogue kEpilogue, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) grouped_w4a16_kernel(GroupedParams p) {
  using Rows = RowTile<kEpilogue, Tile::kRows>;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  __shared__ WorkList list;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  unsigned char* ring = dynamic_smem + warp * Tile::kStages * Tile::kStageBytes;
  float* all_sums = reinterpret_cast<float*>(dynamic_smem + Tile::kRingBytes);
  const uint32_t slots = smem_address(dynamic_smem) + Tile::kRingBytes + Tile::kSumBytes +
                         warp * Tile::kStages * kGroupedW4SlotBytes<Tile>;

  pdl_wait();
  pdl_launch_dependents();
  if (warp == 0) {
    list.make(p.offsets, p.num_experts, Tile::kTokens,
              (p.n + Rows::kColumns - 1) / Rows::kColumns);
  }
  __syncthreads();

  GroupedW4Fetcher<kEpilogue, Tile> fetcher(p, list, smem_address(ring), slots);
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetcher.fetch(stage);

  // Address within a slot; results of rows that the item lacks are not stored.
  uint32_t lane_x[Tile::kTokenTiles];
#pragma unroll
  for (int tokens = 0; tokens < Tile::kTokenTiles; ++tokens) {
    const int token = 8 * tokens + lane % 8;
    lane_x[tokens] = slots + token * Tile::kTokenBytes + (lane / 8 ^ token % 8) * 16;
  }
  const int num_pieces = (p.k + Tile::kDepth - 1) / Tile::kDepth;
  int stage = 0, buffer = 0, first_result = threadIdx.x;
  WorkPlace place(static_cast<int>(blockIdx.x));
  for (; place.is_there(list); place.item += static_cast<int>(gridDim.x)) {
    const GroupedItem at = GroupedItem::at<Rows, Tile>(list, place);
    Sums<Tile> sums = {};
#pragma unroll 1
    for (int piece = warp; piece < num_pieces; piece += Tile::kWarps) {
      cp_async_wait<Tile::kStages - 2>();
      // All lanes' copies have landed, and all lanes have read the stage that is refilled now.
      __syncwarp();
      fetcher.fetch(stage == 0 ? Tile::kStages - 1 : stage - 1);
      multiply_piece<T, Tile>(ring + stage * Tile::kStageBytes, lane_x,
                              stage * kGroupedW4SlotBytes<Tile>, sums);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    finish_item<T, kEpilogue, Tile>(p, at, sums, all_sums, buffer, first_result);
    // Results go to other warps each time.
    first_result = (first_result + kWarpSize) % Tile::kThreads;
  }
  cp_async_wait<0>();
}

// One CTA per SM.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_grouped_w4a16_tiled(const GroupedParams& p, int num_sms, cudaStream_t stream) {
  constexpr auto kKernel = grouped_w4a16_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, kGroupedW4Smem<Tile>>();
  if (error != cudaSuccess) return error;
  return launch_chained(kKernel, static_cast<unsigned>(num_sms), Tile::kThreads,
                        kGroupedW4Smem<Tile>, stream, p);
}

// Launches with the tiling that Tilings has for the group size.
template <template <int> class Tilings>
cudaError_t launch_grouped_w4a16_as(const GroupedParams& p, int64_t group_size, int num_sms,
                                    cudaStream_t stream) {
  return dispatch_half(p.dtype, [&]<class T>(T) {
    return dispatch_group_size(group_size, [&](auto size) {
      using Tile = Tilings<decltype(size)::value>;
      if (p.epilogue == Epilogue::kSiluMul) {
        return launch_grouped_w4a16_tiled<T, Epilogue::kSiluMul, Tile>(p, num_sms, stream);
      }
      return launch_grouped_w4a16_tiled<T, Epilogue::kStore, Tile>(p, num_sms, stream);
    });
  });
}

}  // namespace pyserve::gpu
