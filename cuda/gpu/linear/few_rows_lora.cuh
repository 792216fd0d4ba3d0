// What adapters add, in the kernels that multiply few rows by the base model's weight: the second
// of their two products is a stage or a few more of each group, in the warps' rings like the
// weight's.
//
//   sums[t, j] += sum over r of shrunk[t, p, r] * b[s, j, r], before the norm's factor and the
//   bias, with s the slot of t's adapter, p the part of row j of weight, r below its rank
//
// A piece of that work is the rows of B of one part and one slot by kLoraDepth of r. Which pieces
// there are is known on the card alone: they are listed before the kernel waits for the one in
// front, from `starts` and ranks, which segments.cuh says may be read there. Behind the stages of
// weight of a group each warp takes every kWarps-th of the group's pieces, other warps the first
// ones in the next group. B does not depend on x and is asked for like the weight: in the order of
// the ring, stages ahead of its use, so that it waits behind nothing.
// What was shrunk is read once behind the wait, its splits are added up, and it stands in shared
// memory as the sum of two 16-bit numbers, as staging.cuh's, both of which meet the same rows of B.
// The sum of a piece is kept apart from the warps' own, for its slot's tokens and its part's rows,
// and is added behind theirs: so no other token's adapter changes the order of a row's sum, or is
// multiplied with it.
//
// Numerics: float32 sums in the order of r; of more than kLoraDepth of r, of the pieces in order.
// Floor: bytes, 2 * rank of each row of B.
#pragma once

#include "gpu/linear/few_rows.cuh"
#include "gpu/linear/linear_lora.h"
#include "gpu/lora/staging.cuh"

namespace pyserve::gpu {

struct alignas(16) LoraPiece {
  int b;                 // element of b: of row 0 of all parts, of the first r
  uint16_t place, left;  // of the first r: in units of kLoraUnit; how many there are from it on
  uint16_t begin, end;   // tokens
  uint16_t part, sum;    // sum: the how manieth of its slot and part
};

constexpr int kLoraUnit = 16;  // of r: one mma

// Shared memory behind what the tile takes, in bytes.
template <class Tile>
struct LoraRoom {
  int num_tokens, num_parts;
  int num_units;   // of max_rank
  int num_sums;    // pieces of one slot and part at most
  int max_pieces;  // of one part, of all slots
  int sum_floats;  // of all tokens' sums of as many pieces
  int shrunk, sums, pieces, ranks, counts, bounds, end;

  __host__ __device__ explicit LoraRoom(const LoraRows& rows)
      : num_tokens(static_cast<int>(rows.num_tokens)), num_parts(rows.num_parts),
        num_units((rows.max_rank + kLoraUnit - 1) / kLoraUnit),
        num_sums((rows.max_rank + Tile::kLoraDepth - 1) / Tile::kLoraDepth),
        max_pieces(num_sums * (num_tokens < rows.num_slots ? num_tokens : rows.num_slots)),
        sum_floats(num_sums * num_tokens * Tile::kSumStride) {
    shrunk = 0;
    sums = shrunk + num_parts * num_units * num_tokens * kUnitBytes;
    pieces = sums + 2 * sum_floats * 4;
    ranks = pieces + num_parts * max_pieces * static_cast<int>(sizeof(LoraPiece));
    counts = ranks + num_parts * num_tokens * 4;
    bounds = counts + num_parts * 4;
    end = (bounds + (num_parts + 1) * 4 + 15) / 16 * 16;
  }

  // Of kLoraUnit numbers of a token, each as two.
  static constexpr int kUnitBytes = 4 * kLoraUnit;
};

// Of a row of B in a stage.
template <class Tile>
constexpr int kLoraRowBytes = 2 * Tile::kLoraDepth;

// Where chunk `chunk` of it lies: of 8 rows in different banks.
template <class Tile>
__device__ __forceinline__ uint32_t lora_offset(int row, int chunk) {
  constexpr int kRowBytes = kLoraRowBytes<Tile>, kBankRows = 128 / kRowBytes;
  static_assert(Tile::kRows * kRowBytes <= Tile::kStageBytes);
  return row * kRowBytes + (chunk ^ row / kBankRows % (8 / kBankRows)) * 16;
}

// Where a chunk of a token lies in a unit of what was shrunk: likewise.
__device__ __forceinline__ int swizzled(int token, int chunk) {
  return (chunk ^ token / 2 % 4) * 16;
}

// Of a group, the piece that a warp takes next.
struct LoraCursor {
  int part = 0, last = -1;  // no piece where part is beyond the last one
  int index = 0;            // in the part

  __device__ bool has_piece() const { return part <= last; }
};

// Which pieces there are, and whose turn it is.
template <class Rows, class Tile>
class LoraList {
 public:
  using Cursor = LoraCursor;

  // n: columns of out; smem: of LoraRoom's size.
  __device__ __forceinline__ LoraList(const LinearLora& lora, int n, unsigned char* smem)
      : l_(lora), room_(lora.rows), n_(n), smem_(smem) {}

  // Before the wait: lists the pieces, which are there behind the next barrier.
  __device__ __forceinline__ void list() {
    const LoraRows& rows = l_.rows;
    for (int i = threadIdx.x; i < room_.num_parts * room_.num_tokens; i += Tile::kThreads) {
      ranks()[i] = 0;
    }
    if (static_cast<int>(threadIdx.x) < room_.num_parts) counts()[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < rows.num_slots * rows.num_parts; i += Tile::kThreads) {
      list_of(i / rows.num_parts, i % rows.num_parts);
    }
    // Other warps, which wait for these alone.
    const int part = Tile::kThreads - 1 - static_cast<int>(threadIdx.x);
    if (part < room_.num_parts) {
      const int begin = __ldcg(l_.columns + part), end = __ldcg(l_.columns + part + 1);
      if (begin < 0 || begin > end || end > l_.num_rows) __trap();
      bounds()[part] = begin, bounds()[part + 1] = end;
    }
  }

  // This warp's first piece of the group of columns [column, end).
  __device__ __forceinline__ Cursor first(int column, int end) const {
    Cursor cursor{0, room_.num_parts - 1, 0};
    if constexpr (!Rows::kIsPaired) {
      while (cursor.part < cursor.last && bounds()[cursor.part + 1] <= column) ++cursor.part;
      while (cursor.last > cursor.part && bounds()[cursor.last] >= end) --cursor.last;
    }
    const unsigned turn = static_cast<unsigned>(column) / Rows::kColumns;
    cursor.index = (threadIdx.x / kWarpSize - turn) % Tile::kWarps;
    settle(cursor);
    return cursor;
  }

  __device__ __forceinline__ void go_on(Cursor& cursor) const {
    cursor.index += Tile::kWarps;
    settle(cursor);
  }

 protected:
  // The row of weight that row `row` of a tile is, of the group that begins at `column`.
  __device__ __forceinline__ int weight_row_of(int row, int column) const {
    if (Rows::kIsPaired && row >= Rows::kColumns) return n_ + column + row - Rows::kColumns;
    return column + row;
  }

  __device__ __forceinline__ bool has_row(int part, int row, int weight_row,
                                          int num_columns) const {
    return row % Rows::kColumns < num_columns && weight_row >= bounds()[part] &&
           weight_row < bounds()[part + 1];
  }

  __device__ __forceinline__ LoraPiece piece_of(const Cursor& cursor) const {
    return pieces()[cursor.part * room_.max_pieces + cursor.index];
  }
  // By part and token; how many pieces a part has; as `columns`.
  __device__ __forceinline__ int* ranks() const {
    return reinterpret_cast<int*>(smem_ + room_.ranks);
  }
  __device__ __forceinline__ int* counts() const {
    return reinterpret_cast<int*>(smem_ + room_.counts);
  }
  __device__ __forceinline__ int* bounds() const {
    return reinterpret_cast<int*>(smem_ + room_.bounds);
  }

  const LinearLora& l_;
  LoraRoom<Tile> room_;
  int n_;
  unsigned char* smem_;

 private:
  __device__ __forceinline__ void list_of(int slot, int part) const {
    const LoraRows& rows = l_.rows;
    const int begin = __ldcg(rows.starts + slot), end = __ldcg(rows.starts + slot + 1);
    const int rank = __ldcg(rows.ranks + slot * rows.ranks_stride + part);
    if (begin < 0 || begin > end || end > room_.num_tokens || rank < 0 || rank > rows.max_rank) {
      __trap();
    }
    if (begin == end || rank == 0) return;
    for (int token = begin; token < end; ++token) ranks()[part * room_.num_tokens + token] = rank;
    const int count = (rank + Tile::kLoraDepth - 1) / Tile::kLoraDepth;
    // In any order: each piece has sums of its own.
    LoraPiece* own = pieces() + part * room_.max_pieces + atomicAdd(counts() + part, count);
    for (int i = 0; i < count; ++i) {
      const int r = i * Tile::kLoraDepth;
      own[i] = {static_cast<int>(slot * l_.b_slot_stride) + r,
                static_cast<uint16_t>(r / kLoraUnit), static_cast<uint16_t>(rank - r),
                static_cast<uint16_t>(begin),         static_cast<uint16_t>(end),
                static_cast<uint16_t>(part),          static_cast<uint16_t>(i)};
    }
  }

  // The index counted from the part that it lies in.
  __device__ __forceinline__ void settle(Cursor& cursor) const {
    while (cursor.has_piece() && cursor.index >= counts()[cursor.part]) {
      cursor.index -= counts()[cursor.part++];
    }
  }

  __device__ __forceinline__ LoraPiece* pieces() const {
    return reinterpret_cast<LoraPiece*>(smem_ + room_.pieces);
  }
};

// All of it, as a kernel for few rows calls it; all threads call each.
template <class T, class Rows, class Tile>
class Lora : public LoraList<Rows, Tile> {
  using List = LoraList<Rows, Tile>;
  using List::bounds, List::has_row, List::l_, List::piece_of, List::ranks, List::room_,
      List::smem_, List::weight_row_of;

 public:
  static constexpr bool kIsThere = true;
  using List::List;
  using typename List::Cursor;

  // Behind the wait: what was shrunk to shared memory, where it is behind the next barrier.
  __device__ __forceinline__ void fill() {
    constexpr int kFours = kLoraUnit / 4;
    const int num_fours = room_.num_units * kFours;
    const int count = room_.num_parts * room_.num_tokens * num_fours;
    // From the last thread on: the first ones have the norm's factors.
    for (int i = Tile::kThreads - 1 - static_cast<int>(threadIdx.x); i < count;
         i += Tile::kThreads) {
      const int pair = i / num_fours, four = i % num_fours, r = 4 * four;
      const int part = pair / room_.num_tokens, token = pair % room_.num_tokens;
      const int rank = ranks()[pair];
      if (four / kFours * kLoraUnit >= rank) continue;
      const float* row = l_.shrunk.data + token * l_.shrunk.stride + part * l_.shrunk.part_stride;
      float4 sum{};
      const int num_splits = r < rank ? l_.shrunk.num_splits : 0;
#pragma unroll 8
      for (int split = 0; split < num_splits; ++split) {
        add_four<true>(sum, row + split * l_.shrunk.split_stride, r, rank);
      }
      sum = below_rank(sum, r, rank);
      const Halves halves = Halves::of<T>(sum, sum);
      unsigned char* unit =
          smem_ + room_.shrunk +
          ((part * room_.num_units + four / kFours) * room_.num_tokens + token) * room_.kUnitBytes;
      const int chunk = four % kFours / 2, offset = four % 2 * 8;
      const uint2 value{halves.value.x, halves.value.z}, rest{halves.rest.x, halves.rest.z};
      *reinterpret_cast<uint2*>(unit + swizzled(token, chunk) + offset) = value;
      *reinterpret_cast<uint2*>(unit + swizzled(token, chunk + 2) + offset) = rest;
    }
  }

  // Starts to copy a piece to this stage, the rows of B of columns [column, end).
  __device__ __forceinline__ void copy(uint32_t stage, const Cursor& cursor, int column,
                                       int end) const {
    constexpr int kChunks = Tile::kLoraDepth / kVec, kLaneRows = kWarpSize / kChunks;
    const LoraPiece piece = piece_of(cursor);
    const int lane = threadIdx.x % kWarpSize, chunk = lane % kChunks;
    const int num_bytes = max(0, min(16, 2 * (piece.left - chunk * kVec)));
    const T* b = static_cast<const T*>(l_.b) + piece.b + chunk * kVec;
#pragma unroll
    for (int i = 0; i < Tile::kRows; i += kLaneRows) {
      const int row = i + lane / kChunks, weight_row = weight_row_of(row, column);
      const bool is_there = has_row(piece.part, row, weight_row, end - column);
      const T* from = is_there ? b + weight_row * l_.b_stride : b;
      cp_async_some(stage + lora_offset<Tile>(row, chunk), from, is_there ? num_bytes : 0);
    }
  }

  // The sums of a piece, which lies in this stage.
  __device__ __forceinline__ void multiply(uint32_t stage, const Cursor& cursor, int column,
                                           int end) {
    const LoraPiece piece = piece_of(cursor);
    const int lane = threadIdx.x % kWarpSize;
    const int unit_step = room_.num_tokens * room_.kUnitBytes;
    uint32_t x[Tile::kTokenTiles];
#pragma unroll
    for (int tokens = 0; tokens < Tile::kTokenTiles; ++tokens) {
      const int token = min(8 * tokens + lane % 8, room_.num_tokens - 1);
      x[tokens] = smem_address(smem_ + room_.shrunk) +
                  (piece.part * room_.num_units + piece.place) * unit_step +
                  token * room_.kUnitBytes + swizzled(token, lane / 8);
    }
    const uint32_t weight = stage + lora_offset<Tile>(lane % 16, lane / 16);
    Sums<Tile> sums = {};
#pragma unroll 1
    for (int unit = 0; unit < Tile::kLoraDepth / kLoraUnit; ++unit) {
      if (unit * kLoraUnit >= piece.left) break;
      uint32_t columns[Tile::kTokenTiles][4];
#pragma unroll
      for (int tokens = 0; tokens < Tile::kTokenTiles; ++tokens) {
        ldmatrix_x4(columns[tokens], x[tokens] + unit * unit_step);
      }
#pragma unroll
      for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
        uint32_t rows[4];
        ldmatrix_x4(rows, (weight ^ unit * 32) + 16 * tile * kLoraRowBytes<Tile>);
#pragma unroll
        for (int tokens = 0; tokens < Tile::kTokenTiles; ++tokens) {
          mma_16816<T>(sums[tile][tokens], rows, columns[tokens][0], columns[tokens][1]);
          mma_16816<T>(sums[tile][tokens], rows, columns[tokens][2], columns[tokens][3]);
        }
      }
    }
    put(piece, column, end, sums);
  }

  // Behind a group's barrier: what is added to the sum of a token and this row of the tile.
  __device__ __forceinline__ float sum_of(int token, int row, int weight_row) const {
    float sum = 0.0f;
    for (int part = 0; part < room_.num_parts; ++part) {
      if (weight_row < bounds()[part] || weight_row >= bounds()[part + 1]) continue;
      const int rank = ranks()[part * room_.num_tokens + token];
      for (int i = 0; i * Tile::kLoraDepth < rank; ++i) {
        sum += sums_of(i)[token * Tile::kSumStride + row];
      }
    }
    return sum;
  }

  // Before the next group. With two rooms for sums the barrier that a group has is enough: the next
  // one's comes before this room is written again.
  __device__ __forceinline__ void turn() { half_ ^= 1; }

 private:
  // Leaves them for its tokens and rows.
  __device__ __forceinline__ void put(const LoraPiece& piece, int column, int end,
                                      const Sums<Tile>& sums) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2 * Tile::kRowTiles; ++half) {
      const int row = 8 * half + lane / 4;
      if (!has_row(piece.part, row, weight_row_of(row, column), end - column)) continue;
      float* to = sums_of(piece.sum) + row;
#pragma unroll
      for (int i = 0; i < 2 * Tile::kTokenTiles; ++i) {
        const int token = 8 * (i / 2) + lane % 4 * 2 + i % 2;
        if (token < piece.begin || token >= piece.end) continue;
        to[token * Tile::kSumStride] = sums[half / 2][i / 2][half % 2 * 2 + i % 2];
      }
    }
  }

  __device__ __forceinline__ float* sums_of(int index) const {
    return reinterpret_cast<float*>(smem_ + room_.sums) + half_ * room_.sum_floats +
           index * room_.num_tokens * Tile::kSumStride;
  }
  int half_ = 0;  // of the room for sums
};

// linear_kernel with adapters.
template <class T, Epilogue kEpilogue, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_lora_kernel(const __grid_constant__ LinearParams p, Shares shares,
                       const __grid_constant__ LinearLora lora) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  using Rows = RowTile<kEpilogue, Tile::kRows>;
  multiply_rows<T, kEpilogue, Tile>(
      p, shares, dynamic_smem,
      Lora<T, Rows, Tile>(lora, static_cast<int>(p.n), dynamic_smem + Tile::kSmem));
}

// Of a card whose blocks may have 227 KB, or 99, less what a kernel has that is not dynamic.
template <class Tile>
constexpr int kMaxLoraSmem = (Tile::kSmem > 99 * 1024 ? 227 : 99) * 1024 - 128;

// Whether what is behind the tile has room.
template <class Tile>
bool fits_lora(const LinearLora& lora) {
  return Tile::kSmem + LoraRoom<Tile>(lora.rows).end <= kMaxLoraSmem<Tile>;
}

// As launch_tiled, where it fits.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_lora_tiled(const LinearParams& p, const LinearLora& lora, int num_sms,
                              cudaStream_t stream) {
  constexpr auto kKernel = linear_lora_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, kMaxLoraSmem<Tile>>();
  if (error != cudaSuccess) return error;
  const Grid<kEpilogue, Tile> grid(p.n, num_sms);
  return launch_chained(kKernel, static_cast<unsigned>(grid.num_ctas), Tile::kThreads,
                        Tile::kSmem + LoraRoom<Tile>(lora.rows).end, stream, p, grid.shares, lora);
}

}  // namespace pyserve::gpu
