// linear with e4m3 weights and x rounded to e4m3, on Hopper, in the frame of gemm_frame.cuh: copies
// (W8Tile), products (multiply_w8) and results (finish_w8). out [m, n] is bfloat16 or float16.
//
// Rows of x are the operand of 64 rows per warpgroup; a warpgroup takes kWaves such blocks of 64
// rows (waves) one after the other. Weight rows are the columns, in two halves; with gate and up
// these are one of each, so that a thread has both sums of a result. Mates are tiles of different
// rows that read the same weight. A stage is 128 columns of k, which share scales. Its products are
// scaled and added to the sums in registers while the other warpgroup's products are computed; a
// thread holds kWaves sets of sums and one set of products. The scales of a stage are read one
// stage ahead: for x one per row, for the weight one per half of the tile. Where the weight's
// scales are per row, they are applied once, at the end.
//
// Numerics: sums over 128 columns of k are as precise as wgmma_e4m3 makes them, all others are
// float32; then come the weight's scale per row, the bias, the epilogue and one rounding.
// What bounds it, per stage and wave of a warpgroup: 2 kColumns clocks of products; each of its
// warps issues kColumns / 2 instructions to add them up and about 40 others.
#pragma once

#include "gpu/linear/gemm_frame.cuh"
#include "gpu/linear/gemm_sm90a.cuh"
#include "gpu/linear/w8a8.h"

namespace pyserve::gpu::gemm {

struct W8Args : Args {
  const float* x_scales;  // [groups of columns, m]
  Fp8Scale scale;
  int last_scale_row;
  bool is_block;   // whether the weight has a scale for each 128 columns
  // Else the distance between the scales of neighbouring rows: 1, or 0 for one scale.
  int scale_step;
  bool is_adding;
};

template <class T_, int kGroups_, int kWaves_, int kColumns_, bool kIsPaired_>
struct W8Tile {
  using T = T_;
  using Args = W8Args;
  static constexpr int kGroups = kGroups_;
  static constexpr int kWaves = kWaves_;
  static constexpr int kColumns = kColumns_;
  static constexpr bool kIsPaired = kIsPaired_;
  static constexpr int kOutColumns = kIsPaired ? kColumns / 2 : kColumns;
  static constexpr int kDepth = static_cast<int>(kW8GroupColumns);
  static constexpr bool kCanDivide = kGroups == 1 && !kIsPaired;
  static constexpr int kWaveBytes = 64 * kDepth;
  static constexpr int kRows = 64 * kGroups * kWaves;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  static constexpr int kProducerRegisters = kGroups == 1 ? 0 : 40;
  static constexpr int kGroupRegisters = kGroups == 1 ? 0 : 232;
  static constexpr int kSums = kColumns / 2;  // per thread and wave
  static constexpr int kHalves = 2, kHalfColumns = kColumns / kHalves;
  static constexpr int kXBytes = kRows * kDepth;
  static constexpr int kStageBytes = kXBytes + kColumns * kDepth;
  static constexpr int kExchangeBytes = kCanDivide ? kWarpgroup * kSums / 2 * 4 : 0;
  static constexpr int kStages = (kMaxSmem - 256 - kExchangeBytes) / kStageBytes;
  static constexpr int kExchangeOffset = kStages * kStageBytes;
  static constexpr int kBarrierOffset = kExchangeOffset + kExchangeBytes;
  static constexpr int kExchangeBarrier = kBarrierOffset + 2 * kStages * 8;
  static constexpr int kSmem = kExchangeBarrier + 8;
  static_assert(kGroups <= 2 && kColumns % 64 == 0 && kSmem > kMaxSmem / 2);

  __device__ static void place(const Args& a, const Tiles& tiles, int rank, int& row,
                               int& column) {
    row = (tiles.row_tile * a.mates + rank % a.mates) * kRows;
    column = tiles.column_tile * kOutColumns;
  }

  __device__ static void load_weight(const Args& a, const Ring<W8Tile>& to, int block, int column,
                                     int rank) {
    mbarrier_arrive_expect(to.full(), kStageBytes);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint32_t address = to.weight() + half * kHalfColumns * kDepth;
      const int weight_row = half_row(a, column, half);
      if (a.mates == 1) {
        tma_load(address, &a.weight, to.full(), block * kDepth, weight_row, a.weight_hint);
      } else if (half == rank) {
        tma_load_multicast(address, &a.weight, to.full(), block * kDepth, weight_row, uint16_t{3},
                           a.weight_hint);
      }
    }
  }

  // The first weight row of a half of the tile whose first column of out is `column`.
  __device__ __forceinline__ static int half_row(const Args& a, int column, int half) {
    return column + half * (kIsPaired ? a.n : kHalfColumns);
  }

  __device__ static void load_x(const Args& a, const Ring<W8Tile>& to, int block, int row,
                                int /*rank*/) {
    tma_load(to.x(), &a.x, to.full(), block * kDepth, row, L2Hint::kEvictLast);
  }

  __device__ static void prepare(const Args& a, const Ring<W8Tile>& ring) {
    if (kCanDivide && a.parts > 1) prepare_exchange(ring);
  }

  __device__ __forceinline__ static void compute(const Args& a, Ring<W8Tile> ring, int rank,
                                                 Schedule schedule, const Release& release);
};

// The scales that apply to a thread's products of one block of k.
template <class Tile>
struct W8Scales {
  float x[Tile::kWaves][2];  // of rows r and r + 8 of its fragments
  float weight[Tile::kHalves];
};

// Where a thread finds its scales for a tile.
template <class Tile>
struct W8Place {
  int rows[Tile::kWaves][2];
  int weight[Tile::kHalves];

  __device__ __forceinline__ W8Place(const W8Args& a, int row, int column) {
#pragma unroll
    for (int wave = 0; wave < Tile::kWaves; ++wave) {
#pragma unroll
      for (int j = 0; j < 2; ++j) rows[wave][j] = min(row + wave * 64 + j * 8, a.m - 1);
    }
#pragma unroll
    for (int half = 0; half < Tile::kHalves; ++half) {
      const int first = Tile::half_row(a, column, half);
      const int scale_row = min(first / a.scale.rows, a.last_scale_row);
      weight[half] = scale_row * a.scale.num_groups;
    }
  }

  __device__ __forceinline__ W8Scales<Tile> read(const W8Args& a, int block) const {
    W8Scales<Tile> scales;
    const float* of_block = a.x_scales + int64_t{block} * a.m;
#pragma unroll
    for (int wave = 0; wave < Tile::kWaves; ++wave) {
#pragma unroll
      for (int j = 0; j < 2; ++j) scales.x[wave][j] = __ldcg(of_block + rows[wave][j]);
    }
#pragma unroll
    for (int half = 0; half < Tile::kHalves; ++half) {
      scales.weight[half] = a.is_block ? __ldcg(a.scale.data + weight[half] + block) : 1.0f;
    }
    return scales;
  }
};

// Computes a warpgroup's sums over the next stages of the ring, which hold these blocks.
template <class Tile>
__device__ __forceinline__ void multiply_w8(const W8Args& a, Ring<Tile>& ring, Blocks blocks,
                                            const W8Place<Tile>& place, const Release& release,
                                            float (&sums)[Tile::kWaves][Tile::kSums]) {
  const int group = threadIdx.x / kWarpgroup - 1;
  W8Scales<Tile> next = place.read(a, blocks.first);
#pragma unroll
  for (int wave = 0; wave < Tile::kWaves; ++wave) {
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) sums[wave][i] = 0.0f;
  }
#pragma unroll 1
  for (int i = 0; i < blocks.count; ++i) {
    const W8Scales<Tile> scales = next;
    next = place.read(a, blocks.first + min(i + 1, blocks.count - 1));
    mbarrier_wait(ring.full(), ring.place.phase);
    const uint64_t weight = k_major_descriptor(ring.weight());
#pragma unroll
    for (int wave = 0; wave < Tile::kWaves; ++wave) {
      const uint64_t x =
          k_major_descriptor(ring.x() + (group * Tile::kWaves + wave) * Tile::kWaveBytes);
      float products[Tile::kSums];
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < Tile::kDepth / 32; ++j) {
        wgmma_e4m3(products, advance_descriptor(x, 32 * j), advance_descriptor(weight, 32 * j),
                   j > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      keep_registers(products);
      if (wave == Tile::kWaves - 1) release(ring.empty_in(release.mate_barriers));
#pragma unroll
      for (int half = 0; half < Tile::kHalves; ++half) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float factor = scales.x[wave][j] * scales.weight[half];
#pragma unroll
          for (int chunk = 0; chunk < Tile::kHalfColumns / 8; ++chunk) {
            const int at = half * (Tile::kSums / 2) + 4 * chunk + 2 * j;
            sums[wave][at] += factor * products[at];
            sums[wave][at + 1] += factor * products[at + 1];
          }
        }
      }
    }
    ring.place.advance();
  }
}

// Scales the sums of two neighbouring weight rows and adds their biases.
struct PairEnd {
  float2 scale, bias;

  // For weight rows first + column and the next one. The scales are 1 where the weight's are per
  // block and already applied.
  template <class T>
  __device__ __forceinline__ static PairEnd of(const W8Args& a, int first, int column) {
    PairEnd end{{1.0f, 1.0f}, bias_pair<T>(a, first, column)};
    if (!a.is_block && column < a.n) {
      const float* scales = a.scale.data + (first + column) * a.scale_step;
      end.scale = {scales[0], scales[a.scale_step]};
    }
    return end;
  }

  __device__ __forceinline__ float2 operator()(const float* sums) const {
    return {sums[0] * scale.x + bias.x, sums[1] * scale.y + bias.y};
  }
};

// Adds what out holds to the results of four chunks from `column` on, of rows `row` and row + 8.
template <class T>
__device__ __forceinline__ void add_chunks(const Target<T>& to, int row, int column,
                                           Results& results) {
  const int my_column = column + threadIdx.x % 4 * kVec;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int my_row = row + j * 8;
    uint32_t words[4] = {};
    if (my_row < to.end_row && my_column < to.end_column) {
      const uint4 others = load_vec(to.out + my_row * to.stride + my_column);
      words[0] = others.x, words[1] = others.y, words[2] = others.z, words[3] = others.w;
    }
    transpose_quad(words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_pair<T>(words[i]);
      results[j][i][0] = finish<Epilogue::kAdd>(results[j][i][0], pair.x);
      results[j][i][1] = finish<Epilogue::kAdd>(results[j][i][1], pair.y);
    }
  }
}

// Finishes and stores the results of 64 rows. `row` is the thread's first row; `column` is the
// first column of out of the tile, or of the half that the sums are for.
template <class Tile, int kCount>
__device__ __forceinline__ void finish_w8(const W8Args& a, int row, int column,
                                          const float (&sums)[kCount]) {
  using T = typename Tile::T;
  constexpr int kChunks = kCount / 4 / (Tile::kIsPaired ? 2 : 1);
  const Target<T> target{static_cast<T*>(a.out), a.out_stride, a.m, a.n};
#pragma unroll
  for (int first = 0; first < kChunks; first += 4) {
    const int first_column = column + first * kVec;
    Results results;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* sum = sums + 4 * (first + i);
      const int my_column = first_column + i * kVec + threadIdx.x % 4 * 2;
      const PairEnd end = PairEnd::of<T>(a, 0, my_column);
      const PairEnd end_of_up = Tile::kIsPaired ? PairEnd::of<T>(a, a.n, my_column) : end;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float2 pair = end(sum + 2 * j);
        if constexpr (Tile::kIsPaired) {
          const float2 up = end_of_up(sum + 4 * kChunks + 2 * j);
          pair.x = finish<Epilogue::kSiluMul>(pair.x, up.x);
          pair.y = finish<Epilogue::kSiluMul>(pair.y, up.y);
        }
        results[j][i][0] = pair.x;
        results[j][i][1] = pair.y;
      }
    }
    if (!Tile::kIsPaired && a.is_adding) add_chunks(target, row, first_column, results);
    store_chunks(target, row, first_column, 4, results);
  }
}

template <class T_, int kGroups_, int kWaves_, int kColumns_, bool kIsPaired_>
__device__ __forceinline__ void W8Tile<T_, kGroups_, kWaves_, kColumns_, kIsPaired_>::compute(
    const Args& a, Ring<W8Tile> ring, int rank, Schedule schedule, const Release& release) {
  const Blocks blocks = blocks_of<W8Tile>(a, rank);
  const int group = threadIdx.x / kWarpgroup - 1, lane = threadIdx.x % kWarpSize;
  const int my_row = group * kWaves * 64 + threadIdx.x % kWarpgroup / kWarpSize * 16 + lane / 4;
  float sums[kWaves][kSums];
  for (; schedule.has_more(); schedule.advance()) {
    int row, column;
    place(a, schedule.tiles(a), rank, row, column);
    row += my_row;
    multiply_w8<W8Tile>(a, ring, blocks, W8Place<W8Tile>(a, row, column), release, sums);
    if constexpr (kCanDivide) {
      if (a.parts > 1) {
        float mine[kSums / 2];
        exchange<W8Tile>(ring, rank, sums[0], mine);
        finish_w8<W8Tile>(a, row, column + rank * kHalfColumns, mine);
        continue;
      }
    }
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
      finish_w8<W8Tile>(a, row + wave * 64, column, sums[wave]);
    }
  }
}

}  // namespace pyserve::gpu::gemm
