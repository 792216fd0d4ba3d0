// linear_lora with 4-bit integers for 1 to 8 rows of x on Hopper: few_rows_w4a16_lora.cuh with the
// tile sizes of few_rows_w4a16_sm90a.cu.
#include "gpu/linear/few_rows_w4a16_lora.cuh"

namespace pyserve::gpu {

bool fits_linear_w4a16_lora_sm90a(const LinearLoraParams& params, const Device& device) {
  bool is_fitting = false;
  dispatch_epilogue(params.linear.epilogue, [&](auto epilogue) {
    return dispatch_group_size(params.group_size, [&](auto size) {
      using Tile = W4DeepSm90a<decltype(size)::value>;
      static_assert(Tile::kTokens == kMaxLoraTokens);
      is_fitting = W4LoraPlan<decltype(epilogue)::value, Tile>(params.linear, params.lora,
                                                               device.num_sms).fits();
      return cudaSuccess;
    });
  });
  return is_fitting;
}

cudaError_t launch_linear_w4a16_lora_sm90a(const LinearLoraParams& params, const Device& device,
                                           cudaStream_t stream) {
  return dispatch_half(params.linear.dtype, [&]<class T>(T) {
    return dispatch_epilogue(params.linear.epilogue, [&](auto epilogue) {
      return dispatch_group_size(params.group_size, [&](auto size) {
        using Tile = W4DeepSm90a<decltype(size)::value>;
        return launch_w4a16_lora_tiled<T, decltype(epilogue)::value, Tile>(
            params.linear, params.lora, device.num_sms, stream);
      });
    });
  });
}

}  // namespace pyserve::gpu
