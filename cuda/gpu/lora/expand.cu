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
// The order of columns in a strip is what suits the loads: of its four products a lane has 8
// neighbours. What was shrunk lies in shared memory (staging.cuh), and a warp reads B's first 16 of
// r once for all of its tokens. So what is left to do for 16 tokens more is to read what is added
// to, multiply and write. What many tokens need is bytes on their way: what is added to is asked
// for 48 tokens ahead, by cp.async into shared memory, where each thread has places of its own, 24
// KB of a CTA from its start on.
// Numerics: float32 sums, one rounding of what is added to out, or of what it becomes. The order
// depends on the rank and the number of splits alone.
// Floor: bytes, 2 * rank of each column of B, and 4 of each element of out (6 of
// lora_expand_silu_mul).
#include <algorithm>

#include "gpu/core/gate.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/lora/segments.cuh"
#include "gpu/lora/staging.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kStrip = 32;                     // columns
constexpr int kTiles = kStrip / 8;             // mma of them
constexpr int kColumns = kWarps * 2 * kStrip;  // a CTA
constexpr int kMaxRank = 512;
// Shared memory of what was shrunk: as a rule at most, and of the highest rank.
constexpr int kStagedBytes = 16 * 1024, kMaxStagedBytes = 64 * 1024;
// And of what is added to: 16 tokens of a CTA's columns, and how many of those there is room for.
constexpr int kOldBytes = kMmaTokens * kColumns * 2, kAhead = 3;

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

// Of a piece of 16 tokens, of the parts that a CTA has.
template <bool kIsGated>
constexpr int kPieceBytes = (kIsGated ? 2 : 1) * kHalvesBytes;

// Of a strip and an mma: of token group the first two, of group + 8 the others.
struct Sums {
  float of[2][kTiles][4];

  // Begin with what is added to, of token group or of group + 8.
  template <class T>
  __device__ __forceinline__ void take(int s, int half, const uint4& old) {
    float x[kVec];
    unpack<T>(old, x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) of[s][i / 2][2 * half + i % 2] = x[i];
  }
};

// Tokens of a warp's strips, 16 by 16, read and written by 16 bytes where `is_whole`: a lane's 8
// columns are there and aligned. Where not, one by one, when they are written.
template <class T, bool kIsGated>
struct Tile {
  const LoraExpandParams& p;
  int begin, count;  // tokens
  int column, apart;  // lane's first of a strip, and from there to the other's
  int room[2];        // and to the ends of both strips' parts
  bool is_whole;
  uint32_t places;  // of what is added to: the thread's first one
  const T* asked;   // of lane's token among the next 16 that are asked for
  T* out;           // and that are written

  __device__ __forceinline__ Tile(const LoraExpandParams& params, const TokenTile& tokens,
                                  const Strip (&strips)[2], bool is_aligned, uint32_t smem)
      : p(params), begin(tokens.begin), count(tokens.count),
        places(smem + threadIdx.x * 16) {
    column = strips[0].first + threadIdx.x % 4 * kVec;
    apart = kIsGated ? strips[1].first - strips[0].first : kStrip;
    room[0] = strips[0].end - column;
    room[1] = strips[1].end - column - apart;
    is_whole = is_aligned && column % kVec == 0 && apart % kVec == 0 && room[0] >= kVec &&
               room[1] >= kVec;
    const int group = threadIdx.x % kWarpSize / 4;
    asked = from(group);
    out = static_cast<T*>(p.out) + (begin + group) * p.out_stride + column;
  }

  __device__ __forceinline__ int64_t stride() const {
    return kIsGated ? p.gate_up_stride : p.out_stride;
  }

  __device__ __forceinline__ const T* from(int token) const {
    return static_cast<const T*>(kIsGated ? p.gate_up : p.out) + (begin + token) * stride() +
           column;
  }

  // Of a strip, and of token group or group + 8, in the turn-th of kAhead places.
  __device__ __forceinline__ uint32_t place_of(int turn, int s, int half) const {
    return places + turn * kOldBytes + (2 * s + half) * kThreads * 16;
  }

  // Ask for what the 16 tokens from `first` on add to: a group of copies, empty behind the last.
  __device__ __forceinline__ void load(int first, int turn) {
    if (is_whole && first < count) {
      const int token = first + threadIdx.x % kWarpSize / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* row = asked + 8 * half * stride();
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          cp_async_16(place_of(turn, s, half), row + s * apart, token + 8 * half < count);
        }
      }
      asked += kMmaTokens * stride();
    }
    cp_async_commit();
  }

  // What the oldest of kAhead groups was asked for.
  __device__ __forceinline__ void take(int turn, Sums& sums) const {
    cp_async_wait<kAhead - 1>();
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 old = is_whole ? load_shared(place_of(turn, s, half)) : uint4{};
        sums.take<T>(s, half, old);
      }
    }
  }

  // The 16 tokens from `first` on, the next ones.
  __device__ __forceinline__ void store(int first, const Sums& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + threadIdx.x % kWarpSize / 4 + 8 * half;
      if (token >= count) continue;
      float x[2][kVec];
#pragma unroll
      for (int i = 0; i < 2 * kVec; ++i) {
        x[i / kVec][i % kVec] = sums.of[i / kVec][i % kVec / 2][2 * half + i % 2];
      }
      T* row = out + 8 * half * p.out_stride;
      if (!is_whole) {
        store_each(from(token), row, x);
      } else if constexpr (kIsGated) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) x[0][i] = silu_mul(x[0][i], x[1][i]);
        store_vec(row, pack<T>(x[0]));
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) store_vec(row + s * apart, pack<T>(x[s]));
      }
    }
    out += kMmaTokens * p.out_stride;
  }

  __device__ __forceinline__ void store_each(const T* row, T* to, const float (&x)[2][kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if constexpr (kIsGated) {
        if (i >= room[0]) continue;
        const float gate = to_float(row[i]) + x[0][i];
        const float up = to_float(row[apart + i]) + x[1][i];
        to[i] = from_float<T>(silu_mul(gate, up));
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          if (i >= room[s]) continue;
          to[s * apart + i] = from_float<T>(to_float(row[s * apart + i]) + x[s][i]);
        }
      }
    }
  }
};

// sums += 16 tokens of what was shrunk times a piece of B.
template <class T>
__device__ __forceinline__ void add_product(float (&sums)[kTiles][4], const uint4& value,
                                            const uint4& rest, const uint2 (&weights)[kTiles]) {
  const uint32_t values[4] = {value.x, value.y, value.z, value.w};
  const uint32_t rests[4] = {rest.x, rest.y, rest.z, rest.w};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    mma_16816<T>(sums[n], values, weights[n].x, weights[n].y);
    mma_16816<T>(sums[n], rests, weights[n].x, weights[n].y);
  }
}

// CTAs an SM; of four, ptxas spills for sm_120, which has shared memory for two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kResident = 3;
#else
constexpr int kResident = 4;
#endif

// kIsAligned: four elements of b's rows, and of what was shrunk, may be read at once.
template <class T, bool kIsGated, bool kIsAligned>
__global__ void __launch_bounds__(kThreads, kResident)
    expand_kernel(LoraExpandParams p, int column_blocks, int log2_tile_tokens,
                  int staged_bytes, bool has_aligned_rows) {
  constexpr int kParts = kIsGated ? 2 : 1;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  auto* staged = reinterpret_cast<uint4*>(dynamic_smem);  // behind it, what is added to
  const int lane = threadIdx.x % kWarpSize, place = lane % 4;
  pdl_launch_dependents();
  const int bound = p.columns[min(lane, p.rows.num_parts)];  // all are in L1 when one is wanted
  const TokenTile tokens = token_tile<kIsGated>(
      p.rows, static_cast<int>(blockIdx.x) / column_blocks, log2_tile_tokens);
  if (bound < 0 || bound > (kIsGated ? 2 : 1) * p.n) __trap();
  Strip strips[2];
  strips_of<kIsGated>(p, tokens.slot, blockIdx.x % column_blocks, threadIdx.x / kWarpSize, strips);
  const int rank = max(strips[0].rank, strips[1].rank), b_stride = static_cast<int>(p.b_stride);
  const T* b = static_cast<const T*>(p.b) + max(tokens.slot, 0) * p.b_slot_stride;
  Weights<kIsAligned, T> weights;
  weights.load(b, b_stride, strips, 4 * place);
  pdl_wait();
  if (tokens.count == 0 || (!kIsGated && rank == 0)) return;
  Tile<T, kIsGated> tile(p, tokens, strips, has_aligned_rows,
                               smem_address(dynamic_smem) + staged_bytes);
  const Staging<kWarps> staging(rank, kPieceBytes<kIsGated>, staged_bytes);
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) tile.load(ahead * kMmaTokens, ahead);
  int token = 0, turn = 0;
#pragma unroll 1
  for (int first = 0; first < tokens.count; first += kMmaTokens) {
    if (token == staging.num_tokens) token = 0;
    if (rank > 0 && token == 0) {
      if (first > 0) __syncthreads();
      const int64_t begin = tokens.begin + first;
      const float* row = p.shrunk.data + begin * p.shrunk.stride;
      const int count = min(tokens.count - first, staging.num_tokens);
#pragma unroll 1
      for (int i = 0; i < kParts; ++i) {
        const int part = i == 0 ? strips[0].part : strips[1].part;
        staging.template fill<kIsAligned, T>(staged, p.shrunk, row + part * p.shrunk.part_stride,
                                             count, i == 0 ? strips[0].rank : strips[1].rank, i);
      }
      __syncthreads();
    }
    Sums sums;
    tile.take(turn, sums);
#pragma unroll 1
    for (int piece = 0; piece < staging.num_pieces; ++piece) {
      if (piece > 0 || (first > 0 && staging.num_pieces > 1)) {
        int stride = b_stride;
        forget_origin(stride);  // or 16 addresses are held in registers for these loads alone
        weights.load(b, stride, strips, kPiece * piece + 4 * place);
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint4* halves = staged + staging.index(s % kParts, piece, token, lane);
        add_product<T>(sums.of[s], halves[0], halves[kWarpSize], weights.of[s]);
      }
    }
    tile.load(first + kAhead * kMmaTokens, turn);  // what lay there is in the sums
    turn = turn + 1 == kAhead ? 0 : turn + 1;
    tile.store(first, sums);
    token += kMmaTokens;
  }
}

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

template <class T, bool kIsGated, bool kIsAligned>
cudaError_t launch_tiles(const LoraExpandParams& p, cudaStream_t stream) {
  const int column_blocks = static_cast<int>(
      kIsGated ? (2 * p.n + kColumns - 1) / kColumns : p.n / kColumns + p.rows.num_parts);
  const int log2_tile_tokens = log2_tile_tokens_of<kIsGated>(p.rows.num_tokens);
  const int64_t num_tiles = num_token_tiles(p.rows.num_tokens, 1 << log2_tile_tokens,
                                            p.rows.num_slots + (kIsGated ? 2 : 0));
  const bool has_aligned_rows =
      is_vec_aligned(p.out, p.out_stride) && is_vec_aligned(p.gate_up, p.gate_up_stride);
  constexpr auto kKernel = expand_kernel<T, kIsGated, kIsAligned>;
  if (p.rows.max_rank > kMaxRank) return cudaErrorInvalidValue;
  const cudaError_t error = allow_smem<kKernel, kMaxStagedBytes + kAhead * kOldBytes>();
  if (error != cudaSuccess) return error;
  // A CTA of few tokens asks for little, so that it finds room beside the kernel in front.
  const int num_old = (1 << log2_tile_tokens) / kMmaTokens;
  const int piece_bytes = (p.rows.max_rank + kPiece - 1) / kPiece * kPieceBytes<kIsGated>;
  const int staged_bytes = std::max(std::min(kStagedBytes, num_old * piece_bytes), piece_bytes);
  const int num_bytes = staged_bytes + std::min(num_old, kAhead) * kOldBytes;
  return launch_chained(kKernel, static_cast<unsigned>(num_tiles * column_blocks), kThreads,
                        num_bytes, stream, p, column_blocks, log2_tile_tokens, staged_bytes,
                        has_aligned_rows);
}

template <class T, bool kIsGated>
cudaError_t launch_as(const LoraExpandParams& p, cudaStream_t stream) {
  const int64_t strides = p.b_stride | p.b_slot_stride | p.shrunk.split_stride | p.shrunk.stride |
                          p.shrunk.part_stride | p.rows.max_rank;
  const bool is_aligned = reinterpret_cast<uintptr_t>(p.b) % 8 == 0 &&
                          reinterpret_cast<uintptr_t>(p.shrunk.data) % 16 == 0 && strides % 4 == 0;
  return is_aligned ? launch_tiles<T, kIsGated, true>(p, stream)
                    : launch_tiles<T, kIsGated, false>(p, stream);
}

}  // namespace

cudaError_t launch_lora_expand(const LoraExpandParams& params, cudaStream_t stream) {
  if (params.rows.num_tokens == 0 || params.n == 0) return cudaSuccess;
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return params.gate_up == nullptr ? launch_as<T, false>(params, stream)
                                     : launch_as<T, true>(params, stream);
  });
}

}  // namespace pyserve::gpu
