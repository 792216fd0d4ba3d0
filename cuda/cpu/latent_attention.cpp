// latent_attention on a CPU: causal attention of all heads over one paged cache of latents
// (DeepSeek-V2):
//   scores = q c^T * scale over a whole cached row c, out = softmax(scores) c[:, :latent_size]
//   q [num_tokens, num_heads, width], out [num_tokens, num_heads, latent_size]
//   latent_cache [num_blocks, block_size, width]; all float32 or all bfloat16
//
// Work split: an item is up to kBlockRows rows, where a row is a (query, head) pair, of
// neighbouring queries or, where there are many heads, of neighbouring heads. The heads of a single
// query are divided so that every thread has work. Threads take items from one shared counter,
// those with several queries first. Numerics and the way through a tile are those of attention.cpp
// for many rows: the kTileKeys cached rows of a tile are widened to float32 once for all rows of an
// item, both as keys, transposed, and as values.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "../common/args/latent.h"
#include "attention_rows.h"
#include "attention_tile.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

using namespace attention;

constexpr float kLowestMax = -1e30f;  // finite, because -inf - -inf would be NaN
constexpr int64_t kMaxWidth = kMaxLatentSize + kMaxLatentRopeDim;

struct Params : LatentAttentionArgs {
  int64_t padded_width, padded_size;
  float scale;  // factor of the scores, log2(e) included
};

struct WorkItem {
  int64_t slot;
  int64_t head, num_heads;
  int64_t token;  // index of the first query in q
  int64_t num_queries;
  int64_t position;  // position of the first query
};

// The buffers of one thread. Rows of q are padded_width apart, rows of acc padded_size.
struct Scratch {
  alignas(64) float q[kBlockRows * kMaxWidth];
  alignas(64) float acc[kBlockRows * kMaxLatentSize];
  alignas(64) float k_transposed[kMaxWidth * kTileKeys];
  alignas(64) float v[kTileKeys * kMaxLatentSize];
  alignas(64) float scores[kBlockRows * kTileKeys];
  float row_max[kBlockRows], row_sum[kBlockRows], rescale[kBlockRows];
  const void* rows[kTileKeys];  // the tile's rows in the cache
  const void* values[kTileKeys];
};

Scratch& thread_scratch() {
  thread_local std::unique_ptr<Scratch> scratch = std::make_unique<Scratch>();
  return *scratch;
}

template <class T>
T* row_pointer(const View& view, const WorkItem& item, int64_t r) {
  return view.ptr<T>() + (item.token + r / item.num_heads) * view.stride(0) +
         (item.head + r % item.num_heads) * view.stride(1);
}

template <class T>
void load_queries(const Params& p, const WorkItem& item, int64_t num_rows, Scratch& s) {
  const int64_t filled = (num_rows + kRowGroup - 1) / kRowGroup * kRowGroup;
  std::fill_n(s.row_max, filled, kLowestMax);
  std::fill_n(s.row_sum, filled, 0.0f);
  std::fill_n(s.rescale, filled, 0.0f);
  std::fill_n(s.acc, filled * p.padded_size, 0.0f);
  std::fill_n(s.q + num_rows * p.padded_width, (filled - num_rows) * p.padded_width, 0.0f);
  for (int64_t r = 0; r < num_rows; ++r) {
    load_row(row_pointer<T>(p.q, item, r), p.width(), s.q + r * p.padded_width);
  }
}

// Widens the n cached rows from position `first` on.
template <class T>
void load_tile(const Params& p, const WorkItem& item, int64_t first, int64_t n, Scratch& s) {
  const View& cache = p.latent_cache;
  const int32_t* blocks = p.block_table.ptr<int32_t>() + item.slot * p.block_table.stride(0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t position = first + i;
    const T* row = cache.ptr<T>() + blocks[position / p.block_size()] * cache.stride(0) +
                   position % p.block_size() * cache.stride(1);
    float* copy = s.v + i * p.padded_size;
    load_row(row, p.latent_size(), copy);
    s.rows[i] = row;
    s.values[i] = copy;
  }
  transpose_keys<T>(s.rows, n, p.width(), p.padded_width, s.k_transposed);
}

// Rows up to a multiple of kRowGroup are computed; those behind num_rows are zeros.
void attend_tile(const Params& p, const WorkItem& item, int64_t first, int64_t n, int64_t num_rows,
                 Scratch& s) {
  const HeadRows<float> values{s.values, 0};
  for (int64_t row = 0; row < num_rows; row += kRowGroup) {
    float* scores = s.scores + row * kTileKeys;
    block_scores(s.q + row * p.padded_width, p.padded_width, s.k_transposed, n, p.padded_width,
                 scores);
    for (int64_t r = row; r < std::min(row + kRowGroup, num_rows); ++r) {
      const int64_t position = item.position + r / item.num_heads;
      const int64_t to = std::clamp<int64_t>(position + 1 - first, 0, n);
      s.rescale[r] =
          softmax_row(s.scores + r * kTileKeys, p.scale, 0, to, n, s.row_max[r], s.row_sum[r]);
    }
    float* acc = s.acc + row * p.padded_size;
    int64_t column = 0;
    for (; column + kColumns * kLanes <= p.padded_size; column += kColumns * kLanes) {
      add_values<float, kRowGroup, kColumns>(scores, s.rescale + row, values, n, column, acc,
                                             p.padded_size);
    }
    for (; column < p.padded_size; column += kLanes) {
      add_values<float, kRowGroup, 1>(scores, s.rescale + row, values, n, column, acc,
                                      p.padded_size);
    }
  }
}

template <class T>
void attend(const Params& p, const WorkItem& item) {
  Scratch& s = thread_scratch();
  const int64_t num_rows = item.num_queries * item.num_heads;
  load_queries<T>(p, item, num_rows, s);
  const int64_t end = item.position + item.num_queries;
  for (int64_t first = 0; first < end; first += kTileKeys) {
    const int64_t n = std::min(kTileKeys, end - first);
    load_tile<T>(p, item, first, n, s);
    attend_tile(p, item, first, n, num_rows, s);
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    store_row(s.acc + r * p.padded_size, 1.0f / s.row_sum[r], p.latent_size(),
              row_pointer<T>(p.out, item, r));
  }
}

// Heads per item: as many as it can hold. For a single query, few enough to leave two items for
// every thread, but no fewer than share each load of a key.
int64_t heads_per_item(const Params& p, bool is_decode) {
  const int64_t most = std::min(p.num_heads(), kBlockRows), threads = num_threads();
  if (!is_decode || threads == 1) return most;
  const int64_t parts = (2 * threads + p.num_rows() - 1) / std::max<int64_t>(p.num_rows(), 1);
  const int64_t share = (p.num_heads() + parts - 1) / parts;
  return std::min(most, (share + kRowGroup - 1) / kRowGroup * kRowGroup);
}

// Fills `items` and returns the estimated cost of all of them in nanoseconds.
double make_items(const Params& p, std::vector<WorkItem>& items) {
  double work = 0;
  items.clear();
  for (const bool is_decode : {false, true}) {
    const int64_t max_heads = heads_per_item(p, is_decode);
    const int64_t max_queries = std::max<int64_t>(1, kBlockRows / max_heads);
    for (int64_t r = 0; r < p.num_rows(); ++r) {
      const int64_t query_len = checked_query_len(p, p.latent_cache, 0, r);
      if (query_len == 0 || (query_len == 1) != is_decode) continue;
      const int64_t slot = p.row_slots.ptr<int32_t>()[r];
      const int64_t begin = p.cu_seqlens_q.ptr<int32_t>()[r];
      const int64_t start = p.seq_lens.ptr<int32_t>()[r] - query_len;
      for (int64_t i = 0; i < query_len; i += max_queries) {
        const int64_t num_queries = std::min(max_queries, query_len - i);
        for (int64_t head = 0; head < p.num_heads(); head += max_heads) {
          const int64_t num_heads = std::min(max_heads, p.num_heads() - head);
          items.push_back({slot, head, num_heads, begin + i, num_queries, start + i});
        }
        work += static_cast<double>((start + i + num_queries) * num_queries);
      }
    }
  }
  return work * static_cast<double>(p.num_heads() * (p.width() + p.latent_size())) * 0.05;
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

void latent_attention(const Tensor& q, const Tensor& latent_cache, const Tensor& block_table,
                      const Tensor& row_slots, const Tensor& cu_seqlens_q, const Tensor& seq_lens,
                      double softmax_scale, int64_t /*max_query_len*/,
                      const std::optional<Tensor>& /*work*/,
                      const std::optional<Tensor>& /*workspace*/, const Tensor& out) {
  Params p{latent_attention_args({"latent_attention", Place::kCpu}, q, latent_cache, block_table,
                                 row_slots, cu_seqlens_q, seq_lens, softmax_scale, out)};
  p.padded_width = (p.width() + kLanes - 1) / kLanes * kLanes;
  p.padded_size = (p.latent_size() + kLanes - 1) / kLanes * kLanes;
  p.scale = static_cast<float>(softmax_scale * 1.4426950408889634);
  dispatch_float<float, Bf16>(p.q, [&]<class T>(T) { attend_all<T>(p); });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("latent_attention", TORCH_BOX(&pyserve::latent_attention));
}
