// The parts of the product of 33 to 128 rows of x with 16-bit weights on Hopper: copies
// (fill_ring), products (multiply_piece), results (finish_warp).
//
// out^T = W x^T: 64 or 128 weight rows are the operands of one or two warpgroups, all rows of x the
// columns of both, so that the weight is read once. Tiles are divided by stream_k.h; a CTA is on
// each SM, and one of its threads fills the ring for all of its pieces, without a gap between them.
// With a gate and an up, each 16 rows of a tile are 8 of gate and then the 8 of up that go with
// them (a tensor map of four dimensions brings them so), and a thread holds both sums of a result.
// A warp's results are 16 columns of out, or 8; it needs no other warp for them.
#pragma once

#include "gpu/linear/epilogue.cuh"
#include "gpu/linear/gemm_frame.cuh"
#include "gpu/linear/stream_k.cuh"

namespace pyserve::gpu::skinny {

using gemm::kWarpgroup;

struct SkinnyArgs {
  CUtensorMap x;       // [m, k]
  CUtensorMap weight;  // [n / 8, 1 or gate and up, 8, k]
  LinearParams p;
  StreamK division;
  PartRoom room;
};

template <class T_, Epilogue kEpilogue_, int kTokens_, int kGroups_>
struct SkinnyTile {
  using T = T_;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr int kTokens = kTokens_;  // rows of x there is room for
  static constexpr int kGroups = kGroups_;  // warpgroups that multiply
  static constexpr int kDepth = 64;         // of k, in a stage: 128 bytes
  static constexpr int kRows = 64 * kGroups;
  using Rows = RowTile<kEpilogue, kRows>;
  static constexpr bool kIsPaired = Rows::kIsPaired;
  static constexpr int kColumns = Rows::kColumns;  // of out
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  static constexpr int kSums = kTokens / 2;                   // of a thread
  static constexpr int kHalves = kIsPaired ? 1 : 2;           // of a warp's columns, 8 each
  static constexpr int kVectors = kTokens / 8 * kHalves / 4;  // results of a lane, 8 each

  static constexpr int kXBytes = kTokens * kDepth * 2;
  static constexpr int kStageBytes = kXBytes + kRows * kDepth * 2;
  static constexpr int kMaxSmem = 227 * 1024;
  static constexpr int kStages = (kMaxSmem - 1024) / kStageBytes;
  static constexpr int kBarrierOffset = kStages * kStageBytes;
  static constexpr int kFactorBarrier = kBarrierOffset + 2 * kStages * 8;
  static constexpr int kFlagOffset = kFactorBarrier + 8;  // a word for each warp with sums
  static constexpr int kFactorOffset = kFlagOffset + PartRoom::kWarps * 4;
  static constexpr int kSmem = kFactorOffset + kTokens * 4;
  static_assert(kSmem <= kMaxSmem && kGroups * 4 <= PartRoom::kWarps);
};

// One thread fills the ring.
template <class Tile>
__device__ void fill_ring(const SkinnyArgs& a, gemm::Ring<Tile> ring, const Run& run) {
  const int num_pieces = run.num_pieces();
  auto load_weight = [&](const gemm::Ring<Tile>& to, const Piece& piece, int i) {
    mbarrier_arrive_expect(to.full(), Tile::kStageBytes);
    tma_load(to.weight(), &a.weight, to.full(), (piece.stage + i) * Tile::kDepth, 0, 0,
             piece.tile * (Tile::kColumns / 8), L2Hint::kEvictFirst);
  };
  // The weight does not depend on the kernels before this one: as much of it as the ring holds.
  int ahead = 0;
  gemm::Ring<Tile> to = ring;
  for (int j = 0; j < num_pieces; ++j) {
    const Piece piece = run.piece(j);
    for (int i = 0; i < piece.count && ahead < Tile::kStages; ++i, ++ahead, to.place.advance()) {
      load_weight(to, piece, i);
    }
  }
  pdl_wait();
  pdl_launch_dependents();
  for (int j = 0; j < num_pieces; ++j) {
    const Piece piece = run.piece(j);
    for (int i = 0; i < piece.count; ++i, ring.place.advance()) {
      if (ahead > 0) {
        --ahead;
      } else {
        mbarrier_wait(ring.empty(), ring.place.phase ^ 1);
        load_weight(ring, piece, i);
      }
      tma_load(ring.x(), &a.x, ring.full(), (piece.stage + i) * Tile::kDepth, 0,
               L2Hint::kEvictLast);
    }
  }
}

// Puts to `factors` what the norm before multiplies each row's sums by (common/epilogue.h). By the
// three warps beside the one that fills the ring, for several rows at a time.
template <class Tile>
__device__ void put_factors(const LinearParams& p, int warp, float* factors) {
  constexpr int kWarps = 3, kAtOnce = 4;
  const int lane = threadIdx.x % kWarpSize, num_tokens = static_cast<int>(p.m);
  if (p.x_squares == nullptr) {
    for (int i = warp * kWarpSize + lane; i < Tile::kTokens; i += kWarps * kWarpSize) {
      factors[i] = 1.0f;
    }
    return;
  }
  const auto count = static_cast<int>((p.k + kSquaresColumns - 1) / kSquaresColumns);
  for (int first = warp * kAtOnce; first < Tile::kTokens; first += kWarps * kAtOnce) {
    float sums[kAtOnce] = {};
#pragma unroll 8
    for (int i = lane; i < count; i += kWarpSize) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t token = min(first + j, num_tokens - 1);
        sums[j] += p.x_squares[token * p.x_squares_stride + i];
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const float mean = lane_sum(sums[j]) / static_cast<float>(p.k);
      if (lane == 0 && first + j < Tile::kTokens) {
        factors[first + j] = rsqrtf(mean + p.eps);
      }
    }
  }
}

// A warpgroup's sums over `count` stages of the ring.
template <class Tile>
__device__ __forceinline__ void multiply_piece(gemm::Ring<Tile>& ring, int count,
                                               float (&sums)[Tile::kSums]) {
  const int group = threadIdx.x / kWarpgroup - 1;
  const bool is_releasing = threadIdx.x % kWarpSize == 0;
  uint32_t before = 0;
  for (int i = 0; i < count; ++i) {
    mbarrier_wait(ring.full(), ring.place.phase);
    const uint64_t weight = k_major_descriptor(ring.weight() + group * 64 * Tile::kDepth * 2);
    const uint64_t x = k_major_descriptor(ring.x());
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < Tile::kDepth / 16; ++j) {
      wgmma<typename Tile::T, Major::kK>(sums, advance_descriptor(weight, 32 * j),
                                         advance_descriptor(x, 32 * j), i > 0 || j > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0 && is_releasing) mbarrier_arrive(before);
    before = ring.empty();
    ring.place.advance();
  }
  wgmma_wait<0>();
  if (is_releasing) mbarrier_arrive(before);
}

// Where a lane's results lie. Its sums are of weight rows lane / 4 and 8 more of its warp, for two
// neighbours of each 8 tokens; transposed, by a quad of lanes, vector i is 8 columns of one token.
template <class Tile>
struct LanePlace {
  int quad, row;   // lane % 4, lane / 4
  int column;      // the first of the warp
  int my_column;   // the first of this lane's vectors
  bool is_inside;  // whether that is of out

  __device__ LanePlace(const LinearParams& p, int tile)
      : quad(threadIdx.x % 4), row(threadIdx.x % kWarpSize / 4) {
    const int warp = threadIdx.x / kWarpSize - 4;
    column = tile * Tile::kColumns + warp * 8 * Tile::kHalves;
    my_column = column + quad % Tile::kHalves * 8;
    is_inside = my_column < p.n;
  }
  // Of the sums that make word `i` of the lane's vector: which 8 tokens.
  __device__ static constexpr int chunk(int vector, int i) {
    return (4 * vector + i) / Tile::kHalves;
  }
  __device__ int token(int vector) const { return 8 * chunk(vector, quad) + row; }
};

// What a warp's results need beside sums: asked for early, looked at late.
template <class Tile>
struct Operands {
  using T = typename Tile::T;
  static constexpr bool kIsAdding = Tile::kEpilogue == Epilogue::kAdd;
  uint4 others[kIsAdding ? Tile::kVectors : 1];  // what stands in out
  uint4 norm_weight;
  T bias[2];  // of the lane's two weight rows

  __device__ __forceinline__ void ask(const LinearParams& p, const LanePlace<Tile>& place) {
    const T* biases = static_cast<const T*>(p.bias);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bias[half] = from_float<T>(0.0f);
      const int column = place.column + (Tile::kIsPaired ? 0 : 8 * half);
      if (biases == nullptr || column >= p.n) continue;
      bias[half] = biases[column + place.row + (Tile::kIsPaired ? half * p.n : 0)];
    }
    if constexpr (kIsAdding) {
      norm_weight = {};
      if (p.norm_weight != nullptr && place.is_inside) {
        norm_weight = load_vec(static_cast<const T*>(p.norm_weight) + place.my_column);
      }
#pragma unroll
      for (int i = 0; i < Tile::kVectors; ++i) {
        const int token = place.token(i);
        others[i] = {};
        if (!place.is_inside || token >= p.m) continue;
        others[i] = load_vec(static_cast<const T*>(p.out) + token * p.out_stride +
                             place.my_column);
      }
    }
  }
};

// What the norm that follows needs of 8 results of a token; the neighbour lane has 8 more, or none.
template <class T>
__device__ __forceinline__ void put_norm_vector(const LinearParams& p, const uint4& values,
                                                const uint4& norm_weight, int token, int column,
                                                bool is_valid) {
  static_assert(kSquaresColumns == 2 * kVec);
  float x[kVec], weight[kVec], sum = 0.0f;
  unpack<T>(values, x);
  unpack<T>(norm_weight, weight);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    sum += x[i] * x[i];
    x[i] *= weight[i];
  }
  if (!is_valid) sum = 0.0f;
  sum += __shfl_xor_sync(kFullMask, sum, 1);
  if (!is_valid) return;
  store_vec(static_cast<T*>(p.scaled) + token * p.scaled_stride + column, pack<T>(x));
  if (column % kSquaresColumns == 0) {
    p.squares[token * p.squares_stride + column / kSquaresColumns] = sum;
  }
}

// The results of a warp's sums.
template <class Tile>
__device__ __forceinline__ void finish_warp(const LinearParams& p, const LanePlace<Tile>& place,
                                            const Operands<Tile>& operands, const float* factors,
                                            const float (&sums)[Tile::kSums]) {
  using T = typename Tile::T;
  constexpr bool kIsAdding = Operands<Tile>::kIsAdding;
  const float bias[2] = {to_float(operands.bias[0]), to_float(operands.bias[1])};
#pragma unroll
  for (int vector = 0; vector < Tile::kVectors; ++vector) {
    uint32_t words[4] = {};
    if constexpr (kIsAdding) {
      const uint4& others = operands.others[vector];
      words[0] = others.x, words[1] = others.y, words[2] = others.z, words[3] = others.w;
      gemm::transpose_quad(words);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int chunk = LanePlace<Tile>::chunk(vector, i), half = i % Tile::kHalves;
      const float2 factor =
          *reinterpret_cast<const float2*>(factors + 8 * chunk + 2 * place.quad);
      const float* sum = sums + 4 * chunk + 2 * half;
      const float first = sum[0] * factor.x + bias[half];
      const float second = sum[1] * factor.y + bias[half];
      float2 others{};
      if constexpr (kIsAdding) others = unpack_pair<T>(transpose_8x8(words[i]));
      if constexpr (Tile::kIsPaired) {
        others = {sum[2] * factor.x + bias[1], sum[3] * factor.y + bias[1]};
      }
      words[i] = transpose_8x8(pack_pair<T>(finish<Tile::kEpilogue>(first, others.x),
                                            finish<Tile::kEpilogue>(second, others.y)));
    }
    gemm::transpose_quad(words);
    const uint4 values{words[0], words[1], words[2], words[3]};
    const int token = place.token(vector);
    const bool is_valid = place.is_inside && token < p.m;
    if (is_valid) {
      store_vec(static_cast<T*>(p.out) + token * p.out_stride + place.my_column, values);
    }
    if constexpr (kIsAdding) {
      if (p.norm_weight != nullptr) {
        put_norm_vector<T>(p, values, operands.norm_weight, token, place.my_column, is_valid);
      }
    }
  }
}

// All pieces of a CTA, by the warps that multiply.
template <class Tile>
__device__ __forceinline__ void consume_run(const SkinnyArgs& a, gemm::Ring<Tile> ring,
                                            const Run& run, int32_t* flags,
                                            const float* factors) {
  const int warp = threadIdx.x / kWarpSize - 4, num_pieces = run.num_pieces();
  float sums[Tile::kSums];
  for (int j = 0; j < num_pieces; ++j) {
    const Piece piece = run.piece(j);
    const bool is_whole = a.division.is_whole(piece);
    const LanePlace<Tile> place(a.p, piece.tile);
    Operands<Tile> operands;
    if (is_whole) operands.ask(a.p, place);
    multiply_piece<Tile>(ring, piece.count, sums);
    if (!is_whole) {
      if (!leave_part(a.room, a.division, piece, warp, flags + warp, sums)) continue;
      operands.ask(a.p, place);
      add_parts(a.room, a.division, piece.tile, warp, sums);
    }
    mbarrier_wait(ring.base + Tile::kFactorBarrier, 0);
    finish_warp<Tile>(a.p, place, operands, factors, sums);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    skinny_kernel(const __grid_constant__ SkinnyArgs a) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  gemm::Ring<Tile> ring{smem_address(dynamic_smem), {}};
  auto* flags = reinterpret_cast<int32_t*>(dynamic_smem + Tile::kFlagOffset);
  auto* factors = reinterpret_cast<float*>(dynamic_smem + Tile::kFactorOffset);
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&a.weight);
    prefetch_tensor_map(&a.x);
    gemm::Ring<Tile> each = ring;
    for (int i = 0; i < Tile::kStages; ++i, each.place.advance()) {
      mbarrier_init(each.full(), 1);
      mbarrier_init(each.empty(), Tile::kGroups * 4);
    }
    mbarrier_init(ring.base + Tile::kFactorBarrier, 3);
    barriers_ready();
  }
  __syncthreads();
  const Run run(a.division, static_cast<int>(blockIdx.x));
  if (warp >= 4) {
    pdl_wait();
    pdl_launch_dependents();
    consume_run<Tile>(a, ring, run, flags, factors);
  } else if (threadIdx.x == 0) {
    fill_ring<Tile>(a, ring, run);
  } else {
    pdl_wait();
    pdl_launch_dependents();
    if (warp == 0) return;
    put_factors<Tile>(a.p, warp - 1, factors);
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(ring.base + Tile::kFactorBarrier);
  }
}

}  // namespace pyserve::gpu::skinny
