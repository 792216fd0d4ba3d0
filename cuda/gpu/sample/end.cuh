// How a row that is not greedy ends, by one CTA: from a list of its largest logits, from its mass
// by weight, or by radix selection.
#pragma once

#include "gpu/sample/select.cuh"

namespace pyserve::gpu {

enum class Path { kList, kMass, kSums, kRadix };

// Everything the draw of a row needs.
template <class T>
struct Draw {
  SampleRow<T> row;
  Weigher weigher;
  Path path;
  int top_k;  // 0: all
};

// Any top-k and top-p without a list: sets the thresholds.
template <class T>
__device__ __forceinline__ void select_thresholds(Draw<T>& draw, DrawShared& s) {
  if (draw.top_k > 0) select_key(draw.row, draw.top_k, draw.weigher, s);
  if (s.top_p < 1.0f) select_weight(draw.row, s.top_p, draw.weigher, s);
}

// From the n logits in the list that reach the bound: top-k, min-p, top-p, draw.
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

// From the mass of weights by their upper bits: lists what top-p keeps and draws from it; where
// that does not fit the list, sets the weigher's threshold and gives -1.
template <class T>
__device__ __forceinline__ int end_mass(Draw<T>& draw, DrawShared& s) {
  const Crossing found =
      find_bin(kCoarseBins, s, [&](uint64_t total) { return wanted_mass(s.top_p, total) - 1; });
  const int bin = found.item;
  const auto count_bound = [&](int i) {  // how many weights the bin may hold
    const float most = static_cast<float>(s.masses()[i]) / from_offset(i << kCoarseShift);
    return static_cast<uint64_t>(most * 1.0001f + 1.0f);
  };
  uint64_t bound = 0, num_above;
#pragma unroll 1
  for (int i = bin + 1 + threadIdx.x; i < kCoarseBins; i += kSampleThreads) {
    if (s.masses()[i] != 0) bound += count_bound(i);
  }
  block_exclusive_sum(s.block.warp_sums, bound, num_above);
  const uint64_t room = s.room, num_in_bin = count_bound(bin);
  if (num_in_bin <= room) {
    const bool is_short = num_above + num_in_bin <= room;
    if (threadIdx.x == 0) {
      s.left = wanted_mass(s.top_p, found.total) - (is_short ? 0 : found.before);
    }
    const int last = is_short ? kCoarseBins : bin;
    gather_weights(draw.row, draw.weigher, bin << kCoarseShift, ((last + 1) << kCoarseShift) - 1,
                   s);
    const int n = s.count;
    sort_descending(s.list, n);
    const Crossing end = find_in_list(n, s, [&](uint64_t) { return s.left - 1; });
    if (is_short) return draw_from_list(end.item + 1, s);
    draw.weigher.weight_floor = __uint_as_float(bits_of(s.list[end.item]));
    draw.weigher.last_weight_id = id_of(s.list[end.item]);
  } else {
    select_thresholds(draw, s);
  }
  return -1;
}

}  // namespace pyserve::gpu
