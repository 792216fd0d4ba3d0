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
// its bits or more. What few tokens wait for is one load after the other, so all splits are asked
// for at once.
// Numerics: float32 sums, one rounding of what is added to out, or of what it becomes. The order
// depends on the rank and the number of splits alone.
// Floor: bytes, 2 * rank of each column of B, and 4 of each element of out (6 of
// lora_expand_silu_mul).
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
constexpr int kManyTokens = 64;                  // a CTA, where there are many

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

// A warp's two strips; false where there are none.
template <bool kIsGated>
__device__ __forceinline__ bool strips_of(const LoraExpandParams& p, int slot, int block, int warp,
                                          Strip (&strips)[2]) {
  if constexpr (kIsGated) {
    const int n = static_cast<int>(p.n), last = p.rows.num_parts - 1;
    const bool is_split = p.columns[last] == (last == 0 ? 0 : n);
    if (last > 1 || p.columns[0] != 0 || !is_split || p.columns[last + 1] != 2 * n) __trap();
    const int first = (block * kWarps + warp) * kStrip;
    strips[0] = {0, first, n, slot == kNoSlot ? 0 : rank_of(p.rows, slot, 0)};
    strips[1] = {last, n + first, 2 * n, slot == kNoSlot ? 0 : rank_of(p.rows, slot, last)};
    return first < n;
  } else {
    Strip tile = column_tile(p, block);
    if (tile.part < 0) return false;
    tile.rank = rank_of(p.rows, slot, tile.part);
    tile.first += warp * 2 * kStrip;
    strips[0] = strips[1] = tile;
    strips[1].first += kStrip;
    return tile.rank > 0 && tile.first < tile.end;
  }
}

// Elements r .. r + 3 of a row, as far as the rank goes; zeros beyond, and where there is no row.
template <class T>
__device__ __forceinline__ uint2 load_four(const T* row, bool is_there, int r, int rank,
                                           bool is_aligned) {
  if (!is_there) return {};
  if (is_aligned && r + 4 <= rank) return *reinterpret_cast<const uint2*>(row + r);
  float x[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (r + j < rank) x[j] = to_float(row[r + j]);
  }
  return {pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3])};
}

// Four neighbours of what was shrunk, each as a 16-bit number and what that leaves.
struct Halves {
  uint2 value, rest;
};

template <class T, bool kIsSplit>
__device__ __forceinline__ Halves load_shrunk(const LoraShrunk& shrunk, const float* row,
                                              bool is_there, int r, int rank) {
  float x[4] = {};
  const int num_splits = kIsSplit ? shrunk.num_splits : 1;
  if (is_there) {
#pragma unroll kIsSplit ? 8 : 1
    for (int split = 0; split < num_splits; ++split) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (r + j < rank) x[j] += row[split * shrunk.split_stride + r + j];
      }
    }
  }
  Halves halves{{pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3])}, {}};
  const float2 low = unpack_pair<T>(halves.value.x), high = unpack_pair<T>(halves.value.y);
  halves.rest = {pack_pair<T>(x[0] - low.x, x[1] - low.y),
                 pack_pair<T>(x[2] - high.x, x[3] - high.y)};
  return halves;
}

// 8 neighbours of a row from `column` on, as far as `end`: all at once where they may be.
template <class T>
__device__ __forceinline__ uint4 load_eight(const T* row, int column, int end, bool is_aligned) {
  if (is_aligned && column + kVec <= end) return load_vec(row + column);
  float x[kVec] = {};
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (column + i < end) x[i] = to_float(row[column + i]);
  }
  return pack<T>(x);
}

template <class T>
__device__ __forceinline__ void store_eight(T* row, int column, int end, bool is_aligned,
                                            const float (&x)[kVec]) {
  if (is_aligned && column + kVec <= end) {
    store_vec(row + column, pack<T>(x));
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (column + i < end) row[column + i] = from_float<T>(x[i]);
  }
}

// What 16 tokens from `token` on get in a strip: lane's values of token group and of group + 8,
// each of 8 neighbouring columns, in pairs.
template <class T>
struct Products {
  float of[kTiles][4];

  // b: of the slot. `halves`: of 4 neighbours of r, of both tokens.
  __device__ __forceinline__ void add(const Strip& strip, const T* b, int b_stride, int r,
                                      const Halves& low, const Halves& high, bool is_aligned) {
    const int group = threadIdx.x % kWarpSize / 4;
    const uint32_t value[4] = {low.value.x, high.value.x, low.value.y, high.value.y};
    const uint32_t rest[4] = {low.rest.x, high.rest.x, low.rest.y, high.rest.y};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = strip.first + group / 2 * kVec + 2 * n + group % 2;
      const uint2 four = load_four<T>(b + column * b_stride, column < strip.end, r, strip.rank,
                                      is_aligned);
      mma_16816<T>(of[n], value, four.x, four.y);
      mma_16816<T>(of[n], rest, four.x, four.y);
    }
  }

  // x += the 8 of token group, or of group + 8.
  __device__ __forceinline__ void add_to(float (&x)[kVec], bool is_high) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      x[2 * n] += is_high ? of[n][2] : of[n][0];
      x[2 * n + 1] += is_high ? of[n][3] : of[n][1];
    }
  }
};

struct Alignment {
  bool b, rows;  // of what is read of b, and of rows of out and of gate_up
};

// 16 tokens from `token` on, `count` of them, in a warp's two strips.
template <class T, bool kIsGated, bool kIsSplit>
__device__ __forceinline__ void expand_tile(const LoraExpandParams& p, const Strip (&strips)[2],
                                            int slot, int64_t token, int count, Alignment aligned) {
  const int lane = threadIdx.x % kWarpSize, group = lane / 4, place = lane % 4;
  const T* from = static_cast<const T*>(kIsGated ? p.gate_up : p.out);
  const int64_t from_stride = kIsGated ? p.gate_up_stride : p.out_stride;
  bool is_aligned[2];
  uint4 old[2][2] = {};  // of a strip; of token group and of group + 8
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    is_aligned[s] = aligned.rows && strips[s].first % kVec == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (group + 8 * half >= count) continue;
      old[s][half] = load_eight(from + (token + group + 8 * half) * from_stride,
                                strips[s].first + place * kVec, strips[s].end, is_aligned[s]);
    }
  }
  Products<T> products[2] = {};
  const T* b = static_cast<const T*>(p.b) + (slot == kNoSlot ? 0 : slot) * p.b_slot_stride;
  const float* row = p.shrunk.data + (token + group) * p.shrunk.stride;
  const int rank = max(strips[0].rank, strips[1].rank);
#pragma unroll 1
  for (int r = 4 * place; r < rank + 4 * place; r += kPiece) {
    Halves low, high;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s == 0 || kIsGated) {
        const float* own = row + strips[s].part * p.shrunk.part_stride;
        low = load_shrunk<T, kIsSplit>(p.shrunk, own, group < count, r, strips[s].rank);
        high = load_shrunk<T, kIsSplit>(p.shrunk, own + 8 * p.shrunk.stride, group + 8 < count, r,
                              strips[s].rank);
      }
      products[s].add(strips[s], b, static_cast<int>(p.b_stride), r, low, high, aligned.b);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (group + 8 * half >= count) continue;
    T* out = static_cast<T*>(p.out) + (token + group + 8 * half) * p.out_stride;
    float x[2][kVec];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      unpack<T>(old[s][half], x[s]);
      products[s].add_to(x[s], half == 1);
      if (kIsGated) continue;
      store_eight(out, strips[s].first + place * kVec, strips[s].end, is_aligned[s], x[s]);
    }
    if constexpr (kIsGated) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[0][i] = silu_mul(x[0][i], x[1][i]);
      store_eight(out, strips[0].first + place * kVec, strips[0].end, is_aligned[0], x[0]);
    }
  }
}

template <class T, bool kIsGated, bool kIsSplit>
__global__ void __launch_bounds__(kThreads, kIsSplit ? 2 : 4)
    expand_kernel(LoraExpandParams p, int column_blocks, int tile_tokens, Alignment aligned) {
  pdl_launch_dependents();
  pdl_wait();
  const TokenTile tile = token_tile<kIsGated>(p.rows, blockIdx.x / column_blocks, tile_tokens);
  if (tile.count == 0) return;
  Strip strips[2];
  if (!strips_of<kIsGated>(p, tile.slot, blockIdx.x % column_blocks, threadIdx.x / kWarpSize,
                           strips)) {
    return;
  }
#pragma unroll 1
  for (int first = 0; first < tile.count; first += kMmaTokens) {
    expand_tile<T, kIsGated, kIsSplit>(p, strips, tile.slot, tile.begin + first,
                             min(tile.count - first, kMmaTokens), aligned);
  }
}

template <class T, bool kIsGated, bool kIsSplit>
cudaError_t launch_tiles(const LoraExpandParams& p, cudaStream_t stream) {
  const Alignment aligned{
      .b = reinterpret_cast<uintptr_t>(p.b) % 8 == 0 && (p.b_stride | p.b_slot_stride) % 4 == 0,
      .rows = is_vec_aligned(p.out, p.out_stride) && is_vec_aligned(p.gate_up, p.gate_up_stride)};
  const int column_blocks = static_cast<int>(
      kIsGated ? (2 * p.n + kColumns - 1) / kColumns : p.n / kColumns + p.rows.num_parts);
  const int tile_tokens = p.rows.num_tokens <= kFewTokens ? kMmaTokens : kManyTokens;
  const int64_t num_tiles = num_token_tiles(p.rows.num_tokens, tile_tokens,
                                            p.rows.num_slots + (kIsGated ? 2 : 0));
  return launch_chained(expand_kernel<T, kIsGated, kIsSplit>,
                        static_cast<unsigned>(num_tiles * column_blocks), kThreads, 0, stream, p,
                        column_blocks, tile_tokens, aligned);
}

template <class T, bool kIsGated>
cudaError_t launch_as(const LoraExpandParams& p, cudaStream_t stream) {
  return p.shrunk.num_splits > 1 ? launch_tiles<T, kIsGated, true>(p, stream)
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
