// What the LoRA kernels have in common: finding a tile of tokens that use one slot, with traps
// where the CPU ops would refuse their arguments.
//
// Before pdl_wait() these kernels read columns, ranks, scales, A and B, which torch writes between
// two steps when an adapter is put into a slot, and starts, which a copy writes before a step's
// first kernel. By rule 2 of pdl.cuh this is allowed, since no kernel of the chain writes any of
// them: the step's first kernel starts only when they are complete, and every later kernel starts
// after it. So a kernel can find its tile and load its slot's weights while the kernel before still
// runs. x, x_squares and shrunk are read after the wait.
#pragma once

#include "gpu/core/launch.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/lora/lora.h"

namespace pyserve::gpu {

constexpr int kMmaTokens = 16;  // rows of an mma
constexpr int kNoSlot = -1;
constexpr int kManyTokens = 512;  // with more tokens shrink_many.cu and expand_many.cu take over

// An upper bound on the number of tiles of `size` tokens, whatever the lengths of the num_segments
// segments. The grid has that many tiles.
inline int64_t num_token_tiles(int64_t num_tokens, int size, int num_segments) {
  const int64_t most = num_tokens / size + num_segments;
  return most < num_tokens ? most : num_tokens;
}

// Tokens [begin, begin + count) of one slot; count is 0 beyond the last tile.
struct TokenTile {
  int slot, begin, count;
};

__device__ __forceinline__ bool is_rank(const LoraRows& rows, int rank) {
  return rank >= 0 && rank <= rows.max_rank;
}

// Looks for the tile in the segment [first, end). `left` is the number of tiles that lie before it
// from here on; it is reduced by the segment's tiles.
__device__ __forceinline__ void look_in(TokenTile& tile, int& left, int slot, int first, int end,
                                        int log2_size) {
  const int size = 1 << log2_size, num_tiles = (end - first + size - 1) >> log2_size;
  if (left >= 0 && left < num_tiles) {
    const int begin = first + ((num_tiles - 1 - left) << log2_size);
    tile = {slot, begin, min(end - begin, size)};
  }
  left -= num_tiles;
}

// The index-th of all tiles of 2^log2_size tokens. They are counted from the last slot to the first
// and from the last token to the first, because of many tokens those that the kernel before has
// written last are still in L2. With kHasOthers, tokens without an adapter are included as slot
// kNoSlot. All starts are read even after the tile is found, so that no load waits for the one
// before. The lanes of a warp read the ranks at the same time, so that those of the tile's slot are
// in L1 once the slot is known.
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
