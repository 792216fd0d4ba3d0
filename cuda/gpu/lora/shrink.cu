// lora_shrink: the sum over splits of out[split, t, p, r] = scales[s, p] * sum over i of x[t, i] *
// a[s, p, r, i], s being the slot of t's adapter and r below the part's rank.
//   x [num_tokens, k], a [num_slots, num_parts, max_rank, k], out float32 [num_splits, num_tokens,
//   num_parts, max_rank]
// Where x is what a norm is a factor of (common/epilogue.h), so is it here.
//
// Many tokens are shrink_many.cu's. A CTA takes some tokens of one slot by some rows of A, those of
// all parts one after the other, by one split of k; CTAs beyond what there is end at once, so the
// grid depends on shapes alone. Its 8 warps share k: warp w takes every 8th piece of 32 columns. A
// product is mma m16n8k16, whose columns of k may stand in any order that both sides agree on: so
// each lane loads 16 bytes of a row and feeds two steps with them. Up to 64 tokens take 16 by 8
// rows a CTA, or by 16 or 32 where there are more rows: what counts then is that many SMs ask for
// A, but no more CTAs than run at a time, and that a warp asks for all of its part at once; so k is
// split too, and up to 8 tokens, which leave half of an mma's rows free, take deeper pieces: what a
// warp asks for behind the wait it waits for. More take 32 by 16, as A would be read again for each 16 tokens else. A's first pieces
// are asked for before x is there. One token on Hopper is shrink_one_sm90a.cu's.
// Numerics: float32 sums, one warp's after the other. The order of a sum depends on k and on the
// number of splits alone.
// Floor: bytes, 2 * k of each row of A and of x; of one token, rank 16 and k 4096 the latency of a
// launch.
#include "gpu/core/device.h"
#include "gpu/lora/shrink_tiles.cuh"

namespace pyserve::gpu {
namespace {

template <class T, int kTokens, int kRowTiles, int kDepth, bool kIsAligned>
cudaError_t launch_tiles(const LoraShrinkParams& p, cudaStream_t stream) {
  constexpr int kRows = 8 * kRowTiles;
  const int row_blocks = (p.rows.num_parts * p.rows.max_rank + kRows - 1) / kRows;
  const int64_t num_tiles = num_token_tiles(p.rows.num_tokens, kTokens, p.rows.num_slots);
  return launch_chained(shrink_kernel<T, kTokens, kRowTiles, kDepth, kIsAligned, InPlace>,
                        static_cast<unsigned>(num_tiles * p.out.num_splits * row_blocks), kThreads,
                        0, stream, p, row_blocks, split_columns_of(p));
}

template <class T>
cudaError_t launch_as(const LoraShrinkParams& p, cudaStream_t stream) {
  const bool is_aligned = p.k % kVec == 0 && is_vec_aligned(p.x, p.x_stride) &&
                          is_vec_aligned(p.a, p.a_slot_stride | p.a_part_stride | p.a_stride);
  if (!is_aligned) return launch_tiles<T, 16, 1, 1, false>(p, stream);
  if constexpr (kHasSm90a) {
    const Device* device = nullptr;
    if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
    if (device->is_hopper() && can_lora_shrink_sm90a(p)) return launch_lora_shrink_sm90a(p, stream);
  }
  const int num_rows = p.rows.num_parts * p.rows.max_rank;
  if (p.rows.num_tokens <= kHalfTokens) {
    // As deep as a split is and no deeper: few registers let more CTAs start beside the kernel in
    // front.
    const bool is_short = split_columns_of(p) <= 2 * kStep;
    if (num_rows <= 16) {
      return is_short ? launch_tiles<T, 8, 1, 2, true>(p, stream)
                      : launch_tiles<T, 8, 1, 7, true>(p, stream);  // of 14,336 columns all
    }
    if (num_rows <= 64) {
      return is_short ? launch_tiles<T, 8, 2, 2, true>(p, stream)
                      : launch_tiles<T, 8, 2, 4, true>(p, stream);
    }
    return launch_tiles<T, 8, 4, 2, true>(p, stream);
  }
  if (p.rows.num_tokens <= kFewTokens) {
    if (num_rows <= 16) return launch_tiles<T, 16, 1, 4, true>(p, stream);
    if (num_rows <= 64) return launch_tiles<T, 16, 2, 4, true>(p, stream);
    return launch_tiles<T, 16, 4, 2, true>(p, stream);
  }
  if (p.rows.num_tokens > kManyTokens || p.out.num_splits == 1) {
    return launch_lora_shrink_many(p, stream);
  }
  return launch_tiles<T, 32, 2, 2, true>(p, stream);
}

}  // namespace

cudaError_t launch_lora_shrink(const LoraShrinkParams& params, cudaStream_t stream) {
  if (params.rows.num_tokens == 0) return cudaSuccess;
  return dispatch_half(params.dtype, [&]<class T>(T) { return launch_as<T>(params, stream); });
}

}  // namespace pyserve::gpu
