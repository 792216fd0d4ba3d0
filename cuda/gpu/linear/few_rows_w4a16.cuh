// linear with 4-bit integers (pyserve/ops/w4a16.py, which defines strip, unit, block and record)
// for few rows of x: out [m, n] = x [m, k] times weight [n, k]^T; x and out are bfloat16 or
// float16. The work is to stream the integers once, as fast as memory delivers them, and to widen
// them to 16 bits on the way.
//
// Work: there is one CTA per SM. A CTA takes an even share of the strips (16 rows of weight), two
// at a time, and its warps split k into pieces of 128 columns. Every warp has a ring of stages of
// its own in shared memory, which it fills by cp.async several stages ahead and across strips, so
// the loads never wait for a barrier. A stage holds a piece of both strips with its records, just
// as they lie in memory. The ring is filled before the kernel waits for the one that produces x.
// Apart from their width, the words of a block are the weight operand of mma.sync m16n8k16; x is
// the 8 columns, so one row of x costs as much as 8. Each warp copies the pieces of x that it
// multiplies. Where all pieces fit, they stay in shared memory for all strips; otherwise they are
// read again from L2 for each two strips.
//
// Instructions: a piece of a strip is 1,088 bytes in groups of 128. At an SM's share of 4.47 TB/s
// it arrives in 60 clocks, in which an SM can issue 240 instructions. To widen a word of 8 integers
// takes 4 LOP3, which mask a pair and or it into the mantissa of 128 or 1024, 3 SHF (float16: 1),
// and 4 HADD2 or HFMA2, which subtract that number and the zero point: 88 of the 240 for all words.
// With products, copies and the rest it is about 150. Without mma.sync, a word takes 8 more
// instructions to become float32 and 8 for each row of x: 216 for one row and 280 for two, without
// anything else. So a kernel of its own for one row would not be faster.
// Numerics: q - z is exact in 16 bits, so no sum suffers cancellation and no weight is rounded.
// Sums over a group are float32. Each is multiplied by the group's scale and added in float32, in
// the order of the pieces and then of the warps; then the bias and one rounding follow. A row's
// result does not depend on the other rows of x.
// Bound by bytes: 4.25 bits per element in groups of 128.
// The idea to compute out^T = W x^T on 4-bit fragments is from Marlin (Frantar et al. 2024).
#pragma once

#include <algorithm>

#include "gpu/linear/few_rows.cuh"
#include "gpu/linear/w4a16.h"
#include "gpu/linear/w4a16_words.cuh"

namespace pyserve::gpu {

// The tile sizes of a CTA, in the words of Tiling (few_rows.cuh).
template <int kGroupSize_, int kTokenTiles_, int kStages_, int kSmemKb, int kWarps_ = 8>
struct W4Tiling {
  static constexpr int kGroupSize = kGroupSize_;
  static constexpr int kTokenTiles = kTokenTiles_;  // tiles of 8 rows of x
  static constexpr int kStages = kStages_;
  // These set the order of a sum, so all tilings that a device uses for few rows share them.
  static constexpr int kWarps = kWarps_;
  static constexpr int kRowTiles = 2;  // the two strips share what is read of x
  static constexpr int kDepth = 128;   // columns of a piece

  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kRows = kRowTiles * static_cast<int>(kStripRows);
  static constexpr int kThreads = kWarps * kWarpSize;

  // The layout of a piece in memory: one unit, or two units that follow each other.
  static constexpr int kUnitColumns = std::max(static_cast<int>(kW4BlockColumns), kGroupSize);
  static constexpr int kUnits = kDepth / kUnitColumns;
  static constexpr int kBlockBytes = 4 * static_cast<int>(kW4BlockWords);
  static constexpr int kRecordBytes = 4 * static_cast<int>(kW4RecordWords);
  static constexpr int kRecords = kDepth / kGroupSize;
  static constexpr int kUnitBlocksBytes = 2 / kUnits * kBlockBytes;
  static constexpr int kUnitBytes = kUnitBlocksBytes + kRecords / kUnits * kRecordBytes;
  static constexpr int kPieceBytes = kUnits * kUnitBytes;
  static constexpr int kStageBytes = kRowTiles * kPieceBytes;
  static constexpr int kTokenBytes = 2 * kDepth;  // bytes of one row of a piece of x

  // Lanes that copy records, 16 bytes each.
  static constexpr int kRecordLanes = kRowTiles * kRecords * kRecordBytes / 16;

  // The byte offsets, within a piece, of a block of 64 columns and of a group's record.
  __device__ static constexpr int block_offset(int block) {
    return block * (kUnits == 1 ? kBlockBytes : kUnitBytes);
  }
  __device__ static constexpr int record_offset(int record) {
    constexpr int kUnitRecords = kRecords / kUnits;
    return record / kUnitRecords * kUnitBytes + kUnitBlocksBytes +
           record % kUnitRecords * kRecordBytes;
  }

  // The sums meet in a buffer that holds kPassTokens tokens, in one or more passes.
  static constexpr int kPassTokens = kTokens < 16 ? kTokens : 16;
  static constexpr int kPasses = kTokens / kPassTokens;
  static constexpr int kBuffers = kTokens <= 8 ? 2 : 1;
  // Floats per token; padded to keep a warp's stores in different banks.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kSumFloats = kWarps * kPassTokens * kSumStride;
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kSumBytes = kBuffers * kSumFloats * 4;
  // For the factors of the RMSNorm in front.
  static constexpr int kFactorBytes = (4 * kTokens + 127) / 128 * 128;
  static constexpr int kSmem = kSmemKb * 1024;
  // Room for pieces of x.
  static constexpr int kXBytes = kSmem - kRingBytes - kSumBytes - kFactorBytes;
  static_assert(kXBytes >= kWarps * kStages * kTokens * kTokenBytes);
};

// How the work is divided, computed at launch.
struct W4Work {
  int strips, more;  // strips of out per CTA; `more` CTAs have one strip more
  int num_pieces;    // pieces along k; warp w takes the pieces w, w + kWarps, ...
  int x_slots;       // slots per warp, each for one piece of x
  bool is_x_kept;    // whether each of the warp's pieces has a slot

  // `reserved` bytes of the room for x are left free.
  template <class Tile>
  static W4Work of(const LinearParams& p, int num_ctas, Tile, int reserved = 0) {
    const int num_strips = static_cast<int>((p.n + kStripRows - 1) / kStripRows);
    const int num_pieces = static_cast<int>((p.k + Tile::kDepth - 1) / Tile::kDepth);
    const int num_steps = (num_pieces + Tile::kWarps - 1) / Tile::kWarps;
    const int64_t x_bytes = int64_t{Tile::kWarps} * num_steps * p.m * Tile::kTokenBytes;
    const bool is_x_kept = x_bytes <= Tile::kXBytes - reserved;
    return {num_strips / num_ctas, num_strips % num_ctas, num_pieces,
            is_x_kept ? num_steps : Tile::kStages, is_x_kept};
  }

  // Dynamic shared memory. On Hopper no more than is used, so that the small kernels of a chain can
  // start beside a CTA, but by rule 5 of pdl.cuh too much for two CTAs on an SM. room_bytes: of
  // adapters, behind the rest.
  template <class Tile>
  int smem_bytes(const LinearParams& p, int room_bytes, Tile) const {
    constexpr int kMostOfTwo = 113 * 1024;
    if (Tile::kSmem <= kMostOfTwo) return Tile::kSmem;
    const int x_bytes = Tile::kWarps * x_slots * static_cast<int>(p.m) * Tile::kTokenBytes;
    return std::max(kMostOfTwo + 1024, Tile::kSmem - Tile::kXBytes + x_bytes + room_bytes);
  }
};

// The scales and zero points of a group for the rows of this lane's fragments.
template <class T>
struct W4Group {
  float scales[2];
  uint32_t minus[2];

  __device__ __forceinline__ void read(const unsigned char* record) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 8 * half + threadIdx.x % kWarpSize / 4;
      const uint32_t word = reinterpret_cast<const uint32_t*>(record)[row];
      scales[half] = scale_of(word);
      minus[half] = minus_of<T>(word, half);
    }
  }
};

// sums += weight x^T over one piece. `weight` is its stage. x[i] + slot is the address of chunk
// lane / 8 of the lane's row of x in token tile i.
template <class T, class Tile>
__device__ __forceinline__ void multiply_piece(const unsigned char* weight,
                                               const uint32_t (&x)[Tile::kTokenTiles], int slot,
                                               Sums<Tile>& sums) {
  constexpr int kGroupPairs = Tile::kGroupSize / 32;  // in steps of 32 columns
  const int lane = threadIdx.x % kWarpSize;
  W4Group<T> groups[Tile::kRowTiles];
  Sums<Tile> group_sums;
  uint32_t words[Tile::kRowTiles][4];
#pragma unroll
  for (int pair = 0; pair < Tile::kDepth / 32; ++pair) {
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
      const unsigned char* piece = weight + tile * Tile::kPieceBytes;
      if (pair % 2 == 0) {
        const uint4 block =
            *reinterpret_cast<const uint4*>(piece + Tile::block_offset(pair / 2) + 16 * lane);
        words[tile][0] = block.x, words[tile][1] = block.y;
        words[tile][2] = block.z, words[tile][3] = block.w;
      }
      if (pair % kGroupPairs == 0) {
        groups[tile].read(piece + Tile::record_offset(pair / kGroupPairs));
#pragma unroll
        for (auto& sum : group_sums[tile]) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
      }
    }
    uint32_t columns[Tile::kTokenTiles][4];
#pragma unroll
    for (int tokens = 0; tokens < Tile::kTokenTiles; ++tokens) {
      ldmatrix_x4(columns[tokens], (x[tokens] ^ pair % 2 * 64) + pair / 2 * 128 + slot);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
        uint32_t rows[4];
        widen_word<T>(words[tile][pair % 2 * 2 + half], groups[tile].minus, rows);
#pragma unroll
        for (int tokens = 0; tokens < Tile::kTokenTiles; ++tokens) {
          mma_16816<T>(group_sums[tile][tokens], rows, columns[tokens][2 * half],
                       columns[tokens][2 * half + 1]);
        }
      }
    }
    if ((pair + 1) % kGroupPairs != 0) continue;
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
#pragma unroll
      for (int tokens = 0; tokens < Tile::kTokenTiles; ++tokens) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[tile][tokens][i] =
              fmaf(group_sums[tile][tokens][i], groups[tile].scales[i / 2], sums[tile][tokens][i]);
        }
      }
    }
  }
}

// How a lane copies its part of a piece of the strips that are read together.
template <class Tile>
class W4PieceCopy {
 public:
  // tile_bytes is the distance from one of the strips to the next.
  __device__ explicit W4PieceCopy(int64_t tile_bytes) : tile_bytes_(tile_bytes) {
    const int lane = threadIdx.x % kWarpSize, record = lane / 4 % Tile::kRecords;
    record_tile_ = lane / (Tile::kRecordLanes / Tile::kRowTiles);
    record_unit_ = record / (Tile::kRecords / Tile::kUnits);
    record_to_ = Tile::record_offset(record) + lane % 4 * 16;
    record_from_ = record_tile_ * tile_bytes_ + record_to_ - lane * 16;
    record_to_ += record_tile_ * Tile::kPieceBytes;
  }

  // Whether a piece that begins at `column` has both of its halves. Where a unit is 64 columns, the
  // last piece may have only one.
  __device__ static bool is_whole(int column, int k) {
    return Tile::kUnits == 1 || column + Tile::kUnitColumns < k;
  }

  // Copies the piece of the first num_tiles strips. `weight` points to the first strip's piece plus
  // 16 bytes per lane.
  __device__ __forceinline__ void start(uint32_t to, const unsigned char* weight, int num_tiles,
                                        bool is_whole) const {
    const uint32_t lane_to = to + threadIdx.x % kWarpSize * 16;
#pragma unroll
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
      if (tile >= num_tiles) continue;
      const unsigned char* from = weight + tile * tile_bytes_;
      cp_async_16(lane_to + tile * Tile::kPieceBytes, from, true);
      cp_async_16(lane_to + tile * Tile::kPieceBytes + Tile::block_offset(1),
                  from + Tile::block_offset(1), is_whole);
    }
    if (record_tile_ < min(num_tiles, Tile::kRowTiles)) {
      cp_async_16(to + record_to_, weight + record_from_, record_unit_ == 0 || is_whole);
    }
  }

 private:
  int64_t tile_bytes_, record_from_;
  // The 16 bytes of records that this lane copies to a stage.
  int record_tile_, record_unit_, record_to_;
};

// Copies a warp's pieces of weight into its ring and its pieces of x into its slots, one after
// another.
template <Epilogue kEpilogue, class Tile>
class W4Fetcher {
 public:
  // How many strips of out a CTA takes at a time. With gate and up it is one, for which it reads
  // one strip of gate and one of up.
  static constexpr bool kIsPaired = RowTile<kEpilogue, Tile::kRows>::kIsPaired;
  static constexpr int kStep = kIsPaired ? 1 : Tile::kRowTiles;

  // Strips [strip, strip_end), kStep at a time. `ring` and `slots` belong to the warp alone.
  __device__ W4Fetcher(const LinearParams& p, const W4Work& work, int strip, int strip_end,
                       uint32_t ring, uint32_t slots)
      : num_pieces_(work.num_pieces), strip_end_(strip_end), is_x_kept_(work.is_x_kept),
        num_tokens_(static_cast<int>(p.m)), k_(static_cast<int>(p.k)),
        packed_(static_cast<const unsigned char*>(p.weight)), strip_bytes_(p.weight_stride * 4),
        piece_copy_(kIsPaired ? strip_bytes_ * (p.n / kStripRows) : strip_bytes_),
        x_stride_(p.x_stride), ring_(ring), slots_(slots) {
    const int lane = threadIdx.x % kWarpSize, token = lane / 16, chunk = lane % 16;
    x_ = static_cast<const uint16_t*>(p.x) + token * p.x_stride + chunk * kVec;
    x_to_ = token * Tile::kTokenBytes + (chunk ^ token) * 16;
    begin(strip);
  }

  __device__ void begin(int strip) {
    piece_ = static_cast<int>(threadIdx.x) / kWarpSize;
    strip_ = piece_ < num_pieces_ ? strip : strip_end_;
    weight_ = packed_ + strip * strip_bytes_ + piece_ * Tile::kPieceBytes +
              threadIdx.x % kWarpSize * 16;
  }

  // Whether the next piece is the warp's last one of columns [column(), column_end(n)) of out.
  __device__ __forceinline__ bool is_last() const {
    return strip_ < strip_end_ && piece_ + Tile::kWarps >= num_pieces_;
  }
  __device__ __forceinline__ int column() const { return strip_ * static_cast<int>(kStripRows); }
  __device__ __forceinline__ int column_end(int n) const {
    return min(n, min(strip_ + kStep, strip_end_) * static_cast<int>(kStripRows));
  }

  // Starts to copy a piece, if there is one left, and moves on to the next. It always commits a
  // group of copies, so that waits can count groups.
  __device__ __forceinline__ void fetch(int stage, bool has_weight, bool has_x) {
    if (strip_ < strip_end_) {
      if (has_weight) fetch_weight(ring_ + stage * Tile::kStageBytes);
      if (has_x && !has_all_x_) fetch_x(is_x_kept_ ? piece_ / Tile::kWarps : stage);
      piece_ += Tile::kWarps;
      weight_ += Tile::kWarps * Tile::kPieceBytes;
      if (piece_ >= num_pieces_) {
        begin(strip_ + kStep);
        has_all_x_ = has_x && is_x_kept_;
      }
    }
    cp_async_commit();
  }

 private:
  __device__ __forceinline__ void fetch_weight(uint32_t to) {
    const int num_tiles = kIsPaired ? Tile::kRowTiles : strip_end_ - strip_;
    piece_copy_.start(to, weight_, num_tiles,
                      W4PieceCopy<Tile>::is_whole(piece_ * Tile::kDepth, k_));
  }

  __device__ __forceinline__ void fetch_x(int slot) {
    const int lane = threadIdx.x % kWarpSize;
    const bool is_in_k = piece_ * Tile::kDepth + lane % 16 * kVec < k_;
    const uint16_t* from = x_ + piece_ * Tile::kDepth;
    const uint32_t to = slots_ + slot * num_tokens_ * Tile::kTokenBytes;
#pragma unroll
    for (int i = 0; i < Tile::kTokens; i += 2) {
      // Chunk c of row r lies at c ^ r % 8, so the same chunk of 8 rows lies in different banks.
      const uint32_t place = to + (x_to_ ^ (i & 6) * 16) + i * Tile::kTokenBytes;
      if (lane / 16 + i < num_tokens_) cp_async_16(place, from, is_in_k);
      from += 2 * x_stride_;
    }
  }

  int num_pieces_, strip_end_;
  bool is_x_kept_, has_all_x_ = false;
  int num_tokens_, k_, strip_ = 0, piece_ = 0;
  const unsigned char *packed_, *weight_ = nullptr;  // weight_ is where this lane reads next
  int64_t strip_bytes_;
  W4PieceCopy<Tile> piece_copy_;
  const uint16_t* x_;
  int64_t x_stride_;
  uint32_t ring_, slots_;
  uint32_t x_to_;  // where this lane's 16 bytes of x go within a slot
};

// m <= kTokens and k > 0; n and k fit an int; p.weight is as launch_linear_w4a16 describes it;
// `given` is that of linear_kernel.
template <class T, Epilogue kEpilogue, class Tile, class... Given>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_w4a16_kernel(LinearParams p, W4Work work, Given... given) {
  using Fetcher = W4Fetcher<kEpilogue, Tile>;
  using Rows = RowTile<kEpilogue, Tile::kRows>;
  using Adapters = typename AdaptersOf<T, Rows, Tile, Given...>::Type;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int num_tokens = static_cast<int>(p.m), n = static_cast<int>(p.n);
  const int cta = static_cast<int>(blockIdx.x);
  const int first = cta * work.strips + min(cta, work.more);
  const int strip_end = first + work.strips + (cta < work.more);
  unsigned char* ring = dynamic_smem + warp * Tile::kStages * Tile::kStageBytes;
  float* all_sums = reinterpret_cast<float*>(dynamic_smem + Tile::kRingBytes);
  float* factors = all_sums + Tile::kBuffers * Tile::kSumFloats;
  const int slot_bytes = num_tokens * Tile::kTokenBytes;
  const uint32_t slots = smem_address(dynamic_smem) + Tile::kRingBytes + Tile::kSumBytes +
                         Tile::kFactorBytes + warp * work.x_slots * slot_bytes;

  Adapters adapters(given..., n, dynamic_smem + Tile::kSmem - Tile::kXBytes +
                                     Tile::kWarps * work.x_slots * slot_bytes);

  Fetcher fetcher(p, work, first, strip_end, smem_address(ring), slots);
  if constexpr (Adapters::kIsThere) {
    adapters.ask();
    const int last = max(0, work.num_pieces - 1 - warp) / Tile::kWarps;  // which B comes with
#pragma unroll 1
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      if (stage == min(last, Tile::kStages - 1)) adapters.look();
      if (stage == Tile::kStages - 1) continue;
      if (fetcher.is_last()) {
        adapters.copy(fetcher.column(), fetcher.column_end(n), min(Tile::kWarps, work.num_pieces));
      }
      fetcher.fetch(stage, true, false);
    }
  } else {
#pragma unroll 1
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetcher.fetch(stage, true, false);
  }
  pdl_wait();
  pdl_launch_dependents();
  fetcher.begin(first);
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetcher.fetch(stage, false, true);
  if constexpr (Adapters::kIsThere) adapters.fill();
  for (int token = warp; token < num_tokens; token += Tile::kWarps) {
    const float factor = norm_factor(p, token);  // read only behind the first strips' barrier
    if (lane == 0) factors[token] = factor;
  }

  // Address within a slot; columns beyond the tokens are not stored.
  uint32_t lane_x[Tile::kTokenTiles];
#pragma unroll
  for (int tokens = 0; tokens < Tile::kTokenTiles; ++tokens) {
    const int token = min(8 * tokens + lane % 8, num_tokens - 1);
    lane_x[tokens] = slots + token * Tile::kTokenBytes + (lane / 8 ^ token % 8) * 16;
  }
  constexpr int kPassResults = Tile::kPassTokens * Rows::kColumns;
  constexpr int kResults = (kPassResults + Tile::kThreads - 1) / Tile::kThreads;  // per thread
  static_assert(Tile::kPasses == 1 || kPassResults % Tile::kThreads == 0);
  int stage = 0, buffer = 0, place = threadIdx.x;
  for (int strip = first; strip < strip_end; strip += Fetcher::kStep) {
    const int column0 = strip * static_cast<int>(kStripRows);
    const int column_end = min(n, strip_end * static_cast<int>(kStripRows));
    Result<T> results[kResults];
    const auto ask = [&](int pass) {
#pragma unroll
      for (int i = 0; i < kResults; ++i) {
        const int index = place + i * Tile::kThreads;
        results[i].token = pass * Tile::kPassTokens + index / Rows::kColumns;
        results[i].row = index % Rows::kColumns;
        results[i].template ask<kEpilogue>(p, column0 + results[i].row, column_end);
      }
    };
    if (Tile::kPasses == 1) ask(0);  // with several passes there are no registers for this yet

    Sums<Tile> sums = {};
#pragma unroll 1
    for (int piece = warp; piece < work.num_pieces; piece += Tile::kWarps) {
      // Counts copy groups, of which the first stages have two each.
      cp_async_wait<Tile::kStages - 2>();
      // All lanes' copies have landed, and all lanes have read the stage that is refilled now.
      __syncwarp();
      if constexpr (Adapters::kIsThere) {
        if (fetcher.is_last()) {
          adapters.copy(fetcher.column(), fetcher.column_end(n),
                        min(Tile::kWarps, work.num_pieces));
        }
      }
      fetcher.fetch(stage == 0 ? Tile::kStages - 1 : stage - 1, true, true);
      const int slot = work.is_x_kept ? piece / Tile::kWarps : stage;
      multiply_piece<T, Tile>(ring + stage * Tile::kStageBytes, lane_x, slot * slot_bytes, sums);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      if (Tile::kPasses > 1) ask(pass);
      if (Tile::kBuffers == 1) __syncthreads();  // all threads have read the earlier sums
      float* pass_sums = all_sums + buffer * Tile::kSumFloats;
      put_sums<Tile>(pass_sums + warp * Tile::kPassTokens * Tile::kSumStride, pass, num_tokens,
                     sums);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kResults; ++i) {
        finish_result<T, kEpilogue, Tile>(p, results[i], pass_sums, pass * Tile::kPassTokens,
                                          factors, column0 + results[i].row, adapters);
      }
      buffer = (buffer + 1) % Tile::kBuffers;
    }
    place = (place + kWarpSize) % Tile::kThreads;  // results go to other warps for each strip
    if constexpr (Adapters::kIsThere) adapters.turn();
  }
  cp_async_wait<0>();
}

// Hopper's tilings, for up to 8 rows and for up to 16. Their rings take 60 to 108 KB, and all
// stages but one are in flight.
template <int kGroupSize>
using W4DeepSm90a = W4Tiling<kGroupSize, 1, kGroupSize == 32 ? 5 : 6, 227>;
template <int kGroupSize>
using W4WideSm90a = W4Tiling<kGroupSize, 2, kGroupSize == 32 ? 3 : 4, 227>;

// Calls fn(std::integral_constant<int, ...>{}).
template <class Fn>
cudaError_t dispatch_group_size(int64_t group_size, Fn&& fn) {
  switch (group_size) {
    case 32: return fn(std::integral_constant<int, 32>{});
    case 64: return fn(std::integral_constant<int, 64>{});
    case 128: return fn(std::integral_constant<int, 128>{});
  }
  return cudaErrorInvalidValue;
}

// Launches for p.m <= kTokens, with one CTA per SM.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_w4a16_tiled(const LinearParams& p, int num_sms, cudaStream_t stream) {
  constexpr auto kKernel = linear_w4a16_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, Tile::kSmem>();
  if (error != cudaSuccess) return error;
  const int64_t num_strips = (p.n + kStripRows - 1) / kStripRows;
  const int num_ctas = static_cast<int>(std::min<int64_t>(num_strips, num_sms));
  const W4Work work = W4Work::of(p, num_ctas, Tile{});
  return launch_chained(kKernel, static_cast<unsigned>(num_ctas), Tile::kThreads,
                        static_cast<size_t>(work.smem_bytes(p, 0, Tile{})), stream, p, work);
}

// Launches with the tiling that Tilings has for the group size.
template <template <int> class Tilings>
cudaError_t launch_w4a16_as(const LinearParams& p, int64_t group_size, int num_sms,
                            cudaStream_t stream) {
  return dispatch_half(p.dtype, [&]<class T>(T) {
    return dispatch_epilogue(p.epilogue, [&](auto epilogue) {
      return dispatch_group_size(group_size, [&](auto size) {
        return launch_w4a16_tiled<T, decltype(epilogue)::value, Tilings<decltype(size)::value>>(
            p, num_sms, stream);
      });
    });
  });
}

}  // namespace pyserve::gpu
