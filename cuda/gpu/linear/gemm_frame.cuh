// The frame shared by the matrix products by wgmma on Hopper, whatever their weight is made of:
// which tile comes next (Schedule), a ring of stages in shared memory, the threads that fill it
// (fill), and the kernel.
//
// A CTA computes tiles of out. Two of its threads fill the ring, each with one operand, and kGroups
// warpgroups multiply. A cluster is 1 or 2 CTAs. Two CTAs may be `mates`: they compute neighbouring
// tiles that need the same part of one operand, of which each loads half from L2 and multicasts it
// to both. Or they may be `parts`: each computes the same tile over half of k, and they exchange
// sums at the end.
//
// A Tile class says what the frame does not know: its sizes, its Args, which begin with gemm::Args,
// and
//   place(a, tiles, rank, row, column)           first row and column of the CTA's tile
//   load_weight(a, ring, block, column, rank)    announces a stage's bytes and copies the weight
//   load_x(a, ring, block, row, rank)            copies x
//   prepare(a, ring)                             one thread initialises more barriers, if needed
//   compute(a, ring, rank, schedule, release)    run by all warpgroups that multiply
#pragma once

#include "gpu/core/cluster.cuh"
#include "gpu/core/mbarrier.cuh"
#include "gpu/core/tma.cuh"
#include "gpu/core/vec.cuh"
#include "gpu/core/wgmma.cuh"
#include "gpu/linear/epilogue.cuh"

namespace pyserve::gpu::gemm {

constexpr int kWarpgroup = 128;
constexpr int kMaxSmem = 227 * 1024;

struct Args {
  CUtensorMap x, weight;
  void* out;
  int64_t out_stride;
  const void* bias;
  int m, n, k;  // n counts columns of out
  int num_row_tiles, num_column_tiles;  // tiles of a whole cluster
  int mates = 1, parts = 1;             // at least one of them is 1
  L2Hint weight_hint;
};

// The ring of stages in shared memory, and a position in it. A stage holds x and behind it the
// weight.
template <class Tile>
struct Ring {
  uint32_t base;
  RingPlace<Tile::kStages> place;

  __device__ uint32_t barriers() const { return base + Tile::kBarrierOffset; }
  __device__ uint32_t x() const { return base + place.stage * Tile::kStageBytes; }
  __device__ uint32_t weight() const { return x() + Tile::kXBytes; }
  __device__ uint32_t full() const { return full_in(barriers()); }
  __device__ uint32_t empty() const { return empty_in(barriers()); }
  // The same among barriers that begin at address `first`, which may be in another CTA.
  __device__ uint32_t full_in(uint32_t first) const { return first + place.stage * 16; }
  __device__ uint32_t empty_in(uint32_t first) const { return full_in(first) + 8; }
};

// Initialises the barriers of a ring. One thread calls this before the CTA's first barrier. `a` has
// `mates` and the tensor maps by which the ring is filled.
template <class Tile, class Args>
__device__ __forceinline__ void init_ring(const Args& a, Ring<Tile> ring) {
  prefetch_tensor_map(&a.weight);
  prefetch_tensor_map(&a.x);
  for (int i = 0; i < Tile::kStages; ++i, ring.place.advance()) {
    mbarrier_init(ring.full(), 1);
    mbarrier_init(ring.empty(), Tile::kGroups * 4 * a.mates);
  }
}

// Encodes a matrix [rows, k], to be copied in boxes of box_rows rows by kBoxColumns columns.
constexpr int kBoxColumns = 64;  // 128 bytes
inline cudaError_t encode_matrix(const void* data, int64_t rows, int64_t k, int64_t stride,
                                 int box_rows, Dtype dtype, CUtensorMap* map) {
  return encode_tensor_map<2>({.data = data,
                               .sizes = {static_cast<uint64_t>(k), static_cast<uint64_t>(rows)},
                               .strides = {1, stride},
                               .box_sizes = {kBoxColumns, static_cast<uint32_t>(box_rows)}},
                              dtype, map);
}

// The arguments that the frame needs for a product whose clusters compute num_row_tiles x
// num_column_tiles tiles. The tensor maps, mates and parts are set by the caller.
inline Args frame_args(const LinearParams& p, int num_row_tiles, int num_column_tiles) {
  Args a{};
  a.out = p.out;
  a.out_stride = p.out_stride;
  a.bias = p.bias;
  a.m = static_cast<int>(p.m);
  a.n = static_cast<int>(p.n);
  a.k = static_cast<int>(p.k);
  a.num_row_tiles = num_row_tiles;
  a.num_column_tiles = num_column_tiles;
  a.weight_hint = num_row_tiles == 1 ? L2Hint::kEvictFirst : L2Hint::kNormal;
  return a;
}

// The indices of a cluster's tile.
struct Tiles {
  int row_tile, column_tile;
};

// The tiles of a cluster, one after another. The columns run through groups of a few row tiles, so
// that the tiles which the whole device computes at one time are close to a square.
struct Schedule {
  int tile, step, count;

  __device__ explicit Schedule(const Args& a)
      : tile(blockIdx.x / (a.mates * a.parts)),
        step(gridDim.x / (a.mates * a.parts)),
        count(a.num_row_tiles * a.num_column_tiles) {}
  __device__ bool has_more() const { return tile < count; }
  __device__ void advance() { tile += step; }

  __device__ Tiles tiles(const Args& a) const {
    constexpr int kGroupRows = 8;
    const int group = tile / (kGroupRows * a.num_column_tiles);
    const int within = tile - group * kGroupRows * a.num_column_tiles;
    const int rows = min(kGroupRows, a.num_row_tiles - group * kGroupRows);
    return {group * kGroupRows + within % rows, within / rows};
  }
};

// The blocks of kDepth columns of k that a CTA multiplies: all of them, or those of its part.
struct Blocks {
  int first, count;
};

template <class Tile>
__device__ __forceinline__ Blocks blocks_of(const Args& a, int rank) {
  const int all = (a.k + Tile::kDepth - 1) / Tile::kDepth;
  if (!Tile::kCanDivide || a.parts == 1) return {0, all};
  const int most = (all + 1) / 2;
  return {rank * most, rank == 0 ? most : all - most};
}

// Signals that a stage has been read, to the CTAs that fill it. In each warp, lane i < mates
// signals to mate i, whose barriers begin at mate_barriers.
struct Release {
  uint32_t mate_barriers;
  bool is_releasing;

  __device__ __forceinline__ void operator()(uint32_t empty) const {
    if (is_releasing) mbarrier_arrive_cluster(empty);
  }
};

// Which operand a thread copies.
enum class Operand { kWeight, kX };

// Fills the ring of the CTA at `rank` of its cluster with one operand. A thread that starts a copy
// waits until the copy engine has accepted it, so two threads, in two warps, share the copies of a
// stage.
template <Operand kOperand, class Tile>
__device__ void fill(const typename Tile::Args& a, Ring<Tile> ring, int rank, Schedule schedule) {
  const Blocks blocks = blocks_of<Tile>(a, rank);
  for (; schedule.has_more(); schedule.advance()) {
    int row, column;
    Tile::place(a, schedule.tiles(a), rank, row, column);
    for (int i = 0; i < blocks.count; ++i, ring.place.advance()) {
      mbarrier_wait(ring.empty(), ring.place.phase ^ 1);
      if constexpr (kOperand == Operand::kWeight) {
        Tile::load_weight(a, ring, blocks.first + i, column, rank);
      } else {
        Tile::load_x(a, ring, blocks.first + i, row, rank);
      }
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gemm_kernel(const __grid_constant__ typename Tile::Args a) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  Ring<Tile> ring{smem_address(dynamic_smem), {}};
  if (threadIdx.x == 0) {
    init_ring(a, ring);
    Tile::prepare(a, ring);
    barriers_ready();
  }
  __syncwarp();
  cluster_sync();
  const int rank = static_cast<int>(cluster_rank());
  Schedule schedule(a);
  if (threadIdx.x < kWarpgroup) {
    if constexpr (Tile::kGroupRegisters != 0) give_registers<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) {
      // The weight does not depend on the kernels before this one, so this thread does not wait for
      // them: it begins at once with as much as the ring holds.
      fill<Operand::kWeight>(a, ring, rank, schedule);
    } else {
      pdl_wait();
      pdl_launch_dependents();
      if (threadIdx.x == kWarpSize) fill<Operand::kX>(a, ring, rank, schedule);
    }
    __syncwarp();
    if (a.mates > 1) cluster_sync();
  } else {
    if constexpr (Tile::kGroupRegisters != 0) take_registers<Tile::kGroupRegisters>();
    const int lane = threadIdx.x % kWarpSize;
    const bool is_releasing = lane < a.mates;
    const int mate = a.mates == 1 ? rank : is_releasing ? lane : 0;
    const Release release{cluster_address(ring.barriers(), mate), is_releasing};
    pdl_wait();
    pdl_launch_dependents();
    Tile::compute(a, ring, rank, schedule, release);
    // A mate may still write to this CTA's stages or signal here, so this CTA must not end before
    // it. With parts nothing is left to come: all that the other part sends has been read by now.
    if (a.mates > 1) cluster_sync();
  }
}

// Prepares the exchange of sums between the two parts of a tile. The Tile has kExchangeBytes at
// kExchangeOffset, room for half of the sums of all threads that multiply, and a barrier that
// counts what the other part sends, once per launch.
template <class Tile>
__device__ __forceinline__ void prepare_exchange(const Ring<Tile>& ring) {
  mbarrier_init(ring.base + Tile::kExchangeBarrier, 1);
  mbarrier_arrive_expect(ring.base + Tile::kExchangeBarrier, Tile::kExchangeBytes);
}

// Sends one half of the sums to the other part, and adds what the other part sends to the half that
// this part keeps. Rank 0 keeps the first half.
template <class Tile>
__device__ __forceinline__ void exchange(const Ring<Tile>& ring, int rank,
                                         const float (&sums)[Tile::kSums],
                                         float (&mine)[Tile::kSums / 2]) {
  constexpr int kHalf = Tile::kSums / 2, kChunks = kHalf / 4;
  const uint32_t thread = threadIdx.x - kWarpgroup;  // index among all threads that multiply
  const uint32_t place = ring.base + Tile::kExchangeOffset + thread * 16;
  const uint32_t barrier = ring.base + Tile::kExchangeBarrier;
  constexpr uint32_t kChunkBytes = Tile::kGroups * kWarpgroup * 16;
  const uint32_t other_place = cluster_address(place, rank ^ 1);
  const uint32_t other_barrier = cluster_address(barrier, rank ^ 1);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    float other[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float low = sums[4 * i + j], high = sums[kHalf + 4 * i + j];
      mine[4 * i + j] = rank == 0 ? low : high;
      other[j] = rank == 0 ? high : low;
    }
    store_cluster(other_place + i * kChunkBytes, {other[0], other[1], other[2], other[3]},
                  other_barrier);
  }
  mbarrier_wait_cluster(barrier, 0);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const uint4 sent = load_shared(place + i * kChunkBytes);
    mine[4 * i] += __uint_as_float(sent.x);
    mine[4 * i + 1] += __uint_as_float(sent.y);
    mine[4 * i + 2] += __uint_as_float(sent.z);
    mine[4 * i + 3] += __uint_as_float(sent.w);
  }
}

// Transposes the 4x4 words of four lanes: lane q gives word i to lane i. Applied twice, it changes
// nothing.
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

}  // namespace pyserve::gpu::gemm
