// LoRA in the kernels that multiply up to 8 rows of x: the second of an adapter's two products is
// added to the sums of the base model's linear where that kernel finishes its results.
//
//   sums[t, j] += sum over r of shrunk[t, p, r] * b[s, j, r], before the norm's factor and the
//   bias, where s is the slot of token t's adapter, p the part that row j of weight belongs to, and
//   r runs up to the part's rank
//
// The kernel around it, once it is started, needs about 5 us only to issue the copies that fill its
// ring, because memory holds them back. All latency behind that costs nothing; what counts is what
// comes before the first copy, and what is done when a group of rows ends. So:
// - ask() issues the loads of starts, ranks and columns into registers before the ring, without
//   waiting for them (segments.cuh says why they may be read there). Once all copies are issued
//   that need no adapter, look() makes of them each warp's own table of the tokens' adapters,
//   without a barrier of the block.
// - copy() brings the rows of B of a group into shared memory, together with the last piece of k of
//   that group and in its commit group, so that no wait counts differently. Each adapter's rows are
//   copied once, for the first of its tokens (the leader; an adapter's tokens are neighbours).
// - fill() reads what was shrunk behind the wait for the kernel in front and behind the copies of
//   x, and adds up its splits. The first group's barrier makes it visible to all threads.
// - sum_of() is called by the thread that finishes a result, behind the barrier that the group has
//   anyway. It is a loop over r for one token and one row, without tensor cores.
//
// Buffers: a warp may copy rows of B for the groups that its ring reaches ahead, and for the one in
// work. A slower warp may still read the group before. Hence there are two buffers more than the
// number of whole groups that fit into the stages ahead.
// Numerics: float32 products and sums in the order of r, from zero; the sum is then added to the
// linear's. It depends on nothing but the token's own values and B.
// Bound by bytes: 2 * rank for each row of B. Predicted were 0.3 to 0.5 us a product of an 8B model
// at one token of rank 16; on an H200 it is 0.9, 1.5, 1.3 and 0.4 us (q, k, v; o; gate, up; down).
#pragma once

#include "gpu/linear/few_rows.cuh"
#include "gpu/linear/linear_lora.h"
#include "gpu/lora/segments.cuh"

namespace pyserve::gpu {

constexpr int kMaxLoraTokens = 8;
constexpr int kMaxLoraParts = 4;  // of a linear; those that exist have up to 3
constexpr int kMaxLoraRank = 512;

// What a warp knows of the adapters. Tokens without one have rank 0 in all parts.
struct LoraTable {
  int32_t slots[kMaxLoraTokens];
  int32_t leaders[kMaxLoraTokens];  // the first token with the same adapter
  int32_t ranks[kMaxLoraTokens][kMaxLoraParts];
};

// Shared memory behind that of the tile, in bytes from there; computed at launch.
struct LoraRoom {
  int log2_chunks;  // room for a row of B, in units of 16 bytes
  int num_buffers, buffer_bytes;
  int terms, tables, end;  // terms: what was shrunk, float32 [num_tokens, num_parts, room of rank]

  // max_groups: the most groups of rows that a CTA has. min_pieces: the fewest pieces of k that a
  // warp with any has in each of them.
  template <class Tile>
  static LoraRoom of(const LoraRows& rows, int max_groups, int min_pieces, Tile) {
    LoraRoom room{};
    const int num_tokens = static_cast<int>(rows.num_tokens);
    while (kVec << room.log2_chunks < rows.max_rank) ++room.log2_chunks;
    room.num_buffers = std::min(max_groups, (Tile::kStages - 1) / min_pieces + 2);
    room.buffer_bytes = num_tokens * Tile::kRows * 16 << room.log2_chunks;
    room.terms = room.num_buffers * room.buffer_bytes;
    room.tables = room.terms + (num_tokens * rows.num_parts * kVec * 4 << room.log2_chunks);
    room.end = room.tables + Tile::kWarps * static_cast<int>(sizeof(LoraTable));
    room.end = (room.end + 15) / 16 * 16;
    return room;
  }
};

// Which adapters the tokens have, as one warp works it out. All of its lanes call ask and look.
class LoraLookup {
 public:
  __device__ __forceinline__ LoraLookup(const LoraRows& rows, LoraTable& table)
      : rows_(rows), table_(table) {}

  // Issues the loads that look() needs. Lane i has slot i.
  __device__ __forceinline__ void ask(const int32_t* columns) {
    const int lane = threadIdx.x % kWarpSize;
    ask_slot(min(lane, rows_.num_slots - 1));
    bound_ = load_word(columns + min(lane, rows_.num_parts));
  }

  // Fills the warp's table. All lanes of the warp may read it afterwards.
  __device__ __forceinline__ void look(int num_rows) {
    const int lane = threadIdx.x % kWarpSize;
    if (lane < kMaxLoraTokens) {
      table_.slots[lane] = kNoSlot;
      table_.leaders[lane] = lane;
#pragma unroll
      for (int part = 0; part < kMaxLoraParts; ++part) table_.ranks[lane][part] = 0;
    }
#pragma unroll
    for (int i = 0; i <= kMaxLoraParts; ++i) bounds_[i] = __shfl_sync(kFullMask, bound_, i);
    __syncwarp();
    if (lane < rows_.num_slots) enter(lane);
    for (int slot = lane + kWarpSize; slot < rows_.num_slots; slot += kWarpSize) {
      ask_slot(slot);
      enter(slot);
    }
    bool is_bad = bounds_[0] < 0 || bounds_[kMaxLoraParts] > num_rows;
#pragma unroll
    for (int part = 0; part < kMaxLoraParts; ++part) is_bad |= bounds_[part] > bounds_[part + 1];
    if (is_bad) __trap();
    __syncwarp();
  }

  // The part of a row of weight; -1: none.
  __device__ __forceinline__ int part_of(int weight_row) const {
    int part = 0;
#pragma unroll
    for (int i = 1; i < kMaxLoraParts; ++i) part += weight_row >= bounds_[i];
    const bool is_there = weight_row >= bounds_[0] && weight_row < bounds_[kMaxLoraParts];
    return is_there ? part : -1;
  }

  __device__ __forceinline__ const LoraTable& table() const { return table_; }

 private:
  __device__ __forceinline__ void ask_slot(int slot) {
    begin_ = load_word(rows_.starts + slot);
    end_ = load_word(rows_.starts + slot + 1);
#pragma unroll
    for (int part = 0; part < kMaxLoraParts; ++part) {
      ranks_[part] =
          load_word(rows_.ranks + slot * rows_.ranks_stride + min(part, rows_.num_parts - 1));
    }
  }

  __device__ __forceinline__ void enter(int slot) const {
    bool is_bad = begin_ < 0 || begin_ > end_ || end_ > rows_.num_tokens;
#pragma unroll
    for (int part = 0; part < kMaxLoraParts; ++part) is_bad |= !is_rank(rows_, ranks_[part]);
    if (is_bad) __trap();
    for (int token = begin_; token < end_; ++token) {
      table_.slots[token] = slot;
      table_.leaders[token] = begin_;
#pragma unroll
      for (int part = 0; part < kMaxLoraParts; ++part) {
        if (part < rows_.num_parts) table_.ranks[token][part] = ranks_[part];
      }
    }
  }

  const LoraRows& rows_;
  LoraTable& table_;
  int begin_ = 0, end_ = 0, ranks_[kMaxLoraParts] = {}, bound_ = 0;
  int bounds_[kMaxLoraParts + 1] = {};  // as `columns`; parts that do not exist have no rows
};

// What a kernel for few rows calls in its course. All threads call ask, look, fill and turn.
template <class T, class Rows, class Tile>
class Lora {
 public:
  static constexpr bool kIsThere = true;

  // n: columns of out; smem: as large as `room` says, aligned to 16 bytes.
  __device__ __forceinline__ Lora(const LinearLora& lora, const LoraRoom& room, int n,
                                  unsigned char* smem)
      : l_(lora), room_(room), n_(n), smem_(smem),
        who_(lora.rows, reinterpret_cast<LoraTable*>(smem + room.tables)[threadIdx.x / kWarpSize]) {
  }

  __device__ __forceinline__ void ask() { who_.ask(l_.columns); }
  __device__ __forceinline__ void look() { who_.look(l_.num_rows); }

  // Starts to copy this warp's share of the rows of B of columns [column, end) of out, which are a
  // group. The CTA's first num_warps warps call this once for each group.
  __device__ __forceinline__ void copy(int column, int end, int num_warps) {
    const LoraTable& own = who_.table();
    const uint32_t to = smem_address(smem_) + ahead_ * room_.buffer_bytes;
    advance(ahead_);
    const int count = static_cast<int>(l_.rows.num_tokens) * Tile::kRows << room_.log2_chunks;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += num_warps * kWarpSize) {
      const int chunk = i & ((1 << room_.log2_chunks) - 1), place = i >> room_.log2_chunks;
      const int row = place % Tile::kRows, token = place / Tile::kRows;
      const bool is_up = Rows::kIsPaired && row >= Rows::kColumns;
      const int weight_row = is_up ? n_ + column + row - Rows::kColumns : column + row;
      const int part = who_.part_of(weight_row);
      if (own.leaders[token] != token || row % Rows::kColumns >= end - column || part < 0) continue;
      const int left = own.ranks[token][part] - chunk * kVec;
      if (left <= 0) continue;
      const T* from = static_cast<const T*>(l_.b) + own.slots[token] * l_.b_slot_stride +
                      weight_row * l_.b_stride + chunk * kVec;
      cp_async_some(to + offset(place, chunk), from, min(16, 2 * left));
    }
  }

  // Behind the wait: adds up the splits of what was shrunk. Zeros follow a rank up to 8 of r.
  __device__ __forceinline__ void fill() const {
    const LoraTable& own = who_.table();
    const int num_parts = l_.rows.num_parts, log2_fours = room_.log2_chunks + 1;
    const int count = static_cast<int>(l_.rows.num_tokens) * num_parts << log2_fours;
    // From the last thread on, because the first warps have the norm's factors.
    for (int i = Tile::kThreads - 1 - static_cast<int>(threadIdx.x); i < count;
         i += Tile::kThreads) {
      const int r = (i & ((1 << log2_fours) - 1)) * 4, pair = i >> log2_fours;
      const int token = pair / num_parts, part = pair % num_parts;
      const int rank = own.ranks[token][part];
      if (r / kVec * kVec >= rank) continue;
      const float* from =
          l_.shrunk.data + token * l_.shrunk.stride + part * l_.shrunk.part_stride + r;
      float4 sum{};
      const int num_splits = r < rank ? l_.shrunk.num_splits : 0;
#pragma unroll 8
      for (int split = 0; split < num_splits; ++split) {
        const float4 four =
            *reinterpret_cast<const float4*>(from + split * l_.shrunk.split_stride);
        sum = {sum.x + four.x, sum.y + four.y, sum.z + four.z, sum.w + four.w};
      }
      terms()[i] = {sum.x, r + 1 < rank ? sum.y : 0.0f, r + 2 < rank ? sum.z : 0.0f,
                    r + 3 < rank ? sum.w : 0.0f};
    }
  }

  // Behind a group's barrier: what is added to the sum of a token and this row of the tile.
  __device__ __forceinline__ float sum_of(int token, int row, int weight_row) const {
    const LoraTable& own = who_.table();
    const int part = who_.part_of(weight_row);
    const int rank = part < 0 ? 0 : own.ranks[token][part];
    const uint32_t b = smem_address(smem_) + buffer_ * room_.buffer_bytes;
    const int place = own.leaders[token] * Tile::kRows + row;
    uint32_t x = smem_address(smem_) + room_.terms +
                 ((token * l_.rows.num_parts + part) << room_.log2_chunks) * kVec * 4;
    float sum = 0.0f;
#pragma unroll 2
    for (int chunk = 0; chunk * kVec < rank; ++chunk, x += kVec * 4) {
      const uint4 low = load_shared(x), high = load_shared(x + 16);
      const uint32_t factors[kVec] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      float values[kVec];
      unpack<T>(load_shared(b + offset(place, chunk)), values);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum = fmaf(__uint_as_float(factors[i]), values[i], sum);
    }
    return sum;
  }

  // When a group is finished.
  __device__ __forceinline__ void turn() { advance(buffer_); }

 private:
  // Where a chunk lies in a buffer. place: a leader's row, [num_tokens, kRows]. The swizzle puts
  // the same chunk of 8 rows into different banks.
  __device__ __forceinline__ uint32_t offset(int place, int chunk) const {
    const int log2 = room_.log2_chunks;
    const int swizzle = place >> max(0, 3 - log2) & ((1 << min(3, log2)) - 1);
    return ((place << log2) + (chunk ^ swizzle)) * 16;
  }

  __device__ __forceinline__ void advance(int& buffer) const {
    buffer = buffer + 1 == room_.num_buffers ? 0 : buffer + 1;
  }

  __device__ __forceinline__ float4* terms() const {
    return reinterpret_cast<float4*>(smem_ + room_.terms);
  }

  const LinearLora& l_;
  const LoraRoom& room_;
  int n_;
  unsigned char* smem_;
  int ahead_ = 0, buffer_ = 0;  // of the groups that are copied and finished next
  LoraLookup who_;
};

template <class T, class Rows, class Tile>
struct AdaptersOf<T, Rows, Tile, LinearLora, LoraRoom> {
  using Type = Lora<T, Rows, Tile>;
};

// Of a device whose blocks may have 227 KB, or 99, less what a kernel has that is not dynamic.
template <class Tile>
constexpr int kMaxLoraSmem = (Tile::kSmem > 99 * 1024 ? 227 : 99) * 1024 - 128;

template <Epilogue kEpilogue, class Tile>
LoraRoom lora_room(const LinearParams& p, const LinearLora& lora, int num_sms) {
  constexpr int kStepDepth = Tile::kWarps * Tile::kDepth;
  const int num_pieces = static_cast<int>((p.k + kStepDepth - 1) / kStepDepth);
  return LoraRoom::of(lora.rows, Grid<kEpilogue, Tile>(p.n, num_sms).max_groups(), num_pieces,
                      Tile{});
}

// Whether there is room behind the tile.
template <Epilogue kEpilogue, class Tile>
bool fits_lora(const LinearParams& p, const LinearLora& lora, int num_sms) {
  return Tile::kSmem + lora_room<kEpilogue, Tile>(p, lora, num_sms).end <= kMaxLoraSmem<Tile>;
}

// As launch_tiled, for what fits_lora says fits.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_lora_tiled(const LinearParams& p, const LinearLora& lora, int num_sms,
                              cudaStream_t stream) {
  constexpr auto kKernel = linear_kernel<T, kEpilogue, Tile, LinearLora, LoraRoom>;
  const cudaError_t error = allow_smem<kKernel, kMaxLoraSmem<Tile>>();
  if (error != cudaSuccess) return error;
  const Grid<kEpilogue, Tile> grid(p.n, num_sms);
  const LoraRoom room = lora_room<kEpilogue, Tile>(p, lora, num_sms);
  return launch_chained(kKernel, static_cast<unsigned>(grid.num_ctas), Tile::kThreads,
                        Tile::kSmem + room.end, stream, p, grid.shares, lora, room);
}

}  // namespace pyserve::gpu
