// What both kernels of adapters have in common: tiles of one slot's tokens, and traps for what the
// CPU's ops refuse.
#pragma once

#include "gpu/core/launch.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/lora/lora.h"

namespace pyserve::gpu {

constexpr int kTileTokens = 16;  // rows of an mma

// Token tiles that a slot may have; its tile i begins at its first token + i * kTileTokens.
inline unsigned num_token_tiles(int64_t num_tokens) {
  return static_cast<unsigned>((num_tokens + kTileTokens - 1) / kTileTokens);
}

// Tokens [begin, begin + count) of a slot's tile; none where it has fewer tiles.
struct TokenTile {
  int64_t begin;
  int count;
};

__device__ __forceinline__ TokenTile token_tile(const LoraRows& rows, int slot, int tile) {
  const int64_t first = rows.starts[slot], end = rows.starts[slot + 1];
  if (first < 0 || first > end || end > rows.num_tokens) __trap();
  const int64_t begin = first + int64_t{tile} * kTileTokens;
  return {begin, static_cast<int>(min(max(end - begin, int64_t{0}), int64_t{kTileTokens}))};
}

__device__ __forceinline__ int rank_of(const LoraRows& rows, int slot, int part) {
  const int rank = rows.ranks[slot * rows.ranks_stride + part];
  if (rank < 0 || rank > rows.max_rank) __trap();
  return rank;
}

}  // namespace pyserve::gpu
