// The tiles of linear_silu_mul on Hopper, in the frame of gemm_frame.cuh: copies (Tile), products
// (multiply) and results (finish_tile).
//
// A CTA computes kRows x kColumns sums; each of its kGroups warpgroups has 64 of the rows. Mates
// are tiles of different rows that read the same weight. A tile's columns have two halves: gate
// rows of the weight, and the up rows of the same columns of out, so that a thread holds both sums
// of a result.
#pragma once

#include "gpu/linear/gemm_frame.cuh"

namespace pyserve::gpu::gemm {

constexpr int kDepth = kBoxColumns;  // columns of k in a stage

template <class T_, int kGroups_, int kColumns_>
struct Tile {
  using T = T_;
  using Args = gemm::Args;
  static constexpr int kGroups = kGroups_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kDepth = gemm::kDepth;
  static constexpr bool kCanDivide = false;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kOutColumns = kColumns / 2;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  // Registers per thread, taken out of what the launch gives to all warps; 0 leaves the number as
  // launched.
  static constexpr int kProducerRegisters = kGroups == 1 ? 0 : kGroups == 2 ? 40 : 32;
  static constexpr int kGroupRegisters = kGroups == 1 ? 0 : kGroups == 2 ? 232 : 160;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kProducerRegisters + kGroups * kGroupRegisters <= (kGroups + 1) * kLaunchRegisters);
  static constexpr int kSums = kColumns / 2;  // per thread
  // Of each chunk of 8 columns a thread has two results in each of two rows.
  static constexpr int kOutChunks = kOutColumns / 8;
  static constexpr int kXBytes = kRows * kDepth * 2;
  static constexpr int kStageBytes = kXBytes + kColumns * kDepth * 2;
  static constexpr int kStages = (kMaxSmem - 256) / kStageBytes;
  static constexpr int kBarrierOffset = kStages * kStageBytes;
  static constexpr int kSmem = kBarrierOffset + 2 * kStages * 8;
  static_assert(kColumns % 32 == 0);

  __device__ static void place(const Args& a, const Tiles& tiles, int rank, int& row,
                               int& column) {
    row = (tiles.row_tile * a.mates + rank) * kRows;
    column = tiles.column_tile * kOutColumns;
  }

  __device__ static void load_weight(const Args& a, const Ring<Tile>& to, int block, int column,
                                     int rank) {
    constexpr int kHalf = kColumns / 2;
    mbarrier_arrive_expect(to.full(), kStageBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t address = to.weight() + half * kHalf * kDepth * 2;
      const int weight_row = column + half * a.n;
      if (a.mates == 1) {
        tma_load(address, &a.weight, to.full(), block * kDepth, weight_row, a.weight_hint);
      } else if (half == rank) {
        tma_load_multicast(address, &a.weight, to.full(), block * kDepth, weight_row, uint16_t{3},
                           a.weight_hint);
      }
    }
  }

  __device__ static void load_x(const Args& a, const Ring<Tile>& to, int block, int row,
                                int /*rank*/) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      tma_load(to.x() + group * 64 * kDepth * 2, &a.x, to.full(), block * kDepth, row + group * 64,
               L2Hint::kEvictLast);
    }
  }

  __device__ static void prepare(const Args& /*a*/, const Ring<Tile>& /*ring*/) {}

  __device__ __forceinline__ static void compute(const Args& a, Ring<Tile> ring, int rank,
                                                 Schedule schedule, const Release& release);
};

// Computes a warpgroup's sums over the next `count` stages of the ring.
template <class Tile>
__device__ __forceinline__ void multiply(Ring<Tile>& ring, int count, const Release& release,
                                         float (&sums)[Tile::kSums]) {
  const int group = threadIdx.x / kWarpgroup - 1;
  uint32_t before = 0;
  for (int i = 0; i < count; ++i) {
    mbarrier_wait(ring.full(), ring.place.phase);
    const uint64_t x = k_major_descriptor(ring.x() + group * 64 * kDepth * 2);
    const uint64_t weight = k_major_descriptor(ring.weight());
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kDepth / 16; ++j) {
      wgmma<typename Tile::T, Major::kK>(sums, advance_descriptor(x, 32 * j),
                                         advance_descriptor(weight, 32 * j), i > 0 || j > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0) release(before);
    before = ring.empty_in(release.mate_barriers);
    ring.place.advance();
  }
  wgmma_wait<0>();
  release(before);
}

// The results of a thread in four chunks of 8 columns: [row, row + 8][chunk][column, column + 1].
using Results = float[2][4][2];

// Where results are stored: rows below end_row and columns below end_column.
template <class T>
struct Target {
  T* out;
  int64_t stride;
  int end_row, end_column;
};

// Stores `count` <= 4 chunks from `column` on, of rows `row` and row + 8. Four lanes exchange their
// pairs so that each stores a whole chunk.
template <class T>
__device__ __forceinline__ void store_chunks(const Target<T>& to, int row, int column, int count,
                                             const Results& results) {
  const int quad = threadIdx.x % 4, my_column = column + quad * kVec;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int my_row = row + half * 8;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack_pair<T>(results[half][i][0], results[half][i][1]);
    transpose_quad(words);
    if (my_row < to.end_row && my_column < to.end_column && quad < count) {
      store_vec(to.out + my_row * to.stride + my_column, {words[0], words[1], words[2], words[3]});
    }
  }
}

// The biases of two neighbouring columns; zeros where there is none.
template <class T>
__device__ __forceinline__ float2 bias_pair(const Args& a, int first, int column) {
  if (a.bias == nullptr || column >= a.n) return {0.0f, 0.0f};
  const T* bias = static_cast<const T*>(a.bias) + first + column;
  return unpack_pair<T>(*reinterpret_cast<const uint32_t*>(bias));
}

// Applies bias and epilogue and stores the tile whose first row and column are given.
template <class Tile>
__device__ __forceinline__ void finish_tile(const Args& a, int row, int column,
                                            const float (&sums)[Tile::kSums]) {
  using T = typename Tile::T;
  const int lane = threadIdx.x % kWarpSize, pair_column = lane % 4 * 2;
  const Target<T> target{static_cast<T*>(a.out), a.out_stride, a.m, a.n};
  row += (threadIdx.x - kWarpgroup) / kWarpSize * 16 + lane / 4;
#pragma unroll
  for (int first = 0; first < Tile::kOutChunks; first += 4) {
    const int first_column = column + first * kVec;
    Results results{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i >= Tile::kOutChunks) continue;
      const float* gate = sums + 4 * (first + i);
      const float* up = gate + 4 * Tile::kOutChunks;
      const int my_column = first_column + i * kVec + pair_column;
      const float2 bias = bias_pair<T>(a, 0, my_column);
      const float2 up_bias = bias_pair<T>(a, a.n, my_column);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float(&pair)[2] = results[j][i];
        pair[0] = finish<Epilogue::kSiluMul>(gate[2 * j] + bias.x, up[2 * j] + up_bias.x);
        pair[1] = finish<Epilogue::kSiluMul>(gate[2 * j + 1] + bias.y, up[2 * j + 1] + up_bias.y);
      }
    }
    store_chunks(target, row, first_column, min(4, Tile::kOutChunks - first), results);
  }
}

template <class T_, int kGroups_, int kColumns_>
__device__ __forceinline__ void Tile<T_, kGroups_, kColumns_>::compute(const Args& a,
                                                                       Ring<Tile> ring, int rank,
                                                                       Schedule schedule,
                                                                       const Release& release) {
  const int count = blocks_of<Tile>(a, rank).count;
  float sums[kSums];
  for (; schedule.has_more(); schedule.advance()) {
    int row, column;
    place(a, schedule.tiles(a), rank, row, column);
    multiply<Tile>(ring, count, release, sums);
    finish_tile<Tile>(a, row, column, sums);
  }
}

}  // namespace pyserve::gpu::gemm
