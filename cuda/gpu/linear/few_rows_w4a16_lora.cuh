// few_rows_w4a16.cuh with adapters (few_rows_lora.cuh), which stand in shared memory behind x. What
// is not used of it is left: to lora_shrink of the next linear, which is to start beside this kernel.
#pragma once

#include "gpu/linear/few_rows_lora.cuh"
#include "gpu/linear/few_rows_w4a16.cuh"

namespace pyserve::gpu {

// Of shared memory, what comes before the adapters.
template <class Tile>
__host__ __device__ int w4_lora_begin(const LinearParams& p, const W4Work& work) {
  return Tile::kSmem - Tile::kXBytes +
         Tile::kWarps * work.x_slots * static_cast<int>(p.m) * Tile::kTokenBytes;
}

template <class T, Epilogue kEpilogue, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_w4a16_lora_kernel(const __grid_constant__ LinearParams p, W4Work work,
                             const __grid_constant__ LinearLora lora) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  using Rows = RowTile<kEpilogue, Tile::kRows>;
  unsigned char* room = dynamic_smem + w4_lora_begin<Tile>(p, work);
  multiply_rows_w4a16<T, kEpilogue, Tile>(
      p, work, dynamic_smem, Lora<T, Rows, Tile>(lora, static_cast<int>(p.n), room));
}

// Whether there is room left for x.
template <class Tile>
bool fits_w4a16_lora(const LinearParams& p, const LinearLora& lora) {
  const int reserved = LoraRoom<Tile>(lora.rows).end;
  const W4Work work = W4Work::of(p, 1, Tile{}, reserved);
  return w4_lora_begin<Tile>(p, work) + reserved <= Tile::kSmem;
}

// As launch_w4a16_tiled, where it fits.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_w4a16_lora_tiled(const LinearParams& p, const LinearLora& lora, int num_sms,
                                    cudaStream_t stream) {
  constexpr auto kKernel = linear_w4a16_lora_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, Tile::kSmem>();
  if (error != cudaSuccess) return error;
  const int64_t num_strips = (p.n + kStripRows - 1) / kStripRows;
  const int num_ctas = static_cast<int>(std::min<int64_t>(num_strips, num_sms));
  const int reserved = LoraRoom<Tile>(lora.rows).end;
  const W4Work work = W4Work::of(p, num_ctas, Tile{}, reserved);
  constexpr int kLeast = 120 * 1024;  // more than half of what an SM has, as pdl.cuh asks
  const int num_bytes = std::max(kLeast, w4_lora_begin<Tile>(p, work) + reserved);
  return launch_chained(kKernel, static_cast<unsigned>(num_ctas), Tile::kThreads, num_bytes,
                        stream, p, work, lora);
}

}  // namespace pyserve::gpu
