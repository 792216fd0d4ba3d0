// Top-p without top-k, on any row. The threshold is the smallest weight that top-p keeps. After the
// scan for the largest logit the row takes two passes:
//   1  counts the tokens in bins by the exponents of their weights, which needs no exponential
//      function. Weights within a bin differ by at most a factor, so the counts give the mass of
//      each bin up to that factor, and confine the threshold to a window of a bin or two.
//   2  computes all weights: their sum, for each chunk of 256 tokens the sum above the window, and
//      a list of the tokens in the window. If the list overflows with different weights, the tokens
//      of the window are counted by the bits of their weights, which gives a narrower window, and
//      pass 2 is repeated.
// From these the exact threshold is found and checked. If it is not in the window after all, the
// passes of select.cuh find it. Where several CTAs share a row, they sum the weights in pass 1
// already. If few tokens then reach the window, the last CTA lists just these and draws from the
// list.
#pragma once

#include "gpu/sample/end.cuh"

namespace pyserve::gpu {

constexpr int kBinsPerOctave = 128;
constexpr int kExponentBins = 2 * kMinListWords;  // weights of the last bins round to 0
// Entries of the list for the window; the sums by chunk lie behind them.
constexpr int kWindowRoom = 2048;
constexpr int kFewReaching = 1024;                // so many tokens are listed and sorted at once
// In a chunk's word, its number of tokens in the window lies above its sum.
constexpr int kCountShift = 48;
constexpr uint64_t kSumMask = (uint64_t{1} << kCountShift) - 1;
static_assert(kExponentBins > -Weigher::kLeastExponent * 1.442695f * kBinsPerOctave + 1);
static_assert(kWindowRoom + kMaxVocabSize / kChunkTokens <= kMaxListWords);
static_assert((uint64_t{kChunkTokens} << (kWeightBits - 1)) <= kSumMask);

// A range of weights in which the threshold lies; both ends are included.
struct Window {
  float low, high;
};

// The weight in the middle of a bin. The weights of bin b lie between those of b - 0.5 and b + 0.5.
__device__ __forceinline__ float weight_of_bin(float bin) {
  return exp2_approx(34.0f - bin * (1.0f / kBinsPerOctave));
}

__device__ __forceinline__ void zero_counts(DrawShared& s) {
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kExponentBins; i += kSampleThreads) s.low()[i] = 0;
  __syncthreads();
}

// The first bin at which the running sum of mass_of(bin) exceeds `target`; at most the last bin
// with any mass.
template <class MassOf>
__device__ __forceinline__ int bin_at(DrawShared& s, const MassOf& mass_of, double target) {
  return find_crossing(kExponentBins, s.block, mass_of, [&](uint64_t total) {
           return min(static_cast<uint64_t>(target), total - 1);
         }).item;
}

// Counts the tokens of chunks [first, last) that have any weight, by their exponents, in s.low().
// With kHasMass it returns the sum of this thread's weights, else 0.
template <bool kHasMass, class T>
__device__ __forceinline__ uint64_t count_exponents(const SampleRow<T>& row, int first, int last,
                                                    const Weigher& weigher, DrawShared& s) {
  constexpr float kRoundShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float scale = weigher.factor * (-1.44269504f * kBinsPerOctave);
  const bool has_least = weigher.min_weight > 0.0f;
  uint64_t mass = 0;
  zero_counts(s);
  row.visit(first, last, [&](int, int, const float(&x)[kOctet]) {
    float weights[kOctet];
    if (kHasMass || has_least) weigher.weigh(x, weights);
    if constexpr (kHasMass) {
      WeightSum sum;
#pragma unroll
      for (int e = 0; e < kOctet; ++e) sum.add(weights[e]);
      mass += sum.value();
    }
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      const float shifted = __fmaf_rn(__fsub_rn(x[e], weigher.largest), scale, kRoundShift);
      const uint32_t bin = __float_as_uint(shifted) - __float_as_uint(kRoundShift);
      if (bin >= kExponentBins || (has_least && weights[e] == 0.0f)) continue;
      atomicAdd(&s.low()[bin], 1u);
    }
  });
  __syncthreads();
  return mass;
}

// The window of the threshold by the counts of exponents in s.low(). num_reaching becomes roughly
// the number of tokens that weigh at least as much as its low end.
__device__ __forceinline__ Window window_of(DrawShared& s, uint32_t& num_reaching) {
  // Let A be the mass above the threshold and B the rest, so that A / B = p / (1 - p). The counts
  // give this ratio up to the factor by which the weights of a bin differ, 2^(1 / kBinsPerOctave).
  constexpr double kRatio = 0.994;
  const auto mass_of = [&](int i) {
    return s.low()[i] * static_cast<uint64_t>(weight_of_bin(static_cast<float>(i)) + 1.0f);
  };
  uint64_t mass = 0, total;
#pragma unroll 1
  for (int i = threadIdx.x; i < kExponentBins; i += kSampleThreads) mass += mass_of(i);
  block_exclusive_sum(s.block.warp_sums, mass, total);
  const double p = static_cast<double>(s.top_p), all = static_cast<double>(total);
  const int first = bin_at(s, mass_of, all * (p * kRatio / (1.0 - p + p * kRatio)));
  const int last = bin_at(s, mass_of, all * (p / ((1.0 - p) * kRatio + p)));
  uint64_t count = 0, num_up_to_last;
#pragma unroll 1
  for (int i = threadIdx.x; i <= last; i += kSampleThreads) count += s.low()[i];
  block_exclusive_sum(s.block.warp_sums, count, num_up_to_last);
  num_reaching = static_cast<uint32_t>(num_up_to_last);
  constexpr float kMargin = 1e-4f;  // more than the rounding errors of exponents and weights
  const float low = weight_of_bin(static_cast<float>(last) + 0.5f) * (1.0f - kMargin) - 1.0f;
  const float high = weight_of_bin(static_cast<float>(first) - 0.5f) * (1.0f + kMargin) + 1.0f;
  return {fmaxf(low, 1.0f), high};
}

// A narrower window: the first bin of `window` in which the threshold may lie, where `left` is the
// mass still to be kept, counted from the window's high end. The weights of the window are counted
// by their bits. A bin's mass is taken as that of its largest weight, so the threshold lies in the
// bin that is found or, seldom, below it.
template <class T>
__device__ __forceinline__ Window narrowed(const SampleRow<T>& row, const Weigher& weigher,
                                           const Window& window, uint64_t left, DrawShared& s) {
  const int top = offset_of(window.high), span = top - offset_of(window.low);
  int shift = 0;
  while (span >> shift >= kExponentBins) ++shift;
  zero_counts(s);
  row.visit(0, row.num_chunks(), [&](int, int, const float(&x)[kOctet]) {
    float weights[kOctet];
    weigher.weigh(x, weights);
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      const uint32_t below = static_cast<uint32_t>(top - offset_of(weights[e]));
      if (below <= static_cast<uint32_t>(span)) atomicAdd(&s.low()[below >> shift], 1u);
    }
  });
  __syncthreads();
  const auto mass_of = [&](int i) {
    const auto weight = static_cast<uint64_t>(from_offset(top - (i << shift)));
    return s.low()[i] * (weight + (shift > 0 ? 1 : 0));
  };
  const int bin = bin_at(s, mass_of, static_cast<double>(left - 1));
  return {fmaxf(from_offset(top - ((bin + 1) << shift) + 1), window.low),
          from_offset(top - (bin << shift))};
}

// The results of the second pass.
struct NucleusSums {
  uint64_t all;    // sum of all weights
  uint64_t above;  // sum of the weights above the window
  int num_in_window;
  bool is_one_weight;  // whether all in the window are equal; only set if they overflow the list
};

// The second pass. Lists up to kWindowRoom tokens of the window as ranks by weight, and leaves in
// s.list[kWindowRoom + chunk] the sum above the window and the number of tokens in it.
template <class T>
__device__ __forceinline__ NucleusSums weigh_around(const SampleRow<T>& row, const Weigher& weigher,
                                                    const Window& window, DrawShared& s) {
  __syncthreads();
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  uint64_t all = 0;
  float least = kInfinity, most = 0.0f;  // of the weights that do not fit the list
  row.visit(0, row.num_chunks(), [&](int chunk, int octet, const float(&x)[kOctet]) {
    float weights[kOctet];
    const bool is_any = weigher.weigh(x, weights);
    if (!__any_sync(kFullMask, is_any)) {
      if (threadIdx.x % kWarpSize == 0) s.list[kWindowRoom + chunk] = 0;
      return;
    }
    WeightSum sum, above;
    uint32_t inside = 0;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      const bool is_above = weights[e] > window.high;
      sum.add(weights[e], is_above ? 1.0f : 0.0f, above);
      if (!is_above && weights[e] >= window.low) inside |= 1u << e;
    }
    all += sum.value();
    const int num_inside = __popc(inside);
    if (num_inside > 0) {
      int at = atomicAdd(&s.count, num_inside);
#pragma unroll
      for (int e = 0; e < kOctet; ++e) {
        if ((inside >> e & 1) == 0) continue;
        if (at < kWindowRoom) {
          s.list[at] = rank_of(__float_as_uint(weights[e]), octet * kOctet + e);
        } else {
          least = fminf(least, weights[e]);
          most = fmaxf(most, weights[e]);
        }
        ++at;
      }
    }
    const uint64_t above_total = above.warp_total();
    const uint64_t count = static_cast<uint64_t>(__reduce_add_sync(kFullMask, num_inside));
    if (threadIdx.x % kWarpSize == 0) {
      s.list[kWindowRoom + chunk] = above_total | count << kCountShift;
    }
  });
  NucleusSums sums;
  block_exclusive_sum(s.block.warp_sums, all, sums.all);  // its barriers also end the pass
  uint64_t above = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < row.num_chunks(); i += kSampleThreads) {
    above += s.list[kWindowRoom + i] & kSumMask;
  }
  block_exclusive_sum(s.block.warp_sums, above, sums.above);
  sums.num_in_window = s.count;
  sums.is_one_weight = false;
  if (sums.num_in_window > kWindowRoom) {
    const float weight = __uint_as_float(bits_of(s.list[0]));
    bool is_other = least < weight || most > weight;
#pragma unroll 1
    for (int i = threadIdx.x; i < kWindowRoom; i += kSampleThreads) {
      is_other |= __uint_as_float(bits_of(s.list[i])) != weight;
    }
    sums.is_one_weight = __syncthreads_or(is_other) == 0;
  }
  return sums;
}

// Draws where all tokens of the window weigh the same. The kept ones among them are the first in
// the order of ids.
template <class T>
__device__ __forceinline__ int draw_among_equals(Draw<T>& draw, uint64_t left, DrawShared& s) {
  const float floor = __uint_as_float(bits_of(s.list[0]));
  const uint64_t weight = static_cast<uint64_t>(floor);
  const uint64_t last = (left - 1) / weight;  // how many are kept before the last one
  const uint64_t* sums = s.list + kWindowRoom;
  Weigher& weigher = draw.weigher;
  weigher.weight_floor = floor;
  weigher.last_weight_id = INT32_MAX;
  weigher.measure = Measure::kEqualWeight;
  __syncthreads();
  const int last_id = locate(
      draw.row, weigher, s, [&](int i) { return sums[i] >> kCountShift; },
      [&](uint64_t) { return last; });
  const Crossing end = s.block.crossing;
  __syncthreads();
  weigher.last_weight_id = last_id;
  weigher.measure = Measure::kWeight;
  __syncthreads();
  return locate(
      draw.row, weigher, s,
      [&](int i) {
        const uint64_t count = sums[i] >> kCountShift;
        const uint64_t kept = i < end.item ? count : i == end.item ? last + 1 - end.before : 0;
        return (sums[i] & kSumMask) + kept * weight;
      },
      [&](uint64_t total) { return s.drawn_of(total); });
}

// The mass of the first n entries of the list, which are ranks by weight.
__device__ __forceinline__ uint64_t mass_of_list(int n, DrawShared& s) {
  uint64_t mass = 0, total;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kSampleThreads) {
    mass += static_cast<uint64_t>(__uint_as_float(bits_of(s.list[i])));
  }
  block_exclusive_sum(s.block.warp_sums, mass, total);
  return total;
}

// Draws with the help of the sorted list of the window's n tokens.
template <class T>
__device__ __forceinline__ int draw_around_list(Draw<T>& draw, int n, uint64_t left,
                                                DrawShared& s) {
  uint64_t* sums = s.list + kWindowRoom;
  const Crossing end = find_in_list(n, s, [&](uint64_t) { return left - 1; });
#pragma unroll 1
  for (int i = threadIdx.x; i <= end.item; i += kSampleThreads) {
    const uint64_t rank = s.list[i];
    atomicAdd(reinterpret_cast<unsigned long long*>(&sums[id_of(rank) / kChunkTokens]),
              static_cast<unsigned long long>(__uint_as_float(bits_of(rank))));
  }
  draw.weigher.weight_floor = __uint_as_float(bits_of(s.list[end.item]));
  draw.weigher.last_weight_id = id_of(s.list[end.item]);
  __syncthreads();
  return locate(
      draw.row, draw.weigher, s, [&](int i) { return sums[i] & kSumMask; },
      [&](uint64_t total) { return s.drawn_of(total); });
}

// Draws from a list of the tokens that weigh `low` or more, for a row whose sum of weights is
// known. Returns -1 where they do not fit the list, or where the threshold is below `low`.
template <class T>
__device__ __forceinline__ int draw_from_heaviest(Draw<T>& draw, float low, uint64_t mass,
                                                  DrawShared& s) {
  draw.weigher.limit(offset_of(low), offset_of(0x1p34f));
  gather(draw.row, 0, draw.row.num_chunks(), s,
         [&](int octet, const float(&x)[kOctet], uint32_t(&bits)[kOctet]) {
           float weights[kOctet];
           draw.weigher(octet, x, weights);
           bool is_any = false;
#pragma unroll
           for (int e = 0; e < kOctet; ++e) {
             const bool is_in = weights[e] >= low;
             bits[e] = is_in ? __float_as_uint(weights[e]) : 0;
             is_any |= is_in;
           }
           return is_any;
         });
  draw.weigher.unlimit();
  const int n = s.count;
  const uint64_t wanted = wanted_mass(s.top_p, mass);
  if (n > s.room || wanted > mass_of_list(n, s)) return -1;
  sort_descending(s.list, n);
  return draw_from_list(find_in_list(n, s, [&](uint64_t) { return wanted - 1; }).item + 1, s);
}

// The row's token, given the counts of exponents in s.low(). Returns -1 where the threshold is not
// where the counts say. `mass` is the sum of all weights, or 0 where it is not known.
template <class T>
__device__ __forceinline__ int end_nucleus(Draw<T>& draw, uint64_t mass, DrawShared& s) {
  uint32_t num_reaching;
  Window window = window_of(s, num_reaching);
  const float lowest = window.low;  // the lowest value that the threshold may have
  if (mass != 0 && num_reaching <= static_cast<uint32_t>(kFewReaching)) {
    const int token = draw_from_heaviest(draw, window.low, mass, s);
    if (token >= 0) return token;
  }
#pragma unroll 1
  for (int attempt = 0; attempt < 8; ++attempt) {  // two or three attempts nearly always suffice
    const NucleusSums sums = weigh_around(draw.row, draw.weigher, window, s);
    const uint64_t wanted = wanted_mass(s.top_p, sums.all);
    if (sums.above >= wanted) return -1;
    const uint64_t left = wanted - sums.above;
    const int n = sums.num_in_window;
    if (n > kWindowRoom && !sums.is_one_weight) {
      window = narrowed(draw.row, draw.weigher, window, left, s);
      continue;
    }
    const auto weight = static_cast<uint64_t>(__uint_as_float(bits_of(s.list[0])));
    const uint64_t held = n > kWindowRoom ? weight * n : mass_of_list(n, s);
    if (left <= held) {
      if (n > kWindowRoom) return draw_among_equals(draw, left, s);
      sort_descending(s.list, n);
      return draw_around_list(draw, n, left, s);
    }
    if (window.low <= lowest) return -1;
    window = {lowest, from_offset(offset_of(window.low) - 1)};
  }
  return -1;
}

}  // namespace pyserve::gpu
