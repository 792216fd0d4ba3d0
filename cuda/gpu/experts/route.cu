// route: up to three kernels. x [num_tokens, hidden] and router [num_experts (+ 1), hidden] are
// bfloat16 or float16; logits and weights are float32.
//   logits  x router^T. A CTA takes 16 tokens and 16 rows of the router, and its 8 warps split
//           hidden. Products are mma.sync on fragments that are loaded straight from memory: a sum
//           does not depend on which columns of hidden meet in one product, so the 16 bytes that a
//           lane loads of a row of x and of the router are its fragments of two products.
//   choose  one warp per token: scores, groups, the top_k best experts, weights. Among equal
//           choices the lower expert wins; a NaN comes last.
//   sort    one CTA: sorts the assignments by expert, and by token within an expert. Each warp
//           takes a part of the assignments, counts them by expert and numbers them.
// Up to 64 tokens, choose and sort are one kernel; up to 16 tokens with a small router, all three
// are.
//
// Numerics: float32 throughout, in an order that depends on shapes alone.
// Floor: (num_tokens + num_experts) * hidden * 2 bytes.
#include <algorithm>
#include <cmath>

#include "common/limits.h"
#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/experts/experts.h"

namespace pyserve::gpu {
namespace {

// ---- logits -------------------------------------------------------------------------------------

constexpr int kLogitTokens = 16, kLogitRows = 16;  // per CTA
constexpr int kLogitWarps = 8;
constexpr int kLaneDepth = 4 * kVec;  // columns of hidden that four lanes hold at once

using Partial = float[kLogitTokens][kLogitRows + 1];  // the sums of a warp

// Computes the logits of 16 tokens from token0 on and 16 rows of the router from row0 on. All
// threads of a CTA of kCount warps call this; the logits are visible to them behind the next
// barrier.
template <class T, int kCount>
__device__ __forceinline__ void put_logits(const RouteParams& p, int row0, int token0,
                                           Partial* partial) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  // Rows beyond the last are computed from the last one and not stored.
  const auto row_of = [&](const void* data, int64_t stride, int index, int count) {
    return static_cast<const T*>(data) + stride * min(index, count - 1) + lane % 4 * kVec;
  };
  const T* x[2];
  const T* router[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    x[i] = row_of(p.x, p.x_stride, token0 + lane / 4 + 8 * i, p.num_tokens);
    router[i] = row_of(p.router, p.router_stride, row0 + lane / 4 + 8 * i, p.num_logits);
  }
  float sums[2][4] = {};
#pragma unroll kCount == kLogitWarps ? 4 : 2
  for (int k = warp * kLaneDepth; k < p.hidden; k += kCount * kLaneDepth) {
    const bool is_in = k + lane % 4 * kVec < p.hidden;
    uint4 tokens[2], rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tokens[i] = is_in ? load_vec(x[i] + k) : uint4{};
      rows[i] = is_in ? load_vec(router[i] + k) : uint4{};
    }
    const uint32_t first[4] = {tokens[0].x, tokens[1].x, tokens[0].y, tokens[1].y};
    const uint32_t second[4] = {tokens[0].z, tokens[1].z, tokens[0].w, tokens[1].w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mma_16816<T>(sums[i], first, rows[i].x, rows[i].y);
      mma_16816<T>(sums[i], second, rows[i].z, rows[i].w);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      partial[warp][lane / 4 + j / 2 * 8][8 * i + lane % 4 * 2 + j % 2] = sums[i][j];
    }
  }
  __syncthreads();
  static_assert(kLogitTokens * kLogitRows <= kCount * kWarpSize);
  const int token = static_cast<int>(threadIdx.x) / kLogitRows;
  const int row = static_cast<int>(threadIdx.x) % kLogitRows;
  if (token >= kLogitTokens || token0 + token >= p.num_tokens || row0 + row >= p.num_logits) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += partial[i][token][row];
  p.logits[p.logits_stride * (token0 + token) + row0 + row] = sum;
}

template <class T>
__global__ void __launch_bounds__(kLogitWarps * kWarpSize) logits_kernel(RouteParams p) {
  __shared__ Partial partial[kLogitWarps];
  pdl_launch_dependents();
  pdl_wait();
  put_logits<T, kLogitWarps>(p, static_cast<int>(blockIdx.x) * kLogitRows,
                             static_cast<int>(blockIdx.y) * kLogitTokens, partial);
}

// ---- choose -------------------------------------------------------------------------------------

constexpr int kWarps = 32;  // for choose and sort
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLaneExperts = kMaxExperts / kWarpSize;
constexpr float kSumEps = 1e-20f;  // added to a sum of sigmoids, which may be 0

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, distance));
  }
  return x;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The best of all lanes' candidates: the largest choice, and of equal ones the lowest index. A
// negative index means that the lane has no candidate.
__device__ __forceinline__ void warp_best(float& choice, int& index) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kFullMask, choice, distance);
    const int other_index = __shfl_xor_sync(kFullMask, index, distance);
    const bool is_better =
        index < 0 || (other_index >= 0 &&
                      (other > choice || (other == choice && other_index < index)));
    if (other_index >= 0 && is_better) choice = other, index = other_index;
  }
}

// Sets the choices of all experts outside the best groups to -inf. `choices` are those of one
// token, in shared memory; each lane takes some of the groups.
__device__ __forceinline__ void limit_to_groups(const RouteParams& p, float* choices,
                                                float* group_choices) {
  const int lane = threadIdx.x % kWarpSize, size = p.num_experts / p.num_groups;
  for (int group = lane; group < p.num_groups; group += kWarpSize) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < size; ++i) {
      const float choice = choices[group * size + i];
      second = fmaxf(second, fminf(first, choice));
      first = fmaxf(first, choice);
    }
    group_choices[group] = p.is_sigmoid && size > 1 ? first + second : first;
  }
  __syncwarp();
  for (int group = lane; group < p.num_groups; group += kWarpSize) {
    const float mine = group_choices[group];
    int num_better = 0;
    for (int i = 0; i < p.num_groups; ++i) {
      const float other = group_choices[i];
      num_better += other > mine || (other == mine && i < group);
    }
    if (num_better < p.top_groups) continue;
    for (int i = 0; i < size; ++i) choices[group * size + i] = -INFINITY;
  }
  __syncwarp();
}

// Writes the token's chosen experts to its row of places, where sort finds them, and their weights.
__device__ void choose(const RouteParams& p, int token, float* choices, float* group_choices) {
  const int lane = threadIdx.x % kWarpSize;
  int32_t* places = p.places + p.places_stride * token;
  float* weights = p.weights + p.weights_stride * token;
  if (p.slot_mapping[token] < 0) {
    for (int j = lane; j < p.top_k + p.has_gate; j += kWarpSize) weights[j] = 0.0f;
    for (int j = lane; j < p.top_k; j += kWarpSize) places[j] = -1;
    return;
  }
  const float* logits = p.logits + p.logits_stride * token;
  float most = -INFINITY;
  for (int i = lane; i < p.num_experts; i += kWarpSize) most = fmaxf(most, logits[i]);
  most = warp_max(most);
  float sum = 0.0f;
  for (int i = lane; i < p.num_experts; i += kWarpSize) sum += expf(logits[i] - most);
  sum = lane_sum(sum);
  const auto score_of = [&](int expert) {
    return p.is_sigmoid ? sigmoid(logits[expert]) : expf(logits[expert] - most) / sum;
  };
  for (int i = lane; i < p.num_experts; i += kWarpSize) {
    const float score = score_of(i);
    const float choice = p.correction_bias == nullptr ? score : score + p.correction_bias[i];
    choices[i] = isnan(choice) ? -INFINITY : choice;
  }
  __syncwarp();
  if (p.top_groups < p.num_groups) limit_to_groups(p, choices, group_choices);
  float sum_of_taken = p.is_sigmoid ? kSumEps : 0.0f, mine = 0.0f;
  uint32_t is_taken = 0;  // bits of this lane's experts
  static_assert(kLaneExperts <= 32 && kMaxTopExperts <= kWarpSize);
  for (int j = 0; j < p.top_k; ++j) {
    float choice = -INFINITY;
    int best = -1;
    for (int i = lane, bit = 0; i < p.num_experts; i += kWarpSize, ++bit) {
      if (is_taken >> bit & 1u) continue;
      if (best < 0 || choices[i] > choice) choice = choices[i], best = i;
    }
    warp_best(choice, best);
    if (best % kWarpSize == lane) is_taken |= 1u << (best / kWarpSize);
    const float score = score_of(best);
    sum_of_taken += score;
    if (j == lane) {
      mine = score;
      places[j] = best;
    }
  }
  const float divisor = p.is_normalized ? sum_of_taken : 1.0f;
  if (lane < p.top_k) weights[lane] = mine / divisor * p.scale;
  if (p.has_gate && lane == 0) weights[p.top_k] = sigmoid(logits[p.num_experts]);
}

// ---- sort ---------------------------------------------------------------------------------------

// Replaces the experts in places by places in the sorted order, and writes order and offsets.
// `counts` is shared memory [kWarps][num_experts]. All threads of a CTA call this.
__device__ void sort_by_expert(const RouteParams& p, int32_t* counts) {
  __shared__ int warp_sums[kWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int count = p.num_tokens * p.top_k;
  const int part = (count + kThreads - 1) / kThreads * kWarpSize;  // assignments per warp
  const int begin = min(count, warp * part), end = min(count, begin + part);
  const auto place_of = [&](int i) -> int32_t& {
    const int token = i / p.top_k;
    return p.places[p.places_stride * token + i - token * p.top_k];
  };
  for (int i = threadIdx.x; i < kWarps * p.num_experts; i += kThreads) counts[i] = 0;
  __syncthreads();
  int32_t* mine = counts + warp * p.num_experts;
  for (int i0 = begin; i0 < end; i0 += kWarpSize) {
    const int i = i0 + lane;
    const int expert = i < end ? place_of(i) : -1;
    const unsigned same = __match_any_sync(kFullMask, expert);
    if (expert >= 0 && __ffs(same) - 1 == lane) mine[expert] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  const int expert = static_cast<int>(threadIdx.x);
  int of_expert = 0;
  if (expert < p.num_experts) {
    for (int i = 0; i < kWarps; ++i) {
      const int of_warp = counts[i * p.num_experts + expert];
      counts[i * p.num_experts + expert] = of_expert;  // how many are in front of this warp's first
      of_expert += of_warp;
    }
  }
  static_assert(kMaxExperts <= kThreads);
  int total = 0;
  const int first = block_exclusive_sum<kWarps>(warp_sums, of_expert, total);
  if (expert < p.num_experts) {
    p.offsets[expert] = first;
    for (int i = 0; i < kWarps; ++i) counts[i * p.num_experts + expert] += first;
  }
  if (threadIdx.x == 0) p.offsets[p.num_experts] = total;
  __syncthreads();
  for (int i0 = begin; i0 < end; i0 += kWarpSize) {
    const int i = i0 + lane;
    const int mine_expert = i < end ? place_of(i) : -1;
    const unsigned same = __match_any_sync(kFullMask, mine_expert);
    const int before = __popc(same & ((1u << lane) - 1));
    int place = 0;
    if (mine_expert >= 0) {
      place = mine[mine_expert] + before;
      place_of(i) = place;
      p.order[place] = i;
    }
    __syncwarp();
    if (mine_expert >= 0 && before == 0) mine[mine_expert] += __popc(same);
    __syncwarp();
  }
  for (int i = total + static_cast<int>(threadIdx.x); i < count; i += kThreads) p.order[i] = -1;
}

// ---- the kernels --------------------------------------------------------------------------------

// Shared memory floats that a warp of choose needs for its token. The counts of sort use the same
// memory later.
__host__ __device__ constexpr int choose_floats(int num_experts) {
  return num_experts + static_cast<int>(kMaxExpertGroups);
}
constexpr int kChooseSmem = kWarps * choose_floats(kMaxExperts) * 4;

// Chooses for all tokens of the grid, one warp per token. To sort as well, there must be only one
// CTA. All threads of a CTA call this.
template <bool kIsSorting>
__device__ __forceinline__ void choose_and_sort(const RouteParams& p, unsigned char* smem) {
  const int warp = threadIdx.x / kWarpSize, step = static_cast<int>(gridDim.x) * kWarps;
  float* choices = reinterpret_cast<float*>(smem) + warp * choose_floats(p.num_experts);
  for (int token = static_cast<int>(blockIdx.x) * kWarps + warp; token < p.num_tokens;
       token += step) {
    choose(p, token, choices, choices + p.num_experts);
    __syncwarp();
  }
  if constexpr (kIsSorting) {
    __syncthreads();
    sort_by_expert(p, reinterpret_cast<int32_t*>(smem));
  }
}

template <bool kIsSorting>
__global__ void __launch_bounds__(kThreads) choose_kernel(RouteParams p) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  pdl_launch_dependents();
  pdl_wait();
  choose_and_sort<kIsSorting>(p, dynamic_smem);
}

// All three in one CTA, for few tokens and a small router. It reads with more warps than
// logits_kernel, so its sums have another order.
template <class T>
__global__ void __launch_bounds__(kThreads) route_kernel(RouteParams p) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  pdl_launch_dependents();
  pdl_wait();
  auto* partial = reinterpret_cast<Partial*>(dynamic_smem);
  for (int row0 = 0; row0 < p.num_logits; row0 += kLogitRows) {
    put_logits<T, kWarps>(p, row0, 0, partial);
    __syncthreads();
  }
  choose_and_sort<true>(p, dynamic_smem);
}

__global__ void __launch_bounds__(kThreads) sort_kernel(RouteParams p) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  pdl_launch_dependents();
  pdl_wait();
  sort_by_expert(p, reinterpret_cast<int32_t*>(dynamic_smem));
}

template <bool kIsSorting>
cudaError_t launch_choose(const RouteParams& p, cudaStream_t stream) {
  constexpr auto kKernel = choose_kernel<kIsSorting>;
  const cudaError_t error = allow_smem<kKernel, kChooseSmem>();
  if (error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(kIsSorting ? 1 : (p.num_tokens + kWarps - 1) / kWarps);
  const size_t smem = size_t{kWarps} * choose_floats(p.num_experts) * 4;
  return launch_chained(kKernel, grid, kThreads, smem, stream, p);
}

template <class T>
cudaError_t launch_one(const RouteParams& p, cudaStream_t stream) {
  constexpr auto kKernel = route_kernel<T>;
  const cudaError_t error = allow_smem<kKernel, kChooseSmem>();
  if (error != cudaSuccess) return error;
  static_assert(kChooseSmem >= kWarps * sizeof(Partial));
  const size_t choosing = size_t{kWarps} * choose_floats(p.num_experts) * 4;
  const size_t smem = std::max(choosing, kWarps * sizeof(Partial));
  return launch_chained(kKernel, 1, kThreads, smem, stream, p);
}

cudaError_t launch_sort(const RouteParams& p, cudaStream_t stream) {
  constexpr int kSmem = kWarps * kMaxExperts * 4;
  const cudaError_t error = allow_smem<sort_kernel, kSmem>();
  if (error != cudaSuccess) return error;
  const size_t smem = size_t{kWarps} * p.num_experts * 4;
  return launch_chained(sort_kernel, 1, kThreads, smem, stream, p);
}

}  // namespace

cudaError_t launch_route(const RouteParams& p, cudaStream_t stream) {
  const auto pieces = [](int whole, int part) {
    return static_cast<unsigned>((whole + part - 1) / part);
  };
  // So small a router is read by one SM in less time than the launch of a second kernel takes.
  constexpr int64_t kSmallRouter = 2 << 16;
  if (p.num_tokens > 0 && p.num_tokens <= kLogitTokens &&
      int64_t{p.num_logits} * p.hidden <= kSmallRouter) {
    return dispatch_half(p.dtype, [&]<class T>(T) { return launch_one<T>(p, stream); });
  }
  const dim3 grid(pieces(p.num_logits, kLogitRows), pieces(p.num_tokens, kLogitTokens));
  if (p.num_tokens > 0) {
    const cudaError_t error = dispatch_half(p.dtype, [&]<class T>(T) {
      return launch_chained(logits_kernel<T>, grid, kLogitWarps * kWarpSize, 0, stream, p);
    });
    if (error != cudaSuccess) return error;
  }
  if (p.num_tokens > 0 && p.num_tokens <= 2 * kWarps) return launch_choose<true>(p, stream);
  const cudaError_t error = launch_choose<false>(p, stream);
  return error != cudaSuccess ? error : launch_sort(p, stream);
}

}  // namespace pyserve::gpu
