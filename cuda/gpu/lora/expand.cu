// lora_expand: out[t, j] += sum over r of shrunk[t, p, r] * b[s, j, r], s being the slot of t's
// adapter, p the part that column j belongs to, and r below its rank.
//   shrunk float32 [num_tokens, num_parts, max_rank], b [num_slots, n, max_rank], out [num_tokens, n]
//
// A CTA takes 16 tokens of one slot by 256 columns of one part, a warp 64 of them; a part's columns
// are divided from its own first one on, so no tile has two parts. CTAs beyond a slot's tokens end at
// once: the grid depends on shapes alone. As in shrink.cu the order of r within a piece of 16 is
// what suits the loads: a lane takes 4 neighbours. What was shrunk is float32: it is multiplied as
// the sum of two 16-bit numbers, which keeps 16 of its bits or more.
// Numerics: float32 sums, one rounding of what is added to out. The order depends on the rank alone.
// Floor: bytes, 2 * rank of each column of B, and 4 of each element of out.
#include "gpu/core/vec.cuh"
#include "gpu/lora/segments.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTiles = 8;                           // of 8 columns, a warp
constexpr int kColumns = kWarps * kTiles * 8;       // a CTA
constexpr int kPiece = 16;                          // of r

// The part and the first column of the block-th tile of kColumns; no part where there are fewer.
struct ColumnTile {
  int part, first, end;
};

__device__ __forceinline__ ColumnTile column_tile(const LoraExpandParams& p, int block) {
  for (int part = 0; part < p.rows.num_parts; ++part) {
    const int begin = p.columns[part], end = p.columns[part + 1];
    if (begin < 0 || begin > end || end > p.n) __trap();
    const int num_blocks = (end - begin + kColumns - 1) / kColumns;
    if (block < num_blocks) return {part, begin + block * kColumns, end};
    block -= num_blocks;
  }
  return {-1, 0, 0};
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

template <class T>
__device__ __forceinline__ Halves load_shrunk(const float* row, bool is_there, int r, int rank) {
  float x[4] = {};
  if (is_there) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (r + j < rank) x[j] = row[r + j];
    }
  }
  Halves halves{{pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3])}, {}};
  const float2 low = unpack_pair<T>(halves.value.x), high = unpack_pair<T>(halves.value.y);
  halves.rest = {pack_pair<T>(x[0] - low.x, x[1] - low.y),
                 pack_pair<T>(x[2] - high.x, x[3] - high.y)};
  return halves;
}

template <class T>
__device__ __forceinline__ void add_to(T* out, int column, int end, float first, float second) {
  if (column < end) out[0] = from_float<T>(to_float(out[0]) + first);
  if (column + 1 < end) out[1] = from_float<T>(to_float(out[1]) + second);
}

template <class T>
__global__ void __launch_bounds__(kThreads) expand_kernel(LoraExpandParams p, bool is_aligned) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = lane / 4, place = lane % 4;
  const int slot = blockIdx.z;
  pdl_launch_dependents();
  pdl_wait();
  const TokenTile tile = token_tile(p.rows, slot, blockIdx.y);
  if (tile.count == 0) return;
  const ColumnTile columns = column_tile(p, blockIdx.x);
  if (columns.part < 0) return;
  const int rank = rank_of(p.rows, slot, columns.part);
  const int first = columns.first + warp * kTiles * 8;
  if (rank == 0 || first >= columns.end) return;

  const float* shrunk = p.shrunk + tile.begin * p.shrunk_stride +
                        columns.part * p.shrunk_part_stride;
  const T* b = static_cast<const T*>(p.b) + slot * p.b_slot_stride + first * p.b_stride;
  const bool has_low = group < tile.count, has_high = group + 8 < tile.count;
  float sums[kTiles][4] = {};
  for (int r = 0; r < rank; r += kPiece) {
    const int own = r + 4 * place;
    const Halves low = load_shrunk<T>(shrunk + group * p.shrunk_stride, has_low, own, rank);
    const Halves high = load_shrunk<T>(shrunk + (group + 8) * p.shrunk_stride, has_high, own, rank);
    const uint32_t value[4] = {low.value.x, high.value.x, low.value.y, high.value.y};
    const uint32_t rest[4] = {low.rest.x, high.rest.x, low.rest.y, high.rest.y};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = 8 * n + group;
      const uint2 four = load_four<T>(b + column * p.b_stride, first + column < columns.end, own,
                                      rank, is_aligned);
      mma_16816<T>(sums[n], value, four.x, four.y);
      mma_16816<T>(sums[n], rest, four.x, four.y);
    }
  }
  T* out = static_cast<T*>(p.out) + tile.begin * p.out_stride;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int column = first + 8 * n + 2 * place;
    T* row = out + group * p.out_stride + column;
    if (has_low) add_to(row, column, columns.end, sums[n][0], sums[n][1]);
    if (has_high) add_to(row + 8 * p.out_stride, column, columns.end, sums[n][2], sums[n][3]);
  }
}

template <class T>
cudaError_t launch_as(const LoraExpandParams& p, cudaStream_t stream) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(p.b) % 8 == 0 && p.b_stride % 4 == 0 &&
                          p.b_slot_stride % 4 == 0;
  const auto num_blocks = static_cast<unsigned>(p.n / kColumns + p.rows.num_parts);
  const dim3 grid(num_blocks, num_token_tiles(p.rows.num_tokens),
                  static_cast<unsigned>(p.rows.num_slots));
  return launch_chained(expand_kernel<T>, grid, kThreads, 0, stream, p, is_aligned);
}

}  // namespace

cudaError_t launch_lora_expand(const LoraExpandParams& params, cudaStream_t stream) {
  if (params.rows.num_tokens == 0 || params.n == 0) return cudaSuccess;
  return dispatch_half(params.dtype, [&]<class T>(T) { return launch_as<T>(params, stream); });
}

}  // namespace pyserve::gpu
