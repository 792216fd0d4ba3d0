// linear_w4a16_kernel with what few_rows_lora.cuh adds. That lies at the end of the shared memory
// which else is all for x.
#pragma once

#include "gpu/linear/few_rows_lora.cuh"
#include "gpu/linear/few_rows_w4a16.cuh"

namespace pyserve::gpu {

// lora_place: in shared memory, what `lora` has of it.
template <class T, Epilogue kEpilogue, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_w4a16_lora_kernel(const __grid_constant__ LinearParams p, W4Work work,
                             const __grid_constant__ LinearLora lora, int lora_place) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  multiply_w4_rows<T, kEpilogue, Tile>(p, work, dynamic_smem,
                                       Lora<T, Tile>(p, lora, dynamic_smem + lora_place));
}

// Whether there is room beside the pieces of x that must be there at a time.
template <class Tile>
bool fits_w4a16_lora(const LinearLora& lora) {
  const int64_t x_bytes = lora.rows.num_tokens * Tile::kWarps * Tile::kStages * Tile::kTokenBytes;
  return lora.rows.num_tokens <= Tile::kTokens && x_bytes + lora.smem_bytes() <= Tile::kXBytes;
}

// As launch_w4a16_tiled, where it fits.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_w4a16_lora_tiled(const LinearParams& p, const LinearLora& lora, int num_sms,
                                    cudaStream_t stream) {
  constexpr auto kKernel = linear_w4a16_lora_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, Tile::kSmem>();
  if (error != cudaSuccess) return error;
  const int num_ctas = w4a16_ctas(p, num_sms), held_bytes = lora.smem_bytes();
  return launch_chained(kKernel, static_cast<unsigned>(num_ctas), Tile::kThreads, Tile::kSmem,
                        stream, p, W4Work::of(p, num_ctas, Tile{}, held_bytes), lora,
                        Tile::kSmem - held_bytes);
}

}  // namespace pyserve::gpu
