// linear_lora of plain numbers for 9 to 32 rows of x: few_rows_lora.cuh, cut as few_rows_sm90a.cu.
#include "gpu/linear/few_rows_lora.cuh"

#include "gpu/linear/few_rows_sm90a.h"

namespace pyserve::gpu {
namespace {

using Tall = Tiling<2, 4, 16>;
using Wide = Tiling<2, 3, 32>;
static_assert(Wide::kTokens == kMaxRowsSm90a);

// Calls fn(Tile{}) with the one for so many rows.
template <class Fn>
auto with_tiling(int64_t m, Fn&& fn) {
  return m <= Tall::kTokens ? fn(Tall{}) : fn(Wide{});
}

}  // namespace

bool fits_linear_lora_sm90a(const LinearLoraParams& params) {
  return with_tiling(params.linear.m,
                     [&]<class Tile>(Tile) { return fits_lora<Tile>(params.lora); });
}

cudaError_t launch_linear_lora_sm90a(const LinearLoraParams& params, const Device& device,
                                     cudaStream_t stream) {
  const LinearParams& p = params.linear;
  return dispatch_half(p.dtype, [&]<class T>(T) {
    return dispatch_epilogue(p.epilogue, [&](auto epilogue) {
      return with_tiling(p.m, [&]<class Tile>(Tile) {
        return launch_lora_tiled<T, decltype(epilogue)::value, Tile>(p, params.lora,
                                                                     device.num_sms, stream);
      });
    });
  });
}

}  // namespace pyserve::gpu
