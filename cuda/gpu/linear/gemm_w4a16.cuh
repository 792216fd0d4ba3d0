// The product of 17 rows of x and more with a matrix of 4-bit integers on Hopper, in the frame of
// gemm_frame.cuh: copies (W4Tile), products (multiply_w4), results (finish_w4).
//
// out^T = W x^T: weight is the operand of 64 rows a warpgroup, from registers, and x the columns. The
// words of a block (pyserve/ops/w4a16.py) are fragments of it but for their width: a warp takes a
// strip of 16 rows. While four products, of 64 columns of k, are computed, the words of the next four
// are widened into the other set of registers. A stage is 128 columns: a piece of each strip with its
// records, as they lie in memory, and two panels of x.
// With a gate and an up a warp takes 8 rows of each, as the two halves of its fragments, so that a
// thread has both sums of a result.
// A warp waits for its words, for the products before and for a stage: with two warpgroups an SM does
// half of what its issue slots allow. So there are up to four where a matrix has enough strips. Four
// that take turns with the stages of the same strips are no faster: what holds up tiles of 64 rows of
// weight is to bring x.
//
// Numerics: a weight is (q - z) s, where s is rounded to 16 bits, which those of a checkpoint in this
// type are, and rounded once: plain numbers are no better. float32 sums over k in blocks of 16; where
// k is divided, the sum of both parts; then the bias, the epilogue and one rounding.
// Instructions of a lane for a word: 11 to widen it (float16 9), 4 to scale, beside kTokens / 2 clocks
// of products; of a warp that is 2 clocks for each of 7 (5) of them and one for the others.
#pragma once

#include <algorithm>

#include "gpu/linear/gemm_frame.cuh"
#include "gpu/linear/w4a16.h"
#include "gpu/linear/w4a16_words.cuh"

namespace pyserve::gpu::gemm {

struct W4Args : Args {
  int piece_bytes;  // of a strip, in a stage
  // In a piece, from a block to the next; from the piece to the record of its first 32 columns; and
  // from there to that of the next block, and of the other half of a block.
  int block_bytes, record_offset, record_block_bytes, record_half_bytes;
  int up_strip;  // where the rows of up begin
  bool is_adding;

  // Of pieces of 128 columns.
  void set_format(int64_t group_size) {
    constexpr int block = 4 * static_cast<int>(kW4BlockWords);
    constexpr int record = 4 * static_cast<int>(kW4RecordWords);
    const bool is_unit_whole = group_size == 128;  // one unit is a piece, else two are
    record_offset = is_unit_whole ? 2 * block : block;
    record_half_bytes = group_size == 32 ? record : 0;
    block_bytes = is_unit_whole ? block : block + record + record_half_bytes;
    record_block_bytes = is_unit_whole ? 0 : block_bytes;
    piece_bytes = is_unit_whole ? 2 * block + record : 2 * block_bytes;
  }
};

// Bytes of a WorkList, which is aligned as the stages are.
constexpr int kListBytes = 9 * 1024;

// Grouped: of experts, whose CTAs hold a WorkList and divide k in no way.
template <class T_, int kGroups_, int kTokens_, bool kIsPaired_, bool kIsGrouped_ = false>
struct W4Tile {
  using T = T_;
  using Args = W4Args;
  static constexpr int kGroups = kGroups_;
  static constexpr int kTokens = kTokens_;  // rows of x
  static constexpr bool kIsPaired = kIsPaired_;
  static constexpr int kDepth = 128;
  static constexpr bool kCanDivide = !kIsGrouped_;
  static constexpr int kPanels = kDepth / 64;
  static constexpr int kPanelBytes = kTokens * 128;
  static constexpr int kWeightRows = 64 * kGroups;
  static constexpr int kStrips = kWeightRows / static_cast<int>(kStripRows);
  static constexpr int kOutColumns = kIsPaired ? kWeightRows / 2 : kWeightRows;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  static constexpr bool kHasMany = kGroups == 4;  // else the launch gives enough to all
  static constexpr int kProducerRegisters = kHasMany ? 32 : 0, kGroupRegisters = kHasMany ? 112 : 0;
  static constexpr int kSums = kTokens / 2;  // of a thread
  static constexpr int kMaxPieceBytes = 1280;  // in groups of 32
  static constexpr int kXBytes = kPanels * kPanelBytes;
  static constexpr int kStageBytes = kXBytes + kStrips * kMaxPieceBytes;
  static constexpr int kExchangeBytes = kIsGrouped_ ? 0 : kGroups * kWarpgroup * kSums / 2 * 4;
  static constexpr int kListOrExchangeBytes = kIsGrouped_ ? kListBytes : kExchangeBytes;
  static constexpr int kStages = (kMaxSmem - 256 - kListOrExchangeBytes) / kStageBytes;
  static constexpr int kExchangeOffset = kStages * kStageBytes;
  static constexpr int kBarrierOffset = kExchangeOffset + kExchangeBytes;
  static constexpr int kExchangeBarrier = kBarrierOffset + 2 * kStages * 8;
  static constexpr int kSmem = kExchangeBarrier + 8;
  static_assert(kStageBytes % 1024 == 0 && kSmem <= kMaxSmem && kSmem > kMaxSmem / 2);

  __device__ static void place(const Args& /*a*/, const Tiles& tiles, int /*rank*/, int& row,
                               int& column) {
    row = tiles.row_tile * kTokens;
    column = tiles.column_tile * kOutColumns;
  }

  __device__ static void load_weight(const Args& a, const Ring<W4Tile>& to, int block, int column,
                                     int /*rank*/) {
    mbarrier_arrive_expect(to.full(), kXBytes + kStrips * a.piece_bytes);
    const int strip = column / static_cast<int>(kStripRows), at = block * (a.piece_bytes / 8);
    tma_load(to.weight(), &a.weight, to.full(), at, strip, a.weight_hint);
    if (kIsPaired) {
      tma_load(to.weight() + kStrips / 2 * a.piece_bytes, &a.weight, to.full(), at,
               a.up_strip + strip, a.weight_hint);
    }
  }

  __device__ static void load_x(const Args& a, const Ring<W4Tile>& to, int block, int row,
                                int /*rank*/) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      tma_load(to.x() + panel * kPanelBytes, &a.x, to.full(), (block * kPanels + panel) * 64, row,
               L2Hint::kEvictLast);
    }
  }

  __device__ static void prepare(const Args& a, const Ring<W4Tile>& ring) {
    if (a.parts > 1) prepare_exchange(ring);
  }

  __device__ __forceinline__ static void compute(const Args& a, Ring<W4Tile> ring, int rank,
                                                 Schedule schedule, const Release& release);
};

// Where a lane finds its words and records in a piece of weight, and which half of the rows it takes
// of two strips.
struct W4Lane {
  uint32_t words[2];    // of the strip; of up's
  uint32_t records[2];  // of the rows g and g + 8 of its fragments
  int half;

  template <class Tile>
  __device__ static W4Lane of(const W4Args& a) {
    const int warp = threadIdx.x / kWarpSize - 4, lane = threadIdx.x % kWarpSize;
    const uint32_t row = lane / 4 * 4, at = lane * 16;
    if constexpr (Tile::kIsPaired) {
      const uint32_t gate = warp / 2 * a.piece_bytes;
      const uint32_t up = gate + Tile::kStrips / 2 * a.piece_bytes;
      const uint32_t record = a.record_offset + warp % 2 * 32 + row;
      return {{gate + at, up + at}, {gate + record, up + record}, warp % 2};
    } else {
      const uint32_t strip = warp * a.piece_bytes, record = strip + a.record_offset + row;
      return {{strip + at, 0}, {record, record + 32}, 0};
    }
  }
};

// What a lane reads of a block: words, one for 16 columns, as of a strip whose rows are those of its
// fragments, and for each half of its columns the records of rows g and g + 8.
struct W4Block {
  uint32_t words[4], records[2][2];

  template <class Tile>
  __device__ __forceinline__ void read(const W4Args& a, uint32_t weight, int block,
                                       const W4Lane& lane) {
    const uint32_t at = weight + block * a.block_bytes;
    const uint4 first = load_shared(at + lane.words[0]);
    words[0] = first.x, words[1] = first.y, words[2] = first.z, words[3] = first.w;
    if constexpr (Tile::kIsPaired) {
      // Of each the integers of 8 rows, every second one: gate's become the even ones, up's the odd.
      const uint4 second = load_shared(at + lane.words[1]);
      const uint32_t up[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = (words[i] >> 4 * lane.half & 0x0f0f0f0f) |
                   (up[i] << 4 * (1 - lane.half) & 0xf0f0f0f0);
      }
    }
    const uint32_t record = weight + block * a.record_block_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        records[half][row] =
            load_shared_word(record + half * a.record_half_bytes + lane.records[row]);
      }
    }
  }

  // Of its columns [16 s, 16 s + 16) for s in 0 .. 3: what a product reads.
  template <class T>
  __device__ __forceinline__ void widen(uint32_t (&rows)[4][4]) const {
    constexpr uint32_t kMinusZeros = 0x80008000;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t scales[2], minus[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t record = records[half][row];
        scales[row] = pack_pair<T>(scale_of(record), scale_of(record));
        minus[row] = minus_of<T>(record, row);
      }
#pragma unroll
      for (int s = 2 * half; s < 2 * half + 2; ++s) {
        widen_word<T>(words[s], minus, rows[s]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          rows[s][i] = fma_pair<T>(rows[s][i], scales[i % 2], kMinusZeros);
        }
      }
    }
  }
};

// A warpgroup's sums over `count` stages of the ring.
template <class Tile>
__device__ __forceinline__ void multiply_w4(const W4Args& a, Ring<Tile>& ring, int count,
                                            const Release& release, float (&sums)[Tile::kSums]) {
  using T = typename Tile::T;
  const W4Lane lane = W4Lane::of<Tile>(a);
  uint32_t rows[2][4][4];  // of each of the two blocks: what its four products read
  uint32_t before = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    mbarrier_wait(ring.full(), ring.place.phase);
    const uint64_t x = k_major_descriptor(ring.x());
    W4Block blocks[2];
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      blocks[block].template read<Tile>(a, ring.weight(), block, lane);
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      wgmma_wait<1>();  // the products that have read these registers are complete
#pragma unroll
      for (int s = 0; s < 4; ++s) keep_registers(rows[block][s]);
      if (block == 1 && i > 0) release(before);  // so are the last ones of the stage before
      blocks[block].template widen<T>(rows[block]);
#pragma unroll
      for (int s = 0; s < 4; ++s) keep_registers(rows[block][s]);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        wgmma<T, Major::kK>(sums, rows[block][s],
                            advance_descriptor(x, block * Tile::kPanelBytes + 32 * s),
                            i > 0 || block > 0 || s > 0);
      }
      wgmma_commit();
    }
    before = ring.empty_in(release.mate_barriers);
    ring.place.advance();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < 2; ++block) {
#pragma unroll
    for (int s = 0; s < 4; ++s) keep_registers(rows[block][s]);
  }
  keep_registers(sums);
  release(before);
}

// The results of rows of out from `row` to end_row, 8 for each 4 sums, in the tile whose first column
// this is.
template <class Tile, int kCount>
__device__ __forceinline__ void finish_w4(const W4Args& a, int row, int end_row, int column,
                                          const float (&sums)[kCount]) {
  using T = typename Tile::T;
  constexpr int kHalves = Tile::kIsPaired ? 1 : 2;        // of a warp's columns, 8 each
  constexpr int kChunks = kCount / 4 * kHalves;           // of 8 rows and 8 columns
  const int warp = threadIdx.x / kWarpSize - 4, lane = threadIdx.x % kWarpSize, quad = lane % 4;
  column += warp * 8 * kHalves;
  // A lane computes columns lane / 4 of chunks, for two rows each; it loads and stores a row of chunk
  // first + quad.
  const T* bias = static_cast<const T*>(a.bias);
  float biases[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = column + lane / 4 + (Tile::kIsPaired ? 0 : 8 * half);
    if (bias != nullptr && at < a.n) {
      biases[half] = to_float(bias[at + (Tile::kIsPaired ? half * a.n : 0)]);
    }
  }
#pragma unroll
  for (int first = 0; first < kChunks; first += 4) {
    const int chunk = first + quad;
    const int my_row = row + chunk / kHalves * 8 + lane / 4;
    const int my_column = column + chunk % kHalves * 8;
    const bool is_valid = chunk < kChunks && my_row < end_row && my_column < a.n;
    T* target = static_cast<T*>(a.out) + my_row * a.out_stride + my_column;
    uint32_t words[4] = {};
    if (!Tile::kIsPaired && a.is_adding) {
      if (is_valid) {
        const uint4 others = load_vec(target);
        words[0] = others.x, words[1] = others.y, words[2] = others.z, words[3] = others.w;
      }
      transpose_quad(words);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = transpose_8x8(words[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i >= kChunks) continue;
      float pair[2];
      if constexpr (Tile::kIsPaired) {
        const float* both = sums + 4 * (first + i);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          pair[e] = finish<Epilogue::kSiluMul>(both[e] + biases[0], both[2 + e] + biases[1]);
        }
      } else {
        const int half = i % 2;
        const float* sum = sums + (first + i) / 2 * 4 + 2 * half;
        const float2 others = unpack_pair<T>(words[i]);  // zeros where nothing is added to
        pair[0] = finish<Epilogue::kAdd>(sum[0] + biases[half], others.x);
        pair[1] = finish<Epilogue::kAdd>(sum[1] + biases[half], others.y);
      }
      words[i] = transpose_8x8(pack_pair<T>(pair[0], pair[1]));
    }
    transpose_quad(words);
    if (is_valid) store_vec(target, {words[0], words[1], words[2], words[3]});
  }
}

template <class T_, int kGroups_, int kTokens_, bool kIsPaired_, bool kIsGrouped_>
__device__ __forceinline__ void
W4Tile<T_, kGroups_, kTokens_, kIsPaired_, kIsGrouped_>::compute(
    const Args& a, Ring<W4Tile> ring, int rank, Schedule schedule, const Release& release) {
  const int count = blocks_of<W4Tile>(a, rank).count;
  float sums[kSums];
  for (; schedule.has_more(); schedule.advance()) {
    int row, column;
    place(a, schedule.tiles(a), rank, row, column);
    multiply_w4<W4Tile>(a, ring, count, release, sums);
    if (a.parts == 1) {
      finish_w4<W4Tile>(a, row, a.m, column, sums);
      continue;
    }
    float mine[kSums / 2];
    exchange<W4Tile>(ring, rank, sums, mine);
    finish_w4<W4Tile>(a, row + rank * (kTokens / 2), a.m, column, mine);
  }
}

}  // namespace pyserve::gpu::gemm
