// few_rows_w4a16.cuh with adapters (few_rows_lora.cuh), whose shared memory lies behind x. The
// kernel asks for what it uses and not for all that an SM has, so that the lora_shrink in front of
// the next linear finds room beside it.
//
// A group of rows are the two strips that a CTA takes at a time. Where k has fewer pieces than the
// CTA has warps, only the warps that have any copy rows of B.
#pragma once

#include "gpu/linear/few_rows_lora.cuh"
#include "gpu/linear/few_rows_w4a16.cuh"

namespace pyserve::gpu {

// How a launch is divided, and what shared memory it needs.
template <Epilogue kEpilogue, class Tile>
struct W4LoraPlan {
  int num_ctas, num_bytes;
  LoraRoom room;
  W4Work work;

  W4LoraPlan(const LinearParams& p, const LinearLora& lora, int num_sms) {
    constexpr int kStep = W4Fetcher<kEpilogue, Tile>::kStep;
    const int num_strips = static_cast<int>((p.n + kStripRows - 1) / kStripRows);
    num_ctas = std::min(num_strips, num_sms);
    const int max_strips = (num_strips + num_ctas - 1) / num_ctas;
    const int num_pieces = static_cast<int>((p.k + Tile::kDepth - 1) / Tile::kDepth);
    room = LoraRoom::of(lora.rows, (max_strips + kStep - 1) / kStep,
                        std::max(1, num_pieces / Tile::kWarps), Tile{});
    work = W4Work::of(p, num_ctas, Tile{}, room.end);
    num_bytes = work.smem_bytes(p, room.end, Tile{});
  }

  bool fits() const { return num_bytes <= Tile::kSmem; }
};

// As launch_w4a16_tiled, for what fits.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_w4a16_lora_tiled(const LinearParams& p, const LinearLora& lora, int num_sms,
                                    cudaStream_t stream) {
  constexpr auto kKernel = linear_w4a16_kernel<T, kEpilogue, Tile, LinearLora, LoraRoom>;
  const cudaError_t error = allow_smem<kKernel, Tile::kSmem>();
  if (error != cudaSuccess) return error;
  const W4LoraPlan<kEpilogue, Tile> plan(p, lora, num_sms);
  return launch_chained(kKernel, static_cast<unsigned>(plan.num_ctas), Tile::kThreads,
                        plan.num_bytes, stream, p, plan.work, lora, plan.room);
}

}  // namespace pyserve::gpu
