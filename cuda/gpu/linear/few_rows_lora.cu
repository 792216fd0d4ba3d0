// linear_lora with plain numbers: the tile sizes of few_rows_lora.cuh for all devices, as linear.cu
// has them, and the choice of kernel. 2 to 4 rows take the tiling of 8. With 4-bit integers only
// Hopper has a kernel (few_rows_w4a16_lora_sm90a.cu).
#include "gpu/linear/few_rows_lora.cuh"

#include "gpu/linear/dispatch.h"
#include "gpu/linear/w4a16.h"

namespace pyserve::gpu {
namespace {

using One = Tiling<1, 10, 1>;
using Deep = Tiling<1, 8, 8>;
using Small = Tiling<1, 3, 8>;
static_assert(Deep::kTokens == kMaxLoraTokens && Small::kTokens == kMaxLoraTokens);

// Calls fn(Tile{}) with the tiling for so many rows.
template <class Fn>
auto with_tiling(int64_t m, const Device& device, Fn&& fn) {
  if (device.smem_per_block < Deep::kSmem) return fn(Small{});
  return m == 1 ? fn(One{}) : fn(Deep{});
}

// What both kinds of weight need.
bool is_served(const LinearLoraParams& params) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  const LinearParams& p = params.linear;
  const LinearLora& l = params.lora;
  const int64_t strides = l.shrunk.split_stride | l.shrunk.stride | l.shrunk.part_stride;
  return p.m >= 1 && p.m <= kMaxLoraTokens && p.k > 0 && p.k < kLimit && p.n > 0 && p.n < kLimit &&
         l.rows.num_slots >= 1 && l.rows.num_parts >= 1 && l.rows.num_parts <= kMaxLoraParts &&
         l.rows.max_rank >= 1 && l.rows.max_rank <= kMaxLoraRank && l.rows.max_rank % kVec == 0 &&
         is_vec_aligned(p.x, p.x_stride) && is_vec_aligned(p.weight, 0) &&
         is_vec_aligned(l.b, l.b_slot_stride | l.b_stride) &&
         reinterpret_cast<uintptr_t>(l.shrunk.data) % 16 == 0 && strides % 4 == 0;
}

bool can_w4a16(const LinearLoraParams& params, const Device& device) {
  const LinearParams& p = params.linear;
  if constexpr (kHasSm90a) {
    return device.is_hopper() && (p.epilogue != Epilogue::kSiluMul || p.n % kStripRows == 0) &&
           fits_linear_w4a16_lora_sm90a(params, device);
  }
  return false;
}

}  // namespace

bool can_linear_lora(const LinearLoraParams& params, const Device& device) {
  const LinearParams& p = params.linear;
  if (!is_served(params)) return false;
  if (params.group_size != 0) return can_w4a16(params, device);
  if (p.k % kVec != 0 || p.weight_stride % kVec != 0 ||
      choose_linear(p, device) != LinearKernel::kFewRows) {
    return false;
  }
  bool is_fitting = false;
  dispatch_epilogue(p.epilogue, [&](auto epilogue) {
    is_fitting = with_tiling(p.m, device, [&]<class Tile>(Tile) {
      return fits_lora<decltype(epilogue)::value, Tile>(p, params.lora, device.num_sms);
    });
    return cudaSuccess;
  });
  return is_fitting;
}

cudaError_t launch_linear_lora(const LinearLoraParams& params, cudaStream_t stream) {
  const LinearParams& p = params.linear;
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  if (!can_linear_lora(params, *device)) return cudaErrorInvalidValue;
  if constexpr (kHasSm90a) {
    if (params.group_size != 0) return launch_linear_w4a16_lora_sm90a(params, *device, stream);
  }
  return dispatch_half(p.dtype, [&]<class T>(T) {
    return dispatch_epilogue(p.epilogue, [&](auto epilogue) {
      return with_tiling(p.m, *device, [&]<class Tile>(Tile) {
        return launch_lora_tiled<T, decltype(epilogue)::value, Tile>(p, params.lora,
                                                                     device->num_sms, stream);
      });
    });
  });
}

}  // namespace pyserve::gpu
