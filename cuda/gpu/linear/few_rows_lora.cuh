// What adapters add, in the kernel that multiplies few rows by the base model's weight: a launch of
// lora_shrink and one of lora_expand beside it would each take as long as a small product.
//
//   sums[t, j] += sum over r of shrunk[t, p, r] * b[s, j, r], before the norm's factor and the bias;
//   shrunk[t, p, r] = scales[s, p] * sum over i of x[t, i] * a[s, p, r, i]
//   with s the slot of t's adapter, p the part that row j of weight belongs to, r below its rank
//
// The grid is one CTA an SM. Its CTAs share what is to be shrunk: a unit is 8 rows of A of a slot
// that some token uses by one split of k, for all tokens of that slot. A CTA asks for the A of its
// first unit before it waits for the kernel that makes x, behind its ring of weights, which is
// under way meanwhile. Units are dealt from the last CTA on: the first ones may have a tile of weight
// more. Behind the products of its first group each CTA looks for the sums of all units, adds up
// the splits of all tokens, in their order, and keeps them in shared memory. A result's row of B is
// asked for with the result.
//
// How CTAs see each other's sums, of a short product the latency of all this: each sum is written
// in 8 bytes with the launch's number, and whoever needs it reads until that number is there. So
// no fence stands behind the copies that are under way, and nothing is counted on the way. (NCCL
// calls this LL.) What an earlier launch left there has another number, so nothing is cleared; the
// memory begins as zeros and is for these sums alone. The number: a counter, to which CTA 0 adds
// 2^16 - (number of CTAs - 1) and each other CTA 1, so that every one of them finds the same bits
// above 16, and the next launch, of whatever grid, the next number.
// All this is behind pdl_wait(), that is, when the launch before is complete: what a launch writes
// no earlier one still reads.
// That all CTAs run at once: there are no more than SMs, each has room for one, and what else may
// hold an SM ends without them: the kernels before, and none behind, as those start when all CTAs
// of this one have passed their wait. Another launch of such a kernel on another stream could hold
// SMs while it waits for others: of a device only one stream has these launches.
//
// Before the wait `starts`, ranks, scales, columns and A are read, past L1: a copy writes them
// before the first kernel of a step (rule 2 of pdl.cuh), or between steps.
//
// Numerics: float32 sums of 16-bit products, one after the other in a warp, then over the warps,
// then over the splits, each in order; float32 products with B. No other row changes a row's result.
// Floor: bytes, 2 * rank of each column of A and row of B.
#pragma once

#include "gpu/linear/few_rows.cuh"
#include "gpu/linear/linear_lora.h"

namespace pyserve::gpu {

// 8 rows of A by one split of k, for the tokens [first, end) of a slot; first -1: there is none.
struct LoraUnit {
  int first, end, slot, part, row, rank, split;
};

// What each token uses, in shared memory: its slot, -1 for none, and of all slots the ranks and the
// scales of their parts; behind room for sums.
class LoraTokens {
 public:
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 8;        // of A, of a unit
  static constexpr int kMmaTokens = 16;  // of a unit, at a time
  static constexpr int kDepth = 32;      // columns of k that a warp takes at once

  __device__ __forceinline__ LoraTokens(const LinearLora& lora, int k, unsigned char* smem)
      : l(lora), num_parts(lora.rows.num_parts), count(static_cast<int>(lora.rows.num_tokens)),
        sums(reinterpret_cast<float*>(smem)) {
    const int num_sums = count * num_parts * l.rows.max_rank;
    slots = reinterpret_cast<int*>(smem) + max(num_sums, kWarps * kRows * min(count, kMmaTokens));
    ranks = slots + count;
    bounds = ranks + l.rows.num_slots * num_parts;
    number = reinterpret_cast<uint32_t*>(bounds + num_parts + 1);
    scales = reinterpret_cast<float*>(number + 1);
    const int num_pieces = (k + kDepth - 1) / kDepth;
    split_columns = (num_pieces + l.sums.num_splits - 1) / l.sums.num_splits * kDepth;
    num_splits = (k + split_columns - 1) / split_columns;
  }

  // All threads; all of them see it. Warps share it, so that none waits before another asks.
  __device__ __forceinline__ void read() const {
    const LoraRows& rows = l.rows;
    const int thread = threadIdx.x;
    if (thread < count) slots[thread] = slot_of(thread);
    for (int i = thread - kWarpSize; i >= 0 && i < rows.num_slots * num_parts;
         i += kThreads - kWarpSize) {
      const int slot = i / num_parts, part = i % num_parts;
      const int rank = __ldcg(rows.ranks + slot * rows.ranks_stride + part);
      scales[i] = __ldcg(l.scales + slot * l.scales_stride + part);
      if (rank < 0 || rank > rows.max_rank) __trap();
      ranks[i] = rank;
    }
    if (const int part = kThreads - 1 - thread; part < num_parts) {
      const int begin = __ldcg(l.columns + part), end = __ldcg(l.columns + part + 1);
      if (begin < 0 || begin > end || end > l.num_rows) __trap();
      bounds[part] = begin, bounds[part + 1] = end;
    }
    __syncthreads();
  }

  // The launch's number, of what thread 0 found in the counter; all threads, who see it behind their
  // next barrier. It is never that of memory which is still zeros.
  __device__ __forceinline__ void set_number(uint64_t counted) {
    if (threadIdx.x == 0 && !has_number) *number = static_cast<uint32_t>(counted >> 16) + 1;
    has_number = true;
  }

  // The index-th of all units; all lanes of a warp call it, each counts those of the slot whose
  // first token it has.
  __device__ __forceinline__ LoraUnit unit_at(int index) const {
    const int lane = threadIdx.x % kWarpSize, slot = lane < count ? slots[lane] : -1;
    const bool is_first = slot >= 0 && (lane == 0 || slots[lane - 1] != slot);
    int num_tiles = 0;
    for (int part = 0; is_first && part < num_parts; ++part) num_tiles += tiles_of(slot, part);
    const int end = warp_inclusive_sum(num_tiles), tile = index / num_splits;
    const uint32_t behind = __ballot_sync(kFullMask, end > tile);
    if (behind == 0) return {-1, -1, 0, 0, 0, 0, 0};
    const int first = __ffs(static_cast<int>(behind)) - 1;
    const int own = slots[first], num_tokens = __popc(__ballot_sync(kFullMask, slot == own));
    int left = tile - __shfl_sync(kFullMask, end - num_tiles, first), part = 0;
    for (; left >= tiles_of(own, part); ++part) left -= tiles_of(own, part);
    return {first,         first + num_tokens,
            own,           part,
            left * kRows,  ranks[own * num_parts + part],
            index % num_splits};
  }

  const LinearLora& l;
  int num_parts, count;
  int split_columns, num_splits;  // of k; splits that have columns
  // Sums are [count, num_parts, max_rank], before these are complete those of a unit, by warp; slots
  // [count]; ranks and scales [num_slots, num_parts]; bounds as `columns`; the launch's number.
  float* sums;
  int *slots, *ranks, *bounds;
  uint32_t* number;
  bool has_number = false;
  float* scales;

 private:
  __device__ __forceinline__ int tiles_of(int slot, int part) const {
    return (ranks[slot * num_parts + part] + kRows - 1) / kRows;
  }

  __device__ __forceinline__ int slot_of(int token) const {
    const LoraRows& rows = l.rows;
    int slot = -1;
#pragma unroll 8
    for (int i = 0; i < rows.num_slots; ++i) {
      const int first = __ldcg(rows.starts + i), end = __ldcg(rows.starts + i + 1);
      if (first < 0 || first > end || end > count) __trap();
      if (token >= first && token < end) slot = i;
    }
    return slot;
  }
};

// x A^T of one unit after the other. What a lane holds of A is asked for before x is there.
template <class T, class Tile>
class LoraShrink {
  static constexpr int kWarps = LoraTokens::kWarps, kRows = LoraTokens::kRows;
  static constexpr int kMmaTokens = LoraTokens::kMmaTokens, kDepth = LoraTokens::kDepth;
  static constexpr int kPieces = 8;  // of kDepth columns, that a lane holds of A
  static constexpr int kSpan = kPieces * kWarps * kDepth;
  static_assert(Tile::kWarps == kWarps && Tile::kTokens <= kWarpSize);

 public:
  // Asks for A of the index-th unit.
  __device__ __forceinline__ void begin(const LinearParams& p, const LoraTokens& tokens,
                                        int index) {
    unit_ = tokens.unit_at(index);
    load_a(p, tokens, unit_, unit_.split * tokens.split_columns);
  }

  __device__ __forceinline__ bool has_unit() const { return unit_.first >= 0; }

  // The sums of the unit to memory; then goes on to the next-th.
  __device__ __forceinline__ void run(const LinearParams& p, LoraTokens& tokens, int next,
                                      uint64_t counted) {
    const LoraUnit next_unit = tokens.unit_at(next);
#pragma unroll 1
    for (int token = unit_.first; token < unit_.end; token += kMmaTokens) {
      float sums[4] = {};
      multiply(p, tokens, token, sums);
      if (token + kMmaTokens >= unit_.end) {
        load_a(p, tokens, next_unit, next_unit.split * tokens.split_columns);
      }
      tokens.set_number(counted);
      put(tokens, token, sums);
    }
    unit_ = next_unit;
  }

 private:
  // This lane's pieces of a unit's A, from a column on; a lane has row lane / 4.
  __device__ __forceinline__ void load_a(const LinearParams& p, const LoraTokens& tokens,
                                         const LoraUnit& unit, int begin) {
    if (unit.first < 0) return;
    const LinearLora& l = tokens.l;
    const int lane = threadIdx.x % kWarpSize, row = unit.row + lane / 4;
    const T* a = static_cast<const T*>(l.a) + unit.slot * l.a_slot_stride +
                 unit.part * l.a_part_stride + row * l.a_stride;
    const int end = end_of(p, tokens, unit);
    const int column = begin + threadIdx.x / kWarpSize * kDepth + lane % 4 * kVec;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int at = column + i * kWarps * kDepth;
      a_[i] = {};
      if (at < end && row < unit.rank) a_[i] = load_line(a + at);
    }
  }

  __device__ static __forceinline__ int end_of(const LinearParams& p, const LoraTokens& tokens,
                                               const LoraUnit& unit) {
    return min((unit.split + 1) * tokens.split_columns, static_cast<int>(p.k));
  }

  // sums += x A^T of 16 tokens of the unit from `token` on: of token lane / 4, and of that + 8, and
  // rows lane % 4 * 2, + 1. The columns of k may stand in any order that x and A agree on, so each
  // lane loads 16 bytes and feeds two products.
  __device__ __forceinline__ void multiply(const LinearParams& p, const LoraTokens& tokens,
                                           int token, float (&sums)[4]) {
    constexpr bool kHasHigh = Tile::kTokens > 8;
    const int lane = threadIdx.x % kWarpSize, end = end_of(p, tokens, unit_);
    const int warp_column = threadIdx.x / kWarpSize * kDepth;
    const bool has_low = token + lane / 4 < unit_.end, has_high = token + 8 + lane / 4 < unit_.end;
    const T* x = static_cast<const T*>(p.x) + (token + lane / 4) * p.x_stride;
    const int first = unit_.split * tokens.split_columns;
#pragma unroll 1
    for (int begin = first; begin < end; begin += kSpan) {
      if (begin != first || token != unit_.first) load_a(p, tokens, unit_, begin);
      uint4 low[kPieces], high[kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int at = begin + warp_column + i * kWarps * kDepth + lane % 4 * kVec;
        low[i] = high[i] = {};
        if (at < end && has_low) low[i] = load_line(x + at);
        if (kHasHigh && at < end && has_high) high[i] = load_line(x + 8 * p.x_stride + at);
      }
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (begin + warp_column + i * kWarps * kDepth >= end) continue;  // of the whole warp
        const uint32_t even[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
        const uint32_t odd[4] = {low[i].z, high[i].z, low[i].w, high[i].w};
        mma_16816<T>(sums, even, a_[i].x, a_[i].y);
        mma_16816<T>(sums, odd, a_[i].z, a_[i].w);
      }
    }
  }

  // The warps' sums of the unit's tokens from `token` on, added up in their order, to memory.
  __device__ __forceinline__ void put(const LoraTokens& tokens, int token,
                                      const float (&sums)[4]) const {
    const LoraSums& to = tokens.l.sums;
    const int lane = threadIdx.x % kWarpSize, count = min(unit_.end - token, kMmaTokens);
    const int warp_sums = min(tokens.count, kMmaTokens) * kRows;
    float* own = tokens.sums + threadIdx.x / kWarpSize * warp_sums;
    __syncthreads();  // all have read what was there
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int of = lane / 4 + i / 2 * 8;
      if (of < count) own[of * kRows + lane % 4 * 2 + i % 2] = sums[i];
    }
    __syncthreads();
    const int of = threadIdx.x / kRows, row = unit_.row + threadIdx.x % kRows;
    if (of >= count || row >= unit_.rank) return;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += tokens.sums[w * warp_sums + threadIdx.x];
    store_numbered(to.at(unit_.split, token + of, unit_.part, row), sum, *tokens.number);
  }

  LoraUnit unit_;
  uint4 a_[kPieces];
};

// What is added to the sums of a result, and to those of its row of up where it has one.
template <class T, bool kIsPaired>
struct LoraAdded {
  static constexpr int kEarly = 2;  // 16 bytes of a row of B that are asked for early

  const float* shrunk;
  struct Row {
    int rank;  // 0: nothing is added
    int sums;  // of its first number in shared memory
    const T* b;
    uint4 early[kEarly];
  } rows[kIsPaired ? 2 : 1];

  __device__ __forceinline__ void ask(const LoraTokens& tokens, bool is_valid, int token,
                                      int column, int n) {
    const LinearLora& l = tokens.l;
    shrunk = tokens.sums;
#pragma unroll
    for (int half = 0; half < (kIsPaired ? 2 : 1); ++half) {
      Row& row = rows[half];
      const int weight_row = column + half * n;
      int part = -1;
      for (int i = 0; is_valid && i < tokens.num_parts; ++i) {
        if (weight_row >= tokens.bounds[i] && weight_row < tokens.bounds[i + 1]) part = i;
      }
      const int slot = part < 0 ? -1 : tokens.slots[token];
      row.rank = slot < 0 ? 0 : tokens.ranks[slot * tokens.num_parts + part];
      row.sums = (token * tokens.num_parts + part) * l.rows.max_rank;
      row.b = static_cast<const T*>(l.b);
      if (row.rank > 0) row.b += slot * l.b_slot_stride + weight_row * l.b_stride;
#pragma unroll
      for (int i = 0; i < kEarly; ++i) {
        row.early[i] = {};
        if (i * kVec < row.rank) row.early[i] = load_line(row.b + i * kVec);
      }
    }
  }

  template <int kHalf>
  __device__ __forceinline__ float sum() const {
    const Row& row = rows[kHalf];
    const float* x = shrunk + row.sums;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kEarly; ++i) {
      if (i * kVec < row.rank) add(x + i * kVec, row.early[i], row.rank - i * kVec, sum);
    }
#pragma unroll 4
    for (int r = kEarly * kVec; r < row.rank; r += kVec) {
      add(x + r, load_line(row.b + r), row.rank - r, sum);
    }
    return sum;
  }

 private:
  // Of 8 neighbours, of which `count` are there or more.
  __device__ static __forceinline__ void add(const float* x, const uint4& b, int count,
                                             float& sum) {
    const auto* four = reinterpret_cast<const float4*>(x);
    const float4 low = four[0], high = four[1];
    const float left[kVec] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float right[kVec];
    unpack<T>(b, right);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i < count) sum = fmaf(left[i], right[i], sum);
    }
  }
};

// All of it, as a kernel for few rows calls it; all threads call each.
template <class T, class Tile>
class Lora {
 public:
  static constexpr bool kIsThere = true;
  template <bool kIsPaired>
  using Added = LoraAdded<T, kIsPaired>;

  __device__ __forceinline__ Lora(const LinearParams& p, const LinearLora& lora,
                                  unsigned char* smem)
      : p_(p), tokens_(lora, static_cast<int>(p.k), smem) {}

  // Before the wait for the kernel in front.
  __device__ __forceinline__ void prepare() {
    tokens_.read();
    shrink_.begin(p_, tokens_, first_unit());
  }

  // Behind it: this CTA's part of what is shrunk.
  __device__ __forceinline__ void shrink() {
    if (threadIdx.x == 0) {
      const uint64_t added = blockIdx.x == 0 ? 0x10000 - (gridDim.x - 1) : 1;
      counted_ = fetch_add(tokens_.l.counter, added);
    }
#pragma unroll 1
    for (int next = first_unit() + gridDim.x; shrink_.has_unit(); next += gridDim.x) {
      shrink_.run(p_, tokens_, next, counted_);
    }
  }

  // Asks for what a result needs.
  template <bool kIsPaired>
  __device__ __forceinline__ void ask(Added<kIsPaired>& added, bool is_valid, int token,
                                      int column) const {
    added.ask(tokens_, is_valid, token, column, static_cast<int>(p_.n));
  }

  // Before the first result is finished: what all CTAs have shrunk, to shared memory.
  __device__ __forceinline__ void gather() {
    if (is_gathered_) return;
    is_gathered_ = true;
    tokens_.set_number(counted_);
    __syncthreads();
    const int max_rank = tokens_.l.rows.max_rank;
    const int count = tokens_.count * tokens_.num_parts * max_rank;
    for (int i = threadIdx.x; i < count; i += LoraTokens::kThreads) {
      const int pair = i / max_rank, r = i % max_rank;
      const int token = pair / tokens_.num_parts, part = pair % tokens_.num_parts;
      const int slot = tokens_.slots[token], own = slot * tokens_.num_parts + part;
      if (slot < 0 || r >= tokens_.ranks[own]) continue;
      float sum = 0.0f;
      for (int split = 0; split < tokens_.num_splits; split += kAtOnce) {
        sum = add_splits(sum, split, token, part, r);
      }
      tokens_.sums[i] = sum * tokens_.scales[own];
    }
    __syncthreads();
  }

 private:
  static constexpr int kAtOnce = 8;  // splits that are asked for

  __device__ __forceinline__ static int first_unit() { return gridDim.x - 1 - blockIdx.x; }

  // sum + the splits from `first` on, when all of them are there.
  __device__ __forceinline__ float add_splits(float sum, int first, int token, int part,
                                              int r) const {
    const uint32_t number = *tokens_.number;
    uint2 found[kAtOnce];
    bool are_there;
    do {
      are_there = true;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= tokens_.num_splits) continue;
        found[i] = load_numbered(tokens_.l.sums.at(first + i, token, part, r));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < tokens_.num_splits) are_there &= found[i].y == number;
      }
    } while (!are_there);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < tokens_.num_splits) sum += __uint_as_float(found[i].x);
    }
    return sum;
  }

  const LinearParams& p_;
  LoraTokens tokens_;
  LoraShrink<T, Tile> shrink_;
  uint64_t counted_ = 0;  // what thread 0 found in the counter
  bool is_gathered_ = false;
};

// linear_kernel with adapters.
template <class T, Epilogue kEpilogue, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_lora_kernel(const __grid_constant__ LinearParams p, Shares shares,
                       const __grid_constant__ LinearLora lora) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  multiply_rows<T, kEpilogue, Tile>(p, shares, dynamic_smem,
                                    Lora<T, Tile>(p, lora, dynamic_smem + Tile::kSmem));
}

constexpr int kHopperSmem = 227 * 1024;

// Whether what is behind the tile has room.
template <class Tile>
bool fits_lora(const LinearLora& lora) {
  return lora.smem_bytes() <= kHopperSmem - 128 - Tile::kSmem;  // 128: the norm's factors
}

// As launch_tiled, where it fits.
template <class T, Epilogue kEpilogue, class Tile>
cudaError_t launch_lora_tiled(const LinearParams& p, const LinearLora& lora, int num_sms,
                              cudaStream_t stream) {
  constexpr auto kKernel = linear_lora_kernel<T, kEpilogue, Tile>;
  const cudaError_t error = allow_smem<kKernel, kHopperSmem - 128>();
  if (error != cudaSuccess) return error;
  const Grid<kEpilogue, Tile> grid(p.n, num_sms);
  return launch_chained(kKernel, static_cast<unsigned>(grid.num_ctas), Tile::kThreads,
                        Tile::kSmem + lora.smem_bytes(), stream, p, grid.shares, lora);
}

}  // namespace pyserve::gpu
