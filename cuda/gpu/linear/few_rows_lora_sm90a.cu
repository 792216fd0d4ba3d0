// linear with adapters for 1 to 32 rows of x on Hopper: few_rows_lora.cuh with the tilings of
// linear.cu and few_rows_sm90a.cu.
#include "gpu/linear/few_rows_lora.cuh"

namespace pyserve::gpu {
namespace {

using One = Tiling<1, 10, 1>;
using Few = Tiling<1, 8, 8>;
using Tall = Tiling<2, 4, 16>;
using Wide = Tiling<2, 3, 32>;

// Calls fn with the tiling for m rows; `none` where there is no such.
template <class Result, class Fn>
Result with_tile(int64_t m, Result none, Fn&& fn) {
  if (m <= One::kTokens) return fn(One{});
  if (m <= Few::kTokens) return fn(Few{});
  if (m <= Tall::kTokens) return fn(Tall{});
  return m <= Wide::kTokens ? fn(Wide{}) : none;
}

}  // namespace

bool fits_linear_lora_sm90a(const LinearLora& lora) {
  return with_tile(lora.rows.num_tokens, false, [&]<class Tile>(Tile) {
    return fits_lora<Tile>(lora);
  });
}

cudaError_t launch_linear_lora_sm90a(const LinearParams& params, const LinearLora& lora,
                                     const Device& device, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return dispatch_epilogue(params.epilogue, [&](auto epilogue) {
      return with_tile(params.m, cudaErrorInvalidValue, [&]<class Tile>(Tile) {
        return launch_lora_tiled<T, decltype(epilogue)::value, Tile>(params, lora, device.num_sms,
                                                                     stream);
      });
    });
  });
}

}  // namespace pyserve::gpu
