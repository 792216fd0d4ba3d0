// sample: draws one token per row of logits [num_rows, vocab_size], bfloat16 or float16, by the
// sampling parameters in the row's slot. The result is bit for bit that of the twin in
// pyserve/ops/reference.py. What a row needs is decided on the device, so a batch may mix all kinds
// of rows.
//
// There are two launches. With few rows, several CTAs share one (a contiguous range of tokens each)
// and the last to arrive finishes it. Only short lists are sorted.
//   scan  finds the largest adjusted logit and its place (enough for a greedy row), whether a logit
//         is NaN or +inf, and the maxima of 1,024 disjoint parts of the row. The k-th largest of
//         these maxima is at most the k-th largest logit, and hardly more than k logits reach it.
//   draw  with top-k: lists the logits that reach this bound and sorts the list, which is exact,
//         with ties broken by index.
//         with neither top-k nor top-p: sums the weights of each 256 tokens, then inverts the CDF.
//         with top-p alone: counts logits by their distance from the largest, which tells roughly
//         where the threshold is; then sums as above, with a list of the weights around it.
// Where a list overflows (many equal logits, a huge k), a radix selection with further passes over
// the row does without one. A weight is round(exp((logit - max) / temperature) * 2^34). Sums of
// weights are exact integers, so the result does not depend on their order or on how many CTAs
// share a row.
//
// Floor: the bytes of the logits, once. A weight costs about 36 instructions, and the weights take
// half of the time above that floor. The thresholds come from radix select (Alabi et al. 2012). The
// draw inverts the CDF and never rejects.
#include "common/philox.h"
#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/sample/sample.h"
#include "gpu/sample/nucleus.cuh"

namespace pyserve::gpu {
namespace {

struct Arguments {
  SampleParams p;
  int splits;            // CTAs per row
  int chunks_per_split;  // chunks of 256 tokens
  int room;              // words of a row's list
};

// This CTA's share of a row: chunks [first_chunk, last_chunk).
struct Share {
  int row, split, first_chunk, last_chunk;
};

__device__ __forceinline__ Share share_of(const Arguments& a) {
  const int row = blockIdx.x / a.splits, split = blockIdx.x % a.splits;
  const int num_chunks = (a.p.vocab_size + kChunkTokens - 1) / kChunkTokens;
  const int first = min(split * a.chunks_per_split, num_chunks);
  return {row, split, first, min(first + a.chunks_per_split, num_chunks)};
}

// The row's slot; null for a padded row.
__device__ __forceinline__ int32_t* slot_of(const SampleParams& p, int row, int64_t* slot_id) {
  *slot_id = p.sample_slots[row * p.sample_slots_stride];
  if (*slot_id < -1 || *slot_id >= p.num_slots) __trap();
  return *slot_id < 0 ? nullptr : p.slots + *slot_id * p.slots_stride;
}

__device__ __forceinline__ float real_of(const int32_t* slot, int word) {
  return __int_as_float(slot[word]);
}

__device__ __forceinline__ bool is_greedy(const int32_t* slot) {
  return real_of(slot, kSlotTemperature) < 1e-5f;
}

// Whether the bound from the maxima of the parts serves this k.
__device__ __forceinline__ bool is_short_top_k(int top_k) {
  return top_k > 0 && top_k <= kNumParts - kNumParts / 32;
}

// The row of logits, with its biases and bans put into `adjustments`. All threads of the CTA call
// this.
template <class T>
__device__ inline SampleRow<T> row_of(const Arguments& a, int row, const int32_t* slot,
                                      int64_t slot_id, Adjustments& adjustments) {
  const SampleParams& p = a.p;
  const int num_biases = slot[kSlotNumBias], num_stop = slot[kSlotNumStop];
  if (num_biases < 0 || num_biases > kMaxLogitBias || num_stop < 0 || num_stop > kMaxStopTokenIds) {
    __trap();
  }
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
  const int16_t* counts = nullptr;
  if (slot[kSlotHasPenalties] != 0) counts = p.token_counts + slot_id * p.token_counts_stride;
  const bool is_banned = slot[kSlotNumComputed] < slot[kSlotMinTotalLen];
  const int n = num_biases + (is_banned ? num_stop : 0);
  if (threadIdx.x == 0) {
    adjustments.repetition = real_of(slot, kSlotRepetitionPenalty);
    adjustments.frequency = real_of(slot, kSlotFrequencyPenalty);
    adjustments.presence = real_of(slot, kSlotPresencePenalty);
    adjustments.num_biases = num_biases;
    adjustments.has_biases = n > 0;
    adjustments.counts = counts;
    adjustments.counts_aligned = reinterpret_cast<uintptr_t>(counts) % 16 == 0;
  }
  if (n > 0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kBiasBuckets; i += kSampleThreads) adjustments.first[i] = kNone;
    const int i = threadIdx.x;
    if (i < n) {
      const bool is_bias = i < num_biases;
      const int id = is_bias ? slot[kSlotBiasIds + i] : slot[kSlotStopIds + i - num_biases];
      if (id < 0 || id >= p.vocab_size) __trap();
      adjustments.id[i] = id;
      adjustments.value[i] = is_bias ? real_of(slot, kSlotBiasValues + i) : 0.0f;
    }
    __syncthreads();
    if (i < n) {
      const int bucket = adjustments.id[i] / kOctet % kBiasBuckets;
      atomicMin(&adjustments.first[bucket], i);
      int next = i + 1;
      while (next < n && adjustments.id[next] / kOctet % kBiasBuckets != bucket) ++next;
      adjustments.next[i] = static_cast<int16_t>(next < n ? next : kNone);
    }
  }
  __syncthreads();
  return {.logits = logits,
          .adjustments = &adjustments,
          .vocab_size = p.vocab_size,
          .is_aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0,
          .is_plain = n == 0 && counts == nullptr};
}

__device__ __forceinline__ SampleRowWork& work_of(const SampleParams& p, int row) {
  return reinterpret_cast<SampleRowWork*>(p.workspace)[row];
}

__device__ __forceinline__ uint64_t* list_of(const SampleParams& p, int row, int room) {
  return p.workspace + p.num_rows * kSampleRowWords + static_cast<int64_t>(row) * room;
}

// The largest logit, and the first octet that holds it.
struct Largest {
  float value;
  int octet;

  __device__ __forceinline__ void take(float other, int other_octet) {
    if (other > value || (other == value && other_octet < octet)) {
      value = other;
      octet = other_octet;
    }
  }

  __device__ __forceinline__ void reduce_warp() {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      take(__shfl_xor_sync(kFullMask, value, distance),
           __shfl_xor_sync(kFullMask, octet, distance));
    }
  }
};

// ---- scan ---------------------------------------------------------------------------------------

// What one thread finds out in the scan.
struct ThreadScan {
  Largest largest{-kInfinity, INT32_MAX};
  float parts[2] = {-kInfinity, -kInfinity};
  bool is_bad = false;
};

template <class T>
__device__ __forceinline__ ThreadScan scan_thread(const SampleRow<T>& row, const Share& share) {
  ThreadScan scan;
  row.visit_raw(share.first_chunk, share.last_chunk, [&](int, int octet, const RawOctet<T>& raw) {
    float x[kOctet];
    raw.unpack(x);
    if (!row.is_plain) {
#pragma unroll
      for (int e = 0; e < kOctet; ++e) scan.is_bad |= !(x[e] < kInfinity);
      row.adjust(octet, x);
    }
    float largest = -kInfinity;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      scan.is_bad |= !(x[e] < kInfinity);
      largest = fmaxf(largest, x[e]);
    }
    if (largest > scan.largest.value) scan.largest = {largest, octet};
    // A thread's octets go alternately to its two parts.
    scan.parts[1] = fmaxf(scan.parts[1], largest);
    const float other = scan.parts[0];
    scan.parts[0] = scan.parts[1];
    scan.parts[1] = other;
  });
  return scan;
}

template <class T>
__global__ void __launch_bounds__(kSampleThreads, 2) sample_scan_kernel(Arguments a) {
  __shared__ Adjustments adjustments;
  __shared__ Largest warp_largest[kSampleWarps];
  pdl_wait();
  pdl_launch_dependents();
  const Share share = share_of(a);
  int64_t slot_id;
  const int32_t* slot = slot_of(a.p, share.row, &slot_id);
  if (slot == nullptr) return;
  const SampleRow<T> row = row_of<T>(a, share.row, slot, slot_id, adjustments);
  ThreadScan scan = scan_thread(row, share);
  SampleRowWork& work = work_of(a.p, share.row);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  if (!is_greedy(slot) && is_short_top_k(slot[kSlotTopK])) {
    // Each `splits` neighbouring lanes merge their parts, so that all CTAs of the row together have
    // 1,024.
    for (int distance = 1; distance < a.splits; distance *= 2) {
      scan.parts[0] = fmaxf(scan.parts[0], __shfl_xor_sync(kFullMask, scan.parts[0], distance));
      scan.parts[1] = fmaxf(scan.parts[1], __shfl_xor_sync(kFullMask, scan.parts[1], distance));
    }
    if (lane % a.splits == 0) {
      const int pair = share.split * (kSampleThreads / a.splits) + threadIdx.x / a.splits;
      work.parts[2 * pair] = to_key(scan.parts[0]);
      work.parts[2 * pair + 1] = to_key(scan.parts[1]);
    }
  }
  if (a.splits > 1 && share.split == 0) {  // draw may add up a histogram of exponents in the list
#pragma unroll 1
    for (int i = threadIdx.x; i < kMinListWords; i += kSampleThreads)
      list_of(a.p, share.row, a.room)[i] = 0;
  }
  scan.largest.reduce_warp();
  if (lane == 0) warp_largest[warp] = scan.largest;
  const bool is_bad = __syncthreads_or(scan.is_bad) != 0;
  if (threadIdx.x == 0) {
    Largest largest = warp_largest[0];
    for (int i = 1; i < kSampleWarps; ++i)
      largest.take(warp_largest[i].value, warp_largest[i].octet);
    const float value = is_bad ? __int_as_float(0x7fffffff) : largest.value;
    work.partial[share.split] = {value, largest.octet};
    if (share.split == 0) {
      work.num_arrived = 0;
      work.num_listed = 0;
      work.mass = 0;
    }
  }
}

// ---- draw ---------------------------------------------------------------------------------------

// The row's largest logit over all of its CTAs; NaN where one of them found a NaN or +inf.
__device__ __forceinline__ Largest merged_largest(const SampleRowWork& work, int splits) {
  const int lane = threadIdx.x % kWarpSize;
  Largest largest{-kInfinity, INT32_MAX};
  if (lane < splits) largest = {work.partial[lane].largest, work.partial[lane].octet};
  const bool is_bad = __any_sync(kFullMask, largest.value != largest.value) != 0;
  largest.reduce_warp();
  return {is_bad ? __int_as_float(0x7fffffff) : largest.value, largest.octet};
}

template <class T>
__device__ __forceinline__ int greedy_token(const SampleRow<T>& row, const Largest& largest) {
  float x[kOctet];
  row.adjusted_octet(largest.octet, x);
  int found = 0;
#pragma unroll
  for (int e = kOctet - 1; e >= 0; --e) found = x[e] == largest.value ? e : found;
  return largest.octet * kOctet + found;
}

// Writes the row's result. One thread calls this.
__device__ __forceinline__ void finish(const SampleParams& p, int row, int token) {
  int64_t slot_id;
  int32_t* slot = slot_of(p, row, &slot_id);
  p.sampled[row] = token;
  // A failed row leaves a token that is in range, because the row's next step may be queued
  // already.
  slot[kSlotLastToken] = max(token, 0);
  if (token < 0 || slot[kSlotHasPenalties] == 0) return;
  int16_t& count = p.token_counts[slot_id * p.token_counts_stride + token];
  if ((count & kMaxTokenCount) != kMaxTokenCount) ++count;
}

template <class T>
__device__ __forceinline__ Draw<T> draw_of(const SampleRow<T>& row, const int32_t* slot,
                                           float largest, int room, DrawShared& s) {
  const float factor = __fdiv_rn(1.0f, real_of(slot, kSlotTemperature));
  const float min_weight = rintf(__fmul_rn(real_of(slot, kSlotMinP), 0x1p34f));
  const int top_k = slot[kSlotTopK] < row.vocab_size ? slot[kSlotTopK] : 0;
  const float top_p = real_of(slot, kSlotTopP);
  if (threadIdx.x == 0) {
    const PhiloxWords random = philox4x32({{static_cast<uint32_t>(slot[kSlotNumComputed]),
                                            static_cast<uint32_t>(slot[kSlotSampleIndex]), 0, 0}},
                                          static_cast<uint32_t>(slot[kSlotSeedLow]),
                                          static_cast<uint32_t>(slot[kSlotSeedHigh]));
    s.random = uint64_t{random.word[1]} << 32 | random.word[0];
    s.top_p = top_p;
    s.room = room;
  }
  __syncthreads();
  const Path path = top_k > 0      ? (is_short_top_k(top_k) ? Path::kList : Path::kRadix)
                    : top_p < 1.0f ? Path::kNucleus
                                   : Path::kSums;
  return {.row = row,
          .weigher = Weigher::make(largest, factor, min_weight),
          .path = path,
          .top_k = top_k};
}

// A bound that the maxima of at least top_k parts reach, and hardly more.
__device__ __forceinline__ float top_k_bound(const SampleRowWork& work, int top_k) {
  static_assert(kNumParts == 2 * kSampleThreads);
  return kth_bound(work.parts[threadIdx.x], work.parts[threadIdx.x + kSampleThreads], top_k);
}

template <class T>
__device__ __forceinline__ void list_largest(const Draw<T>& draw, float bound, const Share& share,
                                             DrawShared& s) {
  gather(draw.row, share.first_chunk, share.last_chunk, s,
         [&](int, const float(&x)[kOctet], uint32_t (&bits)[kOctet]) {
           bool is_any = false;
#pragma unroll
           for (int e = 0; e < kOctet; ++e) is_any |= x[e] >= bound;
           if (!is_any) return false;
#pragma unroll
           for (int e = 0; e < kOctet; ++e) bits[e] = x[e] >= bound ? to_key(x[e]) : 0;
           return true;
         });
}

// Does this CTA's share of the draw. Where several CTAs share the row, the results go to the
// workspace.
template <class T>
__device__ __forceinline__ void draw_share(const Arguments& a, const Draw<T>& draw,
                                           const Share& share, DrawShared& s) {
  SampleRowWork& work = work_of(a.p, share.row);
  uint64_t* list = a.splits > 1 ? list_of(a.p, share.row, a.room) : s.list;
  if (draw.path == Path::kSums) {
    sum_chunks(draw.row, share.first_chunk, share.last_chunk, draw.weigher, list);
  } else if (draw.path == Path::kNucleus) {
    if (a.splits == 1) {
      count_exponents<false>(draw.row, share.first_chunk, share.last_chunk, draw.weigher, s);
      return;
    }
    uint64_t total;
    const uint64_t mass =
        count_exponents<true>(draw.row, share.first_chunk, share.last_chunk, draw.weigher, s);
    block_exclusive_sum(s.block.warp_sums, mass, total);
    if (threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long*>(&work.mass), total);
#pragma unroll 1
    for (int i = threadIdx.x; i < kExponentBins; i += kSampleThreads) {
      if (s.low()[i] != 0) atomicAdd(&reinterpret_cast<uint32_t*>(list)[i], s.low()[i]);
    }
  } else if (draw.path == Path::kList) {
    list_largest(draw, top_k_bound(work, draw.top_k), share, s);
    if (a.splits == 1) return;
    const int room = a.room;
    const int count = s.count;
    if (threadIdx.x == 0) s.token = static_cast<int>(atomicAdd(&work.num_listed, count));
    __syncthreads();
    const int first = s.token;  // no CTA counts more than vocab_size, so the sum cannot overflow
#pragma unroll 1
    for (int i = threadIdx.x; i < min(count, room) && first + i < room; i += kSampleThreads) {
      list[first + i] = s.list[i];
    }
  }
}

// The row's token, from the results of all of its CTAs. One CTA calls this.
template <class T>
__device__ __forceinline__ int end_row(const Arguments& a, Draw<T>& draw, int row, DrawShared& s) {
  const auto target_of = [&](uint64_t total) { return s.drawn_of(total); };
  const uint64_t* list = list_of(a.p, row, a.room);
  __syncthreads();
  if (draw.path == Path::kSums) {
#pragma unroll 1
    for (int i = threadIdx.x; a.splits > 1 && i < draw.row.num_chunks(); i += kSampleThreads) {
      s.list[i] = __ldcg(&list[i]);
    }
    __syncthreads();
    return locate(draw.row, draw.weigher, s, [&](int i) { return s.list[i]; }, target_of);
  }
  if (draw.path == Path::kNucleus) {
#pragma unroll 1
    for (int i = threadIdx.x; a.splits > 1 && i < kMinListWords; i += kSampleThreads) {
      s.list[i] = __ldcg(&list[i]);
    }
    __syncthreads();
    const uint64_t mass = a.splits > 1 ? __ldcg(&work_of(a.p, row).mass) : 0;
    const int token = end_nucleus(draw, mass, s);
    if (token >= 0) return token;
  } else if (draw.path == Path::kList) {
    const int n = a.splits > 1 ? __ldcg(&work_of(a.p, row).num_listed) : s.count;
    if (n <= a.room) {
#pragma unroll 1
      for (int i = threadIdx.x; a.splits > 1 && i < n; i += kSampleThreads) {
        s.list[i] = __ldcg(&list[i]);
      }
      return end_list(draw, n, s);
    }
  }
  select_thresholds(draw, s);
  return sum_and_locate(draw.row, draw.weigher, s, target_of);
}

template <class T>
__global__ void __launch_bounds__(kSampleThreads, 2) sample_draw_kernel(Arguments a) {
  __shared__ DrawShared s;
  __shared__ Draw<T> shared_draw;
  pdl_wait();
  pdl_launch_dependents();
  const Share share = share_of(a);
  int64_t slot_id;
  const int32_t* slot = slot_of(a.p, share.row, &slot_id);
  const bool is_first = share.split == 0 && threadIdx.x == 0;
  if (slot == nullptr) {
    if (is_first) a.p.sampled[share.row] = 0;
    return;
  }
  SampleRowWork& work = work_of(a.p, share.row);
  const Largest largest = merged_largest(work, a.splits);
  if (!(fabsf(largest.value) < kInfinity)) {  // there is a NaN or +inf, or every token is -inf
    if (is_first) finish(a.p, share.row, -1);
    return;
  }
  if (is_greedy(slot) && share.split != 0) return;
  const SampleRow<T> row = row_of<T>(a, share.row, slot, slot_id, s.adjustments);
  if (is_greedy(slot)) {
    if (threadIdx.x == 0) finish(a.p, share.row, greedy_token(row, largest));
    return;
  }
  const Draw<T> draw = draw_of(row, slot, largest.value, a.room, s);
  // In shared memory, because end_row needs the registers.
  if (threadIdx.x == 0) shared_draw = draw;
  __syncthreads();
  if (draw.path == Path::kRadix) {
    if (share.split != 0) return;
  } else {
    draw_share(a, draw, share, s);
    if (a.splits > 1 && !arrives_last(&work.num_arrived, a.splits, &s.is_last)) return;
  }
  const int token = end_row(a, shared_draw, share.row, s);
  if (threadIdx.x == 0) finish(a.p, static_cast<int>(blockIdx.x) / a.splits, token);
}

template <class T>
cudaError_t launch_both(const Arguments& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.p.num_rows * a.splits));
  const cudaError_t error =
      launch_chained(&sample_scan_kernel<T>, grid, kSampleThreads, 0, stream, a);
  if (error != cudaSuccess) return error;
  return launch_chained(&sample_draw_kernel<T>, grid, kSampleThreads, 0, stream, a);
}

}  // namespace

cudaError_t launch_sample(const SampleParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const int num_chunks = (params.vocab_size + kChunkTokens - 1) / kChunkTokens;
  int splits = 1;  // a power of two, because scan merges the parts of that many lanes
  while (splits < kMaxSplits && params.num_rows <= kMaxSplitRows &&
         params.num_rows * splits * 2 <= 2 * device->num_sms &&
         splits * 2 * kSampleWarps <= num_chunks) {
    splits *= 2;
  }
  const Arguments arguments{params, splits, (num_chunks + splits - 1) / splits,
                            static_cast<int>(sample_list_words(params.vocab_size))};
  return dispatch_half(params.dtype, [&]<class T>(T) { return launch_both<T>(arguments, stream); });
}

}  // namespace pyserve::gpu
