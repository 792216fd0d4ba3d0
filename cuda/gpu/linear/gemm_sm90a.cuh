// The parts of linear_silu_mul's matrix product on Hopper: which tile (Schedule), copies into a
// ring (produce), products (multiply), results (finish_tile).
//
// A CTA computes kRows x kColumns sums, one producer thread and kGroups warpgroups of 64 rows each.
// A cluster is `mates` CTAs, 1 or 2: tiles of rows that read the same weight, of which each brings
// a share from L2 and sends it to both.
// A tile's columns are two halves, of gate rows n0.. and of the up rows of the same columns, so
// that a thread holds both sums of a result.
#pragma once

#include "gpu/core/cluster.cuh"
#include "gpu/core/mbarrier.cuh"
#include "gpu/core/tma.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/core/wgmma.cuh"
#include "gpu/linear/epilogue.cuh"

namespace pyserve::gpu::gemm {

constexpr int kDepth = 64;  // of k, in a stage: 128 bytes
constexpr int kWarpgroup = 128;

struct Args {
  CUtensorMap x, weight;
  void* out;
  int64_t out_stride;
  const void* bias;
  int m, n, k;  // n: columns of out
  int num_row_tiles, num_column_tiles;  // of a cluster
  int mates;
  L2Hint weight_hint;
};

template <class T_, int kGroups_, int kColumns_>
struct Tile {
  using T = T_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kOutColumns = kColumns / 2;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  // Registers of a thread, out of what the launch gives to all.
  static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32;
  static constexpr int kGroupRegisters = kGroups == 2 ? 232 : 160;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kProducerRegisters + kGroups * kGroupRegisters <= (kGroups + 1) * kLaunchRegisters);
  static constexpr int kSums = kColumns / 2;  // of a thread
  static constexpr int kOutChunks = kOutColumns / 8;  // two results of each of two rows of a thread
  static constexpr int kXBytes = kRows * kDepth * 2;
  static constexpr int kStageBytes = kXBytes + kColumns * kDepth * 2;
  static constexpr int kMaxSmem = 227 * 1024;
  static constexpr int kStages = (kMaxSmem - 256) / kStageBytes;
  static constexpr int kSmem = kStages * kStageBytes + 2 * kStages * 8;
  static_assert(kColumns % 32 == 0);
};

// The ring of stages in shared memory, and a place in it. A stage holds x, then weight.
template <class Tile>
struct Ring {
  uint32_t base;
  RingPlace<Tile::kStages> place;

  __device__ uint32_t barriers() const { return base + Tile::kStages * Tile::kStageBytes; }
  __device__ uint32_t x() const { return base + place.stage * Tile::kStageBytes; }
  __device__ uint32_t weight() const { return x() + Tile::kXBytes; }
  __device__ uint32_t full() const { return full_in(barriers()); }
  __device__ uint32_t empty() const { return empty_in(barriers()); }
  // Of the barriers that begin at this address, perhaps in another CTA.
  __device__ uint32_t full_in(uint32_t first) const { return first + place.stage * 16; }
  __device__ uint32_t empty_in(uint32_t first) const { return full_in(first) + 8; }
};

// The tiles of a cluster, one after another: columns run through groups of a few row tiles, so that
// what the card works on at a time is close to a square.
struct Schedule {
  int tile, step, count;

  __device__ explicit Schedule(const Args& a)
      : tile(blockIdx.x / a.mates),
        step(gridDim.x / a.mates),
        count(a.num_row_tiles * a.num_column_tiles) {}
  __device__ bool has_more() const { return tile < count; }
  __device__ void advance() { tile += step; }

  // First row and first column of the CTA's tile.
  template <class Tile>
  __device__ void place(const Args& a, int rank, int& row, int& column) const {
    constexpr int kGroupRows = 8;
    const int group = tile / (kGroupRows * a.num_column_tiles);
    const int within = tile - group * kGroupRows * a.num_column_tiles;
    const int rows = min(kGroupRows, a.num_row_tiles - group * kGroupRows);
    const int row_tile = group * kGroupRows + within % rows, column_tile = within / rows;
    row = (row_tile * a.mates + rank) * Tile::kRows;
    column = column_tile * Tile::kOutColumns;
  }
};

// Blocks of kDepth in k.
__device__ __forceinline__ int num_blocks(const Args& a) { return (a.k + kDepth - 1) / kDepth; }

// One thread fills the ring of the CTA at `rank` of its cluster.
template <class Tile>
__device__ void produce(const Args& a, Ring<Tile> ring, int rank, Schedule schedule) {
  constexpr int kHalf = Tile::kColumns / 2;
  const int count = num_blocks(a);
  int row, column;
  auto load_weight = [&](const Ring<Tile>& to, int block) {
    mbarrier_arrive_expect(to.full(), Tile::kStageBytes);
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
  };
  auto load_x = [&](const Ring<Tile>& to, int block) {
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      tma_load(to.x() + group * 64 * kDepth * 2, &a.x, to.full(), block * kDepth, row + group * 64,
               L2Hint::kEvictLast);
    }
  };
  // The weight does not depend on the kernels before this one: as much of it as the ring holds.
  int ahead = 0;
  if (schedule.has_more()) {
    schedule.place<Tile>(a, rank, row, column);
    Ring<Tile> to = ring;
    for (; ahead < min(count, Tile::kStages); ++ahead, to.place.advance()) load_weight(to, ahead);
  }
  pdl_wait();
  pdl_launch_dependents();
  for (; schedule.has_more(); schedule.advance()) {
    schedule.place<Tile>(a, rank, row, column);
    for (int i = 0; i < count; ++i, ring.place.advance()) {
      if (ahead > 0) {
        --ahead;
      } else {
        mbarrier_wait(ring.empty(), ring.place.phase ^ 1);
        load_weight(ring, i);
      }
      load_x(ring, i);
    }
  }
}

// A warpgroup's sums over `count` stages of the ring. A lane that is_releasing tells one of the CTAs
// that fill this ring, whose barriers are at mate_barriers, which stages are read.
template <class Tile>
__device__ __forceinline__ void multiply(Ring<Tile>& ring, int count, uint32_t mate_barriers,
                                         bool is_releasing, float (&sums)[Tile::kSums]) {
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
    if (i > 0 && is_releasing) mbarrier_arrive_cluster(before);
    before = ring.empty_in(mate_barriers);
    ring.place.advance();
  }
  wgmma_wait<0>();
  if (is_releasing) mbarrier_arrive_cluster(before);
}

// Lane q of four gives word i to lane i and gets its word q: its own inverse.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
  const bool is_odd = threadIdx.x & 1, is_high = threadIdx.x & 2;
  uint32_t a = __shfl_xor_sync(kFullMask, is_odd ? words[0] : words[1], 1);
  uint32_t b = __shfl_xor_sync(kFullMask, is_odd ? words[2] : words[3], 1);
  words[0] = is_odd ? a : words[0];
  words[1] = is_odd ? words[1] : a;
  words[2] = is_odd ? b : words[2];
  words[3] = is_odd ? words[3] : b;
  a = __shfl_xor_sync(kFullMask, is_high ? words[0] : words[2], 2);
  b = __shfl_xor_sync(kFullMask, is_high ? words[1] : words[3], 2);
  words[0] = is_high ? a : words[0];
  words[1] = is_high ? b : words[1];
  words[2] = is_high ? words[2] : a;
  words[3] = is_high ? words[3] : b;
}

// Results of a thread, of four chunks of columns: [row (+ 8)][chunk][column (+ 1)].
using Results = float[2][4][2];

// What is stored of a tile: rows below end_row, columns below end_column.
template <class T>
struct Target {
  T* out;
  int64_t stride;
  int end_row, end_column;
};

// Stores `count` chunks from `column` on, of rows `row` and row + 8.
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

// Bias of two neighbours, zeros where there is none.
template <class T>
__device__ __forceinline__ float2 bias_pair(const Args& a, int first, int column) {
  if (a.bias == nullptr || column >= a.n) return {0.0f, 0.0f};
  const T* bias = static_cast<const T*>(a.bias) + first + column;
  return unpack_pair<T>(*reinterpret_cast<const uint32_t*>(bias));
}

// The results of the tile whose first row and column these are.
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

}  // namespace pyserve::gpu::gemm
