// linear for few rows of x: the work is to stream the weight once, as fast as memory gives it.
//
// A CTA takes groups of 16 (or 32) rows of weight, grid apart; its warps split k. Every warp has a
// ring of its own in shared memory, filled by cp.async several stages ahead and across groups, so
// that the loads never wait for a barrier. A stage holds the warp's piece of the weight rows and of
// up to 8 rows of x. The ring is filled with weights before the kernel waits for the one that makes
// x, so that memory stays busy from one linear to the next. It is more than half of what an SM has:
// two CTAs of one linear on an SM, beside an SM with none, cost an H200 a fifth of the rate.
// Products are mma.sync with weight as the 16-row operand and x as the 8 columns: 1 row of x costs
// as much as 8, and both cost next to nothing. A sum over k may be taken in any order as long as
// both operands agree, so lane t of a quad takes 8 neighbours of k, 16 bytes, as its fragments of
// two products, without ldmatrix.
// The warps' sums meet in shared memory and are added in the order of the warps.
// With a gate and an up half of the 16 rows are of each, so that a CTA has both sums of a result.
//
// Numerics: float32 sums, then the bias, then the epilogue, then one rounding. The columns of an
// mma are independent and the tiling depends on n, k and the device alone, so that what else is in
// a batch never changes a row's result. More than 8 rows take a pass over the weight for every 8.
// Floor: n * k * 2 bytes. Rows that are not 16-byte aligned take a plain kernel, one warp a result.
// Source of the idea out^T = W x^T for few rows: Marlin (Frantar et al. 2024), llama.cpp.
#include "gpu/linear/linear.h"

#include <algorithm>

#include "gpu/core/block.cuh"
#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/linear/epilogue.cuh"

namespace pyserve::gpu {
namespace {

// How a CTA cuts its work. kTokens: rows of x it has room for.
template <int kRowTiles_, int kDepth_, int kWarps_, int kStages_, int kTokens_>
struct Tiling {
  static constexpr int kRowTiles = kRowTiles_;  // of 16 weight rows, in a group
  static constexpr int kDepth = kDepth_;        // of k, in a stage of one warp
  static constexpr int kWarps = kWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kTokens = kTokens_;

  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kChunks = kDepth / kVec;  // 16-byte pieces of a row
  static constexpr int kRowBytes = kDepth * 2;
  static constexpr int kStageBytes = (kRows + kTokens) * kRowBytes;
  static constexpr int kSumStride = kRows + 4;  // of a token; keeps a warp's stores apart
  static constexpr int kSumFloats = kWarps * kTokens * kSumStride;
  static constexpr int kSmem = kWarps * kStages * kStageBytes + 2 * kSumFloats * 4;

  static_assert(kDepth % 64 == 0 && kTokens <= 8);
  static_assert(kTokens * kRows <= kThreads, "each thread finishes one result at most");
};

// Where chunk `chunk` of row `row` lies in a stage. Chunks of odd rows trade places in fours, so
// that the two rows which eight lanes read at once lie in different banks.
template <class Tile>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * Tile::kRowBytes + ((chunk ^ ((row & 1) << 2)) * 16);
}

// Copies columns [k0, k0 + kDepth) of kCount rows of a matrix, zeros beyond k and for a row that is
// not there: row_of gives the row for each place, negative for none.
template <class Tile, int kCount, class RowOf>
__device__ __forceinline__ void copy_rows(uint32_t to, const uint16_t* matrix, int64_t stride,
                                          int64_t k0, int64_t k, RowOf row_of) {
  constexpr int kPieces = kCount * Tile::kChunks;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int piece = 0; piece < kPieces; piece += kWarpSize) {
    const int r = (piece + lane) / Tile::kChunks, chunk = (piece + lane) % Tile::kChunks;
    const int64_t row = row_of(r), column = k0 + chunk * kVec;
    const bool valid = row >= 0 && column < k;
    const uint16_t* source = valid ? matrix + row * stride + column : matrix;
    if (piece + kWarpSize <= kPieces || piece + lane < kPieces) {
      cp_async_16(to + chunk_offset<Tile>(r, chunk), source, valid);
    }
  }
}

__device__ __forceinline__ uint4 load_shared(const unsigned char* smem, uint32_t offset) {
  return *reinterpret_cast<const uint4*>(smem + offset);
}

// sums += weight x^T over one stage.
template <class T, class Tile>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int num_tokens,
                                               float (&sums)[Tile::kRowTiles][4]) {
  const int lane = threadIdx.x % kWarpSize, group = lane / 4, quad = lane % 4;
  const int token = min(group, num_tokens - 1);  // columns beyond are not stored
#pragma unroll
  for (int j = 0; j < Tile::kChunks; j += 4) {
    const uint4 x = load_shared(stage, Tile::kRows * Tile::kRowBytes +
                                           chunk_offset<Tile>(token, j + quad));
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
      const uint32_t offset = chunk_offset<Tile>(16 * tile + group, j + quad);
      const uint4 low = load_shared(stage, offset);
      const uint4 high = load_shared(stage, offset + 8 * Tile::kRowBytes);
      const uint32_t first[4] = {low.x, high.x, low.y, high.y};
      const uint32_t second[4] = {low.z, high.z, low.w, high.w};
      mma_16816<T>(sums[tile], first, x.x, x.y);
      mma_16816<T>(sums[tile], second, x.z, x.w);
    }
  }
}

// Leaves a warp's sums at `to` [token][row].
template <class Tile>
__device__ __forceinline__ void put_sums(float* to, int num_tokens,
                                         const float (&sums)[Tile::kRowTiles][4]) {
  const int lane = threadIdx.x % kWarpSize, group = lane / 4, token = lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
    float* row = to + token * Tile::kSumStride + 16 * tile + group;
    if (token < num_tokens) {
      row[0] = sums[tile][0];
      row[8] = sums[tile][2];
    }
    if (token + 1 < num_tokens) {
      row[Tile::kSumStride] = sums[tile][1];
      row[Tile::kSumStride + 8] = sums[tile][3];
    }
  }
}

// What the norm before multiplies the sums of a row of x by; all lanes of a warp call it.
__device__ __forceinline__ float norm_factor(const LinearParams& p, int64_t token) {
  if (p.x_squares == nullptr) return 1.0f;
  const int64_t count = (p.k + kSquaresColumns - 1) / kSquaresColumns;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    sum += p.x_squares[token * p.x_squares_stride + i];
  }
  return rsqrtf(lane_sum(sum) / static_cast<float>(p.k) + p.eps);
}

// What the norm that follows needs of one result, `value`, of a row's 16 neighbours that 16 lanes
// hold; all lanes of a warp call it.
template <class T>
__device__ __forceinline__ void put_norm(const LinearParams& p, T value, float weight,
                                         int64_t token, int64_t column, bool is_valid) {
  static_assert(kSquaresColumns == 16);
  const float x = to_float(value);
  if (is_valid) {
    static_cast<T*>(p.scaled)[token * p.scaled_stride + column] = from_float<T>(x * weight);
  }
  const float sum = lane_sum<kSquaresColumns>(is_valid ? x * x : 0.0f);
  if (is_valid && column % kSquaresColumns == 0) {
    p.squares[token * p.squares_stride + column / kSquaresColumns] = sum;
  }
}

// m <= kTokens, k > 0, x and weight aligned.
template <class T, Epilogue kEpilogue, class Tile>
__global__ void __launch_bounds__(Tile::kThreads) linear_kernel(LinearParams p) {
  using Rows = RowTile<kEpilogue, Tile::kRows>;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  __shared__ float factors[Tile::kTokens];
  const int warp = threadIdx.x / kWarpSize;
  const int num_tokens = static_cast<int>(p.m);
  unsigned char* ring = dynamic_smem + warp * Tile::kStages * Tile::kStageBytes;
  float* all_sums =
      reinterpret_cast<float*>(dynamic_smem + Tile::kWarps * Tile::kStages * Tile::kStageBytes);
  const auto* x = static_cast<const uint16_t*>(p.x);
  const auto* weight = static_cast<const uint16_t*>(p.weight);
  const int64_t first_column = int64_t{blockIdx.x} * Rows::kColumns;  // of out
  const int64_t column_step = int64_t{gridDim.x} * Rows::kColumns;
  constexpr int64_t kStepDepth = Tile::kWarps * Tile::kDepth;  // of k, for all warps together

  struct Piece {  // of the CTA's work
    int64_t column, k;
  };
  // Starts to copy a piece, if there is one, and goes on to the next.
  const auto fetch = [&](Piece& piece, int stage, bool has_weight, bool has_x) {
    if (piece.column < p.n) {
      const uint32_t to = smem_address(ring) + stage * Tile::kStageBytes;
      const int64_t k0 = piece.k + warp * Tile::kDepth;
      if (has_weight) {
        copy_rows<Tile, Tile::kRows>(to, weight, p.weight_stride, k0, p.k, [&](int r) {
          return Rows::weight_row(piece.column, r, p.n);
        });
      }
      if (has_x) {
        copy_rows<Tile, Tile::kTokens>(
            to + Tile::kRows * Tile::kRowBytes, x, p.x_stride, k0, p.k,
            [&](int r) { return r < num_tokens ? int64_t{r} : -1; });
      }
      piece.k += kStepDepth;
      if (piece.k >= p.k) {
        piece.k = 0;
        piece.column += column_step;
      }
    }
    cp_async_commit();
  };
  Piece next{first_column, 0};
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetch(next, stage, true, false);
  pdl_wait();
  pdl_launch_dependents();
  next = {first_column, 0};
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetch(next, stage, false, true);
  if (warp < num_tokens) {  // read behind the first group's barrier
    const float factor = norm_factor(p, warp);
    if (threadIdx.x % kWarpSize == 0) factors[warp] = factor;
  }

  int stage = 0, buffer = 0, place = threadIdx.x;
  for (int64_t column0 = first_column; column0 < p.n; column0 += column_step) {
    // The result that this thread finishes, if one. Of a few, another warp has them in every group:
    // what a warp does there delays its copies.
    const int token = place / Rows::kColumns, row = place % Rows::kColumns;
    place = (place + kWarpSize) % Tile::kThreads;
    const int64_t column = column0 + row;
    const bool finishes = token < num_tokens && column < p.n;
    T* target = static_cast<T*>(p.out) + token * p.out_stride + column;
    // Asked for early and looked at late: nothing waits for them.
    T bias{}, other{}, norm_weight{};
    if (finishes && p.bias != nullptr) bias = static_cast<const T*>(p.bias)[column];
    if (finishes && kEpilogue == Epilogue::kAdd) other = *target;
    if (finishes && Rows::kIsPaired && p.bias != nullptr) {
      other = static_cast<const T*>(p.bias)[p.n + column];
    }
    if (finishes && kEpilogue == Epilogue::kAdd && p.norm_weight != nullptr) {
      norm_weight = static_cast<const T*>(p.norm_weight)[column];
    }

    float sums[Tile::kRowTiles][4] = {};
    for (int64_t k0 = 0; k0 < p.k; k0 += kStepDepth) {
      cp_async_wait<Tile::kStages - 2>();  // of groups, the first stages have two each
      __syncwarp();  // all lanes' copies have landed, all have read the stage that is refilled now
      fetch(next, stage == 0 ? Tile::kStages - 1 : stage - 1, true, true);
      multiply_stage<T, Tile>(ring + stage * Tile::kStageBytes, num_tokens, sums);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    // With two buffers one barrier a group is enough: the next group's comes before this buffer is
    // written again.
    float* group_sums = all_sums + buffer * Tile::kSumFloats;
    put_sums<Tile>(group_sums + warp * Tile::kTokens * Tile::kSumStride, num_tokens, sums);
    __syncthreads();
    T result{};
    if (finishes) {
      const float factor = factors[token];
      auto sum_of = [&](int weight_row) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < Tile::kWarps; ++w) {
          sum += group_sums[(w * Tile::kTokens + token) * Tile::kSumStride + weight_row];
        }
        return sum * factor;
      };
      float operand = to_float(other);
      if (Rows::kIsPaired) operand += sum_of(row + Rows::kColumns);
      result = from_float<T>(finish<kEpilogue>(sum_of(row) + to_float(bias), operand));
      *target = result;
    }
    if constexpr (kEpilogue == Epilogue::kAdd) {
      if (p.norm_weight != nullptr) {
        put_norm(p, result, to_float(norm_weight), token, column, finishes);
      }
    }
    buffer ^= 1;
  }
  cp_async_wait<0>();
}

// One warp a result; any alignment and any k.
template <class T, Epilogue kEpilogue>
__global__ void __launch_bounds__(256) linear_plain_kernel(LinearParams p) {
  pdl_wait();
  pdl_launch_dependents();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t index = int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  if (index >= p.m * p.n) return;
  const int64_t token = index % p.m, column = index / p.m;
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  const float factor = norm_factor(p, token);
  auto sum_of = [&](int64_t row) {
    const T* weight = static_cast<const T*>(p.weight) + row * p.weight_stride;
    float sum = 0.0f;
    for (int64_t i = lane; i < p.k; i += kWarpSize) {
      sum = fmaf(to_float(x[i]), to_float(weight[i]), sum);
    }
    sum = lane_sum(sum);
    sum *= factor;
    return p.bias == nullptr ? sum : sum + to_float(static_cast<const T*>(p.bias)[row]);
  };
  const float sum = sum_of(column);
  float other = 0.0f;
  if constexpr (kEpilogue == Epilogue::kSiluMul) other = sum_of(p.n + column);
  T* target = static_cast<T*>(p.out) + token * p.out_stride + column;
  if (lane != 0) return;
  if constexpr (kEpilogue == Epilogue::kAdd) other = to_float(*target);
  *target = from_float<T>(finish<kEpilogue>(sum, other));
}

// Launches for p.m <= kTokens, one CTA an SM.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_tiled(const LinearParams& p, int num_sms, cudaStream_t stream) {
  constexpr auto kKernel = linear_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, Tile::kSmem>();
  if (error != cudaSuccess) return error;
  constexpr int kColumns = RowTile<kEpilogue, Tile::kRows>::kColumns;
  const int64_t num_groups = (p.n + kColumns - 1) / kColumns;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(num_groups, num_sms));
  return launch_chained(kKernel, grid, Tile::kThreads, Tile::kSmem, stream, p);
}

template <class T, Epilogue kEpilogue, int kTokens>
cudaError_t launch_tokens(const LinearParams& p, const Device& device, cudaStream_t stream) {
  // One depth for all m, which says in what order a sum is taken.
  using Deep = Tiling<1, 64, 8, kTokens == 1 ? 10 : kTokens == 4 ? 9 : 8, kTokens>;
  using Small = Tiling<1, 64, 8, 3, kTokens>;  // what fits 99 KB: GDDR needs far less in flight
  static_assert(Deep::kSmem <= 227 * 1024 && Small::kSmem <= 99 * 1024);
  if (device.smem_per_block >= Tiling<1, 64, 8, 8, 8>::kSmem) {
    return launch_tiled<T, kEpilogue, Deep>(p, device.num_sms, stream);
  }
  return launch_tiled<T, kEpilogue, Small>(p, device.num_sms, stream);
}

constexpr int64_t kMaxTokens = 8;

template <class T, Epilogue kEpilogue>
cudaError_t launch_few_rows_as(const LinearParams& params, cudaStream_t stream) {
  if (params.k == 0 || params.k % kVec != 0 || !is_vec_aligned(params.x, params.x_stride) ||
      !is_vec_aligned(params.weight, params.weight_stride)) {
    if (params.norm_weight != nullptr) return cudaErrorInvalidValue;
    const int64_t num_ctas = (params.m * params.n + 7) / 8;
    return launch_chained(linear_plain_kernel<T, kEpilogue>, static_cast<unsigned>(num_ctas), 256,
                          0, stream, params);
  }
  const Device* device = nullptr;
  cudaError_t error = current_device(&device);
  for (int64_t token = 0; token < params.m && error == cudaSuccess; token += kMaxTokens) {
    LinearParams p = params;
    p.x = static_cast<const T*>(params.x) + token * params.x_stride;
    p.out = static_cast<T*>(params.out) + token * params.out_stride;
    if (p.x_squares != nullptr) p.x_squares += token * p.x_squares_stride;
    if (p.norm_weight != nullptr) {
      p.scaled = static_cast<T*>(params.scaled) + token * params.scaled_stride;
      p.squares += token * p.squares_stride;
    }
    p.m = std::min(params.m - token, kMaxTokens);
    error = p.m == 1   ? launch_tokens<T, kEpilogue, 1>(p, *device, stream)
            : p.m <= 4 ? launch_tokens<T, kEpilogue, 4>(p, *device, stream)
                       : launch_tokens<T, kEpilogue, 8>(p, *device, stream);
  }
  return error;
}

}  // namespace

cudaError_t launch_few_rows(const LinearParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return dispatch_epilogue(params.epilogue, [&](auto epilogue) {
      return launch_few_rows_as<T, decltype(epilogue)::value>(params, stream);
    });
  });
}

}  // namespace pyserve::gpu
