// linear_lora of 4-bit integers for 1 to 16 rows of x: few_rows_w4a16_lora.cuh, cut as
// few_rows_w4a16_sm90a.cu.
#include "gpu/linear/few_rows_w4a16_lora.cuh"

namespace pyserve::gpu {
namespace {

// Calls fn(Tile{}) with the one for so many rows and this group size.
template <class Fn>
auto with_tiling(int64_t m, int64_t group_size, Fn&& fn) {
  const auto of_size = [&](auto size) {
    using Deep = W4DeepSm90a<decltype(size)::value>;
    return m <= Deep::kTokens ? fn(Deep{}) : fn(W4WideSm90a<decltype(size)::value>{});
  };
  switch (group_size) {
    case 32: return of_size(std::integral_constant<int, 32>{});
    case 64: return of_size(std::integral_constant<int, 64>{});
    default: return of_size(std::integral_constant<int, 128>{});
  }
}

}  // namespace

bool fits_linear_w4a16_lora_sm90a(const LinearLoraParams& params) {
  return with_tiling(params.linear.m, params.group_size, [&]<class Tile>(Tile) {
    return fits_w4a16_lora<Tile>(params.linear, params.lora);
  });
}

cudaError_t launch_linear_w4a16_lora_sm90a(const LinearLoraParams& params, const Device& device,
                                           cudaStream_t stream) {
  const LinearParams& p = params.linear;
  return dispatch_half(p.dtype, [&]<class T>(T) {
    return dispatch_epilogue(p.epilogue, [&](auto epilogue) {
      return with_tiling(p.m, params.group_size, [&]<class Tile>(Tile) {
        return launch_w4a16_lora_tiled<T, decltype(epilogue)::value, Tile>(
            p, params.lora, device.num_sms, stream);
      });
    });
  });
}

}  // namespace pyserve::gpu
