// linear for few rows of x: out [m, n] = x [m, k] times weight [n, k]^T, in bfloat16 or float16.
// The work is to stream the weight once, as fast as memory delivers it.
//
// Work: there is one CTA per SM. A CTA takes groups of 16 or 32 rows of weight, and its 8 warps
// split k. Every warp has a ring of stages of its own in shared memory, which it fills by cp.async
// several stages ahead and across groups, so the loads never wait for a barrier. A stage holds the
// warp's piece of k of the weight rows and of all rows of x. x is thus read once per group, and for
// 9 or more rows of x groups have 32 rows of weight to halve that. The ring is filled with weights
// before the kernel waits for the one that produces x, so memory stays busy from one linear to the
// next. The ring takes more than half of an SM's shared memory (rule 5 of pdl.cuh): two CTAs of one
// linear on one SM, and none on another, cost an H200 a fifth of its rate. Products are mma.sync
// with the weight as the 16-row operand and x as the 8 columns. One row of x therefore costs as
// much as 8, and either costs next to nothing beside issuing the copies. The warps' sums meet in
// shared memory and are added in the order of the warps. With kSiluMul half of the rows in a group
// are gate's and half are up's, so that a CTA has both sums of a result.
//
// Numerics: float32 sums, then the bias, then the epilogue, then one rounding. The columns of an
// mma are independent and all Tilings add in the same order, so a row's result never depends on
// what else is in the batch.
// Bound by bytes: n * k * 2. Figures: dispatch.cu.
// The idea to compute out^T = W x^T for few rows is from Marlin (Frantar et al. 2024) and
// llama.cpp.
#pragma once

#include <algorithm>

#include "gpu/core/block.cuh"
#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/linear/epilogue.cuh"

namespace pyserve::gpu {

// The tile sizes of a CTA. kTokens is the number of rows of x that it has room for.
template <int kRowTiles_, int kStages_, int kTokens_>
struct Tiling {
  static constexpr int kRowTiles = kRowTiles_;  // tiles of 16 weight rows per group
  static constexpr int kStages = kStages_;
  static constexpr int kTokens = kTokens_;
  // Depth and number of warps are the same for all tilings, because they set the order of a sum.
  static constexpr int kDepth = 64;  // columns of k in a stage of one warp
  static constexpr int kWarps = 8;

  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kTokenTiles = (kTokens + 7) / 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kChunks = kDepth / kVec;  // chunks of 16 bytes in a row
  static constexpr int kRowBytes = kDepth * 2;
  static constexpr int kStageBytes = (kRows + kTokens) * kRowBytes;

  // The sums meet in a buffer that holds kPassTokens tokens, in one or more passes. With two
  // buffers one barrier per group is enough, because the next group's barrier lies between reading
  // a buffer and writing it again.
  static constexpr int kPassTokens = kTokens < 16 ? kTokens : 16;
  static constexpr int kPasses = kTokens / kPassTokens;
  static constexpr int kBuffers = kTokens <= 8 ? 2 : 1;
  // Floats per token; padded to keep a warp's stores in different banks.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kSumFloats = kWarps * kPassTokens * kSumStride;
  static constexpr int kSmem = kWarps * kStages * kStageBytes + kBuffers * kSumFloats * 4;

  // Rows of a stage that a warp copies at once.
  static constexpr int kLaneRows = kWarpSize / kChunks;
  static_assert(kTokens <= 8 || kTokens % 16 == 0);
};

// The groups of a CTA, each given by the column of out of its first result. First there are whole
// groups, one grid width apart. What is left of n is dealt out evenly in tiles of 16 weight rows.
// The host computes this at launch.
struct Shares {
  int whole_end;    // the first column behind all whole groups
  int tiles, more;  // tiles per CTA of what is left; `more` CTAs have one tile more

  Shares(int64_t n, int columns, int tile_columns, int num_ctas) {
    const int64_t step = int64_t{columns} * num_ctas;
    whole_end = static_cast<int>(n / step * step);
    const int left = static_cast<int>((n - whole_end + tile_columns - 1) / tile_columns);
    tiles = left / num_ctas;
    more = left % num_ctas;
  }
};

template <class Rows, class Tile>
struct Groups {
  int n, step, whole_end, share_begin, share_end;

  __device__ Groups(const Shares& shares, int n)
      : n(n), step(static_cast<int>(gridDim.x) * Rows::kColumns), whole_end(shares.whole_end) {
    constexpr int kTileColumns = Rows::kColumns / Tile::kRowTiles;
    const int cta = static_cast<int>(blockIdx.x);
    const int count = shares.tiles + (cta < shares.more);
    const int begin = cta * shares.tiles + min(cta, shares.more);
    share_begin = count == 0 ? n : whole_end + begin * kTileColumns;
    share_end = min(n, share_begin + count * kTileColumns);
  }
  __device__ int first() const {
    return or_share(static_cast<int>(blockIdx.x) * Rows::kColumns);
  }
  // The column of the next group; n behind the last one.
  __device__ int next(int column) const {
    return column < whole_end ? or_share(column + step) : n;
  }
  __device__ int end(int column) const {
    return column < whole_end ? column + Rows::kColumns : share_end;
  }

 private:
  __device__ int or_share(int column) const {
    return column < whole_end ? column : share_begin;
  }
};

// Where a chunk of a row lies in a stage. The swizzle puts the same chunk of 8 rows into different
// banks.
template <class Tile>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * Tile::kRowBytes + (chunk ^ (row & 7)) * 16;
}

// Copies this lane's chunks of a tile of kCount rows: the chunk at `from` and those of every
// kLaneRows-th row behind it, of which num_rows exist. Columns beyond k become zeros, because they
// enter every sum. Rows that do not exist are left as they are, because they only enter results
// that are not stored.
template <class Tile, int kCount>
__device__ __forceinline__ void copy_rows(uint32_t to, const uint16_t* from, int64_t stride,
                                          int num_rows, bool is_in_k) {
  static_assert(Tile::kLaneRows == 4);
#pragma unroll
  for (int i = 0; i < kCount; i += Tile::kLaneRows) {
    // The chunk_offset of row + i.
    const uint32_t place = (to ^ (i & 4) * 16) + i * Tile::kRowBytes;
    if (i < num_rows) cp_async_16(place, from, is_in_k);
    from += Tile::kLaneRows * stride;
  }
}

template <class Tile>
using Sums = float[Tile::kRowTiles][Tile::kTokenTiles][4];

// sums += weight x^T over the stage at this address of shared memory.
template <class T, class Tile>
__device__ __forceinline__ void multiply_stage(uint32_t stage, Sums<Tile>& sums) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t weight = stage + chunk_offset<Tile>(lane % 16, lane / 16);
  // The columns beyond the tokens repeat the last token and are not stored.
  const uint32_t x = stage + Tile::kRows * Tile::kRowBytes +
                     chunk_offset<Tile>(min(lane % 8, Tile::kTokens - 1), lane / 8);
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; chunk += 4) {
    uint32_t columns[Tile::kTokenTiles][4];
#pragma unroll
    for (int tokens = 0; tokens < Tile::kTokenTiles; ++tokens) {
      ldmatrix_x4(columns[tokens], (x ^ chunk * 16) + 8 * tokens * Tile::kRowBytes);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
        uint32_t rows[4];
        ldmatrix_x4(rows, (weight ^ (chunk + 2 * half) * 16) + 16 * tile * Tile::kRowBytes);
#pragma unroll
        for (int tokens = 0; tokens < Tile::kTokenTiles; ++tokens) {
          mma_16816<T>(sums[tile][tokens], rows, columns[tokens][2 * half],
                       columns[tokens][2 * half + 1]);
        }
      }
    }
  }
}

// Stores a warp's sums of one pass to to[token of the pass][row].
template <class Tile>
__device__ __forceinline__ void put_sums(float* to, int pass, int num_tokens,
                                         const Sums<Tile>& sums) {
  constexpr int kTiles = (Tile::kPassTokens + 7) / 8;
  const int lane = threadIdx.x % kWarpSize, group = lane / 4;
#pragma unroll
  for (int tokens = 0; tokens < kTiles; ++tokens) {
    const int place = 8 * tokens + lane % 4 * 2, token = pass * Tile::kPassTokens + place;
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
      const float(&sum)[4] = sums[tile][pass * kTiles + tokens];
      float* row = to + place * Tile::kSumStride + 16 * tile + group;
      if (token < num_tokens) {
        row[0] = sum[0];
        row[8] = sum[2];
      }
      if (token + 1 < num_tokens) {
        row[Tile::kSumStride] = sum[1];
        row[Tile::kSumStride + 8] = sum[3];
      }
    }
  }
}

// The factor of the RMSNorm in front of the linear for the sums of row `token` of x; 1 without a
// norm. All lanes of a warp call this.
__device__ __forceinline__ float norm_factor(const LinearParams& p, int64_t token) {
  if (p.x_squares == nullptr) return 1.0f;
  const int64_t count = (p.k + kSquaresColumns - 1) / kSquaresColumns;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    sum += p.x_squares[token * p.x_squares_stride + i];
  }
  return rsqrtf(lane_sum(sum) / static_cast<float>(p.k) + p.eps);
}

// Stores what the RMSNorm behind the linear needs of one result, `value`. 16 neighbouring lanes
// hold 16 neighbouring columns of a row. All lanes of a warp call this.
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

// A result that this thread finishes. ask() loads what the epilogue needs before the products, and
// it is used only behind them, so that nothing waits for these loads.
template <class T>
struct Result {
  T* target;
  int token, row;  // row counts columns of out within the tile
  bool is_valid;
  T bias{}, other{}, norm_weight{};

  template <Epilogue kEpilogue>
  __device__ __forceinline__ void ask(const LinearParams& p, int column, int end) {
    is_valid = token < p.m && column < end;
    target = static_cast<T*>(p.out) + token * p.out_stride + column;
    if (is_valid && p.bias != nullptr) bias = static_cast<const T*>(p.bias)[column];
    if (is_valid && kEpilogue == Epilogue::kAdd) other = *target;
    if (is_valid && kEpilogue == Epilogue::kSiluMul && p.bias != nullptr) {
      other = static_cast<const T*>(p.bias)[p.n + column];
    }
    if (is_valid && kEpilogue == Epilogue::kAdd && p.norm_weight != nullptr) {
      norm_weight = static_cast<const T*>(p.norm_weight)[column];
    }
  }
};

// What a kernel that is given no adapters has in the place of Lora (few_rows_lora.cuh).
struct NoLora {
  static constexpr bool kIsThere = false;
  __device__ __forceinline__ NoLora() {}
  __device__ __forceinline__ NoLora(int, unsigned char*) {}
};

// By the types of what it is given.
template <class T, class Rows, class Tile, class... Given>
struct AdaptersOf {
  using Type = NoLora;
};

// The sum, in the order of the warps, of what they have stored in pass_sums for a token of the pass
// and a row of weight.
template <class Tile>
__device__ __forceinline__ float sum_of_warps(const float* pass_sums, int token, int row) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < Tile::kWarps; ++w) {
    sum += pass_sums[(w * Tile::kPassTokens + token) * Tile::kSumStride + row];
  }
  return sum;
}

// Finishes one result of the pass that begins at first_token: adds up the warps' sums, applies
// factor, bias and epilogue, and stores it. All lanes of a warp call this.
template <class T, Epilogue kEpilogue, class Tile, class Adapters = NoLora>
__device__ __forceinline__ void finish_result(const LinearParams& p, const Result<T>& result,
                                              const float* pass_sums, int first_token,
                                              const float* factors, int column,
                                              const Adapters& adapters = {}) {
  using Rows = RowTile<kEpilogue, Tile::kRows>;
  T value{};
  if (result.is_valid) {
    const float factor = factors[result.token];
    auto sum_of = [&](int row, int64_t weight_row) {
      float sum = sum_of_warps<Tile>(pass_sums, result.token - first_token, row);
      if constexpr (Adapters::kIsThere) {
        sum += adapters.sum_of(result.token, row, static_cast<int>(weight_row));
      }
      return sum * factor;
    };
    float operand = to_float(result.other);
    if (Rows::kIsPaired) operand += sum_of(result.row + Rows::kColumns, p.n + column);
    value = from_float<T>(
        finish<kEpilogue>(sum_of(result.row, column) + to_float(result.bias), operand));
    *result.target = value;
  }
  if constexpr (kEpilogue == Epilogue::kAdd) {
    if (p.norm_weight != nullptr) {
      put_norm(p, value, to_float(result.norm_weight), result.token, column, result.is_valid);
    }
  }
}

// m <= kTokens and k > 0; x and weight are aligned to 16 bytes; 2 n and k fit an int. given: what
// AdaptersOf names the type of, or nothing. (As a function that two kernels call, this compiles to
// other machine code where there are no adapters.)
template <class T, Epilogue kEpilogue, class Tile, class... Given>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_kernel(LinearParams p, Shares shares, Given... given) {
  using Rows = RowTile<kEpilogue, Tile::kRows>;
  using Adapters = typename AdaptersOf<T, Rows, Tile, Given...>::Type;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  __shared__ float factors[Tile::kTokens];
  const int warp = threadIdx.x / kWarpSize;
  const int num_tokens = static_cast<int>(p.m);
  const int lane = threadIdx.x % kWarpSize;
  const int n = static_cast<int>(p.n), k = static_cast<int>(p.k);
  const uint32_t ring =
      smem_address(dynamic_smem) + warp * Tile::kStages * Tile::kStageBytes;
  float* all_sums =
      reinterpret_cast<float*>(dynamic_smem + Tile::kWarps * Tile::kStages * Tile::kStageBytes);
  const auto* x = static_cast<const uint16_t*>(p.x);
  const auto* weight = static_cast<const uint16_t*>(p.weight);
  const Groups<Rows, Tile> groups(shares, n);
  constexpr int kStepDepth = Tile::kWarps * Tile::kDepth;  // of k, for all warps together
  Adapters adapters(given..., n, dynamic_smem + Tile::kSmem);

  // Where this lane copies to in a stage, and from which row and column of k it starts.
  const int lane_row = lane / Tile::kChunks, lane_chunk = lane % Tile::kChunks;
  const int lane_k = warp * Tile::kDepth + lane_chunk * kVec;
  const uint32_t lane_to = ring + chunk_offset<Tile>(lane_row, lane_chunk);
  struct Piece {  // of the CTA's work: a group's first column and a position in k
    int column, k;
    int num_rows;  // rows of one half of the tile, counted from the lane's first
    const uint16_t *weight, *x;
  };
  const auto piece_at = [&](int column) -> Piece {
    return {column, 0, groups.end(column) - column - lane_row,
            weight + p.weight_stride * (column + lane_row) + lane_k,
            x + p.x_stride * lane_row + lane_k};
  };
  // Starts to copy a piece, if there is one left, and moves on to the next. It always commits a
  // group of copies, so that waits can count groups.
  const auto fetch = [&](Piece& piece, int stage, bool has_weight, bool has_x) {
    if (piece.column < n) {
      const uint32_t to = lane_to + stage * Tile::kStageBytes;
      const bool is_in_k = piece.k + lane_k < k;
      if (has_weight) {
        const uint16_t* from = is_in_k ? piece.weight : weight;
        copy_rows<Tile, Rows::kColumns>(to, from, p.weight_stride, piece.num_rows, is_in_k);
        if (Rows::kIsPaired) {
          copy_rows<Tile, Rows::kColumns>(to + Rows::kColumns * Tile::kRowBytes,
                                          from + p.weight_stride * n, p.weight_stride,
                                          piece.num_rows, is_in_k);
        }
        if constexpr (Adapters::kIsThere) {
          if (piece.k + kStepDepth >= k) {
            adapters.copy(piece.column, groups.end(piece.column), Tile::kWarps);
          }
        }
      }
      if (has_x) {
        copy_rows<Tile, Tile::kTokens>(to + Tile::kRows * Tile::kRowBytes, is_in_k ? piece.x : x,
                                       p.x_stride, num_tokens - lane_row, is_in_k);
      }
      piece.k += kStepDepth;
      piece.weight += kStepDepth;
      piece.x += kStepDepth;
      if (piece.k >= k) piece = piece_at(groups.next(piece.column));
    }
    cp_async_commit();
  };
  Piece next = piece_at(groups.first());
  if constexpr (Adapters::kIsThere) {
    adapters.ask();
    const int last = (k - 1) / kStepDepth;  // the first group's last piece, which B comes with
#pragma unroll 1
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      if (stage == min(last, Tile::kStages - 1)) adapters.look();
      if (stage < Tile::kStages - 1) fetch(next, stage, true, false);
    }
  } else {
#pragma unroll 1
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetch(next, stage, true, false);
  }
  pdl_wait();
  pdl_launch_dependents();
  next = piece_at(groups.first());
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetch(next, stage, false, true);
  if constexpr (Adapters::kIsThere) adapters.fill();
  for (int token = warp; token < num_tokens; token += Tile::kWarps) {
    const float factor = norm_factor(p, token);  // read only behind the first group's barrier
    if (lane == 0) factors[token] = factor;
  }

  constexpr int kPassResults = Tile::kPassTokens * Rows::kColumns;
  constexpr int kResults = (kPassResults + Tile::kThreads - 1) / Tile::kThreads;  // per thread
  static_assert(Tile::kPasses == 1 || kPassResults % Tile::kThreads == 0);
  int stage = 0, buffer = 0, place = threadIdx.x;
  for (int column0 = groups.first(); column0 < n; column0 = groups.next(column0)) {
    Result<T> results[Tile::kPasses][kResults];
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
#pragma unroll
      for (int i = 0; i < kResults; ++i) {
        Result<T>& result = results[pass][i];
        const int index = place + i * Tile::kThreads;
        result.token = pass * Tile::kPassTokens + index / Rows::kColumns;
        result.row = index % Rows::kColumns;
        result.template ask<kEpilogue>(p, column0 + result.row, groups.end(column0));
      }
    }
    // With few results per group, they go to other warps each time: a warp that stores results
    // starts its next copies later.
    place = (place + kWarpSize) % Tile::kThreads;

    Sums<Tile> sums = {};
#pragma unroll 1
    for (int k0 = 0; k0 < k; k0 += kStepDepth) {
      // Counts copy groups, of which the first stages have two each.
      cp_async_wait<Tile::kStages - 2>();
      // All lanes' copies have landed, and all lanes have read the stage that is refilled now.
      __syncwarp();
      fetch(next, stage == 0 ? Tile::kStages - 1 : stage - 1, true, true);
      multiply_stage<T, Tile>(ring + stage * Tile::kStageBytes, sums);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      if (Tile::kBuffers == 1) __syncthreads();  // all threads have read the earlier sums
      float* group_sums = all_sums + buffer * Tile::kSumFloats;
      put_sums<Tile>(group_sums + warp * Tile::kPassTokens * Tile::kSumStride, pass, num_tokens,
                     sums);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kResults; ++i) {
        const Result<T>& result = results[pass][i];
        finish_result<T, kEpilogue, Tile>(p, result, group_sums, pass * Tile::kPassTokens, factors,
                                          column0 + result.row, adapters);
      }
      buffer = (buffer + 1) % Tile::kBuffers;
    }
    if constexpr (Adapters::kIsThere) adapters.turn();
  }
  cp_async_wait<0>();
}

// How many CTAs share the columns of out, and how.
template <Epilogue kEpilogue, class Tile>
struct Grid {
  static constexpr int kColumns = RowTile<kEpilogue, Tile::kRows>::kColumns;
  static constexpr int kTileColumns = kColumns / Tile::kRowTiles;
  int num_ctas;
  Shares shares;

  Grid(int64_t n, int num_sms)
      : num_ctas(static_cast<int>(
            std::min<int64_t>((n + kTileColumns - 1) / kTileColumns, num_sms))),
        shares(n, kColumns, kTileColumns, num_ctas) {}

  // The most groups that a CTA has.
  int max_groups() const {
    return shares.whole_end / (kColumns * num_ctas) + (shares.tiles + shares.more > 0);
  }
};

// Launches for p.m <= kTokens, with one CTA per SM.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_tiled(const LinearParams& p, int num_sms, cudaStream_t stream) {
  constexpr auto kKernel = linear_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, Tile::kSmem>();
  if (error != cudaSuccess) return error;
  const Grid<kEpilogue, Tile> grid(p.n, num_sms);
  return launch_chained(kKernel, static_cast<unsigned>(grid.num_ctas), Tile::kThreads, Tile::kSmem,
                        stream, p, grid.shares);
}

}  // namespace pyserve::gpu
