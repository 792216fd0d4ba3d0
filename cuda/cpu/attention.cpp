// paged_attention on a CPU: causal softmax(q k^T * scale) v over a paged KV cache, for any mix of
// query lengths; with a softcap, softmax(softcap * tanh(q k^T * scale / softcap)) v.
//   q, out [num_tokens, num_heads, head_dim]
//   caches [num_blocks, block_size, num_kv_heads, head_dim]; all float32 or all bfloat16
//
// Work split: an item is up to kBlockRows rows, where a row is a (query, head) pair. All query
// heads of a KV head's group are in one item, so that K and V are read once. A decode item has one
// query and as many KV heads as leave several items for every thread; it goes through these KV
// heads within each tile of keys, because their keys lie side by side. Threads take items from one
// shared counter, items with several queries first.
// Numerics: online softmax in base 2 over tiles of kTileKeys keys (Milakov and Gimelshein 2018, Dao
// et al. 2022), float32 throughout, one rounding at the store. Keys that no query may see are never
// touched, so the memory behind the end of a sequence may hold anything.
// There are two ways through a tile. The direct way is for few rows (decode): it reads the caches
// directly and computes one dot product after another. The other way is for many rows (prefill):
// all rows share a float32 copy of the tile, with K transposed, and are multiplied in register
// blocks.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "../common/args/attention.h"
#include "attention_rows.h"
#include "attention_tile.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

using namespace attention;

constexpr const char* kOp = "paged_attention";
// With up to so many rows a copy of the tile costs more than it saves.
constexpr int64_t kDirectRows = 8;
constexpr float kLowestMax = -1e30f;  // finite, because -inf - -inf would be NaN
static_assert(kBlockRows % kRowGroup == 0);

struct Params : AttentionArgs {
  int64_t window;
  int64_t group = 0, padded_dim = 0;
  float scale = 0;      // factor of the scores, log2(e) included; with a cap, of the capped scores
  float cap_scale = 0;  // factor of the scores before tanh; 0: scores are not capped
};

struct WorkItem {
  int64_t slot, kv_head;  // kv_head is the first KV head
  int64_t num_kv_heads;   // more than 1 only for the direct way, with one query
  int64_t token;          // index of the first query in q
  int64_t num_queries;
  int64_t position;  // position of the first query
};

// Where the keys and values of a tile lie, for the item's first KV head.
struct Pointers {
  const void* keys[kTileKeys];
  const void* values[kTileKeys];
};

// The buffers of one thread. Rows of q, acc and v are padded_dim apart, so that they lie close
// together.
struct Scratch {
  alignas(64) float q[kBlockRows * kMaxHeadDim];
  alignas(64) float acc[kBlockRows * kMaxHeadDim];
  alignas(64) float k_transposed[kMaxHeadDim * kTileKeys];
  alignas(64) float v[kTileKeys * kMaxHeadDim];
  alignas(64) float scores[kBlockRows * kTileKeys];
  float row_max[kBlockRows], row_sum[kBlockRows], rescale[kBlockRows];
  Pointers pointers[2];  // of the current tile and of the next, by parity
};

Scratch& thread_scratch() {
  thread_local std::unique_ptr<Scratch> scratch = std::make_unique<Scratch>();
  return *scratch;
}

// n keys from position `first` on; their pointers are in the scratch.
struct Tile {
  int64_t first, n;
  int parity;
};

template <class T>
void find_tile(const Params& p, const WorkItem& item, const Tile& tile, Scratch& scratch) {
  const int32_t* blocks = p.block_table.ptr<int32_t>() + item.slot * p.block_table.stride(0);
  const int64_t key_stride = p.key_cache.stride(1), value_stride = p.value_cache.stride(1);
  Pointers& pointers = scratch.pointers[tile.parity];
  int64_t block = tile.first / p.block_size, offset = tile.first % p.block_size;
  for (int64_t i = 0; i < tile.n; ++block, offset = 0) {
    const T* key = p.key_cache.ptr<T>() + blocks[block] * p.key_cache.stride(0) +
                   item.kv_head * p.key_cache.stride(2) + offset * key_stride;
    const T* value = p.value_cache.ptr<T>() + blocks[block] * p.value_cache.stride(0) +
                     item.kv_head * p.value_cache.stride(2) + offset * value_stride;
    const int64_t end = std::min(tile.n, i + p.block_size - offset);
    for (; i < end; ++i, key += key_stride, value += value_stride) {
      pointers.keys[i] = key;
      pointers.values[i] = value;
    }
  }
}

// ---- one item -----------------------------------------------------------------------------------

// K and V of one KV head in one tile.
template <class T>
struct HeadTile {
  HeadRows<T> keys, values;
};

template <class T>
HeadTile<T> head_tile(const Params& p, const Pointers& pointers, int64_t head) {
  return {{pointers.keys, head * p.key_cache.stride(2)},
          {pointers.values, head * p.value_cache.stride(2)}};
}

template <class T, int kHeadDim, int kRows>
void direct_rows(const Params& p, const HeadTile<T>& here, const HeadTile<T>& next, int64_t n,
                 int64_t row, Scratch& s) {
  float* scores = s.scores + row * kTileKeys;
  direct_scores<T, kHeadDim, kRows>(s.q + row * kHeadDim, here.keys, next.keys, n, scores);
  for (int r = 0; r < kRows; ++r) {
    if (p.cap_scale != 0) cap_scores(scores + r * kTileKeys, p.cap_scale, n);
    s.rescale[row + r] = softmax_row(scores + r * kTileKeys, p.scale, 0, n, n, s.row_max[row + r],
                                     s.row_sum[row + r]);
  }
  for (int64_t k = 0; k < n; ++k) prefetch<T, kHeadDim>(next.values[k]);
  constexpr int kWhole = kHeadDim / (kColumns * kLanes) * (kColumns * kLanes);
  for (int column = 0; column < kWhole; column += kColumns * kLanes) {
    add_values<T, kRows, kColumns>(scores, s.rescale + row, here.values, n, column,
                                   s.acc + row * kHeadDim, kHeadDim);
  }
  if constexpr (kWhole < kHeadDim) {
    static_assert(kHeadDim - kWhole == 2 * kLanes);
    add_values<T, kRows, 2>(scores, s.rescale + row, here.values, n, kWhole, s.acc + row * kHeadDim,
                            kHeadDim);
  }
}

// The direct way: one query, which sees all keys of the tile. The next KV head or tile is
// prefetched meanwhile.
template <class T, int kHeadDim>
void direct_tile(const Params& p, const WorkItem& item, const Tile& tile, Scratch& s) {
  for (int64_t head = 0; head < item.num_kv_heads; ++head) {
    const bool is_last = head + 1 == item.num_kv_heads;
    const auto here = head_tile<T>(p, s.pointers[tile.parity], head);
    const auto next = head_tile<T>(p, s.pointers[is_last ? 1 - tile.parity : tile.parity],
                                   is_last ? 0 : head + 1);
    int64_t row = head * p.group;
    const int64_t end = row + p.group;
    for (; row + 4 <= end; row += 4) {
      direct_rows<T, kHeadDim, 4>(p, here, next, tile.n, row, s);
    }
    switch (end - row) {
      case 3:
        direct_rows<T, kHeadDim, 3>(p, here, next, tile.n, row, s);
        break;
      case 2:
        direct_rows<T, kHeadDim, 2>(p, here, next, tile.n, row, s);
        break;
      case 1:
        direct_rows<T, kHeadDim, 1>(p, here, next, tile.n, row, s);
        break;
      default:
        break;
    }
  }
}

// The other way, for any rows. Rows up to a multiple of kRowGroup are computed; those behind
// num_rows are zeros.
template <class T>
void block_tile(const Params& p, const WorkItem& item, const Tile& tile, int64_t num_rows,
                Scratch& s) {
  Pointers& here = s.pointers[tile.parity];
  transpose_keys<T>(here.keys, tile.n, p.head_dim, p.padded_dim, s.k_transposed);
  for (int64_t k = 0; k < tile.n; ++k) {
    float* copy = s.v + k * p.padded_dim;
    load_row(static_cast<const T*>(here.values[k]), p.head_dim, copy);
    here.values[k] = copy;
  }
  const HeadRows<float> values{here.values, 0};
  for (int64_t row = 0; row < num_rows; row += kRowGroup) {
    float* scores = s.scores + row * kTileKeys;
    block_scores(s.q + row * p.padded_dim, p.padded_dim, s.k_transposed, tile.n, p.padded_dim,
                 scores);
    for (int64_t r = row; r < std::min(row + kRowGroup, num_rows); ++r) {
      const int64_t position = item.position + r / p.group;
      const int64_t to = std::clamp<int64_t>(position + 1 - tile.first, 0, tile.n);
      const int64_t from =
          p.window > 0 ? std::clamp<int64_t>(position + 1 - p.window - tile.first, 0, to) : 0;
      if (p.cap_scale != 0) cap_scores(s.scores + r * kTileKeys, p.cap_scale, tile.n);
      s.rescale[r] = softmax_row(s.scores + r * kTileKeys, p.scale, from, to, tile.n, s.row_max[r],
                                 s.row_sum[r]);
    }
    float* acc = s.acc + row * p.padded_dim;
    int64_t column = 0;
    for (; column + kColumns * kLanes <= p.padded_dim; column += kColumns * kLanes) {
      add_values<float, kRowGroup, kColumns>(scores, s.rescale + row, values, tile.n, column, acc,
                                             p.padded_dim);
    }
    for (; column < p.padded_dim; column += kLanes) {
      add_values<float, kRowGroup, 1>(scores, s.rescale + row, values, tile.n, column, acc,
                                      p.padded_dim);
    }
  }
}

// The pointer to row r of an item in q or out: first all heads of the first query, then those of
// the second.
template <class T>
T* row_pointer(const View& view, const WorkItem& item, int64_t group, int64_t r) {
  const int64_t num_heads = item.num_kv_heads * group;
  return view.ptr<T>() + (item.token + r / num_heads) * view.stride(0) +
         (item.kv_head * group + r % num_heads) * view.stride(1);
}

template <class T>
void load_queries(const Params& p, const WorkItem& item, int64_t num_rows, Scratch& s) {
  const int64_t filled = (num_rows + kRowGroup - 1) / kRowGroup * kRowGroup;
  std::fill_n(s.row_max, filled, kLowestMax);
  std::fill_n(s.row_sum, filled, 0.0f);
  std::fill_n(s.rescale, filled, 0.0f);
  std::fill_n(s.acc, filled * p.padded_dim, 0.0f);
  std::fill_n(s.q + num_rows * p.padded_dim, (filled - num_rows) * p.padded_dim, 0.0f);
  for (int64_t r = 0; r < num_rows; ++r) {
    load_row(row_pointer<T>(p.q, item, p.group, r), p.head_dim, s.q + r * p.padded_dim);
  }
}

// The direct way for this head_dim; null where there is none.
template <class T>
auto direct_way(const Params& p) -> decltype(&direct_tile<T, 64>) {
  switch (p.head_dim) {
    case 64:
      return direct_tile<T, 64>;
    case 96:
      return direct_tile<T, 96>;
    case 128:
      return direct_tile<T, 128>;
    case 256:
      return direct_tile<T, 256>;
    default:
      return nullptr;
  }
}

// Whether rows with a single query take the direct way.
bool is_direct(const Params& p) {
  return p.group <= kDirectRows && direct_way<float>(p) != nullptr;
}

template <class T>
void attend(const Params& p, const WorkItem& item) {
  Scratch& s = thread_scratch();
  const int64_t num_rows = item.num_queries * item.num_kv_heads * p.group;
  const auto direct = item.num_queries == 1 && is_direct(p) ? direct_way<T>(p) : nullptr;
  load_queries<T>(p, item, num_rows, s);
  const int64_t end = item.position + item.num_queries;
  const int64_t begin = p.window > 0 ? std::max<int64_t>(0, item.position + 1 - p.window) : 0;
  Tile tile{begin, std::min(kTileKeys, end - begin), 0};
  find_tile<T>(p, item, tile, s);
  while (tile.n > 0) {
    Tile next{tile.first + tile.n, std::min(kTileKeys, end - tile.first - tile.n), 1 - tile.parity};
    // Behind the last tile its own keys are prefetched again, which are in the cache already.
    if (next.n < tile.n) s.pointers[next.parity] = s.pointers[tile.parity];
    find_tile<T>(p, item, next, s);
    if (direct != nullptr) {
      direct(p, item, tile, s);
    } else {
      block_tile<T>(p, item, tile, num_rows, s);
    }
    tile = next;
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    store_row(s.acc + r * p.padded_dim, 1.0f / s.row_sum[r], p.head_dim,
              row_pointer<T>(p.out, item, p.group, r));
  }
}

// ---- the op -------------------------------------------------------------------------------------

// KV heads per decode item: as many as fit, but few enough to leave four items for every thread.
int64_t kv_heads_per_item(const Params& p, int64_t num_rows) {
  if (!is_direct(p)) return 1;
  const int64_t num_kv_heads = p.key_cache.size(2), threads = num_threads();
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + num_rows - 1) / num_rows;
  const int64_t parts = std::clamp<int64_t>(wanted, 1, num_kv_heads);
  return std::min(kBlockRows / p.group, (num_kv_heads + parts - 1) / parts);
}

// Fills `items` and returns the estimated cost of all of them in nanoseconds.
double make_items(const Params& p, std::vector<WorkItem>& items) {
  const int64_t num_rows = p.row_slots.size(0), num_kv_heads = p.key_cache.size(2);
  double work = 0;
  items.clear();
  for (const bool is_decode : {false, true}) {
    const int64_t max_queries = std::max<int64_t>(1, kBlockRows / p.group);
    const int64_t max_heads = is_decode ? kv_heads_per_item(p, std::max<int64_t>(num_rows, 1)) : 1;
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t query_len = checked_query_len(p, p.key_cache, p.window, r);
      if (query_len == 0 || (query_len == 1) != is_decode) continue;
      const int64_t slot = p.row_slots.ptr<int32_t>()[r];
      const int64_t begin = p.cu_seqlens_q.ptr<int32_t>()[r];
      const int64_t start = p.seq_lens.ptr<int32_t>()[r] - query_len;
      for (int64_t i = 0; i < query_len; i += max_queries) {
        const int64_t num_queries = std::min(max_queries, query_len - i);
        for (int64_t head = 0; head < num_kv_heads; head += max_heads) {
          items.push_back({slot, head, std::min(max_heads, num_kv_heads - head), begin + i,
                           num_queries, start + i});
        }
        work += static_cast<double>((start + i + num_queries) * num_queries);
      }
    }
  }
  return work * static_cast<double>(p.q.size(1) * p.head_dim) * 0.1;
}

template <class T>
void attend_all(const Params& p) {
  thread_local std::vector<WorkItem> items;
  const double cost = make_items(p, items);
  const auto count = static_cast<int64_t>(items.size());
  const int64_t workers = cost < kParallelCost ? 1 : std::min(num_threads(), count);
  const WorkItem* first = items.data();
  std::atomic<int64_t> next = 0;
  parallel_for(workers, kParallelCost, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      attend<T>(p, first[i]);
    }
  });
}

void paged_attention(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache,
                     const Tensor& block_table, const Tensor& row_slots, const Tensor& cu_seqlens_q,
                     const Tensor& seq_lens, double softmax_scale, int64_t window,
                     int64_t /*max_query_len*/, const std::optional<Tensor>& /*work*/,
                     const std::optional<Tensor>& /*workspace*/, const Tensor& out,
                     double softcap) {
  Params p{{{kOp, Place::kCpu},
            q,
            key_cache,
            value_cache,
            block_table,
            row_slots,
            cu_seqlens_q,
            seq_lens,
            out},
           window};
  PYSERVE_CHECK(p.head_dim > 0 && p.head_dim % 8 == 0 && p.head_dim <= kMaxHeadDim, kOp,
                ": head_dim ", p.head_dim, " is not a multiple of 8 up to ", kMaxHeadDim);
  p.check(softmax_scale, window, softcap, kBlockRows);
  p.group = p.num_heads / p.num_kv_heads;
  p.padded_dim = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  p.scale = static_cast<float>((softcap > 0 ? softcap : softmax_scale) * 1.4426950408889634);
  if (softcap > 0) p.cap_scale = static_cast<float>(softmax_scale / softcap);
  dispatch_float<float, Bf16>(p.q, [&]<class T>(T) { attend_all<T>(p); });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&pyserve::paged_attention));
}
