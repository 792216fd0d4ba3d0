// Decode attention for head_dim 64 and 128 (decode_kernel.cuh), and the choice between decode and
// prefill kernels.
#include "gpu/attention/decode_kernel.cuh"

#include "gpu/attention/attention.h"

namespace pyserve::gpu {
namespace decode {
namespace {

template <class T, int kHeadDim>
cudaError_t launch_head_dim(const Decode& d, dim3 grid, cudaStream_t stream) {
  return d.rope.cos_sin != nullptr ? launch_kind<T, kHeadDim, Kind::kRope>(d, grid, stream)
                                   : launch_kind<T, kHeadDim, Kind::kPlain>(d, grid, stream);
}

cudaError_t launch_decode(const Decode& d, Dtype dtype, dim3 grid, cudaStream_t stream) {
  const bool is_general = d.scale.cap_rate != 0.0f || (d.p.head_dim != 64 && d.p.head_dim != 128);
  if (is_general) return launch_general(d, dtype, grid, stream);
  return dispatch_half(dtype, [&]<class T>(T) {
    return d.p.head_dim == 64 ? launch_head_dim<T, 64>(d, grid, stream)
                              : launch_head_dim<T, 128>(d, grid, stream);
  });
}

}  // namespace
}  // namespace decode

cudaError_t launch_rope_decode_attention(const AttentionParams& params, const DecodeRope& rope,
                                         Dtype dtype, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const int num_ranges = num_decode_ranges(params.device, params.num_kv_heads);
  decode::Decode d{};
  d.p = params;
  d.partials = decode_partials(params);
  d.rope = rope;
  d.group = params.num_heads / params.num_kv_heads;
  d.items_offset = decode_items_offset(num_ranges);
  d.scale = score_scale<true>(params);
  return decode::launch_decode(d, dtype, dim3(params.num_kv_heads, num_ranges), stream);
}

cudaError_t launch_decode_attention(const AttentionParams& params, Dtype dtype,
                                    cudaStream_t stream) {
  return launch_rope_decode_attention(params, DecodeRope{}, dtype, stream);
}

cudaError_t launch_paged_attention(const AttentionParams& params, Dtype dtype,
                                   cudaStream_t stream) {
  const cudaError_t error = launch_decode_attention(params, dtype, stream);
  const int group = params.num_heads / params.num_kv_heads;
  if (error != cudaSuccess || params.num_rows == 0 ||
      static_cast<int64_t>(params.max_query_len) * group <= kDecodeRows) {
    return error;
  }
  return launch_prefill_attention(params, dtype, stream);
}

}  // namespace pyserve::gpu
