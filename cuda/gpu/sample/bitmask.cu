// apply_bitmask: logits [num_rows, vocab_size], bfloat16 or float16, become -inf, in place, where
// the mask of their row has no bit. bitmask is int32 [num_masked, num_words], and tokens beyond its
// end are forbidden.
//
// Work: a thread takes one byte of the mask, which is 8 tokens, at a time, so a warp reads 32 bytes
// of the mask and covers 256 neighbouring logits. Logits are never read: 8 forbidden ones are one
// store of 16 bytes, and allowed ones are not touched.
// Bound by bytes: 1/8 per token for the mask, and one element for each forbidden token.
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/sample/bitmask.h"

namespace pyserve::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kBytes = 4;  // bytes of the mask that a thread loads at once

template <class T>
__global__ void __launch_bounds__(kThreads) bitmask_kernel(BitmaskParams p) {
  constexpr uint32_t kInf = kMinusInfBits<T>, kTwo = kInf << 16 | kInf;
  pdl_launch_dependents();
  pdl_wait();
  const int row = p.rows[blockIdx.y * p.rows_stride];
  if (row < -1 || row >= p.num_rows) __trap();
  if (row < 0) return;
  auto* logits = static_cast<uint16_t*>(p.logits) + row * p.logits_stride;
  const auto* mask = reinterpret_cast<const uint8_t*>(p.bitmask + blockIdx.y * p.bitmask_stride);
  const bool is_aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const int first = blockIdx.x * kThreads * kBytes + threadIdx.x;
  uint32_t allowed[kBytes];
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    const int byte = first + i * kThreads;
    allowed[i] = byte < p.num_words * 4 ? mask[byte] : 0;
  }
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    const int token = (first + i * kThreads) * kVec;
    if (allowed[i] == 0 && is_aligned && token + kVec <= p.vocab_size) {
      *reinterpret_cast<uint4*>(logits + token) = {kTwo, kTwo, kTwo, kTwo};
      continue;
    }
    if (allowed[i] == 0xff) continue;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if ((allowed[i] >> e & 1) == 0 && token + e < p.vocab_size) logits[token + e] = kInf;
    }
  }
}

}  // namespace

cudaError_t launch_bitmask(const BitmaskParams& params, cudaStream_t stream) {
  constexpr int kTokens = kThreads * kBytes * kVec;
  const dim3 grid((params.vocab_size + kTokens - 1) / kTokens, params.num_masked);
  const auto launch_as = [&]<class T>(T) {
    return launch_chained(bitmask_kernel<T>, grid, kThreads, 0, stream, params);
  };
  return dispatch_half(params.dtype, launch_as);
}

}  // namespace pyserve::gpu
