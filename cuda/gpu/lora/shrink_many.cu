// lora_shrink (see shrink.cu for shapes) for many tokens. x is read once, at the rate of a copy. A
// CTA takes 64 tokens of one slot, up to 64 rows of A (those of all parts one after the other) and
// one split of k. There are as many splits as give each SM one CTA (num_splits of ops/lora.py).
//
// The columns of k come in stages of 128 by cp.async. All stages but one are in flight: 80 KB of x
// per SM of an H200. A stage's columns are divided into quarters. Two of the 8 warps take one
// quarter, each of them 32 of the tokens and all of the rows; they load all fragments of a stage
// first and then multiply. In shared memory the 16-byte chunks of a row are XORed with the row's
// number, so that ldmatrix meets no bank conflicts. The first stages of A are loaded before
// pdl_wait(). A CTA takes more than half of an SM's shared memory where the device has enough, by
// rule 5 of pdl.cuh.
// Numerics: float32 sums, added over the quarters in order. The order of a sum depends on k and on
// the number of splits alone.
// Bound by bytes: 2 * k for each token.
#include "gpu/core/vec.cuh"
#include "gpu/lora/shrink.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kWarps = 8, kQuarters = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLog2Tokens = 6, kTokens = 1 << kLog2Tokens;  // tokens of a CTA
constexpr int kTokenTiles = kTokens / kMmaTokens / (kWarps / kQuarters);  // mma rows of a warp
constexpr int kColumns = 128;                               // columns of a stage
constexpr int kRowBytes = 2 * kColumns, kChunks = kRowBytes / 16;
// Rows that all threads copy together, one chunk per thread.
constexpr int kPass = kThreads / kChunks;

// The tile sizes: up to kRows rows of A, and kStages stages.
template <int kRowsOf, int kStagesOf>
struct ManyTiling {
  static constexpr int kRows = kRowsOf, kStages = kStagesOf, kRowTiles = kRows / 8;
  // First the tokens, then the rows of A.
  static constexpr int kStageBytes = (kTokens + kRows) * kRowBytes;
  static constexpr int kSmemBytes = kStages * kStageBytes;
  // In floats; padded so that the float2 stores of four tokens share no bank.
  static constexpr int kPitch = kRows + 8;
  static_assert(kRows % kPass == 0 && kTokens % kPass == 0);
  static_assert(kQuarters * kTokens * kPitch * 4 <= kSmemBytes, "all quarters' sums");
};

// The byte offset of a chunk of a row within a stage.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * kRowBytes + (chunk ^ row % 8) * 16;
}

// What a thread copies of each stage: one chunk of some tokens and of some rows of A.
template <class T, class Tiling>
struct Sources {
  static constexpr int kTokenPasses = kTokens / kPass, kRowPasses = Tiling::kRows / kPass;
  const T *x[kTokenPasses], *a[kRowPasses];
  bool has_x[kTokenPasses], has_a[kRowPasses];
  int begin, end;  // the thread's first column, and the end of the split
  uint32_t to;     // the thread's place in the first stage

  __device__ __forceinline__ Sources(const LoraShrinkParams& p, const TokenTile& tile,
                                     int first_row, int first_column, int end_column, uint32_t smem)
      : begin(first_column + static_cast<int>(threadIdx.x) % kChunks * kVec), end(end_column) {
    const int first = threadIdx.x / kChunks;
    // The swizzle is the same kPass rows further on.
    to = smem + chunk_offset(first, threadIdx.x % kChunks);
    static_assert(kPass % 8 == 0);
#pragma unroll
    for (int i = 0; i < kTokenPasses; ++i) {
      const int token = first + i * kPass;
      has_x[i] = token < tile.count;
      x[i] = static_cast<const T*>(p.x) + begin;
      if (has_x[i]) x[i] += (tile.begin + token) * p.x_stride;
    }
#pragma unroll
    for (int i = 0; i < kRowPasses; ++i) {
      const Row row = row_of(p.rows, tile.slot, first_row + first + i * kPass);
      has_a[i] = row.is_there;
      a[i] = static_cast<const T*>(p.a) + begin;
      if (has_a[i]) {
        a[i] += tile.slot * p.a_slot_stride + row.part * p.a_part_stride + row.index * p.a_stride;
      }
    }
  }

  // Starts to copy stage `stage` of the split into buffer `place`.
  __device__ __forceinline__ void copy_x(int stage, int place) const {
    const bool is_inside = begin + stage * kColumns < end;
#pragma unroll
    for (int i = 0; i < kTokenPasses; ++i) {
      const uint32_t row = to + place * Tiling::kStageBytes + i * kPass * kRowBytes;
      cp_async_16(row, x[i] + (is_inside ? stage * kColumns : 0), is_inside && has_x[i]);
    }
  }

  __device__ __forceinline__ void copy_a(int stage, int place) const {
    const bool is_inside = begin + stage * kColumns < end;
#pragma unroll
    for (int i = 0; i < kRowPasses; ++i) {
      const uint32_t row = to + place * Tiling::kStageBytes + (kTokens + i * kPass) * kRowBytes;
      cp_async_16(row, a[i] + (is_inside ? stage * kColumns : 0), is_inside && has_a[i]);
    }
  }
};

// sums += the warp's tokens times all rows, over its quarter of the stage at address `stage`.
template <class T, int kRowTiles>
__device__ __forceinline__ void add_stage(float (&sums)[kTokenTiles][kRowTiles][4],
                                          uint32_t stage) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int chunk = warp % kQuarters * 4, first_token = warp / kQuarters * kTokenTiles * kMmaTokens;
  // The swizzle is the same 8 rows further on. The quarter's first chunk is a multiple of 4, so
  // going two chunks further flips bit 5 of the address.
  const uint32_t tokens = stage + chunk_offset(first_token + lane % 16, chunk + lane / 16);
  const uint32_t rows = stage + chunk_offset(kTokens + lane % 8, chunk + lane / 8);
  uint32_t x[2][kTokenTiles][4], a[kRowTiles][4];
#pragma unroll
  for (int m = 0; m < kTokenTiles; ++m) {
    ldmatrix_x4(x[0][m], tokens + m * kMmaTokens * kRowBytes);
    ldmatrix_x4(x[1][m], (tokens ^ 32) + m * kMmaTokens * kRowBytes);
  }
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) ldmatrix_x4(a[n], rows + 8 * n * kRowBytes);
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
        mma_16816<T>(sums[m][n], x[step][m], a[n][2 * step], a[n][2 * step + 1]);
      }
    }
  }
}

// Stores a warp's sums to its quarter's place: [kQuarters][kTokens][kPitch].
template <class Tiling>
__device__ __forceinline__ void store_sums(
    float* partial, const float (&sums)[kTokenTiles][Tiling::kRowTiles][4]) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int first = warp / kQuarters * kTokenTiles * kMmaTokens + lane / 4;
#pragma unroll
  for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Tiling::kRowTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first + m * kMmaTokens + 8 * half;
        float* pair = partial + (warp % kQuarters * kTokens + token) * Tiling::kPitch + 8 * n +
                      lane % 4 * 2;
        *reinterpret_cast<float2*>(pair) = {sums[m][n][2 * half], sums[m][n][2 * half + 1]};
      }
    }
  }
}

// Adds up the quarters and writes the rows and tokens that exist.
template <class Tiling>
__device__ __forceinline__ void write_sums(const LoraShrinkParams& p, const TokenTile& tile,
                                           int first_row, int split, const float* partial,
                                           const float* factors) {
  constexpr int kAtOnce = kThreads / Tiling::kRows;  // tokens written at once
  const int own = threadIdx.x % Tiling::kRows;
  const Row row = row_of(p.rows, tile.slot, first_row + own);
  if (threadIdx.x >= kAtOnce * Tiling::kRows || !row.is_there) return;
  const float scale = p.scales[tile.slot * p.scales_stride + row.part];
  float* out = p.out.data + split * p.out.split_stride + row.part * p.out.part_stride + row.index;
  for (int token = threadIdx.x / Tiling::kRows; token < tile.count; token += kAtOnce) {
    float sum = 0.0f;
#pragma unroll
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      sum += partial[(quarter * kTokens + token) * Tiling::kPitch + own];
    }
    out[(tile.begin + token) * p.out.stride] = sum * (scale * factors[token]);
  }
}

template <class T, int kRows, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    shrink_many_kernel(LoraShrinkParams p, int row_blocks, int split_columns) {
  using Tiling = ManyTiling<kRows, kStages>;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  __shared__ float factors[kTokens];
  const uint32_t smem = smem_address(dynamic_smem);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int first_row = static_cast<int>(blockIdx.x) % row_blocks * kRows;
  const int split = static_cast<int>(blockIdx.x) / row_blocks % p.out.num_splits;
  pdl_launch_dependents();
  const TokenTile tile = token_tile<false>(
      p.rows, static_cast<int>(blockIdx.x) / row_blocks / p.out.num_splits, kLog2Tokens);
  if (tile.count == 0 || !has_rows(p.rows, tile.slot, first_row, kRows)) {
    pdl_wait();
    return;
  }
  const int begin = split * split_columns, end = min(begin + split_columns, static_cast<int>(p.k));
  const int num_stages = (end - begin + kColumns - 1) / kColumns;
  const Sources<T, Tiling> sources(p, tile, first_row, begin, end, smem);
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) sources.copy_a(stage, stage);
  pdl_wait();
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) {
    sources.copy_x(stage, stage);
    cp_async_commit();
  }
  for (int token = warp; token < tile.count; token += kWarps) {
    const float factor = norm_factor(p, tile.begin + token);
    if (lane == 0) factors[token] = factor;
  }
  float sums[kTokenTiles][Tiling::kRowTiles][4] = {};
  int place = 0, free_place = kStages - 1;
#pragma unroll 1
  for (int stage = 0; stage < num_stages; ++stage) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there for all threads, and all have finished the one before
    if (stage + kStages - 1 < num_stages) {
      sources.copy_a(stage + kStages - 1, free_place);
      sources.copy_x(stage + kStages - 1, free_place);
    }
    cp_async_commit();
    add_stage<T>(sums, smem + place * Tiling::kStageBytes);
    free_place = place;
    place = place + 1 == kStages ? 0 : place + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
  auto* partial = reinterpret_cast<float*>(dynamic_smem);
  store_sums<Tiling>(partial, sums);
  __syncthreads();
  write_sums<Tiling>(p, tile, first_row, split, partial, factors);
}

template <class T, int kRows, int kStages>
cudaError_t launch_tiling(const LoraShrinkParams& p, cudaStream_t stream) {
  constexpr auto kKernel = shrink_many_kernel<T, kRows, kStages>;
  constexpr int kSmemBytes = ManyTiling<kRows, kStages>::kSmemBytes;
  const cudaError_t error = allow_smem<kKernel, kSmemBytes>();
  if (error != cudaSuccess) return error;
  const int row_blocks = (p.rows.num_parts * p.rows.max_rank + kRows - 1) / kRows;
  const int64_t num_stages = (p.k + kColumns - 1) / kColumns, num_splits = p.out.num_splits;
  const int split_columns =
      static_cast<int>((num_stages + num_splits - 1) / num_splits) * kColumns;
  const int64_t num_tiles = num_token_tiles(p.rows.num_tokens, kTokens, p.rows.num_slots);
  return launch_chained(kKernel, static_cast<unsigned>(num_tiles * num_splits * row_blocks),
                        kThreads, kSmemBytes, stream, p, row_blocks, split_columns);
}

template <class T, int kRows>
cudaError_t launch_rows(const LoraShrinkParams& p, const Device& device, cudaStream_t stream) {
  constexpr int kDeep = 6, kShallow = 3;
  static_assert(ManyTiling<kRows, kShallow>::kSmemBytes + kTokens * 4 <= 99 * 1024);
  static_assert(ManyTiling<kRows, kDeep>::kSmemBytes >= 114 * 1024, "one CTA an SM of 228 KB");
  if (device.smem_per_block >= 227 * 1024) return launch_tiling<T, kRows, kDeep>(p, stream);
  return launch_tiling<T, kRows, kShallow>(p, stream);
}

}  // namespace

cudaError_t launch_lora_shrink_many(const LoraShrinkParams& p, cudaStream_t stream) {
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const int num_rows = p.rows.num_parts * p.rows.max_rank;
  return dispatch_half(p.dtype, [&]<class T>(T) {
    if (num_rows <= 16) return launch_rows<T, 16>(p, *device, stream);
    if (num_rows <= 32) return launch_rows<T, 32>(p, *device, stream);
    if (num_rows <= 48) return launch_rows<T, 48>(p, *device, stream);
    return launch_rows<T, 64>(p, *device, stream);
  });
}

}  // namespace pyserve::gpu
