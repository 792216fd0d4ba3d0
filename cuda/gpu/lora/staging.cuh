// `shrunk` as the factor of lora_expand: each float32 is the sum of two 16-bit numbers, which keeps
// at least 16 bits of its mantissa, laid out as the A fragments of an mma. A CTA sums the splits
// and divides the elements in two once, into shared memory, for all of its warps.
#pragma once

#include "gpu/core/ptx.cuh"
#include "gpu/lora/expand.cuh"

namespace pyserve::gpu {

// sum += elements r .. r + 3 of a row of `shrunk`. With kIsAligned all four may be read.
template <bool kIsAligned>
__device__ __forceinline__ void add_four(float4& sum, const float* row, int r, int rank) {
  float4 four{};
  if constexpr (kIsAligned) {
    four = *reinterpret_cast<const float4*>(row + r);
  } else {
    four.x = row[r];
    if (r + 1 < rank) four.y = row[r + 1];
    if (r + 2 < rank) four.z = row[r + 2];
    if (r + 3 < rank) four.w = row[r + 3];
  }
  sum = {sum.x + four.x, sum.y + four.y, sum.z + four.z, sum.w + four.w};
}

// Zeros from the rank on.
__device__ __forceinline__ float4 below_rank(const float4& four, int r, int rank) {
  return {four.x, r + 1 < rank ? four.y : 0.0f, r + 2 < rank ? four.z : 0.0f,
          r + 3 < rank ? four.w : 0.0f};
}

// The A fragment of a lane for one piece of r of 16 tokens: pairs of neighbours, alternately of
// token `group` and of token group + 8. `value` has the rounded 16-bit numbers and `rest` what
// rounding left over.
struct Halves {
  uint4 value, rest;

  template <class T>
  static __device__ __forceinline__ Halves of(const float4& low, const float4& high) {
    const uint4 value{pack_pair<T>(low.x, low.y), pack_pair<T>(high.x, high.y),
                      pack_pair<T>(low.z, low.w), pack_pair<T>(high.z, high.w)};
    return {value,
            {rest_of<T>(low.x, low.y, value.x), rest_of<T>(high.x, high.y, value.y),
             rest_of<T>(low.z, low.w, value.z), rest_of<T>(high.z, high.w, value.w)}};
  }

 private:
  template <class T>
  static __device__ __forceinline__ uint32_t rest_of(float x, float y, uint32_t value) {
    const float2 taken = unpack_pair<T>(value);
    return pack_pair<T>(x - taken.x, y - taken.y);
  }
};

// Shared memory for one piece of 16 tokens.
constexpr int kHalvesBytes = kWarpSize * static_cast<int>(sizeof(Halves));

// Where the Halves of some tokens and of one or two parts lie: for each 16 tokens the values of all
// lanes, then the rests of all lanes. kWarps is that of the CTA.
template <int kWarps>
struct Staging : Room {
  using Room::Room;

  // The place of the lane's value of the 16 tokens from `token` on, counted from the first staged
  // token. Its rest lies kWarpSize further.
  __device__ __forceinline__ int index(int part, int piece, int token, int lane) const {
    return ((part * num_pieces + piece) * num_tokens + token) / kMmaTokens * 2 * kWarpSize + lane;
  }

  // Fills the shared memory for one part. All threads of the CTA call this. A warp takes 16 of each
  // kPass tokens, and kAtOnce such groups at a time; it loads kSplits splits at once (1: there is
  // only one). `row` is that of the first token and of the part, whose rank is `rank`.
  template <bool kIsAligned, int kAtOnce, int kSplits, class T>
  __device__ __forceinline__ void fill(uint4* staged, const LoraShrunk& shrunk, const float* row,
                                       int count, int rank, int part) const {
    constexpr int kPass = kWarps * kMmaTokens;
    const int lane = threadIdx.x % kWarpSize, first = threadIdx.x / kWarpSize * kMmaTokens;
    const int num_splits = kSplits == 1 ? 1 : shrunk.num_splits;
#pragma unroll 1
    for (int piece = 0; piece < num_pieces; ++piece) {
      const int r = kPiece * piece + 4 * (lane % 4), num_there = r < rank ? count : 0;
#pragma unroll 1
      for (int begin = first; begin < count; begin += kAtOnce * kPass) {
        float4 sums[2 * kAtOnce] = {};  // alternately of token group and of group + 8
        const int token = begin + lane / 4;
        const float* own = row + token * shrunk.stride;
#pragma unroll 1
        for (int split = 0; split < num_splits; split += kSplits) {
#pragma unroll
          for (int i = 0; i < 2 * kAtOnce * kSplits; ++i) {
            const int ahead = i / 2 % kAtOnce * kPass + i % 2 * 8, other = i / 2 / kAtOnce;
            if (token + ahead >= num_there || split + other >= num_splits) continue;
            const float* from = own + other * shrunk.split_stride + ahead * shrunk.stride;
            add_four<kIsAligned>(sums[i % (2 * kAtOnce)], from, r, rank);
          }
          own += kSplits * shrunk.split_stride;
        }
        uint4* to = staged + index(part, piece, begin, lane);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (begin + i * kPass >= count) continue;
          const Halves halves = Halves::of<T>(below_rank(sums[2 * i], r, rank),
                                              below_rank(sums[2 * i + 1], r, rank));
          to[i * kPass * 4] = halves.value;
          to[i * kPass * 4 + kWarpSize] = halves.rest;
        }
      }
    }
  }

  // The same, with as many loads in flight as suit the number of splits.
  template <bool kIsAligned, class T>
  __device__ __forceinline__ void fill(uint4* staged, const LoraShrunk& shrunk, const float* row,
                                       int count, int rank, int part) const {
    if (shrunk.num_splits == 1) {
      fill<kIsAligned, 2, 1, T>(staged, shrunk, row, count, rank, part);
    } else {
      fill<kIsAligned, 1, 8, T>(staged, shrunk, row, count, rank, part);
    }
  }
};

}  // namespace pyserve::gpu
