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
// As in shrink.cu the order of r within a piece of 16 is what suits the loads: a lane takes 4
// neighbours. So is the order of columns in a strip: of its four products a lane has 8 neighbours.
// What was shrunk is float32: it is multiplied as the sum of two 16-bit numbers, which keeps 16 of
// its bits or more. A CTA adds its splits up and divides it once for all of its warps, into shared
// memory; a warp reads B's first 16 of r once for all of its tokens. So what is left to do for 16
// tokens more is to read what is added to, which is asked for 16 tokens ahead, multiply and write:
// what many tokens need is bytes on their way.
// Numerics: float32 sums, one rounding of what is added to out, or of what it becomes. The order
// depends on the rank and the number of splits alone.
// Floor: bytes, 2 * rank of each column of B, and 4 of each element of out (6 of
// lora_expand_silu_mul).
#include <algorithm>

#include "gpu/core/gate.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/lora/segments.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kStrip = 32;                       // columns
constexpr int kTiles = kStrip / 8;               // mma of them
constexpr int kColumns = kWarps * 2 * kStrip;    // a CTA
constexpr int kPiece = 16;                       // of r
constexpr int kMaxRank = 512;
// Shared memory of what was shrunk: as a rule, and of the highest rank.
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

// Four neighbours of what was shrunk, each as a 16-bit number, x and y, and what that leaves.
template <class T>
__device__ __forceinline__ uint4 halves_of(const float4& x) {
  const uint2 value{pack_pair<T>(x.x, x.y), pack_pair<T>(x.z, x.w)};
  const float2 low = unpack_pair<T>(value.x), high = unpack_pair<T>(value.y);
  return {value.x, value.y, pack_pair<T>(x.x - low.x, x.y - low.y),
          pack_pair<T>(x.z - high.x, x.w - high.y)};
}

// Elements r .. r + 3 of what was shrunk of a token and a part, added up over splits; zeros from
// the rank on.
template <bool kIsAligned>
__device__ __forceinline__ float4 load_shrunk(const LoraShrunk& shrunk, int num_splits,
                                              const float* row, int r, int rank) {
  float x[4] = {};
#pragma unroll kIsAligned ? 8 : 1
  for (int split = 0; split < num_splits; ++split) {
    const float* own = row + split * shrunk.split_stride + r;
    if constexpr (kIsAligned) {
      const float4 four = *reinterpret_cast<const float4*>(own);
      x[0] += four.x;
      x[1] += four.y;
      x[2] += four.z;
      x[3] += four.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (r + j < rank) x[j] += own[j];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (r + j >= rank) x[j] = 0.0f;
  }
  return {x[0], x[1], x[2], x[3]};
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

// Of a piece of 16 tokens, in shared memory.
template <bool kIsGated>
constexpr int kPieceBytes = (kIsGated ? 2 : 1) * kMmaTokens * 4 * static_cast<int>(sizeof(uint4));

// What is in shared memory of what was shrunk: a vector of four each, of some tokens and of both
// strips' parts, or of one where it is the same.
struct Staging {
  int num_pieces, num_tokens;  // of r; that there is room for

  __device__ __forceinline__ Staging(int rank, int piece_bytes, int num_bytes)
      : num_pieces((rank + kPiece - 1) / kPiece),
        num_tokens(num_bytes / (piece_bytes * max(num_pieces, 1)) * kMmaTokens) {}

  // Lane `place`'s four of a token, both counted from the first.
  __device__ __forceinline__ int index(int part, int piece, int token, int place) const {
    return ((part * num_pieces + piece) * num_tokens + token) * 4 + place;
  }

  // All threads of a CTA, each kAtOnce fours at a time. row: of the first token.
  template <bool kIsAligned, int kAtOnce, class T>
  __device__ __forceinline__ void fill(uint4* staged, const LoraShrunk& shrunk, int num_splits,
                                       const float* row, int count, const Strip (&strips)[2],
                                       int num_parts) const {
    const int padded = (count + kMmaTokens - 1) / kMmaTokens * kMmaTokens;
    const int most = num_parts * padded * 4;
#pragma unroll 1
    for (int piece = 0; piece < num_pieces; ++piece) {
#pragma unroll 1
      for (int first = threadIdx.x; first < most; first += kAtOnce * kThreads) {
        float4 sums[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int four = first + i * kThreads, r = kPiece * piece + 4 * (four % 4);
          const bool is_second = four / 4 >= padded;
          const int token = is_second ? four / 4 - padded : four / 4;
          const int rank = is_second ? strips[1].rank : strips[0].rank;
          const int part = is_second ? strips[1].part : strips[0].part;
          sums[i] = float4{};
          if (four < most && token < count && r < rank) {
            const float* own = row + token * shrunk.stride + part * shrunk.part_stride;
            sums[i] = load_shrunk<kIsAligned>(shrunk, num_splits, own, r, rank);
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int four = first + i * kThreads, part = four / 4 >= padded;
          const int token = four / 4 - part * padded;
          if (four < most) staged[index(part, piece, token, four % 4)] = halves_of<T>(sums[i]);
        }
      }
    }
  }

  // The same, whatever of it may be on its way at once.
  template <bool kIsAligned, class T>
  __device__ __forceinline__ void fill(uint4* staged, const LoraShrunk& shrunk, const float* row,
                                       int count, const Strip (&strips)[2], int num_parts) const {
    if (kIsAligned && shrunk.num_splits == 1) {
      fill<kIsAligned, 4, T>(staged, shrunk, 1, row, count, strips, num_parts);
    } else {
      fill<kIsAligned, 1, T>(staged, shrunk, shrunk.num_splits, row, count, strips, num_parts);
    }
  }
};

// Of token group, and of group + 8, the 8 neighbouring columns of a lane in each strip.
struct Old {
  uint4 of[2][2];
};

// Of a strip and an mma: of token group the first two, of group + 8 the others.
struct Sums {
  float of[2][kTiles][4];

  // Begin with what is added to.
  template <class T>
  __device__ __forceinline__ void take(const Old& old) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kVec];
        unpack<T>(old.of[s][half], x);
#pragma unroll
        for (int i = 0; i < kVec; ++i) of[s][i / 2][2 * half + i % 2] = x[i];
      }
    }
  }
};

// Tokens of a warp's strips, read and written by 16 bytes where `is_whole`: a lane's 8 columns are
// there and aligned. Where not, one by one, when they are written.
template <class T, bool kIsGated>
struct Tile {
  const LoraExpandParams& p;
  int begin, count;  // tokens
  int column[2], end[2];
  bool is_whole;

  __device__ __forceinline__ Tile(const LoraExpandParams& params, const TokenTile& tokens,
                                  const Strip (&strips)[2], bool is_aligned)
      : p(params), begin(tokens.begin), count(tokens.count), is_whole(is_aligned) {
    const int place = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      column[s] = strips[s].first + place * kVec;
      end[s] = strips[s].end;
      is_whole &= column[s] % kVec == 0 && column[s] + kVec <= end[s];
    }
  }

  __device__ __forceinline__ const T* from(int token) const {
    return kIsGated ? static_cast<const T*>(p.gate_up) + (begin + token) * p.gate_up_stride
                    : static_cast<const T*>(p.out) + (begin + token) * p.out_stride;
  }

  // What the 16 tokens from `first` on add to.
  __device__ __forceinline__ void load(int first, Old& old) const {
    if (!is_whole) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + threadIdx.x % kWarpSize / 4 + 8 * half;
      if (token >= count) continue;
      const T* row = from(token);
#pragma unroll
      for (int s = 0; s < 2; ++s) old.of[s][half] = load_vec(row + column[s]);
    }
  }

  __device__ __forceinline__ void store(int first, const Sums& sums) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + threadIdx.x % kWarpSize / 4 + 8 * half;
      if (token >= count) continue;
      float x[2][kVec];
#pragma unroll
      for (int i = 0; i < 2 * kVec; ++i) {
        x[i / kVec][i % kVec] = sums.of[i / kVec][i % kVec / 2][2 * half + i % 2];
      }
      T* out = static_cast<T*>(p.out) + (begin + token) * p.out_stride;
      if (!is_whole) {
        store_each(from(token), out, x);
      } else if constexpr (kIsGated) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) x[0][i] = silu_mul(x[0][i], x[1][i]);
        store_vec(out + column[0], pack<T>(x[0]));
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) store_vec(out + column[s], pack<T>(x[s]));
      }
    }
  }

  __device__ __forceinline__ void store_each(const T* row, T* out,
                                             const float (&x)[2][kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if constexpr (kIsGated) {
        if (column[0] + i >= end[0]) continue;
        const float gate = to_float(row[column[0] + i]) + x[0][i];
        const float up = to_float(row[column[1] + i]) + x[1][i];
        out[column[0] + i] = from_float<T>(silu_mul(gate, up));
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          if (column[s] + i >= end[s]) continue;
          out[column[s] + i] = from_float<T>(to_float(row[column[s] + i]) + x[s][i]);
        }
      }
    }
  }
};

// sums += 16 tokens of what was shrunk times a piece of B. low, high: lane's fours of token group
// and of group + 8.
template <class T>
__device__ __forceinline__ void add_product(float (&sums)[kTiles][4], const uint4& low,
                                            const uint4& high, const uint2 (&weights)[kTiles]) {
  const uint32_t value[4] = {low.x, high.x, low.y, high.y};
  const uint32_t rest[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    mma_16816<T>(sums[n], value, weights[n].x, weights[n].y);
    mma_16816<T>(sums[n], rest, weights[n].x, weights[n].y);
  }
}

// kIsAligned: four elements of b's rows, and of what was shrunk, may be read at once.
template <class T, bool kIsGated, bool kIsAligned>
__global__ void __launch_bounds__(kThreads, kIsAligned ? 4 : 3)
    expand_kernel(LoraExpandParams p, int column_blocks, int log2_tile_tokens,
                  int staged_bytes, bool has_aligned_rows) {
  constexpr int kParts = kIsGated ? 2 : 1;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  auto* staged = reinterpret_cast<uint4*>(dynamic_smem);
  const int lane = threadIdx.x % kWarpSize, group = lane / 4, place = lane % 4;
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
  const Tile<T, kIsGated> tile(p, tokens, strips, has_aligned_rows);
  const Staging staging(rank, kPieceBytes<kIsGated>, staged_bytes);
  Old old{};
  tile.load(0, old);
#pragma unroll 1
  for (int first = 0; first < tokens.count; first += kMmaTokens) {
    const int token = first % staging.num_tokens;
    if (rank > 0 && token == 0) {
      if (first > 0) __syncthreads();
      const int64_t begin = tokens.begin + first;
      staging.template fill<kIsAligned, T>(
          staged, p.shrunk, p.shrunk.data + begin * p.shrunk.stride,
          min(tokens.count - first, staging.num_tokens), strips, kParts);
      __syncthreads();
    }
    Sums sums;
    sums.take<T>(old);
    tile.load(first + kMmaTokens, old);
#pragma unroll 1
    for (int piece = 0; piece < staging.num_pieces; ++piece) {
      if (piece > 0 || (first > 0 && staging.num_pieces > 1)) {
        int stride = b_stride;
        forget_origin(stride);  // or 16 addresses are held in registers for these loads alone
        weights.load(b, stride, strips, kPiece * piece + 4 * place);
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint4* fours = staged + staging.index(s % kParts, piece, token + group, place);
        add_product<T>(sums.of[s], fours[0], fours[8 * 4], weights.of[s]);
      }
    }
    tile.store(first, sums);
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
  const cudaError_t error = allow_smem<kKernel, kMaxStagedBytes>();
  if (error != cudaSuccess) return error;
  const int num_pieces = (p.rows.max_rank + kPiece - 1) / kPiece;
  const int staged_bytes = std::max(kStagedBytes, num_pieces * kPieceBytes<kIsGated>);
  return launch_chained(kKernel, static_cast<unsigned>(num_tiles * column_blocks), kThreads,
                        staged_bytes, stream, p, column_blocks, log2_tile_tokens, staged_bytes,
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
