// linear_lora of plain numbers for up to 8 rows of x: few_rows_lora.cuh, cut for every card as
// linear.cu is; 2 to 4 rows take the tiling of 8. On Hopper up to 32 rows (few_rows_lora_sm90a.cu),
// and up to 16 by 4-bit integers (few_rows_w4a16_lora_sm90a.cu).
#include "gpu/linear/few_rows_lora.cuh"

#include "gpu/linear/dispatch.h"
#include "gpu/linear/few_rows_sm90a.h"
#include "gpu/linear/w4a16.h"

namespace pyserve::gpu {
namespace {

using One = Tiling<1, 10, 1>;
using Deep = Tiling<1, 8, 8>;
using Small = Tiling<1, 3, 8>;

// Calls fn(Tile{}) with the one for so many rows.
template <class Fn>
auto with_tiling(int64_t m, const Device& device, Fn&& fn) {
  if (device.smem_per_block < Deep::kSmem) return fn(Small{});
  return m == 1 ? fn(One{}) : fn(Deep{});
}

cudaError_t launch(const LinearLoraParams& params, const Device& device, cudaStream_t stream) {
  const LinearParams& p = params.linear;
  return dispatch_half(p.dtype, [&]<class T>(T) {
    return dispatch_epilogue(p.epilogue, [&](auto epilogue) {
      return with_tiling(p.m, device, [&]<class Tile>(Tile) {
        return launch_lora_tiled<T, decltype(epilogue)::value, Tile>(p, params.lora,
                                                                     device.num_sms, stream);
      });
    });
  });
}

// What both kinds of weight need.
bool is_aligned(const LinearLoraParams& params) {
  const LinearParams& p = params.linear;
  const LinearLora& l = params.lora;
  const int64_t strides = l.shrunk.split_stride | l.shrunk.stride | l.shrunk.part_stride;
  return is_vec_aligned(p.x, p.x_stride) && is_vec_aligned(p.weight, 0) &&
         is_vec_aligned(l.b, l.b_slot_stride | l.b_stride) && l.rows.max_rank % kVec == 0 &&
         reinterpret_cast<uintptr_t>(l.shrunk.data) % 16 == 0 && strides % 4 == 0;
}

bool can_w4a16(const LinearLoraParams& params, const Device& device) {
  const LinearParams& p = params.linear;
  const bool is_paired = p.epilogue == Epilogue::kSiluMul;
  if constexpr (kHasSm90a) {
    return device.is_hopper() && p.m <= kMaxW4RowsSm90a && (!is_paired || p.n % kStripRows == 0) &&
           fits_linear_w4a16_lora_sm90a(params);
  }
  return false;
}

}  // namespace

bool can_linear_lora(const LinearLoraParams& params, const Device& device) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  const LinearParams& p = params.linear;
  const LinearLora& l = params.lora;
  if (!is_aligned(params) || p.m == 0 || p.k == 0 || p.k >= kLimit || p.n >= kLimit ||
      l.rows.num_slots * l.b_slot_stride >= 2 * kLimit) {
    return false;
  }
  if (params.group_size != 0) return can_w4a16(params, device);
  if (p.k % kVec != 0 || p.weight_stride % kVec != 0 ||
      choose_linear(p, device) != LinearKernel::kFewRows) {
    return false;
  }
  if (p.m <= Deep::kTokens) {
    return with_tiling(p.m, device, [&]<class Tile>(Tile) { return fits_lora<Tile>(l); });
  }
  if constexpr (kHasSm90a) {
    return device.is_hopper() && p.m <= kMaxRowsSm90a && fits_linear_lora_sm90a(params);
  }
  return false;
}

cudaError_t launch_linear_lora(const LinearLoraParams& params, cudaStream_t stream) {
  if (params.linear.m == 0 || params.linear.n == 0) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  if (!can_linear_lora(params, *device)) return cudaErrorInvalidValue;
  if constexpr (kHasSm90a) {
    if (params.group_size != 0) return launch_linear_w4a16_lora_sm90a(params, *device, stream);
  }
  if (params.linear.m <= Deep::kTokens) return launch(params, *device, stream);
  if constexpr (kHasSm90a) return launch_linear_lora_sm90a(params, *device, stream);
  return cudaErrorInvalidValue;
}

}  // namespace pyserve::gpu
