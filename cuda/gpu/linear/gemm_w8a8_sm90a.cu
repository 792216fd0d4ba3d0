// linear with e4m3 weights and x rounded to e4m3, on Hopper (sm_90a): quantise_rows.cuh, then
// gemm_w8a8.cuh. This file has the choice of a tiling for a shape, and the launches.
//
// Numerics: the tiling depends on m, n, k and the device, never on the data, so equal calls give
// equal bits. All tilings that do not divide k add in the same order, so a row's result differs
// between numbers of rows only where one of them divides k.
// Floor: 1 byte per element of the weight, 4 of x and 2 of out; or 2 m n k operations at twice the
// rate of 16 bits.
#include "gpu/linear/gemm_w8a8.cuh"

#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/linear/dispatch.h"
#include "gpu/linear/gemm_estimate.h"
#include "gpu/linear/quantise_rows.cuh"

namespace pyserve::gpu {
namespace gemm {
namespace {

// The parameters of a W8Tile, and the CTAs of a cluster, which share the weight (mates) or divide k
// (parts).
struct W8Tiling {
  int groups, waves, columns;
  int mates = 1, parts = 1;

  constexpr int rows() const { return 64 * groups * waves; }
  constexpr int cluster() const { return mates * parts; }
};

// LinearTrial counts the tilings of this list from 1.
constexpr auto kW8Tilings = std::to_array<W8Tiling>({
    {1, 1, 64}, {1, 1, 64, 1, 2}, {1, 1, 128}, {1, 1, 128, 1, 2}, {2, 1, 64},
    {2, 1, 128}, {2, 1, 128, 2}, {2, 2, 128}, {2, 2, 128, 2},
});

static_assert(kW8Tilings.size() == kNumW8Tilings);

// How many clusters a tiling has for a shape, by rows and by columns.
struct W8Grid {
  int rows, columns;

  W8Grid(const W8Tiling& t, const LinearParams& p)
      : rows(pieces(p.m, t.rows() * t.mates)), columns(pieces(p.weight_rows(), t.columns)) {}
  int clusters() const { return rows * columns; }
};

// Whether the scales are for 128 columns, and for so many rows that each half of a tile has only
// one.
bool has_block_scales(const LinearParams& p, const Fp8Scale& scale) {
  constexpr int kStep = 64;
  return scale.columns == kW8GroupColumns && scale.rows % kStep == 0 &&
         (p.epilogue != Epilogue::kSiluMul || p.n % kStep == 0);
}

bool has_row_scales(const LinearParams& p, const Fp8Scale& scale) {
  return scale.num_groups == 1 && (scale.rows == 1 || scale.rows >= p.weight_rows());
}

// Whether both parts have work if k is divided.
bool can_divide(const LinearParams& p) {
  return p.epilogue != Epilogue::kSiluMul && p.k > 2 * kW8GroupColumns;
}

// Estimated microseconds of a tiling; these are counted, not measured yet. A CTA with one warpgroup
// does not multiply while it adds up, which is kAddClocks.
double estimate_us(const W8Tiling& t, const LinearParams& p, const Device& device) {
  constexpr double kW8Products = 4096 / 1.25, kAddClocks = 120, kExchangeClocks = 3000;
  constexpr double kSmBytes = 50;
  const int clusters = W8Grid(t, p).clusters();
  const int waves = pieces(clusters, num_resident(device, t.cluster()));
  const double stages = pieces(pieces(p.k, kW8GroupColumns), t.parts);
  const double stage_bytes = (t.rows() + 1.0 * t.columns / t.mates) * kW8GroupColumns;
  const double stage_clocks =
      t.rows() * t.columns * kW8GroupColumns / kW8Products + (t.groups == 1 ? kAddClocks : 0);
  return Clocks{
      .compute =
          waves * (stages * stage_clocks + kTileClocks + (t.parts > 1 ? kExchangeClocks : 0)),
      // Either all SMs together use up L2's rate, or one SM uses up what it can take in.
      .cache = std::max(clusters * t.cluster() / (kL2Bytes * device.num_sms), waves / kSmBytes) *
               stages * stage_bytes,
      .memory = static_cast<double>(p.weight_rows() * p.k) / kMemoryBytes,
  }.us();
}

// x rounded to e4m3 and its scales, in scratch.
struct RoundedRows {
  uint8_t* x;
  float* scales;

  RoundedRows(void* scratch, int64_t m, int64_t k)
      : x(static_cast<uint8_t*>(scratch)), scales(reinterpret_cast<float*>(x + m * k)) {}
};

cudaError_t encode_bytes(const void* data, int64_t rows, int64_t k, int64_t stride, int box_rows,
                         CUtensorMap* map) {
  return encode_byte_map<2>({.data = data,
                             .sizes = {static_cast<uint64_t>(k), static_cast<uint64_t>(rows)},
                             .strides = {1, stride},
                             .box_sizes = {kW8GroupColumns, static_cast<uint32_t>(box_rows)}},
                            map);
}

template <class Tile>
cudaError_t launch_tile(const LinearParams& p, const Fp8Scale& scale, const RoundedRows& rounded,
                        const W8Tiling& tiling, const Device& device, cudaStream_t stream) {
  constexpr auto kKernel = gemm_kernel<Tile>;
  if (const cudaError_t error = allow_smem<kKernel, Tile::kSmem>(); error != cudaSuccess) {
    return error;
  }
  const W8Grid grid(tiling, p);
  W8Args a{};
  static_cast<Args&>(a) = frame_args(p, grid.rows, grid.columns);
  a.mates = tiling.mates;
  a.parts = tiling.parts;
  a.x_scales = rounded.scales;
  a.scale = scale;
  a.last_scale_row = static_cast<int>((p.weight_rows() - 1) / scale.rows);
  a.is_block = has_block_scales(p, scale);
  a.scale_step = scale.rows == 1;
  a.is_adding = p.epilogue == Epilogue::kAdd;
  cudaError_t error = encode_bytes(rounded.x, p.m, p.k, p.k, Tile::kRows, &a.x);
  if (error != cudaSuccess) return error;
  error = encode_bytes(p.weight, p.weight_rows(), p.k, p.weight_stride, Tile::kHalfColumns,
                       &a.weight);
  if (error != cudaSuccess) return error;
  const int cluster = tiling.cluster();
  // Parts exchange sums once, so each of their clusters has one tile.
  const int num_clusters = tiling.parts > 1
                               ? grid.clusters()
                               : std::min(grid.clusters(), num_resident(device, cluster));
  return launch_chained_clusters(kKernel, static_cast<unsigned>(num_clusters * cluster),
                                 static_cast<unsigned>(cluster), Tile::kThreads, Tile::kSmem,
                                 stream, a);
}

// The index of the tiling that a trial asks for, if it can serve this shape; else of the one with
// the least estimate.
size_t best_w8_tiling(const LinearParams& p, const Device& device) {
  const int asked = linear_trial().w8a8_tiling;
  const auto can = [&](const W8Tiling& t) { return t.parts == 1 || can_divide(p); };
  if (asked > 0 && can(kW8Tilings[asked - 1])) return static_cast<size_t>(asked - 1);
  size_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < kW8Tilings.size(); ++i) {
    if (!can(kW8Tilings[i])) continue;
    const double estimate = estimate_us(kW8Tilings[i], p, device);
    if (estimate < least) best = i, least = estimate;
  }
  return best;
}

template <class T, bool kIsPaired, size_t... kIndex>
cudaError_t launch_best(const LinearParams& p, const Fp8Scale& scale, const RoundedRows& rounded,
                        const Device& device, cudaStream_t stream, std::index_sequence<kIndex...>) {
  const size_t best = best_w8_tiling(p, device);
  cudaError_t error = cudaErrorInvalidValue;
  auto launch_if = [&]<size_t kI>(std::integral_constant<size_t, kI>) {
    constexpr W8Tiling kTiling = kW8Tilings[kI];
    using OneTile = W8Tile<T, kTiling.groups, kTiling.waves, kTiling.columns, kIsPaired>;
    if (kI == best) error = launch_tile<OneTile>(p, scale, rounded, kTiling, device, stream);
  };
  (launch_if(std::integral_constant<size_t, kIndex>{}), ...);
  return error;
}

template <class T>
cudaError_t launch_pass(const LinearParams& p, const Fp8Scale& scale, void* scratch,
                        const Device& device, cudaStream_t stream) {
  constexpr auto kAll = std::make_index_sequence<kW8Tilings.size()>{};
  const RoundedRows rounded(scratch, p.m, p.k);
  const cudaError_t error = launch_quantise_rows<T>({.x = p.x,
                                                     .x_stride = p.x_stride,
                                                     .out = rounded.x,
                                                     .scales = rounded.scales,
                                                     .m = p.m,
                                                     .k = static_cast<int>(p.k),
                                                     .num_groups = pieces(p.k, kW8GroupColumns)},
                                                    stream);
  if (error != cudaSuccess) return error;
  if (p.epilogue == Epilogue::kSiluMul) {
    return launch_best<T, true>(p, scale, rounded, device, stream, kAll);
  }
  return launch_best<T, false>(p, scale, rounded, device, stream, kAll);
}

}  // namespace
}  // namespace gemm

bool can_gemm_w8a8_sm90a(const LinearParams& p, const Fp8Scale& scale) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  return !p.has_norm() && p.k > 0 && p.k % 16 == 0 && p.n % kVec == 0 && p.m < kLimit &&
         p.n < kLimit && p.k < kLimit &&
         (gemm::has_block_scales(p, scale) || gemm::has_row_scales(p, scale)) &&
         is_vec_aligned(p.x, p.x_stride) && is_vec_aligned(p.weight, 0) &&
         p.weight_stride % 16 == 0 && is_vec_aligned(p.out, p.out_stride) &&
         reinterpret_cast<uintptr_t>(p.bias) % 4 == 0;
}

cudaError_t launch_gemm_w8a8_sm90a(const LinearParams& params, const Fp8Scale& scale, void* scratch,
                                   int64_t scratch_bytes, const Device& device,
                                   cudaStream_t stream) {
  constexpr int64_t kWholeTiles = 512;  // rows of the largest cluster
  int64_t rows = scratch_bytes / w8_row_bytes(params.k);
  if (rows >= kWholeTiles) rows = rows / kWholeTiles * kWholeTiles;
  if (rows == 0 || !is_vec_aligned(scratch, 0)) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  for (int64_t row = 0; row < params.m && params.n > 0 && error == cudaSuccess; row += rows) {
    LinearParams p = params.from_row(row);
    p.m = std::min(params.m - row, rows);
    error = dispatch_half(p.dtype, [&]<class T>(T) {
      return gemm::launch_pass<T>(p, scale, scratch, device, stream);
    });
  }
  return error;
}

}  // namespace pyserve::gpu
