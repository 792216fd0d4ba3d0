// linear of 4-bit integers with adapters for 1 to 16 rows of x on Hopper: few_rows_w4a16_lora.cuh
// with the tilings of few_rows_w4a16_sm90a.cu.
#include "gpu/linear/few_rows_w4a16_lora.cuh"

namespace pyserve::gpu {
namespace {

// Calls fn with the tiling for m rows; `none` where there is no such.
template <int kGroupSize, class Result, class Fn>
Result with_tile(int64_t m, Result none, Fn&& fn) {
  using Deep = W4DeepSm90a<kGroupSize>;
  using Wide = W4WideSm90a<kGroupSize>;
  if (m <= Deep::kTokens) return fn(Deep{});
  return m <= Wide::kTokens ? fn(Wide{}) : none;
}

}  // namespace

bool fits_linear_w4a16_lora_sm90a(const LinearLora& lora, int64_t group_size) {
  bool fits = false;
  dispatch_group_size(group_size, [&](auto size) {
    fits = with_tile<decltype(size)::value>(lora.rows.num_tokens, false, [&]<class Tile>(Tile) {
      return fits_w4a16_lora<Tile>(lora);
    });
    return cudaSuccess;
  });
  return fits;
}

cudaError_t launch_linear_w4a16_lora_sm90a(const LinearParams& params, const LinearLora& lora,
                                           int64_t group_size, const Device& device,
                                           cudaStream_t stream) {
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return dispatch_epilogue(params.epilogue, [&](auto epilogue) {
      return dispatch_group_size(group_size, [&](auto size) {
        return with_tile<decltype(size)::value>(
            params.m, cudaErrorInvalidValue, [&]<class Tile>(Tile) {
              return launch_w4a16_lora_tiled<T, decltype(epilogue)::value, Tile>(
                  params, lora, device.num_sms, stream);
            });
      });
    });
  });
}

}  // namespace pyserve::gpu
