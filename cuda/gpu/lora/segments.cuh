// What the kernels of adapters have in common: tiles of one slot's tokens, and traps for what the
// CPU's ops refuse.
//
// What they read before pdl_wait(), by rule 2 of pdl.cuh: columns, ranks, scales, A and B, written
// by calls of torch when an adapter is put into a slot, between two steps; and starts, which a copy
// writes before a step's first kernel. Neither is of the chain: the step's first kernel starts when
// they are complete, and each other after the one in front of it has. So a kernel finds its tile,
// and asks for its slot's weights, while the one in front still runs; x, its squares and what was
// shrunk come after the wait.
#pragma once

#include "gpu/core/launch.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/lora/lora.h"

namespace pyserve::gpu {

constexpr int kMmaTokens = 16;  // rows of an mma
constexpr int kNoSlot = -1;
constexpr int kManyTokens = 512;  // beyond, tokens are shrink_many.cu's and expand_many.cu's

// Tiles of `size` tokens that all segments together may have, num_segments of them: as many CTAs
// take them, whatever the segments are.
inline int64_t num_token_tiles(int64_t num_tokens, int size, int num_segments) {
  const int64_t most = num_tokens / size + num_segments;
  return most < num_tokens ? most : num_tokens;
}

// Tokens [begin, begin + count) of a slot; none where there are fewer tiles.
struct TokenTile {
  int slot, begin, count;
};

__device__ __forceinline__ bool is_rank(const LoraRows& rows, int rank) {
  return rank >= 0 && rank <= rows.max_rank;
}

// The tile is the one behind `left` others of this segment or of those in front of it.
__device__ __forceinline__ void look_in(TokenTile& tile, int& left, int slot, int first, int end,
                                        int log2_size) {
  const int size = 1 << log2_size, num_tiles = (end - first + size - 1) >> log2_size;
  if (left >= 0 && left < num_tiles) {
    const int begin = first + ((num_tiles - 1 - left) << log2_size);
    tile = {slot, begin, min(end - begin, size)};
  }
  left -= num_tiles;
}

// The index-th of all tiles of 2^log2_size tokens, slot by slot, from the last on: of many tokens,
// those that the kernel in front has written last are in L2 still. kHasOthers: also of tokens that
// no slot has, kNoSlot.
// All of the starts are looked at, so that none is waited for before the next is asked for; and by
// the lanes of a warp the ranks, so that those of the slot are in L1 when it is known.
template <bool kHasOthers>
__device__ __forceinline__ TokenTile token_tile(const LoraRows& rows, int index, int log2_size) {
  const int num_tokens = static_cast<int>(rows.num_tokens);
  TokenTile tile{kNoSlot, 0, 0};
  int left = index;
  const int entry = min(static_cast<int>(threadIdx.x) % kWarpSize,
                        rows.num_slots * rows.num_parts - 1);
  const int slot_of_entry = entry / rows.num_parts, part_of_entry = entry % rows.num_parts;
  const int rank = entry < 0 ? 0 : rows.ranks[slot_of_entry * rows.ranks_stride + part_of_entry];
  bool is_bad = false;
  if constexpr (kHasOthers) {
    look_in(tile, left, kNoSlot, rows.starts[rows.num_slots], num_tokens, log2_size);
  }
#pragma unroll 8
  for (int slot = rows.num_slots - 1; slot >= 0; --slot) {
    const int first = rows.starts[slot], end = rows.starts[slot + 1];
    is_bad |= first < 0 || first > end || end > num_tokens;
    look_in(tile, left, slot, first, end, log2_size);
  }
  if (is_bad || !is_rank(rows, rank)) __trap();
  if constexpr (kHasOthers) look_in(tile, left, kNoSlot, 0, rows.starts[0], log2_size);
  return tile;
}

__device__ __forceinline__ int rank_of(const LoraRows& rows, int slot, int part) {
  const int rank = rows.ranks[slot * rows.ranks_stride + part];
  if (!is_rank(rows, rank)) __trap();
  return rank;
}

}  // namespace pyserve::gpu
