// What the kernels of lora_expand have in common.
//
// lora_expand: out[t, j] += sum over r of shrunk[t, p, r] * b[s, j, r], s being the slot of t's
// adapter, p the part that column j belongs to, and r below its rank.
//   shrunk float32 [num_splits, num_tokens, num_parts, max_rank], the sum over splits; b
//   [num_slots, n, max_rank], out [num_tokens, n]
// lora_expand_silu_mul: out = silu(gate) * up of what that makes of gate_up [num_tokens, 2 n] =
// gate | up, whose parts are both, or are one; of all tokens.
//
// A CTA takes tokens of one slot by 256 columns, a warp two strips of 32: neighbours of one part,
// or a strip of gate and the one of up. A part's columns are divided from its own first one on, so
// no tile has two parts. CTAs beyond what there is end at once: the grid depends on shapes alone.
// The order of r within a piece of 16 is what suits the loads: a lane takes 4 neighbours. So is the
// order of columns in a strip: of its four products a lane has 8 neighbours.
// What was shrunk is float32: it is multiplied as the sum of two 16-bit numbers, which keeps 16 of
// its bits or more. A CTA adds its splits up and divides it once for all of its warps, into shared
// memory; a warp reads B's first 16 of r once for all of its tokens. So what is left to do for 16
// tokens more is to read what is added to, multiply and write.
// Numerics: float32 sums, one rounding of what is added to out, or of what it becomes. The order
// depends on the rank and the number of splits alone.
// Floor: bytes, 2 * rank of each column of B, and 4 of each element of out (6 of
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
constexpr int kStrip = 32;                     // columns
constexpr int kTiles = kStrip / 8;             // mma of them
constexpr int kColumns = kWarps * 2 * kStrip;  // a CTA
constexpr int kPiece = 16;                     // of r
constexpr int kMaxRank = 512;
// Shared memory of what was shrunk: as a rule at most, and of the highest rank.
constexpr int kStagedBytes = 16 * 1024, kMaxStagedBytes = 64 * 1024;

// Columns of one part, as b and what is added to have them; `rank` 0: nothing is added.
struct Strip {
  int part, first, end, rank;
};

// The first column of the block-th tile of kColumns; part -1 where there are fewer.
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

// A warp's two strips; of no rank where the CTA has nothing to add.
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

// Which of elements r .. r + 3 are below the rank, as masks of two each.
__device__ __forceinline__ uint2 masks_below(int r, int rank) {
  const int left = rank - r;
  return {left <= 0 ? 0u : left == 1 ? 0xffffu : ~0u, left <= 2 ? 0u : left == 3 ? 0xffffu : ~0u};
}

// Elements r .. r + 3 of a row as far as the rank goes, which `masks` say too; zeros beyond.
// kIsAligned: all four may be read.
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

// A piece of B, of the columns of a warp's strips: lane's of the four products.
template <bool kIsAligned, class T>
struct Weights {
  uint2 of[2][kTiles];

  // r: the first of lane's four. b: of the slot.
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

// What a CTA adds, and B's first piece of r for its warps' strips. Asked for before pdl_wait().
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
    const int bound = p.columns[min(lane, p.rows.num_parts)];  // all are in L1 when one is wanted
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

  // Before the products of a piece of the 16 tokens from `first` on: B's, unless it is there still.
  __device__ __forceinline__ void take_piece(int piece, int num_pieces, int first) {
    if (piece > 0 || (first > 0 && num_pieces > 1)) {
      int stride = b_stride;
      forget_origin(stride);  // or 16 addresses are held in registers for these loads alone
      weights.load(b, stride, strips, kPiece * piece + 4 * (threadIdx.x % 4));
    }
  }
};

// How much of what was shrunk there is room for in num_bytes of shared memory.
struct Room {
  int num_pieces, num_tokens;  // of r; at a time

  __device__ __forceinline__ Room(int rank, int piece_bytes, int num_bytes)
      : num_pieces((rank + kPiece - 1) / kPiece),
        num_tokens(num_bytes / (piece_bytes * max(num_pieces, 1)) * kMmaTokens) {}
};

// Of a CTA's tokens, 16 to 128: few where CTAs are few, of which an H200 runs 528 at a time; gate
// and up have four to seven times the columns of others.
template <bool kIsGated>
int log2_tile_tokens_of(int64_t num_tokens) {
  constexpr int64_t kFew = kIsGated ? 64 : 256;
  int log2 = 4;
  static_assert(1 << 4 == kMmaTokens);
  for (; log2 < 7 && num_tokens > kFew; num_tokens /= 4) ++log2;
  return log2;
}

// The grid of tiles of so many tokens: tiles of columns, tiles of tokens behind each other.
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

// Whether four elements of b's rows, and of what was shrunk, may be read at once.
inline bool has_aligned_fours(const LoraExpandParams& p) {
  const int64_t strides = p.b_stride | p.b_slot_stride | p.shrunk.split_stride | p.shrunk.stride |
                          p.shrunk.part_stride | p.rows.max_rank;
  return reinterpret_cast<uintptr_t>(p.b) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p.shrunk.data) % 16 == 0 && strides % 4 == 0;
}

// Whether rows of what is added to may be read and written by 16 bytes.
inline bool has_aligned_rows(const LoraExpandParams& p) {
  return is_vec_aligned(p.out, p.out_stride) && is_vec_aligned(p.gate_up, p.gate_up_stride);
}

// Calls launch.operator()<T, kIsGated, kIsAligned>(), kIsAligned being has_aligned_fours.
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
