// How the parts of a tile (stream_k.h) become one sum: each warp leaves its float32 sums in the
// room, then arrives; the last to arrive adds all of them, in the order of k, and goes on with the
// result. Nobody waits for another CTA, so it does not matter which of them run at the same time.
#pragma once

#include "gpu/core/block.cuh"
#include "gpu/linear/stream_k.h"

namespace pyserve::gpu {

// Room for the parts of one kernel at a time on a device, of at most kMaxCtas CTAs: those of two
// streams that run at the same time would mix. Kernels that follow one another come here after
// their pdl_wait.
struct PartRoom {
  static constexpr int kMaxCtas = 144;  // no Hopper has more SMs
  static constexpr int kWarps = 8;      // of a CTA, that have sums
  static constexpr int kMaxSums = 64;   // of a thread

  float4* sums;   // [2 kMaxCtas][kWarps][kMaxSums / 4][kWarpSize]
  int* arrivals;  // [kMaxCtas][kWarps], zero between kernels
};

// Of the current device; made when it is first asked for, which is no work for a stream.
cudaError_t part_room(PartRoom* room);

// A CTA has at most two pieces that are parts: of these, one begins a tile.
template <int kSums>
__device__ __forceinline__ float4* part_of(const PartRoom& room, int cta, bool begins_tile,
                                           int warp) {
  constexpr int kChunks = kSums / 4;
  return room.sums + ((2 * cta + begins_tile) * PartRoom::kWarps + warp) * kChunks * kWarpSize +
         threadIdx.x % kWarpSize;
}

// Leaves this warp's sums of a piece. Whether it is the last of those that have parts of them: it
// calls add_parts then. `flag` is a word of shared memory of this warp alone.
template <int kSums>
__device__ __forceinline__ bool leave_part(const PartRoom& room, const StreamK& division,
                                           const Piece& piece, int warp, int32_t* flag,
                                           const float (&sums)[kSums]) {
  static_assert(kSums % 4 == 0 && kSums <= PartRoom::kMaxSums);
  float4* to = part_of<kSums>(room, static_cast<int>(blockIdx.x), piece.stage == 0, warp);
#pragma unroll
  for (int i = 0; i < kSums / 4; ++i) {
    to[i * kWarpSize] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
  }
  const Parts parts = division.parts(piece.tile);
  return arrives_last(room.arrivals + parts.first * PartRoom::kWarps + warp, parts.count, flag,
                      threadIdx.x % kWarpSize == 0, [] { __syncwarp(); });
}

// sums = those of all parts of a tile, this warp's among them.
template <int kSums>
__device__ __forceinline__ void add_parts(const PartRoom& room, const StreamK& division, int tile,
                                          int warp, float (&sums)[kSums]) {
  constexpr int kChunks = kSums / 4;
  // Chunks that are asked for together, of so many parts: what registers there are.
  constexpr int kGroup = kSums > 32 ? 4 : 8, kPartsAtOnce = 2;
  static_assert(kChunks % kGroup == 0);
  const Parts parts = division.parts(tile);
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
#pragma unroll
  for (int first = 0; first < kChunks; first += kGroup) {
#pragma unroll 1
    for (int begin = 0; begin < parts.count; begin += kPartsAtOnce) {
      float4 part[kPartsAtOnce][kGroup];
#pragma unroll
      for (int j = 0; j < kPartsAtOnce; ++j) {
        if (begin + j >= parts.count) continue;
        const float4* from =
            part_of<kSums>(room, parts.first + begin + j, begin + j == 0, warp) +
            first * kWarpSize;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) part[j][i] = __ldcg(from + i * kWarpSize);
      }
#pragma unroll
      for (int j = 0; j < kPartsAtOnce; ++j) {
        if (begin + j >= parts.count) continue;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          float* sum = sums + 4 * (first + i);
          sum[0] += part[j][i].x;
          sum[1] += part[j][i].y;
          sum[2] += part[j][i].z;
          sum[3] += part[j][i].w;
        }
      }
    }
  }
}

}  // namespace pyserve::gpu
