// grouped_linear and grouped_linear_silu_mul for many rows per expert on Hopper (sm_90a), in
// bfloat16 or float16. It uses the parts of gemm_sm90a.cuh: a ring of stages that TMA fills and
// warpgroups multiply. A tile is an expert, a block of its rows, and some of its columns.
//
// The rows of x are sorted by expert. A tile at the end of an expert reaches into the rows of the
// next one; these results are computed and not stored. Each CTA finds its tiles by a list that it
// makes from the offsets (work_list.cuh), so the grid is the same wherever the tokens go.
//
// Numerics: float32 sums over k in blocks of 16, then the epilogue, one rounding. A row's result
// does not depend on which other rows its expert has.
// Floor: rows_per_column * n * k * 2 bytes for each expert that has rows, or 2 * rows_per_column *
// n * k operations per row.
#include <algorithm>

#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/experts/experts.h"
#include "gpu/experts/grouped_schedule.cuh"
#include "gpu/linear/gemm_sm90a.cuh"

namespace pyserve::gpu {
namespace gemm {

struct GroupedArgs {
  CUtensorMap x, weight;
  void* out;
  int64_t out_stride;
  const int32_t* offsets;
  int num_experts;
  int n, k;  // n counts columns of out
  int weight_rows;  // per expert
  int num_column_tiles;
  int mates;
  L2Hint weight_hint;
};

// Columns of out per tile.
template <class Tile, Epilogue kEpilogue>
constexpr int kGroupedColumns =
    kEpilogue == Epilogue::kSiluMul ? Tile::kOutColumns : Tile::kColumns;

// Fills the ring of the CTA at `rank` of its cluster. One thread calls this.
template <class Tile, Epilogue kEpilogue>
__device__ void produce_grouped(const GroupedArgs& a, const WorkList& list, Ring<Tile> ring,
                                int rank, GroupedSchedule schedule) {
  constexpr int kHalf = Tile::kColumns / 2;
  const int count = (a.k + kDepth - 1) / kDepth;
  // The distance from the first half of a tile's weight rows to the second half: either the rows of
  // up, or the next columns.
  const int step = kEpilogue == Epilogue::kSiluMul ? a.n : kHalf;
  for (; schedule.has_more(list); schedule.advance()) {
    const GroupedTile tile =
        schedule.tile(a, list, Tile::kRows, kGroupedColumns<Tile, kEpilogue>, rank);
    for (int i = 0; i < count; ++i, ring.place.advance()) {
      mbarrier_wait(ring.empty(), ring.place.phase ^ 1);
      mbarrier_arrive_expect(ring.full(), Tile::kStageBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t address = ring.weight() + half * kHalf * kDepth * 2;
        const int weight_row = tile.weight_row + half * step;
        if (a.mates == 1) {
          tma_load(address, &a.weight, ring.full(), i * kDepth, weight_row, a.weight_hint);
        } else if (half == rank) {
          tma_load_multicast(address, &a.weight, ring.full(), i * kDepth, weight_row, uint16_t{3},
                             a.weight_hint);
        }
      }
#pragma unroll
      for (int group = 0; group < Tile::kGroups; ++group) {
        tma_load(ring.x() + group * 64 * kDepth * 2, &a.x, ring.full(), i * kDepth,
                 tile.row + group * 64, L2Hint::kEvictLast);
      }
    }
  }
}

template <class Tile, Epilogue kEpilogue>
__device__ __forceinline__ void finish_grouped(const GroupedArgs& a, const GroupedTile& tile,
                                               const float (&sums)[Tile::kSums]) {
  using T = typename Tile::T;
  constexpr bool kIsPaired = kEpilogue == Epilogue::kSiluMul;
  constexpr int kChunks = kGroupedColumns<Tile, kEpilogue> / kVec;
  const Target<T> target{static_cast<T*>(a.out), a.out_stride, tile.end_row, a.n};
  const int lane = threadIdx.x % kWarpSize;
  const int row = tile.row + (threadIdx.x - kWarpgroup) / kWarpSize * 16 + lane / 4;
#pragma unroll
  for (int first = 0; first < kChunks; first += 4) {
    Results results{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i >= kChunks) continue;
      const float* sum = sums + 4 * (first + i);
      const float* up = sum + (kIsPaired ? 4 * kChunks : 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        results[j / 2][i][j % 2] = finish<kEpilogue>(sum[j], up[j]);
      }
    }
    store_chunks(target, row, tile.column + first * kVec, min(4, kChunks - first), results);
  }
}

template <class Tile, Epilogue kEpilogue>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ GroupedArgs a) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  __shared__ WorkList list;
  Ring<Tile> ring{smem_address(dynamic_smem), {}};
  if (threadIdx.x == 0) {
    init_ring(a, ring);
    barriers_ready();
  }
  __syncwarp();
  pdl_wait();
  pdl_launch_dependents();
  if (threadIdx.x < kWarpSize) {
    list.make(a.offsets, a.num_experts, Tile::kRows * a.mates, a.num_column_tiles);
  }
  __syncthreads();
  cluster_sync();
  const int rank = static_cast<int>(cluster_rank());
  GroupedSchedule schedule(a);
  if (threadIdx.x < kWarpgroup) {
    if constexpr (Tile::kGroupRegisters != 0) give_registers<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) produce_grouped<Tile, kEpilogue>(a, list, ring, rank, schedule);
    __syncwarp();
    cluster_sync();
  } else {
    if constexpr (Tile::kGroupRegisters != 0) take_registers<Tile::kGroupRegisters>();
    const int lane = threadIdx.x % kWarpSize;
    const bool is_releasing = lane < a.mates;
    const Release release{cluster_address(ring.barriers(), is_releasing ? lane : 0), is_releasing};
    const int count = (a.k + kDepth - 1) / kDepth;
    float sums[Tile::kSums];
    for (; schedule.has_more(list); schedule.advance()) {
      const GroupedTile tile =
          schedule.tile(a, list, Tile::kRows, kGroupedColumns<Tile, kEpilogue>, rank);
      multiply<Tile>(ring, count, release, sums);
      finish_grouped<Tile, kEpilogue>(a, tile, sums);
    }
    cluster_sync();  // the other CTA may still write here or signal that it has read a stage
  }
}

template <class OneTile, Epilogue kEpilogue>
cudaError_t launch_grouped_tile(const GroupedParams& p, const Device& device,
                                cudaStream_t stream) {
  constexpr auto kKernel = grouped_gemm_kernel<OneTile, kEpilogue>;
  constexpr int kColumns = kGroupedColumns<OneTile, kEpilogue>;
  static_assert(OneTile::kSmem + sizeof(WorkList) <= 226 * 1024);
  if (const cudaError_t error = allow_smem<kKernel, OneTile::kSmem>(); error != cudaSuccess) {
    return error;
  }
  // Where experts have two tiles of rows on average, a cluster of two CTAs shares each tile of
  // weight.
  const int mates = p.mean_rows() >= 2 * OneTile::kRows ? 2 : 1;
  GroupedArgs a{.out = p.out,
                .out_stride = p.out_stride,
                .offsets = p.offsets,
                .num_experts = p.num_experts,
                .n = p.n,
                .k = p.k,
                .weight_rows = p.weight_rows(),
                .num_column_tiles = (p.n + kColumns - 1) / kColumns,
                .mates = mates,
                .weight_hint =
                    p.mean_rows() <= OneTile::kRows ? L2Hint::kEvictFirst : L2Hint::kNormal};
  cudaError_t error = encode_matrix(p.x, p.max_rows, p.k, p.x_stride, 64, p.dtype, &a.x);
  if (error != cudaSuccess) return error;
  error = encode_matrix(p.weight, int64_t{p.num_experts} * p.weight_rows(), p.k, p.weight_stride,
                        OneTile::kColumns / 2, p.dtype, &a.weight);
  if (error != cudaSuccess) return error;
  const int num_clusters = device.num_sms / mates;
  return launch_chained_clusters(kKernel, static_cast<unsigned>(num_clusters * mates),
                                 static_cast<unsigned>(mates), OneTile::kThreads, OneTile::kSmem,
                                 stream, a);
}

template <class T, Epilogue kEpilogue>
cudaError_t launch_grouped_gemm(const GroupedParams& p, const Device& device,
                                cudaStream_t stream) {
  // Up to this average, most experts fit one block of 64 rows. The smaller x in a stage leaves room
  // for more stages, and so for more weights in flight.
  constexpr int kFewRows = 40;
  if (p.mean_rows() <= kFewRows) {
    return launch_grouped_tile<Tile<T, 1, 256>, kEpilogue>(p, device, stream);
  }
  return launch_grouped_tile<Tile<T, 2, 256>, kEpilogue>(p, device, stream);
}

}  // namespace gemm

cudaError_t launch_grouped_gemm_sm90a(const GroupedParams& p, const Device& device,
                                      cudaStream_t stream) {
  return dispatch_half(p.dtype, [&]<class T>(T) {
    if (p.epilogue == Epilogue::kSiluMul) {
      return gemm::launch_grouped_gemm<T, Epilogue::kSiluMul>(p, device, stream);
    }
    return gemm::launch_grouped_gemm<T, Epilogue::kStore>(p, device, stream);
  });
}

}  // namespace pyserve::gpu
