// linear with 4-bit integers for more than 16 rows on Hopper (sm_90a): see gemm_w4a16.cuh. This
// file has the choice of a tiling for a shape, and the launch.
//
// A warpgroup spends its time widening integers, however many rows x has, until about 128 rows keep
// the products busy; with 256, as in a prompt, it widens half as often. Where there are too few
// tiles of weight rows for the SMs, two parts divide k; where tiles have few rows of weight,
// warpgroups take turns.
//
// Numerics: the tiling depends on m, n, k and the device, never on the data, so equal calls give
// equal bits. A row's result may differ between different numbers of rows.
// Floor: 4.25 bits per element of the weight, 2 bytes per element of x and of out; or 2 m n k
// operations.
#include "gpu/linear/gemm_w4a16.cuh"

#include <array>
#include <limits>
#include <utility>

#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/linear/dispatch.h"
#include "gpu/linear/gemm_estimate.h"

namespace pyserve::gpu {
namespace gemm {
namespace {

// The parameters of a W4Tile, the CTAs of a cluster that divide k, and the warpgroups that take
// turns.
struct W4Tiling {
  int groups, tokens;
  int parts = 1, turns = 1;

  constexpr int rows() const { return 64 * groups; }
  // The rows of x that a tile loads. They are the same for all tiles, so that few rows lie beyond
  // the last one of x, whose copies are slow.
  constexpr int rows_of_x(int64_t m) const {
    const int64_t num_tiles = (m + tokens - 1) / tokens, rows = (m + num_tiles - 1) / num_tiles;
    return static_cast<int>((rows + 7) / 8 * 8);
  }
  // Whether a CTA has only one tile: parts and turns exchange sums once per launch.
  constexpr bool is_once() const { return parts * turns > 1; }
};

// LinearTrial counts the tilings of this list from 1.
constexpr auto kW4Tilings = std::to_array<W4Tiling>({
    {1, 32}, {1, 32, 2}, {2, 32}, {2, 32, 2}, {4, 32},
    {1, 64}, {1, 64, 2}, {2, 64}, {2, 64, 2}, {4, 64},
    {1, 128}, {1, 128, 2}, {2, 128}, {2, 128, 2},
    {1, 32, 1, 4}, {1, 32, 2, 4}, {1, 64, 1, 4}, {1, 64, 2, 4},
    {2, 256},
});

static_assert(kW4Tilings.size() == kNumW4Tilings);

// Whether there is a kernel for this tiling. Turns are for matrices with few rows, which gate and
// up never are.
constexpr bool has_kernel(const W4Tiling& t, bool is_paired) { return !is_paired || t.turns == 1; }

// How many clusters a tiling has for a shape, by rows of x and by columns of out.
struct W4Grid {
  int rows, columns;

  W4Grid(const W4Tiling& t, const LinearParams& p)
      : rows(pieces(p.m, t.tokens)), columns(pieces(p.weight_rows(), t.rows())) {}
  int clusters() const { return rows * columns; }
};

// Estimated microseconds of a tiling. It is fitted to what all tilings took on an H200 for the
// shapes of an 8B model at 17 to 512 rows (`bench.ops --only int4_tilings`), within 3 % on average.
// bench/notes.md says how much time wrong choices cost.
double estimate_us(const W4Tiling& t, const LinearParams& p, const Device& device) {
  constexpr double kMemoryKilobytesPerUs = 4200;
  constexpr double kKilobytes = 17.0 / 32 / 1000;  // per weight, in groups of 128
  constexpr int kDepth = 128;
  const W4Grid grid(t, p);
  const int waves = pieces(grid.clusters(), num_resident(device, t.parts));
  const int stages = pieces(pieces(p.k, kDepth), t.parts);
  // The time per stage: what the warpgroups share, and what each adds. For 256 rows it is not
  // measured yet, but taken as twice the products of 128.
  double stage_us = t.turns > 1      ? (t.tokens == 64 ? 0.22 : 0.19)
                    : t.tokens >= 128 ? 0.085 + 0.3 * t.groups * (t.tokens / 128)
                    : t.tokens == 64  ? 0.09 + 0.17 * t.groups
                                      : 0.12 + 0.125 * t.groups;
  // SMs that multiply at the same time slow each other down.
  stage_us *= 1 + 0.15 * std::min(1.0, 1.0 * grid.clusters() * t.parts / device.num_sms);
  // A row of a box that lies beyond the last row of x takes longer to copy than others.
  const double rows_beyond = 1.0 * grid.rows * t.rows_of_x(p.m) - p.m;
  stage_us = std::max(stage_us, 0.0103 * rows_beyond);
  const double ends_us = 2.0 + (t.parts > 1 ? 0.5 : 0.0) + (t.turns > 1 ? 0.3 : 0.0) +
                         (waves - 1) * (t.is_once() ? 2.7 : 0.3);
  const double memory_us =
      2.0 + kKilobytes * static_cast<double>(p.weight_rows() * p.k) / kMemoryKilobytesPerUs;
  return std::max(ends_us + waves * stages * stage_us, memory_us);
}

template <class Tile>
W4Args args_of(const LinearParams& p, int64_t group_size, const W4Tiling& tiling) {
  const W4Grid grid(tiling, p);
  W4Args a{};
  static_cast<Args&>(a) = frame_args(p, grid.rows, grid.columns);
  a.parts = tiling.parts;
  a.format = W4PieceFormat::of(group_size);
  a.x_rows = tiling.rows_of_x(p.m);
  a.up_strip = static_cast<int>(p.n / kStripRows);
  a.is_adding = p.epilogue == Epilogue::kAdd;
  return a;
}

template <class Tile>
cudaError_t launch_tile(const LinearParams& p, int64_t group_size, const W4Tiling& tiling,
                        const Device& device, cudaStream_t stream) {
  constexpr auto kKernel = gemm_kernel<Tile>;
  if (const cudaError_t error = allow_smem<kKernel, Tile::kSmem>(); error != cudaSuccess) {
    return error;
  }
  W4Args a = args_of<Tile>(p, group_size, tiling);
  cudaError_t error = encode_matrix(p.x, p.m, p.k, p.x_stride, a.x_rows, p.dtype, &a.x);
  if (error != cudaSuccess) return error;
  const int64_t num_strips = (p.weight_rows() + kStripRows - 1) / kStripRows;
  error = encode_word_map<2>(
      {.data = p.weight,
       .sizes = {static_cast<uint64_t>(p.weight_stride) / 2, static_cast<uint64_t>(num_strips)},
       .strides = {1, p.weight_stride / 2},
       .box_sizes = {static_cast<uint32_t>(a.format.piece_bytes / 8),
                     static_cast<uint32_t>(Tile::kIsPaired ? Tile::kStrips / 2 : Tile::kStrips)}},
      &a.weight);
  if (error != cudaSuccess) return error;
  const int tiles = a.num_row_tiles * a.num_column_tiles;
  const int num_clusters = tiling.is_once() ? tiles : std::min(tiles, num_resident(device, 1));
  return launch_chained_clusters(kKernel, static_cast<unsigned>(num_clusters * tiling.parts),
                                 static_cast<unsigned>(tiling.parts), Tile::kThreads, Tile::kSmem,
                                 stream, a);
}

// The index of the tiling that a trial asks for, else of the one with the least estimate.
size_t best_tiling(const LinearParams& p, const Device& device) {
  const bool is_paired = p.epilogue == Epilogue::kSiluMul;
  const int asked = linear_trial().w4a16_tiling;
  if (asked > 0 && has_kernel(kW4Tilings[asked - 1], is_paired)) {
    return static_cast<size_t>(asked - 1);
  }
  size_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < kW4Tilings.size(); ++i) {
    if (!has_kernel(kW4Tilings[i], is_paired)) continue;
    const double estimate = estimate_us(kW4Tilings[i], p, device);
    if (estimate < least) best = i, least = estimate;
  }
  return best;
}

template <class T, bool kIsPaired, bool kIsWhole, size_t... kIndex>
cudaError_t launch_best(const LinearParams& p, int64_t group_size, const Device& device,
                        cudaStream_t stream, std::index_sequence<kIndex...>) {
  const size_t best = best_tiling(p, device);
  cudaError_t error = cudaErrorInvalidValue;
  auto launch_if = [&]<size_t kI>(std::integral_constant<size_t, kI>) {
    constexpr W4Tiling kTiling = kW4Tilings[kI];
    if constexpr (has_kernel(kTiling, kIsPaired)) {
      // With 128 rows of x the products are the bottleneck, so one kernel serves all group sizes.
      using OneTile = W4Tile<T, kTiling.groups, kTiling.tokens, kIsPaired, false, kTiling.turns,
                             kIsWhole && kTiling.tokens < 128>;
      if (kI == best) error = launch_tile<OneTile>(p, group_size, kTiling, device, stream);
    }
  };
  (launch_if(std::integral_constant<size_t, kIndex>{}), ...);
  return error;
}

}  // namespace
}  // namespace gemm

bool can_gemm_w4a16_sm90a(const LinearParams& p) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  const bool is_paired = p.epilogue == Epilogue::kSiluMul;
  return !p.has_norm() && p.k >= kMinW4GemmColumns && p.n % (is_paired ? kStripRows : kVec) == 0 &&
         p.m < kLimit && p.n < kLimit && p.k < kLimit && is_vec_aligned(p.x, p.x_stride) &&
         is_vec_aligned(p.weight, 0) && is_vec_aligned(p.out, p.out_stride);
}

cudaError_t launch_gemm_w4a16_sm90a(const LinearParams& params, int64_t group_size,
                                    const Device& device, cudaStream_t stream) {
  if (params.m == 0 || params.n == 0) return cudaSuccess;
  return dispatch_half(params.dtype, [&]<class T>(T) {
    const auto launch = [&]<bool kIsPaired, bool kIsWhole>() {
      constexpr auto kAll = std::make_index_sequence<gemm::kW4Tilings.size()>{};
      return gemm::launch_best<T, kIsPaired, kIsWhole>(params, group_size, device, stream, kAll);
    };
    const bool is_whole = group_size == gemm::W4PieceFormat::kWholeGroup;
    if (params.epilogue == Epilogue::kSiluMul) {
      return is_whole ? launch.template operator()<true, true>()
                      : launch.template operator()<true, false>();
    }
    return is_whole ? launch.template operator()<false, true>()
                    : launch.template operator()<false, false>();
  });
}

}  // namespace pyserve::gpu
