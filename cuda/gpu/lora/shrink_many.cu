// lora_shrink (shrink.cu) of many tokens: x is read once, at the rate of a copy, by CTAs of 64
// tokens of one slot by 64 rows of A, those of all parts one after the other.
//
// Columns of k come in stages of 64, kStages - 1 of them on their way by cp.async: 40 KB of x on
// each SM. Half of a CTA's 8 warps take the first 32 columns of a stage, half the others; of those
// each takes 16 tokens. As in shrink.cu a lane reads 16 bytes of a row and feeds two mma steps with
// them; in shared memory odd rows have their halves swapped, so that 8 lanes, 64 bytes of two rows
// each, meet no bank twice.
// Numerics: float32 sums, one half's after the other's. The order of a sum depends on k alone.
// Floor: bytes, 2 * k of each token.
#include "gpu/core/vec.cuh"
#include "gpu/lora/shrink.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLog2Tokens = 6, kTokens = 1 << kLog2Tokens, kRows = 64;  // of a CTA
constexpr int kColumns = 64;             // of a stage
constexpr int kStages = 6;
constexpr int kRowBytes = 2 * kColumns, kChunks = kRowBytes / 16;
constexpr int kStageBytes = (kTokens + kRows) * kRowBytes;  // tokens, then rows
constexpr int kSmemBytes = kStages * kStageBytes;
constexpr int kPasses = kTokens * kChunks / kThreads;  // chunks of x and of A that a thread copies
static_assert(kRows == kTokens, "x and A are copied alike");
static_assert(2 * kTokens * (kRows + 1) * 4 <= kSmemBytes, "both halves' sums");

// Where a chunk of a row lies.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * kRowBytes + (chunk ^ row % 2 * 4) * 16;
}

// What a thread copies of each stage: a chunk of kPasses tokens and of as many rows of A.
template <class T>
struct Sources {
  const T *x[kPasses], *a[kPasses];
  bool has_x[kPasses], has_a[kPasses];

  __device__ __forceinline__ Sources(const LoraShrinkParams& p, const TokenTile& tile,
                                     int first_row) {
    const int chunk = threadIdx.x % kChunks;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int index = threadIdx.x / kChunks + i * (kThreads / kChunks);
      has_x[i] = index < tile.count;
      x[i] = static_cast<const T*>(p.x) + chunk * kVec;
      if (has_x[i]) x[i] += (tile.begin + index) * p.x_stride;
      const Row row = row_of(p.rows, tile.slot, first_row + index);
      has_a[i] = row.is_there;
      a[i] = static_cast<const T*>(p.a) + chunk * kVec;
      if (has_a[i]) {
        a[i] += tile.slot * p.a_slot_stride + row.part * p.a_part_stride + row.index * p.a_stride;
      }
    }
  }

  __device__ __forceinline__ void copy(uint32_t smem, int stage, int64_t k) const {
    const int column = stage * kColumns, chunk = threadIdx.x % kChunks;
    const uint32_t to = smem + stage % kStages * kStageBytes;
    if (column < k) {
      const bool is_inside = column + chunk * kVec < k;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int index = threadIdx.x / kChunks + i * (kThreads / kChunks);
        const uint32_t offset = chunk_offset(index, chunk);
        cp_async_16(to + offset, x[i] + column, is_inside && has_x[i]);
        cp_async_16(to + kTokens * kRowBytes + offset, a[i] + column, is_inside && has_a[i]);
      }
    }
    cp_async_commit();
  }
};

// sums: of a warp's 16 tokens; `num_tiles` mma of rows.
template <class T>
__device__ __forceinline__ void add_stage(float (&sums)[kRows / 8][4], uint32_t stage,
                                          int num_tiles) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, group = lane / 4;
  const uint32_t own = chunk_offset(group, warp / 4 * 4 + lane % 4);  // 8 rows on it is the same
  const uint32_t tokens = stage + warp % 4 * kMmaTokens * kRowBytes + own;
  const uint4 low = load_shared(tokens), high = load_shared(tokens + 8 * kRowBytes);
  const uint32_t first[4] = {low.x, high.x, low.y, high.y};
  const uint32_t second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    if (n >= num_tiles) break;
    const uint4 b = load_shared(stage + (kTokens + 8 * n) * kRowBytes + own);
    mma_16816<T>(sums[n], first, b.x, b.y);
    mma_16816<T>(sums[n], second, b.z, b.w);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    shrink_many_kernel(LoraShrinkParams p, int row_blocks) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  __shared__ float factors[kTokens];
  const uint32_t smem = smem_address(dynamic_smem);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int first_row = blockIdx.x % row_blocks * kRows;
  pdl_launch_dependents();
  const TokenTile tile = token_tile<false>(p.rows, blockIdx.x / row_blocks, kLog2Tokens);
  const bool has_work = tile.count > 0 && has_rows(p.rows, tile.slot, first_row, kRows);
  pdl_wait();
  if (!has_work) return;
  const Sources<T> sources(p, tile, first_row);
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) sources.copy(smem, stage, p.k);
  for (int token = warp; token < tile.count; token += kWarps) {
    const float factor = norm_factor(p, tile.begin + token);
    if (lane == 0) factors[token] = factor;
  }
  const int num_tiles = (p.rows.num_parts * p.rows.max_rank - first_row + 7) / 8;
  const int num_stages = static_cast<int>((p.k + kColumns - 1) / kColumns);
  float sums[kRows / 8][4] = {};
#pragma unroll 1
  for (int stage = 0; stage < num_stages; ++stage) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are through with the one before
    sources.copy(smem, stage + kStages - 1, p.k);
    add_stage<T>(sums, smem + stage % kStages * kStageBytes, num_tiles);
  }
  cp_async_wait<0>();
  __syncthreads();
  auto* partial = reinterpret_cast<float*>(dynamic_smem);  // [2][kTokens][kRows + 1]
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = warp % 4 * kMmaTokens + lane / 4 + i / 2 * 8;
      const int row = 8 * n + lane % 4 * 2 + i % 2;
      partial[(warp / 4 * kTokens + token) * (kRows + 1) + row] = sums[n][i];
    }
  }
  __syncthreads();
  const Row row = row_of(p.rows, tile.slot, first_row + threadIdx.x % kRows);
  if (!row.is_there) return;
  const float scale = p.scales[tile.slot * p.scales_stride + row.part];
  for (int token = threadIdx.x / kRows; token < tile.count; token += kThreads / kRows) {
    const float* own = partial + token * (kRows + 1) + threadIdx.x % kRows;
    const float sum = own[0] + own[kTokens * (kRows + 1)];
    float* out = p.out.data + (tile.begin + token) * p.out.stride;
    out[row.part * p.out.part_stride + row.index] = sum * (scale * factors[token]);
  }
}

}  // namespace

cudaError_t launch_lora_shrink_many(const LoraShrinkParams& p, cudaStream_t stream) {
  return dispatch_half(p.dtype, [&]<class T>(T) {
    constexpr auto kKernel = shrink_many_kernel<T>;
    const cudaError_t error = allow_smem<kKernel, kSmemBytes>();
    if (error != cudaSuccess) return error;
    const int row_blocks = (p.rows.num_parts * p.rows.max_rank + kRows - 1) / kRows;
    const int64_t num_tiles = num_token_tiles(p.rows.num_tokens, kTokens, p.rows.num_slots);
    return launch_chained(kKernel, static_cast<unsigned>(num_tiles * row_blocks), kThreads,
                          kSmemBytes, stream, p, row_blocks);
  });
}

}  // namespace pyserve::gpu
