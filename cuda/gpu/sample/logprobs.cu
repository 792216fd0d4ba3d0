// logprobs: for given rows of logits [num_rows, vocab_size], bfloat16 or float16: the log-softmax
// of one token, how many tokens have a larger logit, and the 20 most likely tokens.
//
// Work: one CTA per row, and two passes over the row, the second mostly from L2. The first pass
// sums exp with a running largest logit (Milakov and Gimelshein 2018), and keeps the maxima of
// 1,024 disjoint parts of the row. None of the 20 tokens is below the 20th largest of these maxima.
// The second pass lists the few logits that reach this bound, and the list is sorted. If the list
// overflows, as with many equal logits, each of the 20 tokens takes one more pass. No workspace is
// needed.
// Numerics: float32; a NaN counts as -inf. Ids and ranks are exact, with ties broken by id.
// Floor: the bytes of the logits, once. Only few rows ask for logprobs, and one CTA per row stays
// far below the device's bandwidth, but takes far less time than the forward pass in front of it.
#include "common/limits.h"
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/sample/block.cuh"
#include "gpu/sample/logprobs.h"
#include "gpu/sample/select.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kTop = static_cast<int>(kTopLogprobs);
constexpr int kRoom = 2048;  // entries of the list

struct LogprobsShared {
  uint64_t list[kRoom];
  float largest[kSampleWarps];
  float sums[kSampleWarps];
  uint64_t best[kSampleWarps];
  int32_t num_above;
  int32_t count;
};

// A sum of exp(x - largest), which can be rescaled to a larger `largest`.
struct ExpSum {
  float largest = -kInfinity;
  float sum = 0.0f;

  __device__ __forceinline__ void rescale(float other) {
    if (!(other > largest)) return;
    sum *= expf(largest - other);
    largest = other;
  }

  __device__ __forceinline__ void merge(ExpSum other) {
    rescale(other.largest);
    other.rescale(largest);
    sum += other.sum;
  }
};

template <class T>
__device__ __forceinline__ void read_octet(const RawOctet<T>& raw, float (&x)[kOctet]) {
  raw.unpack(x);
#pragma unroll
  for (int e = 0; e < kOctet; ++e) x[e] = fmaxf(x[e], -kInfinity);  // a NaN becomes -inf
}

// Finds the 20 largest ranks (rank_of in select.cuh) one after the other, with one pass each.
template <class T>
__device__ __forceinline__ void select_slowly(const SampleRow<T>& row, LogprobsShared& s) {
  uint64_t before = ~uint64_t{0};
#pragma unroll 1
  for (int i = 0; i < min(kTop, row.vocab_size); ++i) {
    uint64_t best = 0;
    row.visit_raw(0, row.num_chunks(), [&](int, int octet, const RawOctet<T>& raw) {
      float x[kOctet];
      read_octet(raw, x);
#pragma unroll
      for (int e = 0; e < kOctet; ++e) {
        const int id = octet * kOctet + e;
        const uint64_t rank = rank_of(to_key(x[e]), id);
        if (id < row.vocab_size && rank < before && rank > best) best = rank;
      }
    });
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      const uint64_t other = __shfl_xor_sync(kFullMask, best, distance);
      best = other > best ? other : best;
    }
    __syncthreads();  // the readers of the pass before have finished
    if (threadIdx.x % kWarpSize == 0) s.best[threadIdx.x / kWarpSize] = best;
    __syncthreads();
    before = s.best[0];
    for (int warp = 1; warp < kSampleWarps; ++warp) {
      before = s.best[warp] > before ? s.best[warp] : before;
    }
    if (threadIdx.x == 0) s.list[i] = before;
  }
  __syncthreads();
}

// Puts the ranks of the 20 largest logits into the list, in order. `bound` is the one from the
// maxima of the parts.
template <class T>
__device__ __forceinline__ void select_top(const SampleRow<T>& row, float bound,
                                           LogprobsShared& s) {
  row.visit_raw(0, row.num_chunks(), [&](int, int octet, const RawOctet<T>& raw) {
    float x[kOctet];
    read_octet(raw, x);
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      if (!(x[e] >= bound && x[e] > -kInfinity)) continue;
      const int at = atomicAdd(&s.count, 1);
      if (at < kRoom) s.list[at] = rank_of(to_key(x[e]), octet * kOctet + e);
    }
  });
  __syncthreads();
  const int count = s.count;
  if (count > kRoom) return select_slowly(row, s);
  sort_descending(s.list, count);
  if (count >= kTop || threadIdx.x != 0) return;
  // The remaining places go to tokens with a logit of -inf, lowest ids first. Fewer than kTop
  // tokens are listed, so the first 2 * kTop ids have enough others.
  int listed = count;
#pragma unroll 1
  for (int id = 0; id < min(2 * kTop, row.vocab_size) && listed < kTop; ++id) {
    float x[kOctet];
    read_octet(row.load(id / kOctet), x);
    float own = x[0];
#pragma unroll
    for (int e = 1; e < kOctet; ++e) own = id % kOctet == e ? x[e] : own;
    if (own == -kInfinity) s.list[listed++] = rank_of(to_key(own), id);
  }
}

template <class T>
__global__ void __launch_bounds__(kSampleThreads, 2) logprobs_kernel(LogprobsParams p) {
  __shared__ LogprobsShared s;
  pdl_wait();
  pdl_launch_dependents();
  const int asked = blockIdx.x, row_index = p.rows[asked * p.rows_stride];
  if (row_index < -1 || row_index >= p.num_rows) __trap();
  int32_t* top_ids = p.top_ids + asked * p.top_ids_stride;
  float* top_logprobs = p.top_logprobs + asked * p.top_logprobs_stride;
  if (threadIdx.x < kTop) {
    top_ids[threadIdx.x] = -1;
    top_logprobs[threadIdx.x] = -kInfinity;
  }
  const int token = row_index < 0 ? -1 : p.token_ids[row_index * p.token_ids_stride];
  if (token < -1 || token >= p.vocab_size) __trap();
  if (threadIdx.x == 0) {
    p.token_logprobs[asked * p.token_logprobs_stride] = -kInfinity;
    p.token_ranks[asked * p.token_ranks_stride] = 0;
    s.num_above = 0;
    s.count = 0;
  }
  if (row_index < 0) return;
  const T* logits = static_cast<const T*>(p.logits) + row_index * p.logits_stride;
  const SampleRow<T> row{.logits = logits,
                         .adjustments = nullptr,
                         .vocab_size = p.vocab_size,
                         .is_aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0,
                         .is_plain = true};
  float token_logit = kInfinity;
  if (token >= 0) token_logit = fmaxf(to_float(logits[token]), -kInfinity);

  ExpSum sum;
  int num_above = 0;
  float parts[2] = {-kInfinity, -kInfinity};
  row.visit_raw(0, row.num_chunks(), [&](int, int, const RawOctet<T>& raw) {
    float x[kOctet];
    read_octet(raw, x);
    float largest = -kInfinity;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      largest = fmaxf(largest, x[e]);
      num_above += x[e] > token_logit;
    }
    parts[1] = fmaxf(parts[1], largest);  // a thread's octets go alternately to its two parts
    const float other = parts[0];
    parts[0] = parts[1];
    parts[1] = other;
    sum.rescale(largest);
    if (sum.largest == -kInfinity) return;
#pragma unroll
    for (int e = 0; e < kOctet; ++e) sum.sum += expf(x[e] - sum.largest);
  });
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    sum.merge({__shfl_xor_sync(kFullMask, sum.largest, distance),
               __shfl_xor_sync(kFullMask, sum.sum, distance)});
  }
  num_above = __reduce_add_sync(kFullMask, num_above);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  __syncthreads();  // s.num_above has been set to 0
  if (lane == 0) {
    s.largest[warp] = sum.largest;
    s.sums[warp] = sum.sum;
    atomicAdd(&s.num_above, num_above);
  }
  const float bound = kth_bound(to_key(parts[0]), to_key(parts[1]), kTop);
  __syncthreads();
  sum = {s.largest[0], s.sums[0]};
#pragma unroll 1
  for (int i = 1; i < kSampleWarps; ++i) sum.merge({s.largest[i], s.sums[i]});
  select_top(row, bound, s);
  __syncthreads();

  const float log_sum = logf(sum.sum);
  const bool is_finite = fabsf(sum.largest) < kInfinity;
  const auto value_of = [&](float logit) {
    if (!p.is_normalized) return logit;
    return is_finite ? (logit - sum.largest) - log_sum : -kInfinity;
  };
  if (threadIdx.x < min(kTop, p.vocab_size)) {
    const uint64_t rank = s.list[threadIdx.x];
    top_ids[threadIdx.x] = id_of(rank);
    top_logprobs[threadIdx.x] = value_of(from_key(bits_of(rank)));
  }
  if (threadIdx.x == 0 && token >= 0) {
    p.token_logprobs[asked * p.token_logprobs_stride] = value_of(token_logit);
    p.token_ranks[asked * p.token_ranks_stride] = 1 + s.num_above;
  }
}

}  // namespace

cudaError_t launch_logprobs(const LogprobsParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.num_asked));
  const auto launch_as = [&]<class T>(T) {
    return launch_chained(logprobs_kernel<T>, grid, kSampleThreads, 0, stream, params);
  };
  return dispatch_half(params.dtype, launch_as);
}

}  // namespace pyserve::gpu
