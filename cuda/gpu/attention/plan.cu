// plan_attention: divides the visible keys of a step's rows into the work items of the attention
// kernels. Inputs are cu_seqlens_q [num_rows + 1] and seq_lens [num_rows], int32; attention.h
// describes the output. One block does this once a step, for all layers with the same window.
//
// Decode: the KV tiles of all rows, plus a fixed cost per row, are laid end to end in one line,
// which is cut into equal ranges, one for each CTA of a KV head ("stream-K", Osama et al. 2023). So
// the load is even for any lengths, and there are at most rows + ranges items and two partial
// buffers per range.
// Prefill: there is one item per query tile, longest first (counting sort). Keys are split only
// where there are too few query tiles to keep all SMs busy. Only the order of equally long prefill
// items depends on timing, and no result depends on that order.
// Bound by latency: a few passes over the rows, each with a block-wide prefix sum over 1024 rows.
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "gpu/attention/attention.h"
#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kThreads >= kMaxDecodeRanges);  // one thread per range
constexpr int kBuckets = 256;                 // buckets of prefill items by length
// In KV tiles: the cost of a decode row besides its keys.
constexpr int kRowCost = 1;
// In KV tiles: the shortest part of a split decode row.
constexpr int kMinSplit = 2;
constexpr int kWholeSlack = 16;  // a range may be longer by 1/16 if that keeps rows whole
constexpr int kMinPrefillChunk = 8;  // in KV tiles: shorter parts cost more to merge than they save

constexpr int kMaxSeqLen = 1 << 30;  // divided by the query heads per KV head

struct Shared {
  int64_t warp_sums[kWarps];
  int range_items[kMaxDecodeRanges];
  int range_costs[kMaxDecodeRanges];
  bool is_whole;  // whether no decode row is split
  int buckets[kBuckets];
  int row_tiles[kThreads + 1];  // exclusive sums over a batch of rows of their query tiles
  int num_partials;
};

struct Plan {
  AttentionPlanParams p;
  int group, num_ranges, num_chunks;
  int decode_items;  // offset of the decode items in work
};

__device__ int64_t sum_over_block(Shared& shared, int64_t value) {
  int64_t total;
  block_exclusive_sum(shared.warp_sums, value, total);
  return total;
}

__device__ int divide_up(int a, int b) { return (a - 1) / b + 1; }  // a > 0

struct Row {
  int query_len = 0, seq_len = 0;

  __device__ bool is_empty() const { return query_len == 0; }
};

// Row `row` of the step; empty for padding and where there is no such row.
__device__ Row row_at(const Plan& plan, int row) {
  if (row >= plan.p.num_rows) return {};
  const int query_len = plan.p.cu_seqlens_q[row + 1] - plan.p.cu_seqlens_q[row];
  const int seq_len = plan.p.seq_lens[row];
  if (query_len == 0 || seq_len == 0) return {};
  // Within these limits no position, packed row or tile number overflows.
  if (query_len < 0 || seq_len < query_len || seq_len > kMaxSeqLen / plan.group) __trap();
  return {query_len, seq_len};
}

__device__ bool is_decode(const Plan& plan, Row row) {
  return row.query_len <= kDecodeRows / plan.group;
}

// The first key that the query at `position` sees, rounded down to a multiple of kKvTile.
__device__ int first_key(const Plan& plan, int position) {
  const int first = plan.p.window > 0 ? max(0, position - plan.p.window + 1) : 0;
  return first / kKvTile * kKvTile;
}

__device__ void write_item(const Plan& plan, int64_t offset, int64_t index,
                           const AttentionItem& item) {
  const int64_t at = offset + index * kItemWords;
  if (at + kItemWords > plan.p.work_words) __trap();
  int4* words = reinterpret_cast<int4*>(plan.p.work + at);
  words[0] = make_int4(item.row, item.query_tile, item.kv_begin, item.kv_end);
  words[1] = make_int4(item.num_splits, item.split, item.first_item, item.partial);
}

// ---- decode -------------------------------------------------------------------------------------

// The line of all decode rows' costs, and how it is cut into ranges.
struct Line {
  int64_t total, share;
  int num_ranges, rest;  // total = share * num_ranges + rest

  __device__ Line(int64_t length, int ranges)
      : total(length),
        share(length / ranges),
        num_ranges(ranges),
        rest(static_cast<int>(length % ranges)) {}

  // floor(range * total / num_ranges), without a 64-bit division.
  __device__ int64_t range_begin(int range) const {
    return range * share + range * rest / num_ranges;
  }
  __device__ int range_of(int64_t position) const {
    return static_cast<int>(((position + 1) * num_ranges - 1) / total);
  }
};

struct DecodeRow {
  int kv_begin = 0, seq_len = 0, num_tiles = 0;
  int64_t at = 0;  // position in the line
  int first_range = 0, last_range = -1;
  int index = 0, num_items = 0, first_part = 0;  // first_part is the range of the row's first item
  int first_item = 0, first_partial = 0;

  __device__ DecodeRow(const Plan& plan, int row_index) : index(row_index) {
    const Row row = row_at(plan, row_index);
    if (row.is_empty() || !is_decode(plan, row)) return;
    kv_begin = first_key(plan, row.seq_len - row.query_len);
    seq_len = row.seq_len;
    num_tiles = divide_up(seq_len - kv_begin, kKvTile);
  }

  __device__ DecodeRow of_lane(int lane) const {
    DecodeRow row = *this;
    for (int* word :
         {&row.kv_begin, &row.seq_len, &row.num_tiles, &row.first_range, &row.last_range,
          &row.index, &row.num_items, &row.first_part, &row.first_item, &row.first_partial}) {
      *word = __shfl_sync(kFullMask, *word, lane);
    }
    row.at = __shfl_sync(kFullMask, row.at, lane);
    return row;
  }

  __device__ int64_t cost(const Plan& plan) const {
    return num_tiles == 0 ? 0 : int64_t{num_tiles} + kRowCost;
  }

  __device__ void place(const Plan& plan, const Line& line, int64_t position, bool is_whole) {
    if (num_tiles == 0) return;
    at = position;
    // Where no row is split, a row belongs to the range that holds its middle.
    const int64_t middle = cost(plan) / 2;
    first_range = line.range_of(is_whole ? at + middle : at);
    last_range = line.range_of(is_whole ? at + middle : at + cost(plan) - 1);
  }

  // The first tile of the row that belongs to `range`. If a cut would leave a part shorter than
  // kMinSplit on one of its sides, it moves to the row's end on that side.
  __device__ int cut(const Plan& plan, const Line& line, int range) const {
    if (range <= first_range) return 0;
    if (range > last_range) return num_tiles;
    const int64_t tile = line.range_begin(range) - at - kRowCost;
    if (tile < kMinSplit) return 0;
    return num_tiles - tile < kMinSplit ? num_tiles : static_cast<int>(tile);
  }

  // Each range that the row touches gets one part of it, except that the ranges at both ends get
  // none if their part would be too short. The cuts between them are further apart than the
  // shortest part.
  __device__ void count_items(const Plan& plan, const Line& line) {
    if (num_tiles == 0) return;
    int last = last_range;
    first_part = first_range;
    while (first_part < last && cut(plan, line, first_part + 1) == 0) ++first_part;
    while (last > first_part && cut(plan, line, last) == num_tiles) --last;
    num_items = last - first_part + 1;
  }
};

constexpr int kFewItems = 4;  // of a row; so many are written by one thread

__device__ void write_part(const Plan& plan, const Line& line, Shared& shared, const DecodeRow& row,
                           int split) {
  const int range = row.first_part + split;
  const int end = split == row.num_items - 1 ? row.num_tiles : row.cut(plan, line, range + 1);
  AttentionItem item{};
  item.row = row.index;
  item.kv_begin = row.kv_begin + (split == 0 ? 0 : row.cut(plan, line, range)) * kKvTile;
  item.kv_end = end == row.num_tiles ? row.seq_len : row.kv_begin + end * kKvTile;
  item.num_splits = row.num_items;
  item.split = split;
  item.first_item = row.first_item;
  item.partial = row.num_items == 1 ? -1 : row.first_partial + split;
  write_item(plan, plan.decode_items, row.first_item + split, item);
  atomicAdd(&shared.range_items[range], 1);
}

// Writes the items of each lane's row. The whole warp writes the items of a row with many.
__device__ void write_parts(const Plan& plan, const Line& line, Shared& shared,
                            const DecodeRow& row) {
  if (row.num_items <= kFewItems) {
    for (int split = 0; split < row.num_items; ++split) write_part(plan, line, shared, row, split);
  }
  unsigned lanes = __ballot_sync(kFullMask, row.num_items > kFewItems);
  for (; lanes != 0; lanes &= lanes - 1) {
    const DecodeRow theirs = row.of_lane(__ffs(lanes) - 1);
    for (int split = threadIdx.x % kWarpSize; split < theirs.num_items; split += kWarpSize) {
      write_part(plan, line, shared, theirs, split);
    }
  }
}

// Finds out whether rows can be kept whole: whether no range would then be much longer than an even
// share. Splitting a row costs writing and reading partial sums, and a wait of the CTA that merges
// them.
__device__ void see_whether_whole(const Plan& plan, Shared& shared, const Line& line) {
  const int thread = threadIdx.x;
  if (thread == 0) shared.is_whole = plan.p.num_rows <= kThreads && line.total > 0;
  shared.range_costs[thread] = 0;
  const int cost = static_cast<int>(DecodeRow(plan, thread).cost(plan));
  int64_t sum;
  const int64_t before = block_exclusive_sum(shared.warp_sums, cost, sum);
  if (shared.is_whole && cost > 0) {
    atomicAdd(&shared.range_costs[line.range_of(before + cost / 2)], cost);
  }
  __syncthreads();
  const int64_t most = line.share + 1 + line.share / kWholeSlack;
  if (shared.range_costs[thread] > most) shared.is_whole = false;
  __syncthreads();
}

// Returns the number of decode items.
__device__ int plan_decode(const Plan& plan, Shared& shared) {
  const int thread = threadIdx.x;
  shared.range_items[thread] = 0;
  int64_t cost = 0;
  for (int row = thread; row < plan.p.num_rows; row += kThreads) {
    cost += DecodeRow(plan, row).cost(plan);
  }
  const int64_t total = sum_over_block(shared, cost);
  const int64_t wanted = total / kMinSplit;
  const Line line(total, wanted < 1                 ? 1
                         : wanted < plan.num_ranges ? static_cast<int>(wanted)
                                                    : plan.num_ranges);
  see_whether_whole(plan, shared, line);
  int64_t position = 0, num_items = 0, num_partials = 0;
  for (int base = 0; base < plan.p.num_rows && total > 0; base += kThreads) {
    DecodeRow row(plan, base + thread);
    int64_t sum;
    const int64_t before = block_exclusive_sum(shared.warp_sums, row.cost(plan), sum);
    row.place(plan, line, position + before, shared.is_whole);
    position += sum;
    row.count_items(plan, line);
    const int64_t partials = row.num_items > 1 ? row.num_items : 0;
    const int64_t counts =
        block_exclusive_sum(shared.warp_sums, (int64_t{row.num_items} << 32) | partials, sum);
    row.first_item = static_cast<int>(num_items + (counts >> 32));
    row.first_partial = static_cast<int>(num_partials + (counts & 0xffffffff));
    write_parts(plan, line, shared, row);
    num_items += sum >> 32;
    num_partials += sum & 0xffffffff;
  }
  __syncthreads();
  int64_t all;
  const int64_t start = block_exclusive_sum(shared.warp_sums, shared.range_items[thread], all);
  if (thread < plan.num_ranges) plan.p.work[kDecodeStartsOffset + thread] = static_cast<int>(start);
  if (thread == 0) plan.p.work[kDecodeStartsOffset + plan.num_ranges] = static_cast<int>(all);
  return static_cast<int>(num_items);
}

// ---- prefill ------------------------------------------------------------------------------------

struct QueryTile {
  int kv_begin, kv_end, num_kv_tiles;

  __device__ QueryTile(const Plan& plan, Row row, int index) {
    const int last_packed = min((index + 1) * kPrefillRows, row.query_len * plan.group) - 1;
    const int position = row.seq_len - row.query_len;  // position of the row's first query
    kv_begin = first_key(plan, position + index * kPrefillRows / plan.group);
    kv_end = position + last_packed / plan.group + 1;
    num_kv_tiles = divide_up(kv_end - kv_begin, kKvTile);
  }
};

__device__ int num_query_tiles(const Plan& plan, Row row) {
  if (row.is_empty() || is_decode(plan, row)) return 0;
  return static_cast<int>(divide_up(row.query_len * plan.group, kPrefillRows));
}

// Calls fn(row index, tile index, tile) for all query tiles of the step, spread over the threads.
template <class Fn>
__device__ void for_each_query_tile(const Plan& plan, Shared& shared, Fn&& fn) {
  const int thread = threadIdx.x;
  for (int base = 0; base < plan.p.num_rows; base += kThreads) {
    int64_t total;
    const int64_t before = block_exclusive_sum(
        shared.warp_sums, num_query_tiles(plan, row_at(plan, base + thread)), total);
    shared.row_tiles[thread] = static_cast<int>(before);
    if (thread == 0) shared.row_tiles[kThreads] = static_cast<int>(total);
    __syncthreads();
    for (int i = thread; i < total; i += kThreads) {
      int low = 0, high = kThreads;  // searches for the last row that begins at or before i
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (shared.row_tiles[middle] <= i ? low : high) = middle;
      }
      const int index = i - shared.row_tiles[low];
      fn(base + low, index, QueryTile(plan, row_at(plan, base + low), index));
    }
    __syncthreads();
  }
}

// Returns the number of prefill items.
__device__ int plan_prefill(const Plan& plan, Shared& shared, int64_t offset) {
  const int thread = threadIdx.x;
  int64_t tiles = 0;
  int longest = 0;
  for (int row = thread; row < plan.p.num_rows; row += kThreads) {
    const Row shape = row_at(plan, row);
    const int count = num_query_tiles(plan, shape);
    tiles += count;
    if (count > 0) longest = max(longest, divide_up(shape.seq_len, kKvTile));
  }
  const int64_t num_tiles = sum_over_block(shared, tiles);
  if (num_tiles == 0) return 0;
  if (thread < kBuckets) shared.buckets[thread] = 0;
  if (thread == 0) shared.num_partials = 0;
  __syncthreads();
  atomicMax(&shared.buckets[0], longest);
  __syncthreads();
  longest = shared.buckets[0];
  __syncthreads();
  if (thread == 0) shared.buckets[0] = 0;

  int chunk = longest;  // the most KV tiles that an item may have
  if (num_tiles < plan.num_chunks) {
    int64_t kv_tiles = 0;
    for_each_query_tile(plan, shared,
                        [&](int, int, const QueryTile& tile) { kv_tiles += tile.num_kv_tiles; });
    kv_tiles = sum_over_block(shared, kv_tiles);
    chunk =
        max(kMinPrefillChunk, static_cast<int>((kv_tiles + plan.num_chunks - 1) / plan.num_chunks));
  }
  __syncthreads();

  const auto bucket_of = [&](int kv_tiles) {  // the longest come first
    return kBuckets - 1 - static_cast<int>(int64_t{kv_tiles} * (kBuckets - 1) / longest);
  };
  for_each_query_tile(plan, shared, [&](int, int, const QueryTile& tile) {
    const int splits = divide_up(tile.num_kv_tiles, chunk);
    atomicAdd(&shared.buckets[bucket_of(divide_up(tile.num_kv_tiles, splits))], splits);
  });
  int64_t num_items;
  const int64_t before = block_exclusive_sum(
      shared.warp_sums, thread < kBuckets ? shared.buckets[thread] : 0, num_items);
  __syncthreads();
  if (thread < kBuckets) shared.buckets[thread] = static_cast<int>(before);
  __syncthreads();
  for_each_query_tile(plan, shared, [&](int row, int index, const QueryTile& tile) {
    const int splits = divide_up(tile.num_kv_tiles, chunk);
    const int first =
        atomicAdd(&shared.buckets[bucket_of(divide_up(tile.num_kv_tiles, splits))], splits);
    const int partial = splits == 1 ? -1 : atomicAdd(&shared.num_partials, splits);
    for (int split = 0; split < splits; ++split) {
      AttentionItem item{};
      item.row = row;
      item.query_tile = index;
      item.kv_begin =
          tile.kv_begin + static_cast<int>(int64_t{tile.num_kv_tiles} * split / splits) * kKvTile;
      item.kv_end = min(tile.kv_end, tile.kv_begin + static_cast<int>(int64_t{tile.num_kv_tiles} *
                                                                      (split + 1) / splits) *
                                                         kKvTile);
      item.num_splits = splits;
      item.split = split;
      item.first_item = first;
      item.partial = splits == 1 ? -1 : partial + split;
      write_item(plan, offset, first + split, item);
    }
  });
  return static_cast<int>(num_items);
}

__global__ void __launch_bounds__(kThreads) plan_attention_kernel(Plan plan) {
  __shared__ Shared shared;
  pdl_wait();
  pdl_launch_dependents();
  const int num_decode = plan_decode(plan, shared);
  const int64_t offset = plan.decode_items + int64_t{num_decode} * kItemWords;
  const int num_prefill = plan_prefill(plan, shared, offset);
  if (threadIdx.x != 0) return;
  plan.p.work[kWorkNumDecodeItems] = num_decode;
  plan.p.work[kWorkNumPrefillItems] = num_prefill;
  plan.p.work[kWorkDecodeStartsOffset] = kDecodeStartsOffset;
  plan.p.work[kWorkDecodeItemsOffset] = plan.decode_items;
  plan.p.work[kWorkPrefillItemsOffset] = static_cast<int>(offset);
  plan.p.work[kWorkNumDecodeRanges] = plan.num_ranges;
}

}  // namespace

cudaError_t launch_plan_attention(const AttentionPlanParams& params, cudaStream_t stream) {
  Plan plan{};
  plan.p = params;
  plan.group = params.num_heads / params.num_kv_heads;
  plan.num_ranges = num_decode_ranges(params.device, params.num_kv_heads);
  plan.decode_items = decode_items_offset(plan.num_ranges);
  plan.num_chunks = num_prefill_chunks(params.device, params.num_kv_heads);
  return launch_chained(plan_attention_kernel, 1, kThreads, 0, stream, plan);
}

}  // namespace pyserve::gpu
