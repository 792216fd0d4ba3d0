// Selection within a row by one CTA: weights under the thresholds of top-k, min-p and top-p, the
// passes that find these thresholds, and the draw. A threshold consists of a value and, among the
// tokens that equal it, the last id that is kept.
#pragma once

#include "common/limits.h"
#include "gpu/sample/block.cuh"
#include "gpu/sample/row.cuh"

namespace pyserve::gpu {

// A weight's offset is its bits as a float minus those of 1.0f. Offsets have the order of the
// weights.
constexpr uint32_t kWeightOne = 0x3f800000;
constexpr int kCoarseShift = 18;             // the upper bits of an offset: 32 bins per octave
constexpr int kCoarseBins = 34 * 32 + 1;     // weights go up to 2^34
constexpr int kLevelBins = 2048;             // bins of any histogram
constexpr int kIdBits = 19;
constexpr int kWeightBits = 35;  // bits of a weight as an integer
constexpr uint32_t kLastId = (1u << kIdBits) - 1;
static_assert(kCoarseBins <= kMinListWords && kCoarseBins <= kLevelBins);
static_assert(kMaxVocabSize == int64_t{kLastId} + 1);

struct DrawShared {
  uint64_t list[kMaxListWords];
  Adjustments adjustments;
  BlockShared block;
  uint64_t random;
  uint64_t left;  // what a selection still wants below the items it has found; one thread writes it
  int room;       // words of the list that may be used
  float top_p;
  int count;
  int token;
  int32_t is_last;

  // The target that the running sum of weights must pass for the draw.
  __device__ uint64_t drawn_of(uint64_t total) const { return __umul64hi(random, total); }

  // A histogram of masses: the low and the high halves of its sums lie in the first half of the
  // list, the 64-bit sums in the second.
  __device__ uint32_t* low() { return reinterpret_cast<uint32_t*>(list); }
  __device__ uint32_t* high() { return low() + kLevelBins; }
  __device__ uint64_t* masses() { return list + kLevelBins; }
};

// A token's rank: a number that sorts tokens by their bits (of a weight, or a key), largest first
// when sorted downwards, and among equal bits by the lowest id first.
__device__ __forceinline__ uint64_t rank_of(uint32_t bits, int id) {
  return uint64_t{bits} << 32 | (kLastId - static_cast<uint32_t>(id));
}
__device__ __forceinline__ int id_of(uint64_t rank) {
  return static_cast<int>(kLastId - static_cast<uint32_t>(rank));
}
__device__ __forceinline__ uint32_t bits_of(uint64_t rank) {
  return static_cast<uint32_t>(rank >> 32);
}

// The offset of a weight; negative for a weight of 0.
__device__ __forceinline__ int offset_of(float weight) {
  return static_cast<int>(__float_as_uint(weight) - kWeightOne);
}
__device__ __forceinline__ float from_offset(int offset) {
  return __uint_as_float(static_cast<uint32_t>(offset) + kWeightOne);
}

// The mass that top_p asks for, at least 1. Going through the tokens in the order of falling
// weights, a token is kept while the mass in front of it is less than this.
__device__ __forceinline__ uint64_t wanted_mass(float top_p, uint64_t total) {
  return static_cast<uint64_t>(
      ceil(__dmul_rn(static_cast<double>(top_p), static_cast<double>(total))));
}

enum class Measure { kWeight, kEqualKey, kEqualWeight };

// How much each token counts in a sum: its weight if the thresholds keep it, or 1 if its key or
// weight equals a threshold.
struct Weigher {
  float largest, factor, min_weight;
  uint32_t key_floor;
  int last_key_id;
  float weight_floor;
  int last_weight_id;
  float least, most;  // tokens with exponents outside may be taken to weigh 0
  Measure measure;

  static constexpr float kLeastExponent = -24.3f;  // below this all weights are 0

  // With min-p as the only threshold.
  static __device__ __forceinline__ Weigher make(float largest, float factor, float min_weight) {
    return {largest, factor,    min_weight, 0,    INT32_MAX,
            0.0f,    INT32_MAX, kLeastExponent, 0.0f, Measure::kWeight};
  }

  // Undoes limit().
  __device__ __forceinline__ void unlimit() {
    least = kLeastExponent;
    most = 0.0f;
  }

  // From now on only weights with offsets in [first, last] need be right; others may count as 0,
  // which saves their exponentials.
  __device__ __forceinline__ void limit(int first, int last) {
    constexpr float kMargin = 1e-3f;  // far more than logf and quantized_exp can be off
    least = fmaxf(logf((from_offset(first) - 0.5f) * 0x1p-34f) - kMargin, kLeastExponent);
    most = fminf(logf((from_offset(last) + 0.5f) * 0x1p-34f) + kMargin, 0.0f);
  }

  // The weights of an octet with min-p as the only threshold. Returns false where all are 0.
  __device__ __forceinline__ bool weigh(const float (&x)[kOctet], float (&out)[kOctet]) const {
    float highest = -kInfinity;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      out[e] = __fmul_rn(__fsub_rn(x[e], largest), factor);
      highest = fmaxf(highest, out[e]);
    }
    const bool is_any = highest >= kLeastExponent;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) out[e] = is_any ? quantized_exp(out[e]) : 0.0f;
    if (min_weight > 0.0f) {
#pragma unroll
      for (int e = 0; e < kOctet; ++e) out[e] = out[e] < min_weight ? 0.0f : out[e];
    }
    return is_any;
  }

  __device__ __forceinline__ void operator()(int octet, const float (&x)[kOctet],
                                             float (&out)[kOctet]) const {
    if (measure == Measure::kEqualKey) {
#pragma unroll
      for (int e = 0; e < kOctet; ++e) out[e] = to_key(x[e]) == key_floor ? 1.0f : 0.0f;
      return;
    }
    bool is_any = false;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      out[e] = __fmul_rn(__fsub_rn(x[e], largest), factor);
      is_any |= out[e] >= least && out[e] <= most;
    }
    if (!is_any) {
#pragma unroll
      for (int e = 0; e < kOctet; ++e) out[e] = 0.0f;
      return;
    }
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      const float weight = quantized_exp(out[e]);
      out[e] = weight < min_weight ? 0.0f : weight;
    }
    if (key_floor == 0 && weight_floor == 0.0f) return;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      const int id = octet * kOctet + e;
      const uint32_t key = to_key(x[e]);
      const bool is_kept = key > key_floor || (key == key_floor && id <= last_key_id);
      if (!is_kept) out[e] = 0.0f;
      if (measure == Measure::kEqualWeight) {
        out[e] = out[e] == weight_floor ? 1.0f : 0.0f;
      } else if (out[e] < weight_floor || (out[e] == weight_floor && id > last_weight_id)) {
        out[e] = 0.0f;
      }
    }
  }
};

// Writes to sums[chunk] what `weigher` measures in each of the chunks [first, last).
template <class T>
__device__ __forceinline__ void sum_chunks(const SampleRow<T>& row, int first, int last,
                                           const Weigher& weigher, uint64_t* sums) {
  row.visit(first, last, [&](int chunk, int octet, const float(&x)[kOctet]) {
    float weights[kOctet];
    weigher(octet, x, weights);
    WeightSum sum;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) sum.add(weights[e]);
    const uint64_t total = sum.warp_total();
    if (threadIdx.x % kWarpSize == 0) sums[chunk] = total;
  });
}

// The token at which the running sum of what `weigher` measures exceeds target_of(total);
// sum_of(chunk) is that sum over each chunk.
template <class T, class SumOf, class TargetOf>
__device__ __forceinline__ int locate(const SampleRow<T>& row, const Weigher& weigher,
                                      DrawShared& s, const SumOf& sum_of,
                                      const TargetOf& target_of) {
  const Crossing chunk = find_crossing(row.num_chunks(), s.block, sum_of, target_of);
  if (threadIdx.x < kWarpSize) {
    const int octet = chunk.item * kWarpSize + threadIdx.x;
    float x[kOctet], weights[kOctet];
    row.adjusted_octet(octet, x);
    weigher(octet, x, weights);
    WeightSum sum;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) sum.add(weights[e]);
    const uint64_t own = sum.value(), inclusive = warp_inclusive_sum(own);
    const uint64_t target = target_of(chunk.total) - chunk.before;
    if (target < inclusive && target >= inclusive - own) {
      uint64_t left = target - (inclusive - own);
      int found = kOctet - 1;
      bool is_found = false;
#pragma unroll
      for (int e = 0; e < kOctet; ++e) {
        const uint64_t weight = static_cast<uint64_t>(weights[e]);
        if (!is_found && left < weight) {
          found = e;
          is_found = true;
        }
        left -= weight;
      }
      s.token = octet * kOctet + found;
    }
  }
  __syncthreads();
  return s.token;
}

template <class T, class TargetOf>
__device__ __forceinline__ int sum_and_locate(const SampleRow<T>& row, const Weigher& weigher,
                                              DrawShared& s, const TargetOf& target_of) {
  __syncthreads();
  sum_chunks(row, 0, row.num_chunks(), weigher, s.list);
  __syncthreads();
  return locate(row, weigher, s, [&](int i) { return s.list[i]; }, target_of);
}

// Sums the weights in bins (offset >> shift) % 2^bits, for those with offset >> (shift + bits)
// equal to `prefix`.
template <class T>
__device__ __forceinline__ void mass_histogram(const SampleRow<T>& row, int first, int last,
                                               const Weigher& weigher, int shift, int bits,
                                               int prefix, DrawShared& s) {
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * kLevelBins; i += kSampleThreads) s.low()[i] = 0;
  __syncthreads();
  const auto add = [&](int level, uint64_t mass) {
    const int bin = level & ((1 << bits) - 1);
    const uint32_t low = static_cast<uint32_t>(mass);
    const uint32_t before = atomicAdd(&s.low()[bin], low);
    const uint32_t high = static_cast<uint32_t>(mass >> 32) + (before + low < before ? 1u : 0u);
    if (high != 0) atomicAdd(&s.high()[bin], high);
  };
  row.visit(first, last, [&](int, int octet, const float(&x)[kOctet]) {
    float weights[kOctet];
    weigher(octet, x, weights);
    // Equal logits all fall into one bin, so a warp's 256 are then added at once and not one after
    // another.
    const int level = __shfl_sync(kFullMask, offset_of(weights[0]) >> shift, 0);
    bool is_level = true;
    WeightSum sum;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      is_level &= offset_of(weights[e]) >> shift == level;
      sum.add(weights[e]);
    }
    if (__all_sync(kFullMask, is_level)) {
      if (level >> bits != prefix) return;
      const uint64_t mass = sum.warp_total();
      if (threadIdx.x % kWarpSize == 0) add(level, mass);
      return;
    }
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      const int offset = offset_of(weights[e]);
      if (offset < 0 || offset >> (shift + bits) != prefix) continue;
      add(offset >> shift, static_cast<uint64_t>(weights[e]));
    }
  });
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kLevelBins; i += kSampleThreads) {
    s.masses()[i] = uint64_t{s.high()[i]} << 32 | s.low()[i];
  }
  __syncthreads();
}

// The bin, counted from the largest, in which the running mass exceeds target_of(total).
template <class TargetOf>
__device__ __forceinline__ Crossing find_bin(int num_bins, DrawShared& s,
                                             const TargetOf& target_of) {
  Crossing found = find_crossing(
      num_bins, s.block, [&](int i) { return s.masses()[num_bins - 1 - i]; }, target_of);
  found.item = num_bins - 1 - found.item;
  return found;
}

// Appends rank_of(bits, id) to the list in shared memory for each token to which bits_of_octet
// gives bits other than 0. s.count becomes their number, whether or not they fit the list.
template <class T, class BitsOf>
__device__ __forceinline__ void gather(const SampleRow<T>& row, int first, int last, DrawShared& s,
                                       const BitsOf& bits_of_octet) {
  __syncthreads();
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  row.visit(first, last, [&](int, int octet, const float(&x)[kOctet]) {
    uint32_t bits[kOctet];
    if (!bits_of_octet(octet, x, bits)) return;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      const int id = octet * kOctet + e;
      if (bits[e] == 0 || id >= row.vocab_size) continue;
      const int at = atomicAdd(&s.count, 1);
      if (at < s.room) s.list[at] = rank_of(bits[e], id);
    }
  });
  __syncthreads();
}

// Draws from the first n entries of the list, which are ranks by weight, by inverting the CDF in
// the order of ids.
__device__ __forceinline__ int draw_from_list(int n, DrawShared& s) {
  constexpr uint64_t kWeightMask = (uint64_t{1} << kWeightBits) - 1;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kSampleThreads) {
    const uint64_t rank = s.list[i];
    const uint64_t weight = static_cast<uint64_t>(__uint_as_float(bits_of(rank)));
    s.list[i] = uint64_t{static_cast<uint32_t>(rank)} << kWeightBits | weight;
  }
  sort_descending(s.list, n);
  const Crossing drawn = find_crossing(
      n, s.block, [&](int i) { return s.list[i] & kWeightMask; },
      [&](uint64_t total) { return s.drawn_of(total); });
  return static_cast<int>(kLastId - static_cast<uint32_t>(s.list[drawn.item] >> kWeightBits));
}

// In a list of ranks by weight: the first item at which the running mass exceeds `target`, which is
// the last item that is kept.
template <class TargetOf>
__device__ __forceinline__ Crossing find_in_list(int n, DrawShared& s, const TargetOf& target_of) {
  return find_crossing(
      n, s.block, [&](int i) { return static_cast<uint64_t>(__uint_as_float(bits_of(s.list[i]))); },
      target_of);
}

// ---- radix selection: any row, any k, no list -----------------------------------------------

// In these functions the weigher lies in shared memory. All threads write the same values to it,
// between barriers.

// Sets the weigher's key threshold to the k-th largest key, with ties broken by id.
template <class T>
__device__ __forceinline__ void select_key(const SampleRow<T>& row, int top_k, Weigher& weigher,
                                           DrawShared& s) {
  uint32_t* counts = s.low();
  uint32_t prefix = 0, mask = 0;
  if (threadIdx.x == 0) s.left = top_k;
#pragma unroll 1
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const uint32_t bin_mask = shift == 0 ? 1023 : 2047;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kLevelBins; i += kSampleThreads) counts[i] = 0;
    __syncthreads();
    row.visit(0, row.num_chunks(), [&](int, int octet, const float(&x)[kOctet]) {
#pragma unroll
      for (int e = 0; e < kOctet; ++e) {
        const uint32_t key = to_key(x[e]);
        if ((key & mask) != prefix || octet * kOctet + e >= row.vocab_size) continue;
        atomicAdd(&counts[key >> shift & bin_mask], 1u);
      }
    });
    __syncthreads();
    const Crossing found = find_crossing(
        kLevelBins, s.block, [&](int i) { return uint64_t{counts[kLevelBins - 1 - i]}; },
        [&](uint64_t) { return s.left - 1; });
    prefix |= static_cast<uint32_t>(kLevelBins - 1 - found.item) << shift;
    mask |= bin_mask << shift;
    if (threadIdx.x == 0) s.left -= found.before;
  }
  weigher.key_floor = prefix;
  weigher.measure = Measure::kEqualKey;
  weigher.last_key_id = sum_and_locate(row, weigher, s, [&](uint64_t) { return s.left - 1; });
  weigher.measure = Measure::kWeight;
}

// Sets the weigher's weight threshold to the last weight that top_p keeps.
template <class T>
__device__ __forceinline__ void select_weight(const SampleRow<T>& row, float top_p,
                                              Weigher& weigher, DrawShared& s) {
  int prefix = 0;
#pragma unroll 1
  for (int shift = kCoarseShift; shift >= 0; shift -= 9) {
    const int bits = shift == kCoarseShift ? 11 : 9;
    mass_histogram(row, 0, row.num_chunks(), weigher, shift, bits, prefix, s);
    const bool is_first = shift == kCoarseShift;
    const auto target_of = [&](uint64_t total) {
      return is_first ? wanted_mass(top_p, total) - 1 : s.left - 1;
    };
    const Crossing found = find_bin(kLevelBins, s, target_of);
    const uint64_t left = target_of(found.total) + 1 - found.before;
    __syncthreads();
    if (threadIdx.x == 0) s.left = left;
    prefix = prefix << bits | found.item;
    weigher.limit(prefix << shift, ((prefix + 1) << shift) - 1);
  }
  weigher.weight_floor = from_offset(prefix);
  weigher.measure = Measure::kEqualWeight;
  weigher.last_weight_id = sum_and_locate(row, weigher, s, [&](uint64_t) {
    return (s.left - 1) / static_cast<uint64_t>(weigher.weight_floor);
  });
  weigher.measure = Measure::kWeight;
  weigher.unlimit();
}

}  // namespace pyserve::gpu
