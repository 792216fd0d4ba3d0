// What the kernels of lora_expand have in common.
//
// lora_expand: out[t, j] += sum over r of shrunk[t, p, r] * b[s, j, r], where s is the slot of
// token t's adapter, p the part (one of several fused matrices, such as q, k and v) that column j
// belongs to, and r runs up to the part's rank.
//   shrunk float32 [num_splits, num_tokens, num_parts, max_rank], to be summed over the splits
//   b [num_slots, n, max_rank] and out [num_tokens, n], bfloat16 or float16
// lora_expand_silu_mul: the same is added to gate_up [num_tokens, 2 n] = gate | up, which are two
// parts or one, and out = silu(gate) * up. It computes all tokens, also those without an adapter.
//
// Work: a CTA takes some tokens of one slot by 256 columns. Each of its 4 warps takes two strips of
// 32 columns: two neighbouring ones of one part, or one of gate and the matching one of up. Tiles
// of columns begin at a part's first column, so no tile has two parts. The grid depends on shapes
// alone; CTAs beyond the last tile end at once. An mma may take its 16 of r in any order that both
// operands share; here each lane takes 4 neighbours, which are one load. In the same way the
// columns of a strip are dealt to its four mma so that a lane gets 8 neighbouring columns of the
// result. `shrunk` is float32. It is multiplied as the sum of two 16-bit numbers, which keeps at
// least 16 bits of its mantissa. A CTA sums the splits and divides the elements in two only once,
// into shared memory, for all of its warps; a warp reads the first 16 of r of B once for all of its
// tokens. For 16 more tokens there remain reading the addends, multiplying and writing.
// Numerics: float32 sums that begin with the addend, and one rounding. Their order depends on the
// rank and the number of splits alone.
// Bound by bytes: 2 * rank for each column of B, and 4 for each element of out (6 for
// lora_expand_silu_mul).
#pragma once

#include <algorithm>

#include "gpu/core/gate.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/lora/segments.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kStrip = 32;                     // columns of a strip
constexpr int kTiles = kStrip / 8;             // mma per strip
constexpr int kColumns = kWarps * 2 * kStrip;  // columns of a CTA
constexpr int kPiece = 16;                     // a piece: so many of r, the depth of one mma
constexpr int kMaxRank = 512;
// Shared memory for `shrunk`: the usual limit, and what the highest rank needs.
constexpr int kStagedBytes = 16 * 1024, kMaxStagedBytes = 64 * 1024;

// Some columns of one part, numbered as the rows of b and the columns of the addend. With rank 0
// nothing is added.
struct Strip {
  int part, first, end, rank;
};

// The block-th tile of kColumns columns; its part is -1 beyond the last tile.
__device__ __forceinline__ Strip column_tile(const LoraExpandParams& p, int block) {
  for (int part = 0; part < p.rows.num_parts; ++part) {
    const int begin = p.columns[part], end = p.columns[part + 1];
    if (begin < 0 || begin > end || end > p.n) __trap();
    const int num_blocks = (end - begin + kColumns - 1) / kColumns;
    if (block < num_blocks) return {part, begin + block * kColumns, end, 0};
    block -= num_blocks;
  }
  return {-1, 0, 0, 0};
}

// The two strips of a warp; their rank is 0 where the CTA has nothing to add.
template <bool kIsGated>
__device__ __forceinline__ void strips_of(const LoraExpandParams& p, int slot, int block, int warp,
                                          Strip (&strips)[2]) {
  if constexpr (kIsGated) {
    const int n = static_cast<int>(p.n), last = p.rows.num_parts - 1;
    const bool is_split = p.columns[last] == (last == 0 ? 0 : n);
    if (last > 1 || p.columns[0] != 0 || !is_split || p.columns[last + 1] != 2 * n) __trap();
    const int first = (block * kWarps + warp) * kStrip;
    strips[0] = {0, first, n, slot == kNoSlot ? 0 : rank_of(p.rows, slot, 0)};
    strips[1] = {last, n + first, 2 * n, slot == kNoSlot ? 0 : rank_of(p.rows, slot, last)};
  } else {
    Strip tile = column_tile(p, block);
    if (tile.part >= 0 && slot != kNoSlot) tile.rank = rank_of(p.rows, slot, tile.part);
    tile.first += warp * 2 * kStrip;
    strips[0] = strips[1] = tile;
    strips[1].first += kStrip;
  }
}

// Masks for two 16-bit pairs that keep those of the elements r .. r + 3 that are below the rank.
__device__ __forceinline__ uint2 masks_below(int r, int rank) {
  const int left = rank - r;
  return {left <= 0 ? 0u : left == 1 ? 0xffffu : ~0u, left <= 2 ? 0u : left == 3 ? 0xffffu : ~0u};
}

// Elements r .. r + 3 of a row, with zeros from the rank on; `masks` is masks_below(r, rank). With
// kIsAligned all four may be read.
template <bool kIsAligned, class T>
__device__ __forceinline__ uint2 load_four(const T* row, int r, int rank, const uint2& masks) {
  if constexpr (kIsAligned) {
    const uint2 four = *reinterpret_cast<const uint2*>(row + r);
    return {four.x & masks.x, four.y & masks.y};
  } else {
    float x[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (r + j < rank) x[j] = to_float(row[r + j]);
    }
    return {pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3])};
  }
}

// A piece of B for the columns of a warp's strips: the lane's fragments of the four mma of each.
template <bool kIsAligned, class T>
struct Weights {
  uint2 of[2][kTiles];

  // `r` is the first of the lane's four; `b` is the matrix of the slot.
  __device__ __forceinline__ void load(const T* b, int b_stride, const Strip (&strips)[2], int r) {
    const int group = threadIdx.x % kWarpSize / 4;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint2 masks = masks_below(r, strips[s].rank);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int column = strips[s].first + group / 2 * kVec + 2 * n + group % 2;
        of[s][n] = uint2{};
        if (column < strips[s].end && r < strips[s].rank) {
          of[s][n] = load_four<kIsAligned>(b + column * b_stride, r, strips[s].rank, masks);
        }
      }
    }
  }
};

// What a CTA computes, and the first piece of B for its warps' strips. All of it is loaded before
// pdl_wait().
template <class T, bool kIsGated, bool kIsAligned>
struct Work {
  TokenTile tokens;
  Strip strips[2];
  int rank, b_stride;
  const T* b;
  Weights<kIsAligned, T> weights;

  __device__ __forceinline__ Work(const LoraExpandParams& p, int column_blocks,
                                  int log2_tile_tokens) {
    const int lane = threadIdx.x % kWarpSize;
    // Brings all bounds into L1 before one is needed.
    const int bound = p.columns[min(lane, p.rows.num_parts)];
    tokens = token_tile<kIsGated>(p.rows, static_cast<int>(blockIdx.x) / column_blocks,
                                  log2_tile_tokens);
    if (bound < 0 || bound > (kIsGated ? 2 : 1) * p.n) __trap();
    strips_of<kIsGated>(p, tokens.slot, blockIdx.x % column_blocks, threadIdx.x / kWarpSize,
                        strips);
    rank = max(strips[0].rank, strips[1].rank);
    b_stride = static_cast<int>(p.b_stride);
    b = static_cast<const T*>(p.b) + max(tokens.slot, 0) * p.b_slot_stride;
    weights.load(b, b_stride, strips, 4 * (lane % 4));
  }

  __device__ __forceinline__ bool is_empty() const {
    return tokens.count == 0 || (!kIsGated && rank == 0);
  }

  // Called before the products of a piece for the 16 tokens from `first` on: loads that piece of B,
  // unless it is still in the registers.
  __device__ __forceinline__ void take_piece(int piece, int num_pieces, int first) {
    if (piece > 0 || (first > 0 && num_pieces > 1)) {
      int stride = b_stride;
      forget_origin(stride);  // else 16 addresses would be held in registers just for these loads
      weights.load(b, stride, strips, kPiece * piece + 4 * (threadIdx.x % 4));
    }
  }
};

// How much of `shrunk` fits into num_bytes of shared memory.
struct Room {
  int num_pieces, num_tokens;  // pieces of the rank; tokens that fit at a time

  __device__ __forceinline__ Room(int rank, int piece_bytes, int num_bytes)
      : num_pieces((rank + kPiece - 1) / kPiece),
        num_tokens(num_bytes / (piece_bytes * max(num_pieces, 1)) * kMmaTokens) {}
};

// How many tokens a CTA takes, 16 to 128. With few tokens it takes few, so that there are enough
// CTAs; an H200 runs 528 of them at a time. Gate and up have four to seven times as many columns as
// other matrices, so their CTAs take more tokens sooner.
template <bool kIsGated>
int log2_tile_tokens_of(int64_t num_tokens) {
  constexpr int64_t kFew = kIsGated ? 64 : 256;
  int log2 = 4;
  static_assert(1 << 4 == kMmaTokens);
  for (; log2 < 7 && num_tokens > kFew; num_tokens /= 4) ++log2;
  return log2;
}

// The grid: all tiles of columns of the first tile of tokens, then of the next, and so on.
struct Grid {
  int column_blocks;
  int64_t num_tiles;

  Grid(const LoraExpandParams& p, bool is_gated, int log2_tile_tokens)
      : column_blocks(static_cast<int>(is_gated ? (2 * p.n + kColumns - 1) / kColumns
                                                : p.n / kColumns + p.rows.num_parts)),
        num_tiles(num_token_tiles(p.rows.num_tokens, 1 << log2_tile_tokens,
                                  p.rows.num_slots + (is_gated ? 2 : 0))) {}
  unsigned num_ctas() const { return static_cast<unsigned>(num_tiles * column_blocks); }
};

// Whether four neighbouring elements of a row of b and of shrunk may be read at once.
inline bool has_aligned_fours(const LoraExpandParams& p) {
  const int64_t strides = p.b_stride | p.b_slot_stride | p.shrunk.split_stride | p.shrunk.stride |
                          p.shrunk.part_stride | p.rows.max_rank;
  return reinterpret_cast<uintptr_t>(p.b) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p.shrunk.data) % 16 == 0 && strides % 4 == 0;
}

// Whether the rows of the addends and of out may be read and written 16 bytes at a time.
inline bool has_aligned_rows(const LoraExpandParams& p) {
  return is_vec_aligned(p.out, p.out_stride) && is_vec_aligned(p.gate_up, p.gate_up_stride);
}

// Calls launch.operator()<T, kIsGated, kIsAligned>() with kIsAligned = has_aligned_fours(p).
template <class Launch>
cudaError_t dispatch_expand(const LoraExpandParams& p, const Launch& launch) {
  return dispatch_half(p.dtype, [&]<class T>(T) {
    const bool is_aligned = has_aligned_fours(p);
    if (p.gate_up == nullptr) {
      return is_aligned ? launch.template operator()<T, false, true>()
                        : launch.template operator()<T, false, false>();
    }
    return is_aligned ? launch.template operator()<T, true, true>()
                      : launch.template operator()<T, true, false>();
  });
}

}  // namespace
}  // namespace pyserve::gpu
