// Grouped linears of 4-bit integers for many rows per expert on Hopper (sm_90a). Tiles are those of
// gemm_w4a16.cuh, 256 rows of weight by 32 or 64 rows of an expert, or 128 by 128, in the order of
// grouped_schedule.cuh. Weights are dequantised in registers; no matrix is ever stored as 16-bit
// numbers.
//
// The rows of x are sorted by expert. A tile at the end of an expert reaches into the rows of the
// next one, and a tile at the end of a matrix reaches into weight rows of the next matrix; these
// results are computed and not stored.
//
// Numerics: as linear_w4a16 for as many rows. The tile depends on sizes, never on where the tokens
// go; a row's result does not depend on which other rows its expert has.
// Floor: 4.25 bits per element in groups of 128 of each expert that has rows, or 2 *
// rows_per_column * n * k operations per row.
#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/experts/grouped_schedule.cuh"
#include "gpu/experts/grouped_w4a16.h"
#include "gpu/linear/gemm_w4a16.cuh"

namespace pyserve::gpu {
namespace gemm {

struct GroupedW4Args : W4Args {
  const int32_t* offsets;
  int num_experts;
  int weight_rows;  // per expert, rounded up to whole strips
};

template <Operand kOperand, class Tile>
__device__ void fill_grouped_w4(const GroupedW4Args& a, const WorkList& list, Ring<Tile> ring,
                                GroupedSchedule schedule) {
  const int count = (a.k + Tile::kDepth - 1) / Tile::kDepth;
  for (; schedule.has_more(list); schedule.advance()) {
    const GroupedTile tile = schedule.tile(a, list, Tile::kTokens, Tile::kOutColumns, 0);
    for (int i = 0; i < count; ++i, ring.place.advance()) {
      mbarrier_wait(ring.empty(), ring.place.phase ^ 1);
      if constexpr (kOperand == Operand::kWeight) {
        Tile::load_weight(a, ring, i, tile.weight_row, 0);
      } else {
        Tile::load_x(a, ring, i, tile.row, 0);
      }
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    grouped_gemm_w4_kernel(const __grid_constant__ GroupedW4Args a) {
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
    list.make(a.offsets, a.num_experts, Tile::kTokens, a.num_column_tiles);
  }
  __syncthreads();
  GroupedSchedule schedule(a);
  if (threadIdx.x < kWarpgroup) {
    if constexpr (Tile::kGroupRegisters != 0) give_registers<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) fill_grouped_w4<Operand::kWeight>(a, list, ring, schedule);
    if (threadIdx.x == kWarpSize) fill_grouped_w4<Operand::kX>(a, list, ring, schedule);
  } else {
    if constexpr (Tile::kGroupRegisters != 0) take_registers<Tile::kGroupRegisters>();
    const Release release{cluster_address(ring.barriers(), 0), threadIdx.x % kWarpSize == 0};
    const int count = (a.k + Tile::kDepth - 1) / Tile::kDepth;
    float sums[Tile::kSums];
    for (; schedule.has_more(list); schedule.advance()) {
      const GroupedTile tile = schedule.tile(a, list, Tile::kTokens, Tile::kOutColumns, 0);
      multiply_w4<Tile>(a, ring, 0, count, release, sums);
      finish_w4<Tile>(a, ring, tile.row, tile.end_row, tile.column, sums);
    }
  }
}

template <class Tile>
cudaError_t launch_grouped_w4(const GroupedParams& p, int64_t group_size, const Device& device,
                              cudaStream_t stream) {
  static_assert(sizeof(WorkList) <= kListBytes);
  constexpr auto kKernel = grouped_gemm_w4_kernel<Tile>;
  if (const cudaError_t error = allow_smem<kKernel, Tile::kSmem>(); error != cudaSuccess) {
    return error;
  }
  const int strip_rows = static_cast<int>(kStripRows);
  const int num_strips = (p.weight_rows() + strip_rows - 1) / strip_rows;
  GroupedW4Args a{};
  a.out = p.out;
  a.out_stride = p.out_stride;
  a.n = p.n;
  a.k = p.k;
  a.num_column_tiles = (p.n + Tile::kOutColumns - 1) / Tile::kOutColumns;
  a.weight_hint = p.mean_rows() <= Tile::kTokens ? L2Hint::kEvictFirst : L2Hint::kNormal;
  a.format = W4PieceFormat::of(group_size);
  a.x_rows = Tile::kTokens;
  a.up_strip = p.n / strip_rows;
  a.offsets = p.offsets;
  a.num_experts = p.num_experts;
  a.weight_rows = num_strips * strip_rows;
  cudaError_t error = encode_matrix(p.x, p.max_rows, p.k, p.x_stride, Tile::kTokens, p.dtype, &a.x);
  if (error != cudaSuccess) return error;
  error = encode_word_map<2>(
      {.data = p.weight,
       .sizes = {static_cast<uint64_t>(p.weight_stride) / 2,
                 static_cast<uint64_t>(p.num_experts) * num_strips},
       .strides = {1, p.weight_stride / 2},
       .box_sizes = {static_cast<uint32_t>(a.format.piece_bytes / 8),
                     static_cast<uint32_t>(Tile::kIsPaired ? Tile::kStrips / 2 : Tile::kStrips)}},
      &a.weight);
  if (error != cudaSuccess) return error;
  return launch_chained_clusters(kKernel, static_cast<unsigned>(device.num_sms), 1, Tile::kThreads,
                                 Tile::kSmem, stream, a);
}

// Chooses the tile with the fewest rows of x that still holds most experts' rows, on the assumption
// that all experts have about as many.
template <class T, bool kIsPaired, bool kIsWhole>
cudaError_t launch_grouped_w4_as(const GroupedParams& p, int64_t group_size, const Device& device,
                                 cudaStream_t stream) {
  const int rows = p.mean_rows();
  if (rows <= 24) {
    using Tile = W4Tile<T, 4, 32, kIsPaired, true, 1, kIsWhole>;
    return launch_grouped_w4<Tile>(p, group_size, device, stream);
  }
  if (rows <= 52) {
    using Tile = W4Tile<T, 4, 64, kIsPaired, true, 1, kIsWhole>;
    return launch_grouped_w4<Tile>(p, group_size, device, stream);
  }
  return launch_grouped_w4<W4Tile<T, 2, 128, kIsPaired, true>>(p, group_size, device, stream);
}

}  // namespace gemm

bool can_gemm_grouped_w4a16_sm90a(const GroupedParams& p) {
  constexpr int kMinColumns = 256;
  const int64_t num_strips = (p.weight_rows() + kStripRows - 1) / kStripRows;
  return p.k >= kMinColumns && p.n % kVec == 0 && is_vec_aligned(p.out, p.out_stride) &&
         p.expert_stride == num_strips * p.weight_stride &&
         (p.order == nullptr ||
          (p.sorted_x != nullptr && is_vec_aligned(p.sorted_x, p.sorted_x_stride)));
}

cudaError_t launch_grouped_gemm_w4a16_sm90a(const GroupedParams& p, int64_t group_size,
                                            const Device& device, cudaStream_t stream) {
  return dispatch_half(p.dtype, [&]<class T>(T) {
    const auto launch = [&]<bool kIsPaired, bool kIsWhole>() {
      return gemm::launch_grouped_w4_as<T, kIsPaired, kIsWhole>(p, group_size, device, stream);
    };
    const bool is_whole = group_size == gemm::W4PieceFormat::kWholeGroup;
    if (p.epilogue == Epilogue::kSiluMul) {
      return is_whole ? launch.template operator()<true, true>()
                      : launch.template operator()<true, false>();
    }
    return is_whole ? launch.template operator()<false, true>()
                    : launch.template operator()<false, false>();
  });
}

}  // namespace pyserve::gpu
