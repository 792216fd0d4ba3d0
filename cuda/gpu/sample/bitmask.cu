// apply_bitmask: -inf where a row's mask has no bit, in place.
//
// A thread has one byte of the mask, 8 tokens, at a time: a warp reads 32 bytes of it and covers
// 256 neighbouring logits. Logits are never read; 8 forbidden ones are one store of 16 bytes (two
// where they are float32), allowed ones are not touched. What lies behind the mask's end is
// forbidden.
// Floor: bytes, 1/8 a token for the mask and an element for each token that is forbidden.
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/sample/bitmask.h"

namespace pyserve::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kBytes = 4;  // of the mask, that a thread asks for at once

// -inf in 16 bytes, and as an element.
template <class T>
struct MinusInf {
  static constexpr uint32_t kWord = sizeof(T) == 4                       ? 0xff800000u
                                    : std::is_same_v<T, __nv_bfloat16> ? 0xff80ff80u
                                                                         : 0xfc00fc00u;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  static constexpr Bits kBits = static_cast<Bits>(kWord);
};

template <class T>
__global__ void __launch_bounds__(kThreads) bitmask_kernel(BitmaskParams p) {
  using Inf = MinusInf<T>;
  pdl_launch_dependents();
  pdl_wait();
  const int row = p.rows[blockIdx.y * p.rows_stride];
  if (row < -1 || row >= p.num_rows) __trap();
  if (row < 0) return;
  auto* logits = static_cast<typename Inf::Bits*>(p.logits) + row * p.logits_stride;
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
      constexpr uint4 kInf{Inf::kWord, Inf::kWord, Inf::kWord, Inf::kWord};
#pragma unroll
      for (int part = 0; part < static_cast<int>(sizeof(T)) / 2; ++part) {
        reinterpret_cast<uint4*>(logits + token)[part] = kInf;
      }
      continue;
    }
    if (allowed[i] == 0xff) continue;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if ((allowed[i] >> e & 1) == 0 && token + e < p.vocab_size) logits[token + e] = Inf::kBits;
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
  if (params.dtype == Dtype::kFloat32) return launch_as(float{});
  return dispatch_half(params.dtype, launch_as);
}

}  // namespace pyserve::gpu
