// linear with 4-bit integers for more than 16 rows of x on Hopper, in the frame of gemm_frame.cuh:
// copies (W4Tile), products (multiply_w4) and results (finish_w4). x [m, k] and out [m, n] are
// bfloat16 or float16.
//
// It computes out^T = W x^T: the weight is the operand of 64 rows per warpgroup, from registers,
// and x is the columns. Apart from their width, the words of a block (pyserve/ops/w4a16.py) are
// fragments of the weight operand: each warp takes a strip of 16 rows. While four products (64
// columns of k) are computed, the words of the next four are widened into a second set of
// registers. A stage is 128 columns of k: a piece of each strip with its records, as they lie in
// memory, and two panels of x. With gate and up, two warps of a warpgroup take a strip of each.
// After the products each gives the other the sums of half of the tokens, so that a thread has both
// sums of its results. To give each warp 8 rows of gate and 8 of up instead would take a quarter
// more instructions. A warp waits for its words, for the products before, and for a stage; with
// only two warpgroups an SM does half of what its issue slots allow. So there are up to four
// warpgroups, on as many strips. Where a matrix has too few strips, they work on the same strips
// instead and take turns: warpgroup t of kTurns takes stages t, t + kTurns, and so on. Each frees
// its stage as soon as it has multiplied, and their sums are added at the end.
//
// Numerics: a weight is (q - z) s, rounded once, where s is rounded to 16 bits; the scales of a
// checkpoint in this type have 16 bits already. So the weights are as good as dequantised ones.
// Sums over k are float32 in blocks of 16; where k is divided, the sums of all turns and of both
// parts are added. Then come the bias, the epilogue and one rounding.
// What bounds it: per word, a lane needs 11 instructions to widen it (float16: 9) and 4 to scale
// it; for a warp, 7 (5) of these take 2 clocks each and the others one. The products take kTokens /
// 2 clocks per word at the same time. With everything else, a stage takes 190 (176) instructions of
// a lane with groups of 128, and 226 (214) where there may be more records.
#pragma once

#include <algorithm>

#include "gpu/linear/gemm_frame.cuh"
#include "gpu/linear/w4a16.h"
#include "gpu/linear/w4a16_words.cuh"

namespace pyserve::gpu::gemm {

// How a piece (128 columns of a strip) lies in memory.
struct W4PieceFormat {
  int piece_bytes;
  // In bytes: from one block to the next; from the begin of the piece to the record of its first 32
  // columns; from there to the record of the next block; and to that of the other half of a block.
  int block_bytes, record_offset, record_block_bytes, record_half_bytes;

  __host__ __device__ static constexpr W4PieceFormat of(int64_t group_size) {
    constexpr int kBlock = 4 * static_cast<int>(kW4BlockWords);
    constexpr int kRecord = 4 * static_cast<int>(kW4RecordWords);
    if (group_size == kWholeGroup) return {2 * kBlock + kRecord, kBlock, 2 * kBlock, 0, 0};
    const int half_bytes = group_size == 32 ? kRecord : 0;
    const int block_bytes = kBlock + kRecord + half_bytes;
    return {2 * block_bytes, block_bytes, kBlock, block_bytes, half_bytes};
  }

  static constexpr int64_t kWholeGroup = 128;  // such a piece has one record
};

struct W4Args : Args {
  W4PieceFormat format;
  int x_rows;    // rows of x per tile, up to kTokens; results of other rows are not stored
  int up_strip;  // the first strip of up
  bool is_adding;
};

// Bytes reserved for a WorkList, rounded up so that the stages stay aligned.
constexpr int kListBytes = 9 * 1024;

// kIsGrouped: for the experts' products, whose CTAs also hold a WorkList and never divide k.
// kIsWhole: for groups of 128 only, whose one record per piece is prepared once per stage. kTurns:
// see above.
template <class T_, int kGroups_, int kTokens_, bool kIsPaired_, bool kIsGrouped_ = false,
          int kTurns_ = 1, bool kIsWhole_ = false>
struct W4Tile {
  using T = T_;
  using Args = W4Args;
  static constexpr int kGroups = kGroups_;
  static constexpr int kTokens = kTokens_;  // rows of x
  static constexpr bool kIsPaired = kIsPaired_;
  static constexpr int kTurns = kTurns_;  // with several turns a CTA computes only one tile
  static constexpr bool kIsWhole = kIsWhole_;
  static constexpr int kDepth = 128;
  static constexpr bool kIsLong = kTokens > 128;  // sums take half of the registers
  static constexpr bool kCanDivide = !kIsGrouped_ && !kIsLong;
  static constexpr int kPanels = kDepth / 64;
  static constexpr int kPanelBytes = kTokens * 128;
  static constexpr int kWeightRows = 64 * kGroups;
  static constexpr int kStrips = kWeightRows / static_cast<int>(kStripRows);
  static constexpr int kOutColumns = kIsPaired ? kWeightRows / 2 : kWeightRows;
  static constexpr int kThreads = kWarpgroup * (kGroups * kTurns + 1);
  // Otherwise the launch gives enough registers to all threads.
  static constexpr bool kHasMany = kGroups * kTurns == 4;
  static constexpr int kProducerRegisters = kHasMany ? 32 : kIsLong ? 40 : 0;
  static constexpr int kGroupRegisters = kHasMany ? 112 : kIsLong ? 232 : 0;
  static constexpr int kSums = kTokens / 2;  // per thread
  static constexpr int kMaxPieceBytes = 1280;  // for groups of 32
  static constexpr int kXBytes = kPanels * kPanelBytes;
  static constexpr int kStageBytes = kXBytes + kStrips * kMaxPieceBytes;
  // Words that a thread can send to another at a time: all of them, where the stages leave the
  // room.
  static constexpr int kExchangeWords = !kIsPaired && !kCanDivide ? 0 : kIsLong ? 4 : kSums / 2;
  static constexpr int kExchangeBytes = kGroups * kWarpgroup * kExchangeWords * 4;
  static constexpr int kStages =
      (kMaxSmem - 256 - (kIsGrouped_ ? kListBytes : 0) - kExchangeBytes) / kStageBytes;
  static constexpr int kExchangeOffset = kStages * kStageBytes;
  static constexpr int kBarrierOffset = kExchangeOffset + kExchangeBytes;
  static constexpr int kExchangeBarrier = kBarrierOffset + 2 * kStages * 8;
  static constexpr int kSmem = kExchangeBarrier + 8;
  static_assert(kStageBytes % 1024 == 0 && kSmem <= kMaxSmem && kSmem > kMaxSmem / 2);
  static_assert(kTurns == 1 || (!kIsGrouped_ && kTurns <= kStages));

  __device__ static constexpr W4PieceFormat format(const Args& a) {
    return kIsWhole ? W4PieceFormat::of(W4PieceFormat::kWholeGroup) : a.format;
  }

  // The strip of a stage that a warp takes. The strips of gate lie before those of up.
  __device__ static int strip_of(int warp) {
    return kIsPaired ? warp / 4 * 2 + warp % 2 + warp / 2 % 2 * (kStrips / 2) : warp;
  }

  __device__ static void place(const Args& a, const Tiles& tiles, int /*rank*/, int& row,
                               int& column) {
    row = tiles.row_tile * a.x_rows;
    column = tiles.column_tile * kOutColumns;
  }

  __device__ static void load_weight(const Args& a, const Ring<W4Tile>& to, int block, int column,
                                     int /*rank*/) {
    const int piece_bytes = format(a).piece_bytes;
    mbarrier_arrive_expect(to.full(), kPanels * 128 * a.x_rows + kStrips * piece_bytes);
    const int strip = column / static_cast<int>(kStripRows), at = block * (piece_bytes / 8);
    tma_load(to.weight(), &a.weight, to.full(), at, strip, a.weight_hint);
    if (kIsPaired) {
      tma_load(to.weight() + kStrips / 2 * piece_bytes, &a.weight, to.full(), at,
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

// The offsets of a lane's words, and of the record of its first row, within a stage's weight.
struct W4Lane {
  uint32_t words, records;

  template <class Tile>
  __device__ static W4Lane of(const W4Args& a) {
    const int warp = (threadIdx.x / kWarpSize - 4) % (4 * Tile::kGroups);
    const int lane = threadIdx.x % kWarpSize;
    const W4PieceFormat format = Tile::format(a);
    const uint32_t strip = Tile::strip_of(warp) * format.piece_bytes;
    return {strip + lane * 16, strip + format.record_offset + lane / 4 * 4};
  }
};

// What a lane widens the words of a group with, for rows g and g + 8 of its fragments: the scale
// and minus the zero point, each twice in a word.
template <class T>
struct W4Group {
  uint32_t scales[2], minus[2];

  __device__ __forceinline__ static W4Group of(const uint32_t (&records)[2]) {
    W4Group group;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float scale = scale_of(records[row]);
      group.scales[row] = pack_pair<T>(scale, scale);
      group.minus[row] = minus_of<T>(records[row], row);
    }
    return group;
  }
};

// What a lane reads of a stage: the words of its two blocks, one word for each 16 columns; and the
// records of rows g and g + 8, one for each half of a block, or one for the whole piece.
template <class Tile>
struct W4Stage {
  using T = typename Tile::T;
  static constexpr int kRecords = Tile::kIsWhole ? 1 : 4;
  uint32_t words[2][4], records[kRecords][2];
  W4Group<T> group;

  __device__ __forceinline__ void read(const W4Args& a, uint32_t weight, const W4Lane& lane) {
    const W4PieceFormat format = Tile::format(a);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint4 all = load_shared(weight + block * format.block_bytes + lane.words);
      words[block][0] = all.x, words[block][1] = all.y;
      words[block][2] = all.z, words[block][3] = all.w;
    }
#pragma unroll
    for (int i = 0; i < kRecords; ++i) {
      const uint32_t record = weight + i / 2 * format.record_block_bytes +
                              i % 2 * format.record_half_bytes + lane.records;
      records[i][0] = load_shared_word(record);
      records[i][1] = load_shared_word(record + 32);
    }
  }

  // Widens columns [16 s, 16 s + 16) of a block, for s in 0 .. 3, to the operand of four products.
  // Block 0 must be widened first.
  __device__ __forceinline__ void widen(int block, uint32_t (&rows)[4][4]) {
    constexpr uint32_t kMinusZeros = 0x80008000;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int column = 4 * block + s;
      if (column == 0 || (!Tile::kIsWhole && s % 2 == 0)) {
        group = W4Group<T>::of(records[Tile::kIsWhole ? 0 : column / 2]);
      }
      widen_word<T>(words[block][s], group.minus, rows[s]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rows[s][i] = fma_pair<T>(rows[s][i], group.scales[i % 2], kMinusZeros);
      }
    }
  }
};

// Computes a warpgroup's sums over the stages of its turn, out of the next `count` stages. The ring
// is already at the first of them.
template <class Tile>
__device__ __forceinline__ void multiply_w4(const W4Args& a, Ring<Tile>& ring, int turn, int count,
                                            const Release& release, float (&sums)[Tile::kSums]) {
  using T = typename Tile::T;
  if constexpr (Tile::kTurns > 1) {  // a turn may have no stage at all
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) sums[i] = 0.0f;
  }
  const W4Lane lane = W4Lane::of<Tile>(a);
  uint32_t rows[2][4][4];  // for each of the two blocks: the operand of its four products
  uint32_t before = 0;
#pragma unroll 1
  for (int i = turn; i < count; i += Tile::kTurns) {
    mbarrier_wait(ring.full(), ring.place.phase);
    const uint64_t x = k_major_descriptor(ring.x());
    W4Stage<Tile> stage;
    stage.read(a, ring.weight(), lane);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      wgmma_wait<1>();  // the products that have read these registers are complete
#pragma unroll
      for (int s = 0; s < 4; ++s) keep_registers(rows[block][s]);
      // The products of the stage before are complete, too.
      if (Tile::kTurns == 1 && block == 1 && i > 0) release(before);
      stage.widen(block, rows[block]);
#pragma unroll
      for (int s = 0; s < 4; ++s) keep_registers(rows[block][s]);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        wgmma<T, Major::kK>(sums, rows[block][s],
                            advance_descriptor(x, block * Tile::kPanelBytes + 32 * s),
                            Tile::kTurns > 1 || i > 0 || block > 0 || s > 0);
      }
      wgmma_commit();
    }
    before = ring.empty_in(release.mate_barriers);
    if constexpr (Tile::kTurns > 1) {
      // Other warpgroups multiply meanwhile, and the stage should be refilled at once.
      wgmma_wait<0>();
      keep_registers(sums);
      release(before);
    }
    ring.place.advance(Tile::kTurns);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < 2; ++block) {
#pragma unroll
    for (int s = 0; s < 4; ++s) keep_registers(rows[block][s]);
  }
  keep_registers(sums);
  if constexpr (Tile::kTurns == 1) release(before);
}

// Adds up the sums of all turns in the ring's memory, which is no longer filled. Returns true for
// the threads of the first turn, which have the total then.
template <class Tile>
__device__ __forceinline__ bool add_turns(const Ring<Tile>& ring, int turn,
                                          float (&sums)[Tile::kSums]) {
  constexpr int kThreads = Tile::kGroups * kWarpgroup;  // threads per turn
  constexpr uint32_t kChunkBytes = kThreads * 16, kTurnBytes = Tile::kSums / 4 * kChunkBytes;
  static_assert((Tile::kTurns - 1) * kTurnBytes <= Tile::kStages * Tile::kStageBytes);
  const uint32_t first = ring.base + (threadIdx.x - kWarpgroup) % kThreads * 16;
  named_barrier_sync(1, Tile::kTurns * kThreads);  // after this no thread reads stages any more
  if (turn > 0) {
#pragma unroll
    for (int i = 0; i < Tile::kSums / 4; ++i) {
      store_shared(first + (turn - 1) * kTurnBytes + i * kChunkBytes,
                   uint4{__float_as_uint(sums[4 * i]), __float_as_uint(sums[4 * i + 1]),
                         __float_as_uint(sums[4 * i + 2]), __float_as_uint(sums[4 * i + 3])});
    }
  }
  named_barrier_sync(1, Tile::kTurns * kThreads);
  if (turn > 0) return false;
#pragma unroll
  for (int other = 0; other < Tile::kTurns - 1; ++other) {
#pragma unroll
    for (int i = 0; i < Tile::kSums / 4; ++i) {
      const uint4 sent = load_shared(first + other * kTurnBytes + i * kChunkBytes);
      sums[4 * i] += __uint_as_float(sent.x);
      sums[4 * i + 1] += __uint_as_float(sent.y);
      sums[4 * i + 2] += __uint_as_float(sent.z);
      sums[4 * i + 3] += __uint_as_float(sent.w);
    }
  }
  return true;
}

// For two warps, one with a strip of gate and one with the strip of up: each gives the other the
// sums of half of the tokens. Afterwards gate's warp has both sums for the first half of the tokens
// and up's warp for the second. One call does this for kPiece sums of each half, from `first` on.
template <class Tile, int kCount, int kPiece>
__device__ __forceinline__ void pair_up(const Ring<Tile>& ring, bool is_up,
                                        const float (&sums)[kCount], int first,
                                        float (&gates)[kPiece], float (&ups)[kPiece]) {
  constexpr int kHalf = kCount / 2, kRound =
      kPiece < Tile::kExchangeWords ? kPiece : Tile::kExchangeWords;
  static_assert(kHalf % kPiece == 0 && kPiece % kRound == 0);
  constexpr uint32_t kChunkBytes = Tile::kGroups * kWarpgroup * 16;
  const uint32_t thread = threadIdx.x - kWarpgroup;  // index among all threads that multiply
  const uint32_t place = ring.base + Tile::kExchangeOffset;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
#pragma unroll
  for (int begin = 0; begin < kPiece; begin += kRound) {
    named_barrier_sync(warpgroup, kWarpgroup);  // what was stored there before has been read
#pragma unroll
    for (int i = 0; i < kRound; i += 4) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = first + begin + i + j;
        words[j] = __float_as_uint(is_up ? sums[at] : sums[kHalf + at]);
      }
      store_shared(place + (thread ^ 64) * 16 + i / 4 * kChunkBytes,
                   uint4{words[0], words[1], words[2], words[3]});
    }
    named_barrier_sync(warpgroup, kWarpgroup);
#pragma unroll
    for (int i = 0; i < kRound; i += 4) {
      const uint4 sent = load_shared(place + thread * 16 + i / 4 * kChunkBytes);
      const uint32_t words[4] = {sent.x, sent.y, sent.z, sent.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int to = begin + i + j, at = first + to;
        const float other = __uint_as_float(words[j]);
        gates[to] = is_up ? other : sums[at];
        ups[to] = is_up ? sums[kHalf + at] : other;
      }
    }
  }
}

// Stores the results of rows `row` to end_row - 1 of out, 8 rows for each 4 sums, in the tile whose
// first column is given. With gate and up, `sums` are those of gate; otherwise `ups` is not read.
template <class Tile, int kCount>
__device__ __forceinline__ void store_w4(const W4Args& a, int row, int end_row, int column,
                                         const float (&sums)[kCount], const float (&ups)[kCount]) {
  using T = typename Tile::T;
  constexpr int kHalves = 2;                     // halves of a warp's columns, 8 columns each
  constexpr int kChunks = kCount / 4 * kHalves;  // chunks of 8 rows by 8 columns
  constexpr int kOutStrips = Tile::kOutColumns / static_cast<int>(kStripRows);
  const int warp = threadIdx.x / kWarpSize - 4, lane = threadIdx.x % kWarpSize, quad = lane % 4;
  column += Tile::strip_of(warp) % kOutStrips * static_cast<int>(kStripRows);
  // A lane computes column lane / 4 of each chunk, for two rows. After the transposes it loads and
  // stores one row of chunk first + quad.
  const T* bias = static_cast<const T*>(a.bias);
  float biases[kHalves] = {}, up_biases[kHalves] = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const int at = column + lane / 4 + 8 * half;
    if (bias == nullptr || at >= a.n) continue;
    biases[half] = to_float(bias[at]);
    if (Tile::kIsPaired) up_biases[half] = to_float(bias[at + a.n]);
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
      const int half = i % kHalves, sum = (first + i) / kHalves * 4 + 2 * half;
      const float2 others = unpack_pair<T>(words[i]);  // zeros where nothing is added
      float pair[2] = {sums[sum] + biases[half], sums[sum + 1] + biases[half]};
      if constexpr (Tile::kIsPaired) {
        pair[0] = finish<Epilogue::kSiluMul>(pair[0], ups[sum] + up_biases[half]);
        pair[1] = finish<Epilogue::kSiluMul>(pair[1], ups[sum + 1] + up_biases[half]);
      } else {
        pair[0] = finish<Epilogue::kAdd>(pair[0], others.x);
        pair[1] = finish<Epilogue::kAdd>(pair[1], others.y);
      }
      words[i] = transpose_8x8(pack_pair<T>(pair[0], pair[1]));
    }
    transpose_quad(words);
    if (is_valid) store_vec(target, {words[0], words[1], words[2], words[3]});
  }
}

// Stores the results, given the sums of each warp's strip.
template <class Tile, int kCount>
__device__ __forceinline__ void finish_w4(const W4Args& a, const Ring<Tile>& ring, int row,
                                          int end_row, int column, const float (&sums)[kCount]) {
  if constexpr (Tile::kIsPaired) {
    constexpr int kHalf = kCount / 2, kPiece = kHalf < 32 ? kHalf : 32;  // what registers allow
    const int is_up = threadIdx.x / 64 % 2;
#pragma unroll
    for (int first = 0; first < kHalf; first += kPiece) {
      float gates[kPiece], ups[kPiece];
      pair_up<Tile>(ring, is_up, sums, first, gates, ups);
      store_w4<Tile>(a, row + is_up * kCount + 2 * first, end_row, column, gates, ups);
    }
  } else {
    store_w4<Tile>(a, row, end_row, column, sums, sums);
  }
}

template <class T_, int kGroups_, int kTokens_, bool kIsPaired_, bool kIsGrouped_, int kTurns_,
          bool kIsWhole_>
__device__ __forceinline__ void
W4Tile<T_, kGroups_, kTokens_, kIsPaired_, kIsGrouped_, kTurns_, kIsWhole_>::compute(
    const Args& a, Ring<W4Tile> ring, int rank, Schedule schedule, const Release& release) {
  const int count = blocks_of<W4Tile>(a, rank).count;
  // A shuffle, because the compiler then knows that the turn, and so the address of the stages, is
  // the same for a whole warp.
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const int turn = kTurns == 1 ? 0 : __shfl_sync(kFullMask, warpgroup / kGroups, 0);
  ring.place.advance(turn);
  float sums[kSums];
  for (; schedule.has_more(); schedule.advance()) {
    int row, column;
    place(a, schedule.tiles(a), rank, row, column);
    multiply_w4<W4Tile>(a, ring, turn, count, release, sums);
    if constexpr (kTurns > 1) {
      if (!add_turns<W4Tile>(ring, turn, sums)) return;
    }
    const int end_row = min(a.m, row + a.x_rows);
    if (!kCanDivide || a.parts == 1) {
      finish_w4<W4Tile>(a, ring, row, end_row, column, sums);
      continue;
    }
    if constexpr (kCanDivide) {
      float mine[kSums / 2];
      exchange<W4Tile>(ring, rank, sums, mine);
      finish_w4<W4Tile>(a, ring, row + rank * (kTokens / 2), end_row, column, mine);
    }
  }
}

}  // namespace pyserve::gpu::gemm
