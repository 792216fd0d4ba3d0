// How one CTA draws the token of a row that is not greedy: from a list of its largest logits, or
// after a radix selection. nucleus.cuh does the same for top-p without top-k.
#pragma once

#include "gpu/sample/select.cuh"

namespace pyserve::gpu {

// kList: a top-k that the scan's bound serves. kNucleus: top-p without top-k. kSums: neither.
// kRadix: a top-k too large for a list.
enum class Path { kList, kNucleus, kSums, kRadix };

// What is known of a row when the draw begins.
template <class T>
struct Draw {
  SampleRow<T> row;
  Weigher weigher;
  Path path;
  int top_k;  // 0: all
};

// Sets the thresholds for any top-k and top-p, without a list.
template <class T>
__device__ __forceinline__ void select_thresholds(Draw<T>& draw, DrawShared& s) {
  if (draw.top_k > 0) select_key(draw.row, draw.top_k, draw.weigher, s);
  if (s.top_p < 1.0f) select_weight(draw.row, s.top_p, draw.weigher, s);
}

// Draws from a list of the n logits that reach the bound: top-k, then min-p, then top-p.
template <class T>
__device__ __forceinline__ int end_list(const Draw<T>& draw, int n, DrawShared& s) {
  sort_descending(s.list, n);
  int kept = min(n, draw.top_k);
#pragma unroll 1
  for (int i = threadIdx.x; i < kept; i += kSampleThreads) {
    const uint64_t rank = s.list[i];
    const float x = from_key(bits_of(rank));
    const float exponent = __fmul_rn(__fsub_rn(x, draw.weigher.largest), draw.weigher.factor);
    float weight = quantized_exp(exponent);
    if (weight < draw.weigher.min_weight) weight = 0.0f;
    s.list[i] = rank_of(__float_as_uint(weight), id_of(rank));
  }
  __syncthreads();
  if (s.top_p < 1.0f) {
    sort_descending(s.list, kept);
    kept = find_in_list(kept, s, [&](uint64_t total) { return wanted_mass(s.top_p, total) - 1; })
               .item +
           1;
  }
  return draw_from_list(kept, s);
}

}  // namespace pyserve::gpu
