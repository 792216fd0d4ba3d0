// linear_silu_mul for more than 64 rows of x on Hopper (sm_90a), in bfloat16 or float16: wgmma on
// tiles that TMA brings, see gemm_sm90a.cuh. It exists only for this epilogue: with the others
// cuBLAS leaves nothing to fuse and is as fast at most shapes (bench/notes.md). This file has the
// choice of a tiling for a shape, and the launch.
//
// From 65 to about 200 rows the work is to stream the weight, with more rows to multiply. The rest
// of the time is lost where the tiles do not fill the SMs evenly. So there are several tilings, and
// estimate_us() tells which is best for a shape. An H200's L2 delivers about 9.5 TB/s, all of which
// tiles of 128 rows would need; with two such tiles in a cluster, one copy brings the weight to
// both.
//
// Numerics: float32 sums over k in blocks of 16, then the epilogue, one rounding. The tiling
// depends on m, n, k and the device, never on the data, so equal calls give equal bits. A row's
// result may differ between different numbers of rows.
// Floor: 4 n k bytes, or 4 m n k operations. Figures: dispatch.cu.
#include "gpu/linear/gemm_sm90a.cuh"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/linear/gemm_estimate.h"
#include "gpu/linear/gemm_sm90a.h"

namespace pyserve::gpu {
namespace gemm {

// The tile sizes for a shape, and how many CTAs share the weight (mates).
struct Tiling {
  int groups, columns;
  int mates;

  constexpr int rows() const { return 64 * groups; }
};

constexpr auto kTilings = std::to_array<Tiling>({
    {2, 256, 2}, {2, 256, 1}, {2, 224, 2}, {2, 224, 1}, {3, 128, 1},
});

// How many clusters a tiling has for a shape, by rows and by columns.
struct Grid {
  int rows, columns;

  Grid(const Tiling& t, const LinearParams& p)
      : rows(pieces(p.m, t.rows() * t.mates)), columns(pieces(p.weight_rows(), t.columns)) {}
};

// Estimated microseconds of a tiling. It fits what an H200 took for the matrices of an 8B model at
// 96 to 2,048 rows to about 5 %.
double estimate_us(const Tiling& t, const LinearParams& p, const Device& device) {
  const Grid grid(t, p);
  const double clusters = static_cast<double>(grid.rows) * grid.columns;
  const double waves = std::ceil(clusters / num_resident(device, t.mates));
  const double stages = pieces(p.k, kDepth);
  const double stage_bytes = (t.rows() + 1.0 * t.columns / t.mates) * kDepth * 2;
  return Clocks{
      .compute = waves * (stages * t.rows() * t.columns * kDepth / kProducts + kTileClocks),
      .cache = clusters * t.mates * stages * stage_bytes / (kL2Bytes * device.num_sms),
      .memory = 2.0 * p.weight_rows() * p.k / kMemoryBytes,
  }.us();
}

template <class Tile>
cudaError_t launch_tile(const LinearParams& p, const Tiling& tiling, const Device& device,
                        cudaStream_t stream) {
  constexpr auto kKernel = gemm_kernel<Tile>;
  if (const cudaError_t error = allow_smem<kKernel, Tile::kSmem>(); error != cudaSuccess) {
    return error;
  }
  const Grid grid(tiling, p);
  Args a = frame_args(p, grid.rows, grid.columns);
  a.mates = tiling.mates;
  cudaError_t error = encode_matrix(p.x, p.m, p.k, p.x_stride, 64, p.dtype, &a.x);
  if (error != cudaSuccess) return error;
  error = encode_matrix(p.weight, p.weight_rows(), p.k, p.weight_stride, Tile::kColumns / 2,
                        p.dtype, &a.weight);
  if (error != cudaSuccess) return error;
  const int num_clusters =
      std::min(grid.rows * grid.columns, num_resident(device, tiling.mates));
  return launch_chained_clusters(kKernel, static_cast<unsigned>(num_clusters * tiling.mates),
                                 static_cast<unsigned>(tiling.mates), Tile::kThreads, Tile::kSmem,
                                 stream, a);
}

// The index of the tiling with the least estimate.
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
    using OneTile = Tile<T, kTiling.groups, kTiling.columns>;
    if (kI == best) error = launch_tile<OneTile>(p, kTiling, device, stream);
  };
  (launch_if(std::integral_constant<size_t, kIndex>{}), ...);
  return error;
}

// Estimated microseconds of cuBLAS followed by silu_mul. It rests on what cuBLAS reached on an H200
// for the matrices of an 8B model: 560 TFLOP/s at 160 rows and up to 750 at 512 and more, where its
// tiles fit the shape.
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
