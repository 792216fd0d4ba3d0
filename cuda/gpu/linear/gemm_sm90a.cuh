// The parts of a matrix product out = x weight^T on Hopper: which tile (Schedule), copies into a ring
// (produce), products (multiply), sums over a cluster (reduce), results (finish).
//
// A CTA computes kRows x kColumns results, one producer thread and kGroups warpgroups of 64 rows
// each. A cluster is share_weight x share_x x kSplit CTAs: share_weight tiles of rows that read the
// same weight, share_x tiles of columns that read the same x; what is shared is read from L2 once
// and sent to all. kSplit CTAs take a part of k each and add up in the order of the parts.
// A tile's columns are two halves: of weight rows n0.. and n0 + kColumns / 2 .., or, for silu_mul,
// of gate rows n0.. and the up rows of the same columns, so that a thread holds both sums of a
// result.
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
  int share_weight, share_x;
  L2Hint weight_hint;
};

template <class T_, Epilogue kEpilogue_, int kGroups_, int kColumns_, int kSplit_>
struct Tile {
  using T = T_;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kSplit = kSplit_;
  static constexpr int kRows = 64 * kGroups;
  static constexpr bool kIsPaired = kEpilogue == Epilogue::kSiluMul;
  static constexpr int kOutColumns = kIsPaired ? kColumns / 2 : kColumns;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  // Registers of a thread, out of what the launch gives to all.
  static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32;
  static constexpr int kGroupRegisters = kGroups == 2 ? 232 : 160;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kProducerRegisters + kGroups * kGroupRegisters <= (kGroups + 1) * kLaunchRegisters);
  static constexpr int kSums = kColumns / 2;   // of a thread
  static constexpr int kChunks = kColumns / 8;  // four sums of a thread each
  static constexpr int kXBytes = kRows * kDepth * 2;
  static constexpr int kStageBytes = kXBytes + kColumns * kDepth * 2;
  static constexpr int kMaxSmem = 227 * 1024;
  static constexpr int kStages = (kMaxSmem - 256) / kStageBytes;
  static constexpr int kSmem = kStages * kStageBytes + 2 * kStages * 8;
  static constexpr int kSliceBytes = kRows * kColumns * 4 / kSplit;
  static_assert((kSplit - 1) * kSliceBytes <= kStages * kStageBytes);
  static_assert(kChunks % (2 * kSplit) == 0 && kColumns % 32 == 0);
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

struct Place {
  int row_rank, column_rank, part;  // in the cluster

  __device__ static Place of(const Args& a) {
    const int rank = static_cast<int>(cluster_rank());
    return {rank % a.share_weight, rank / a.share_weight % a.share_x,
            rank / (a.share_weight * a.share_x)};
  }
  __device__ int rank_of(const Args& a, int row, int column, int the_part) const {
    return row + a.share_weight * (column + a.share_x * the_part);
  }
  // The CTAs that read this one's weight, and its x.
  __device__ uint16_t weight_mates(const Args& a) const {
    return static_cast<uint16_t>(((1 << a.share_weight) - 1) << rank_of(a, 0, column_rank, part));
  }
  __device__ uint16_t x_mates(const Args& a) const {
    uint32_t mates = 0;
    for (int i = 0; i < a.share_x; ++i) mates |= 1u << rank_of(a, row_rank, i, part);
    return static_cast<uint16_t>(mates);
  }
};

// The tiles of a cluster, one after another: columns run through groups of a few row tiles, so that
// what the card works on at a time is close to a square.
struct Schedule {
  int tile, step, count;

  __device__ explicit Schedule(const Args& a, int cluster_size)
      : tile(blockIdx.x / cluster_size),
        step(gridDim.x / cluster_size),
        count(a.num_row_tiles * a.num_column_tiles) {}
  __device__ bool has_more() const { return tile < count; }
  __device__ void advance() { tile += step; }

  // First row and first column of the CTA's tile.
  template <class Tile>
  __device__ void place(const Args& a, const Place& at, int& row, int& column) const {
    constexpr int kGroupRows = 8;
    const int group = tile / (kGroupRows * a.num_column_tiles);
    const int within = tile - group * kGroupRows * a.num_column_tiles;
    const int rows = min(kGroupRows, a.num_row_tiles - group * kGroupRows);
    const int row_tile = group * kGroupRows + within % rows, column_tile = within / rows;
    row = (row_tile * a.share_weight + at.row_rank) * Tile::kRows;
    column = (column_tile * a.share_x + at.column_rank) * Tile::kOutColumns;
  }
};

// The blocks of k that a part takes.
template <class Tile>
__device__ __forceinline__ void part_of_k(const Args& a, int part, int& first, int& count) {
  const int blocks = (a.k + kDepth - 1) / kDepth;
  first = blocks * part / Tile::kSplit;
  count = blocks * (part + 1) / Tile::kSplit - first;
}

// One thread fills the ring.
template <class Tile>
__device__ void produce(const Args& a, Ring<Tile> ring, const Place& at, Schedule schedule) {
  constexpr int kHalf = Tile::kColumns / 2;
  const uint16_t weight_mates = at.weight_mates(a), x_mates = at.x_mates(a);
  const int up = Tile::kIsPaired ? a.n : kHalf;  // rows from the first half's to the second's
  int first, count, row, column;
  part_of_k<Tile>(a, at.part, first, count);
  auto load_weight = [&](const Ring<Tile>& to, int block) {
    mbarrier_arrive_expect(to.full(), Tile::kStageBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t address = to.weight() + half * kHalf * kDepth * 2;
      if (a.share_weight == 1) {
        tma_load(address, &a.weight, to.full(), block * kDepth, column + half * up, a.weight_hint);
      } else if (half % a.share_weight == at.row_rank) {
        tma_load_multicast(address, &a.weight, to.full(), block * kDepth, column + half * up,
                           weight_mates, a.weight_hint);
      }
    }
  };
  auto load_x = [&](const Ring<Tile>& to, int block) {
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      const uint32_t address = to.x() + group * 64 * kDepth * 2;
      if (a.share_x == 1) {
        tma_load(address, &a.x, to.full(), block * kDepth, row + group * 64, L2Hint::kEvictLast);
      } else if (group % a.share_x == at.column_rank) {
        tma_load_multicast(address, &a.x, to.full(), block * kDepth, row + group * 64, x_mates,
                           L2Hint::kEvictLast);
      }
    }
  };
  // The weight does not depend on the kernels before this one: as much of it as the ring holds.
  int ahead = 0;
  if (schedule.has_more()) {
    schedule.place<Tile>(a, at, row, column);
    Ring<Tile> to = ring;
    for (; ahead < min(count, Tile::kStages); ++ahead, to.place.advance()) {
      load_weight(to, first + ahead);
    }
  }
  pdl_wait();
  pdl_launch_dependents();
  for (; schedule.has_more(); schedule.advance()) {
    schedule.place<Tile>(a, at, row, column);
    for (int i = 0; i < count; ++i, ring.place.advance()) {
      if (ahead > 0) {
        --ahead;
      } else {
        mbarrier_wait(ring.empty(), ring.place.phase ^ 1);
        load_weight(ring, first + i);
      }
      load_x(ring, first + i);
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

// Chunk `i` of slice `slice`: the first half of its chunks lie in the first half of the columns.
template <class Tile>
__device__ constexpr int slice_chunk(int slice, int i) {
  constexpr int kHalfSlice = Tile::kChunks / 2 / Tile::kSplit;
  return i < kHalfSlice ? slice * kHalfSlice + i
                        : Tile::kChunks / 2 + slice * kHalfSlice + i - kHalfSlice;
}

// Adds up the parts of k: afterwards slice `at.part` of the columns is complete in this CTA.
template <class Tile>
__device__ void reduce(const Args& a, uint32_t buffer, const Place& at,
                       float (&sums)[Tile::kSums]) {
  constexpr int kSliceChunks = Tile::kChunks / Tile::kSplit;
  constexpr int kChunkBytes = Tile::kGroups * kWarpgroup * 16;
  const uint32_t mine = buffer + (threadIdx.x - kWarpgroup) * 16;
#pragma unroll
  for (int slice = 0; slice < Tile::kSplit; ++slice) {
    if (slice == at.part) continue;
    const int rank = at.rank_of(a, at.row_rank, at.column_rank, slice);
    const int from = at.part < slice ? at.part : at.part - 1;
    const uint32_t to = cluster_address(mine, rank) + from * Tile::kSliceBytes;
#pragma unroll
    for (int i = 0; i < kSliceChunks; ++i) {
      store_cluster(to + i * kChunkBytes, sums + 4 * slice_chunk<Tile>(slice, i));
    }
  }
  cluster_sync();
#pragma unroll
  for (int slice = 0; slice < Tile::kSplit; ++slice) {
    if (slice != at.part) continue;
#pragma unroll
    for (int i = 0; i < kSliceChunks; ++i) {
      float* chunk = sums + 4 * slice_chunk<Tile>(slice, i);
      float total[4] = {};
#pragma unroll
      for (int part = 0; part < Tile::kSplit; ++part) {
        float other[4] = {chunk[0], chunk[1], chunk[2], chunk[3]};
        if (part != slice) {
          const int from = part < slice ? part : part - 1;
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                       : "=f"(other[0]), "=f"(other[1]), "=f"(other[2]), "=f"(other[3])
                       : "r"(mine + from * Tile::kSliceBytes + i * kChunkBytes)
                       : "memory");
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) total[j] += other[j];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) chunk[j] = total[j];
    }
  }
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

// Finishes and stores `count` chunks from `column` on, of rows `row` and row + 8. With kSiluMul
// `results` are finished, else they are sums with their bias.
template <class Tile>
__device__ __forceinline__ void store_chunks(const Args& a, int row, int column, int count,
                                             Results& results) {
  using T = typename Tile::T;
  const int quad = threadIdx.x % 4, my_column = column + quad * kVec;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int my_row = row + half * 8;
    const bool is_stored = my_row < a.m && my_column < a.n && quad < count;
    T* target = static_cast<T*>(a.out) + my_row * a.out_stride + my_column;
    uint32_t words[4];
    if constexpr (Tile::kEpilogue == Epilogue::kAdd) {
      uint4 before{};
      if (is_stored) before = load_vec(target);
      words[0] = before.x, words[1] = before.y, words[2] = before.z, words[3] = before.w;
      transpose_quad(words);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_pair<T>(words[i]);
        results[half][i][0] = finish<Epilogue::kAdd>(results[half][i][0], pair.x);
        results[half][i][1] = finish<Epilogue::kAdd>(results[half][i][1], pair.y);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack_pair<T>(results[half][i][0], results[half][i][1]);
    transpose_quad(words);
    if (is_stored) store_vec(target, {words[0], words[1], words[2], words[3]});
  }
}

// Bias of two neighbours, zeros where there is none.
template <class T>
__device__ __forceinline__ float2 bias_pair(const Args& a, int first, int column) {
  if (a.bias == nullptr || column >= a.n) return {0.0f, 0.0f};
  const T* bias = static_cast<const T*>(a.bias) + first + column;
  return unpack_pair<T>(*reinterpret_cast<const uint32_t*>(bias));
}

// The results of slice `slice` of the tile whose first row and column these are.
template <class Tile>
__device__ __forceinline__ void finish_slice(const Args& a, int row, int column, int slice,
                                             const float (&sums)[Tile::kSums]) {
  using T = typename Tile::T;
  constexpr int kHalfSlice = Tile::kChunks / 2 / Tile::kSplit;
  const int lane = threadIdx.x % kWarpSize, pair_column = lane % 4 * 2;
  row += (threadIdx.x - kWarpgroup) / kWarpSize * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < (Tile::kIsPaired ? 1 : 2); ++half) {
#pragma unroll
    for (int first = 0; first < kHalfSlice; first += 4) {
      const int chunk = half * Tile::kChunks / 2 + slice * kHalfSlice + first;
      const int first_column = column + chunk * kVec;
      Results results{};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i >= kHalfSlice) continue;
        const float* sum = sums + 4 * (chunk + i);
        const int my_column = first_column + i * kVec + pair_column;
        const float2 bias = bias_pair<T>(a, 0, my_column);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          results[j][i][0] = sum[2 * j] + bias.x;
          results[j][i][1] = sum[2 * j + 1] + bias.y;
        }
        if constexpr (Tile::kIsPaired) {
          const float* up = sum + 2 * Tile::kChunks;
          const float2 up_bias = bias_pair<T>(a, a.n, my_column);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float(&pair)[2] = results[j][i];
            pair[0] = finish<Epilogue::kSiluMul>(pair[0], up[2 * j] + up_bias.x);
            pair[1] = finish<Epilogue::kSiluMul>(pair[1], up[2 * j + 1] + up_bias.y);
          }
        }
      }
      store_chunks<Tile>(a, row, first_column, min(4, kHalfSlice - first), results);
    }
  }
}

}  // namespace pyserve::gpu::gemm
