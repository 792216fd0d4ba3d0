// lora_shrink: out[t, p, r] = scales[s, p] * sum over i of x[t, i] * a[s, p, r, i], s being the slot
// of t's adapter and r below the part's rank.
//   x [num_tokens, k], a [num_slots, num_parts, max_rank, k], out float32 [num_tokens, num_parts,
//   max_rank]
//
// A CTA takes 16 tokens of one slot by kTiles * 8 rows of one part's A; CTAs beyond a slot's tokens
// or a part's rank end at once, so the grid depends on shapes alone. Its 8 warps share k: warp w
// takes every 8th piece of 32 columns. A product is mma m16n8k16, whose columns of k may stand in
// any order that both sides agree on: so each lane loads 16 bytes of a row and feeds two steps with
// them. Few tokens take 8 rows a CTA, as many CTAs as there are: what counts then is that many SMs
// ask for A. Many tokens take 32, as x would be read again by each CTA else.
// Numerics: float32 sums, one warp's after the other. The order of a sum depends on k alone.
// Floor: bytes, 2 * k of each row of A and of x; of one token, rank 16 and k 4096 the latency of a
// launch.
#include "gpu/core/vec.cuh"
#include "gpu/lora/segments.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPiece = 32;        // columns of k that a warp takes at once
constexpr int kFewTokens = 64;    // up to here 8 rows a CTA
constexpr int kManyTiles = 4;     // of 8 rows, beyond

// 8 elements of a row from column i on; zeros beyond k, and where there is no row.
template <class T, bool kIsAligned>
__device__ __forceinline__ uint4 load_piece(const T* row, bool is_there, int64_t i, int64_t k) {
  if constexpr (kIsAligned) {
    return is_there && i < k ? load_vec(row + i) : uint4{};
  } else {
    float x[kVec] = {};
    if (is_there) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (i + j < k) x[j] = to_float(row[i + j]);
      }
    }
    return pack<T>(x);
  }
}

template <class T, int kTiles, bool kIsAligned>
__global__ void __launch_bounds__(kThreads, 2) shrink_kernel(LoraShrinkParams p, int num_blocks) {
  constexpr int kRows = 8 * kTiles;
  __shared__ float partial[kWarps][kTileTokens][kRows + 1];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = lane / 4, place = lane % 4;  // of an mma's fragments
  const int block = blockIdx.x % num_blocks, part = blockIdx.x / num_blocks % p.rows.num_parts;
  const int slot = blockIdx.x / num_blocks / p.rows.num_parts;
  pdl_launch_dependents();
  pdl_wait();
  const TokenTile tile = token_tile(p.rows, slot, blockIdx.y);
  const int first_row = block * kRows, num_rows = rank_of(p.rows, slot, part) - first_row;
  if (tile.count == 0 || num_rows <= 0) return;

  const T* x = static_cast<const T*>(p.x) + tile.begin * p.x_stride;
  const T* a = static_cast<const T*>(p.a) + slot * p.a_slot_stride + part * p.a_part_stride +
               first_row * p.a_stride;
  const bool has_low = group < tile.count, has_high = group + 8 < tile.count;
  const T* x_low = x + group * p.x_stride;
  const T* x_high = x + (group + 8) * p.x_stride;
  float sums[kTiles][4] = {};
#pragma unroll 2
  for (int64_t i = warp * kPiece; i < p.k; i += kWarps * kPiece) {
    const int64_t column = i + place * kVec;
    const uint4 low = load_piece<T, kIsAligned>(x_low, has_low, column, p.k);
    const uint4 high = load_piece<T, kIsAligned>(x_high, has_high, column, p.k);
    const uint32_t first[4] = {low.x, high.x, low.y, high.y};
    const uint32_t second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int row = 8 * n + group;
      const uint4 b = load_piece<T, kIsAligned>(a + row * p.a_stride, row < num_rows, column, p.k);
      mma_16816<T>(sums[n], first, b.x, b.y);
      mma_16816<T>(sums[n], second, b.z, b.w);
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int row = 8 * n + 2 * place;
    partial[warp][group][row] = sums[n][0];
    partial[warp][group][row + 1] = sums[n][1];
    partial[warp][group + 8][row] = sums[n][2];
    partial[warp][group + 8][row + 1] = sums[n][3];
  }
  __syncthreads();
  const float scale = p.scales[slot * p.scales_stride + part];
  float* out = p.out + tile.begin * p.out_stride + part * p.out_part_stride + first_row;
  for (int i = threadIdx.x; i < kTileTokens * kRows; i += kThreads) {
    const int token = i / kRows, row = i % kRows;
    if (token >= tile.count || row >= num_rows) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w][token][row];
    out[token * p.out_stride + row] = sum * scale;
  }
}

template <class T, int kTiles, bool kIsAligned>
cudaError_t launch_tiles(const LoraShrinkParams& p, cudaStream_t stream) {
  constexpr int kRows = 8 * kTiles;
  const int num_blocks = (p.rows.max_rank + kRows - 1) / kRows;
  const dim3 grid(static_cast<unsigned>(num_blocks * p.rows.num_parts * p.rows.num_slots),
                  num_token_tiles(p.rows.num_tokens));
  return launch_chained(shrink_kernel<T, kTiles, kIsAligned>, grid, kThreads, 0, stream, p,
                        num_blocks);
}

template <class T>
cudaError_t launch_as(const LoraShrinkParams& p, cudaStream_t stream) {
  const bool is_aligned = p.k % kVec == 0 && is_vec_aligned(p.x, p.x_stride) &&
                          is_vec_aligned(p.a, p.a_stride);
  if (!is_aligned) return launch_tiles<T, 1, false>(p, stream);
  if (p.rows.num_tokens <= kFewTokens) return launch_tiles<T, 1, true>(p, stream);
  return launch_tiles<T, kManyTiles, true>(p, stream);
}

}  // namespace

cudaError_t launch_lora_shrink(const LoraShrinkParams& params, cudaStream_t stream) {
  if (params.rows.num_tokens == 0) return cudaSuccess;
  return dispatch_half(params.dtype, [&]<class T>(T) { return launch_as<T>(params, stream); });
}

}  // namespace pyserve::gpu
