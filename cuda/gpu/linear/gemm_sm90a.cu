// linear for more than 64 rows on Hopper (sm_90a): wgmma on tiles that the copy engine brings, see
// gemm_sm90a.cuh. What is here: the kernel, which of its tilings a shape gets, the launch.
//
// The work of 65 to some 200 rows is to stream the weight, of more to multiply. What costs beside
// that is tiles that do not fill the SMs evenly: so there are several, and estimate_us() tells which
// is best for a shape. An H200's L2 gives some 9.5 TB/s, which tiles of 128 rows would need all of:
// where there are two of them, one copy brings the weight to both.
//
// Numerics: float32 sums over k in blocks of 16, of a divided k in the order of its parts, then the
// epilogue, one rounding. The tiling depends on m, n, k and the device, never on the data: equal
// calls give equal bits. A row's result may differ between numbers of rows.
// Floor: 4 n k bytes, or 4 m n k operations, with kSiluMul.
#include "gpu/linear/gemm_sm90a.cuh"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/linear/gemm_sm90a.h"

namespace pyserve::gpu {
namespace gemm {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gemm_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  Ring<Tile> ring{smem_address(dynamic_smem), {}};
  const Place at = Place::of(a);
  const int num_mates = a.share_weight + a.share_x - 1;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&a.weight);
    prefetch_tensor_map(&a.x);
    Ring<Tile> each = ring;
    for (int i = 0; i < Tile::kStages; ++i, each.place.advance()) {
      mbarrier_init(each.full(), 1);
      mbarrier_init(each.empty(), Tile::kGroups * 4 * num_mates);
    }
    barriers_ready();
  }
  cluster_sync();
  Schedule schedule(a, a.share_weight * a.share_x * Tile::kSplit);
  if (threadIdx.x < kWarpgroup) {
    give_registers<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce<Tile>(a, ring, at, schedule);
    } else {
      pdl_wait();
      pdl_launch_dependents();
    }
    __syncwarp();
    cluster_sync();
    if (Tile::kSplit > 1) cluster_sync();
  } else {
    take_registers<Tile::kGroupRegisters>();
    const int lane = threadIdx.x % kWarpSize;
    int mate = at.rank_of(a, lane, at.column_rank, at.part);
    if (lane >= a.share_weight) {
      const int other = lane - a.share_weight;
      mate = at.rank_of(a, at.row_rank, other + (other >= at.column_rank), at.part);
    }
    const bool is_releasing = lane < num_mates;
    const uint32_t mate_barriers = cluster_address(ring.barriers(), is_releasing ? mate : 0);
    pdl_wait();
    pdl_launch_dependents();
    int first, count, row, column;
    part_of_k<Tile>(a, at.part, first, count);
    float sums[Tile::kSums];
    if constexpr (Tile::kSplit > 1) {
      schedule.place<Tile>(a, at, row, column);
      multiply<Tile>(ring, count, mate_barriers, is_releasing, sums);
      cluster_sync();
      reduce<Tile>(a, ring.base, at, sums);
#pragma unroll
      for (int slice = 0; slice < Tile::kSplit; ++slice) {
        if (slice == at.part) finish_slice<Tile>(a, row, column, slice, sums);
      }
    } else {
      for (; schedule.has_more(); schedule.advance()) {
        schedule.place<Tile>(a, at, row, column);
        multiply<Tile>(ring, count, mate_barriers, is_releasing, sums);
        finish_slice<Tile>(a, row, column, 0, sums);
      }
      cluster_sync();
    }
  }
}

// How a shape is cut: a Tile, and how many of them a cluster is.
struct Tiling {
  int groups, columns, split;
  int share_weight, share_x;

  constexpr int rows() const { return 64 * groups; }
  constexpr int cluster() const { return share_weight * share_x * split; }
};

// What of them is worth having: for kSiluMul alone. With the other epilogues cuBLAS leaves nothing to
// be fused and is as fast at most shapes of an 8B model (bench/notes.md).
constexpr Epilogue kServed = Epilogue::kSiluMul;
constexpr auto kTilings = std::to_array<Tiling>({
    {2, 256, 1, 2, 1}, {2, 256, 1, 1, 1}, {2, 224, 1, 2, 1}, {2, 224, 1, 1, 1}, {3, 128, 1, 1, 1},
});

int pieces(int64_t whole, int part) { return static_cast<int>((whole + part - 1) / part); }

// Clusters of a tiling for a shape, by rows and by columns.
struct Grid {
  int rows, columns;

  Grid(const Tiling& t, const LinearParams& p)
      : rows(pieces(p.m, t.rows() * t.share_weight)),
        columns(pieces(p.weight_rows(), t.columns * t.share_x)) {}
};

// How many clusters of this many CTAs, one on an SM, run at a time: a GPC has some 16 SMs, of which
// a cluster of four leaves some unused.
int num_resident(const Device& device, int cluster) {
  return cluster <= 2 ? device.num_sms / cluster : device.num_sms / cluster - 3;
}

// Microseconds that a tiling takes: the longest of three, and a fifth of the next, as they hinder
// each other. Fits what an H200 took for 8B matrices at 96 to 2,048 rows to some 5 %.
double estimate_us(const Tiling& t, const LinearParams& p, const Device& device) {
  constexpr double kClocksPerUs = 1800, kFixedUs = 3.5;
  constexpr double kProducts = 2048 / 1.1;   // multiplications a clock and SM
  constexpr double kL2Bytes = 40;            // a clock and SM
  constexpr double kMemoryBytes = 2440;      // a clock
  const Grid grid(t, p);
  const double clusters = static_cast<double>(grid.rows) * grid.columns;
  const double waves = std::ceil(clusters / num_resident(device, t.cluster()));
  const double stages = pieces(p.k, kDepth * t.split);
  const double stage_bytes =
      (1.0 * t.rows() / t.share_x + 1.0 * t.columns / t.share_weight) * kDepth * 2;
  double clocks[] = {
      waves * (stages * t.rows() * t.columns * kDepth / kProducts + (t.split == 1 ? 2500 : 5000)),
      clusters * t.cluster() * stages * stage_bytes / (kL2Bytes * device.num_sms),
      2.0 * p.weight_rows() * p.k / kMemoryBytes,
  };
  std::sort(clocks, clocks + 3);
  return (clocks[2] + 0.2 * clocks[1]) / kClocksPerUs + kFixedUs;
}

template <class Tile>
cudaError_t launch_tile(const LinearParams& p, const Tiling& tiling, const Device& device,
                        cudaStream_t stream) {
  constexpr auto kKernel = gemm_kernel<Tile>;
  if (const cudaError_t error = allow_smem<kKernel, Tile::kSmem>(); error != cudaSuccess) {
    return error;
  }
  const Grid grid(tiling, p);
  Args a{.out = p.out,
         .out_stride = p.out_stride,
         .bias = p.bias,
         .m = static_cast<int>(p.m),
         .n = static_cast<int>(p.n),
         .k = static_cast<int>(p.k),
         .num_row_tiles = grid.rows,
         .num_column_tiles = grid.columns,
         .share_weight = tiling.share_weight,
         .share_x = tiling.share_x,
         .weight_hint = grid.rows == 1 ? L2Hint::kEvictFirst : L2Hint::kNormal};
  auto encode = [&](const void* data, int64_t rows, int64_t stride, int box_rows, CUtensorMap* map) {
    return encode_tensor_map<2>({.data = data,
                                 .sizes = {static_cast<uint64_t>(p.k), static_cast<uint64_t>(rows)},
                                 .strides = {1, stride},
                                 .box_sizes = {kDepth, static_cast<uint32_t>(box_rows)}},
                                p.dtype, map);
  };
  cudaError_t error = encode(p.x, p.m, p.x_stride, 64, &a.x);
  if (error != cudaSuccess) return error;
  error = encode(p.weight, p.weight_rows(), p.weight_stride, Tile::kColumns / 2, &a.weight);
  if (error != cudaSuccess) return error;
  int num_clusters = grid.rows * grid.columns;
  if (Tile::kSplit == 1) {
    num_clusters = std::min(num_clusters, num_resident(device, tiling.cluster()));
  }
  return launch_chained_clusters(kKernel, static_cast<unsigned>(num_clusters * tiling.cluster()),
                                 static_cast<unsigned>(tiling.cluster()), Tile::kThreads,
                                 Tile::kSmem, stream, a);
}

// The tiling of least estimate, by its place.
size_t best_tiling(const LinearParams& p, const Device& device, double* us) {
  size_t best = 0;
  *us = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < kTilings.size(); ++i) {
    const double estimate = estimate_us(kTilings[i], p, device);
    if (estimate < *us) best = i, *us = estimate;
  }
  return best;
}

template <class T, size_t... kIndex>
cudaError_t launch_best(const LinearParams& p, const Device& device, cudaStream_t stream,
                        std::index_sequence<kIndex...>) {
  double us = 0;
  const size_t best = best_tiling(p, device, &us);
  cudaError_t error = cudaErrorInvalidValue;
  auto launch_if = [&]<size_t kI>(std::integral_constant<size_t, kI>) {
    constexpr Tiling kTiling = kTilings[kI];
    using OneTile = Tile<T, kServed, kTiling.groups, kTiling.columns, kTiling.split>;
    if (kI == best) error = launch_tile<OneTile>(p, kTiling, device, stream);
  };
  (launch_if(std::integral_constant<size_t, kIndex>{}), ...);
  return error;
}

// Microseconds that cuBLAS takes, and silu_mul after it: what it reached on an H200 for 8B matrices,
// 560 TFLOP/s at 160 rows and up to 750 at 512 and more, where its tiles fit the shape.
double other_us(const LinearParams& p) {
  const double tflops = std::min(680.0, 480 + 0.65 * p.m);
  const double products = 2e-6 / tflops * p.m * p.weight_rows() * p.k;
  const double bytes = 2e-6 / 3.7 * p.weight_rows() * p.k;
  const double silu_mul = 3 + 6e-6 / 3.5 * p.m * p.n;
  return 2 + std::max(products, bytes) + silu_mul;
}

}  // namespace gemm

bool is_gemm_sm90a_faster(const LinearParams& params, const Device& device) {
  double us = 0;
  gemm::best_tiling(params, device, &us);
  return us < gemm::other_us(params);
}

cudaError_t launch_gemm_sm90a(const LinearParams& params, cudaStream_t stream) {
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return gemm::launch_best<T>(params, *device, stream,
                                std::make_index_sequence<gemm::kTilings.size()>{});
  });
}

}  // namespace pyserve::gpu
