// LoRA on a CPU: what adapters add to a linear's output (Hu et al. 2021), in two ops.
//   lora_shrink  out[t, p, r] = scales[s, p] * sum over i of x[t, i] * a[s, p, r, i]
//   lora_expand  out[t, j] += sum over r of shrunk[t, p, r] * b[s, j, r], for j in part p's columns
//   lora_expand_silu_mul  lora_expand, then silu_mul
// where s is the slot of token t's adapter, so that starts[s] <= t < starts[s + 1], and r <
// ranks[s, p].
//   x [num_tokens, k], a [num_slots, num_parts, max_rank, k] and b [num_slots, n, max_rank],
//   float32 or bfloat16
// The result of lora_shrink is put into the first split and the others are zeros; only a GPU splits
// k.
//
// Tokens without an adapter are neither read nor written, nor is anything from a part's rank on.
//
// Work: an item is kTokens tokens of one slot by some rows of one part's matrix; threads split the
// items.
// Numerics: float32 sums, one rounding of what is added to out. The order of a sum depends only on
// k, or on the rank, so a row's result never depends on what else is in a batch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../common/args/lora.h"
#include "activate.h"
#include "linear_norm.h"

namespace pyserve {
namespace {

constexpr int64_t kTokens = 16;
constexpr int64_t kShrinkRows = kLanes;
constexpr int64_t kExpandColumns = 16 * kLanes;

// Some tokens of one slot, and some rows of one part's matrix.
struct Item {
  int64_t slot, part;
  int64_t token, num_tokens;
  int64_t row, num_rows;
};

// The rank of each part of each slot, checked.
struct Ranks {
  const View& view;
  int64_t max_rank;

  int64_t operator()(int64_t slot, int64_t part) const {
    const int64_t rank = view.ptr<int32_t>()[slot * view.stride(0) + part];
    PYSERVE_CHECK(rank >= 0 && rank <= max_rank, view.op, ": ranks[", slot, ", ", part, "] is ",
                  rank, ", the limit is ", max_rank);
    return rank;
  }
};

// All items. rows_of_part(slot, part) gives the begin and the end of a part's rows, equal where it
// has none.
template <class RowsOfPart>
std::vector<Item> items_of(const View& starts, int64_t num_tokens, int64_t num_parts,
                           int64_t rows_at_once, const RowsOfPart& rows_of_part) {
  std::vector<Item> items;
  const int32_t* start = starts.ptr<int32_t>();
  for (int64_t slot = 0; slot + 1 < starts.size(0); ++slot) {
    const int64_t begin = start[slot], end = start[slot + 1];
    PYSERVE_CHECK(begin >= 0 && begin <= end && end <= num_tokens, starts.op, ": slot ", slot,
                  " has tokens ", begin, " to ", end, " of ", num_tokens);
    if (begin == end) continue;
    for (int64_t part = 0; part < num_parts; ++part) {
      const auto [first, last] = rows_of_part(slot, part);
      for (int64_t row = first; row < last; row += rows_at_once) {
        for (int64_t token = begin; token < end; token += kTokens) {
          items.push_back({slot, part, token, std::min(kTokens, end - token), row,
                           std::min(rows_at_once, last - row)});
        }
      }
    }
  }
  return items;
}

// ---- shrink -------------------------------------------------------------------------------------

// Dot products of kTokensAtOnce rows of x and kLanes / kTokensAtOnce rows of a, token by token.
template <class T, int kTokensAtOnce>
Vec dots(const T* x, int64_t x_stride, const T* const (&rows)[kLanes / kTokensAtOnce], int64_t k) {
  constexpr int kRows = kLanes / kTokensAtOnce;
  Vec sums[kLanes] = {};
  auto step = [&](auto&& read, int64_t i) {
    Vec parts[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) parts[r] = read(rows[r] + i);
#pragma GCC unroll 4
    for (int t = 0; t < kTokensAtOnce; ++t) {
      const Vec x_part = read(x + t * x_stride + i);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        sums[t * kRows + r] = fma(x_part, parts[r], sums[t * kRows + r]);
      }
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) step([](const T* p) { return load(p); }, i);
  if (i < k) step([&](const T* p) { return load_first(p, k - i); }, i);
  return sum_rows(sums);
}

// For `count` rows of a, at most kLanes / kTokensAtOnce.
template <class T, int kTokensAtOnce>
void shrink_block(const T* x, int64_t x_stride, const T* a, int64_t a_stride, int64_t k,
                  int64_t count, float scale, float* out, int64_t out_stride) {
  constexpr int kRows = kLanes / kTokensAtOnce;
  const T* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = a + std::min<int64_t>(r, count - 1) * a_stride;
  float sums[kLanes];
  store(sums, dots<T, kTokensAtOnce>(x, x_stride, rows, k) * scale);
  for (int t = 0; t < kTokensAtOnce; ++t) {
    std::copy_n(sums + t * kRows, count, out + t * out_stride);
  }
}

template <class T, int kTokensAtOnce>
void shrink_rows(const LoraShrinkArgs& args, const Item& item, int64_t token, const T* a,
                 float scale) {
  constexpr int64_t kRows = kLanes / kTokensAtOnce;
  const T* x = args.x.ptr<T>() + token * args.x.stride(0);
  const int64_t out_stride = args.out.stride(1);
  float* out = args.out.ptr<float>() + token * out_stride + item.part * args.out.stride(2);
  const int64_t end = item.row + item.num_rows, stride = args.a.stride(2);
  for (int64_t row = item.row; row < end; row += kRows) {
    shrink_block<T, kTokensAtOnce>(x, args.x.stride(0), a + row * stride, stride, args.k(),
                                   std::min(kRows, end - row), scale, out + row, out_stride);
  }
}

template <class T>
void shrink_item(const LoraShrinkArgs& args, const Item& item) {
  const T* a = args.a.ptr<T>() + item.slot * args.a.stride(0) + item.part * args.a.stride(1);
  const float scale =
      args.scales.ptr<float>()[item.slot * args.scales.stride(0) + item.part];
  const int64_t end = item.token + item.num_tokens;
  int64_t token = item.token;
  for (; token + 4 <= end; token += 4) shrink_rows<T, 4>(args, item, token, a, scale);
  for (; token < end; ++token) shrink_rows<T, 1>(args, item, token, a, scale);
}

// Multiplies what shrink_item wrote by the factors of the RMSNorm in front, and fills the other
// splits with zeros.
void finish_item(const LoraShrinkArgs& args, const Item& item, const std::vector<float>& factors) {
  for (int64_t token = item.token; token < item.token + item.num_tokens; ++token) {
    float* out = args.out.ptr<float>() + token * args.out.stride(1) +
                 item.part * args.out.stride(2) + item.row;
    if (!factors.empty()) {
      for (int64_t r = 0; r < item.num_rows; ++r) out[r] *= factors[token];
    }
    for (int64_t split = 1; split < args.num_splits(); ++split) {
      std::fill_n(out + split * args.out.stride(0), item.num_rows, 0.0f);
    }
  }
}

void lora_shrink(const Tensor& x, const Tensor& a, const Tensor& starts, const Tensor& ranks,
                 const Tensor& scales, const Tensor& out, const std::optional<Tensor>& x_squares,
                 double eps) {
  const ViewReader read{"lora_shrink", Place::kCpu};
  const LoraShrinkArgs args =
      lora_shrink_args(read, x, a, starts, ranks, scales, out, x_squares);
  const std::vector<float> factors =
      norm_factors(args.x_squares, args.num_tokens(), args.k(), eps);
  const Ranks rank_of{args.ranks, args.max_rank()};
  const std::vector<Item> items = items_of(
      args.starts, args.num_tokens(), args.num_parts(), kShrinkRows,
      [&](int64_t slot, int64_t part) { return std::pair(int64_t{0}, rank_of(slot, part)); });
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) {
    // As for a linear: nanoseconds per byte of a row, and per byte and token.
    const double bytes = static_cast<double>(args.k() * sizeof(T) * kShrinkRows);
    const double cost = bytes * (0.035 + 0.008 * std::min(kTokens, args.num_tokens()));
    parallel_for(static_cast<int64_t>(items.size()), cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        shrink_item<T>(args, items[i]);
        finish_item(args, items[i], factors);
      }
    });
  });
}

// ---- expand -------------------------------------------------------------------------------------

// out[c] += sum over r of shrunk[r] * b[c, r], for `count` <= kLanes columns.
template <class T>
void expand_block(const float* shrunk, int64_t rank, const T* b, int64_t b_stride, int64_t count,
                  T* out) {
  const T* rows[kLanes];
  for (int c = 0; c < kLanes; ++c) rows[c] = b + std::min<int64_t>(c, count - 1) * b_stride;
  Vec sums[kLanes] = {};
  int64_t r = 0;
  for (; r + kLanes <= rank; r += kLanes) {
    const Vec part = load(shrunk + r);
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c) sums[c] = fma(part, load(rows[c] + r), sums[c]);
  }
  if (r < rank) {
    const Vec part = load_first(shrunk + r, rank - r);
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c) {
      sums[c] = fma(part, load_first(rows[c] + r, rank - r), sums[c]);
    }
  }
  const Vec added = sum_rows(sums);
  if (count == kLanes) {
    store(out, load(out) + added);
  } else {
    store_first(out, load_first(out, count) + added, count);
  }
}

// sums = the sum over the splits for one token and one part.
void add_splits(const LoraExpandArgs& args, int64_t token, int64_t part, int64_t rank,
                std::vector<float>& sums) {
  const float* row =
      args.shrunk.ptr<float>() + token * args.shrunk.stride(1) + part * args.shrunk.stride(2);
  sums.assign(row, row + rank);
  for (int64_t split = 1; split < args.num_splits(); ++split) {
    row += args.shrunk.stride(0);
    for (int64_t r = 0; r < rank; ++r) sums[r] += row[r];
  }
}

template <class T>
void expand_item(const LoraExpandArgs& args, const Item& item, int64_t rank) {
  const T* b = args.b.ptr<T>() + item.slot * args.b.stride(0);
  const int64_t stride = args.b.stride(1), end = item.row + item.num_rows;
  std::vector<float> shrunk;
  for (int64_t token = item.token; token < item.token + item.num_tokens; ++token) {
    add_splits(args, token, item.part, rank, shrunk);
    T* out = args.out.ptr<T>() + token * args.out.stride(0);
    for (int64_t column = item.row; column < end; column += kLanes) {
      expand_block<T>(shrunk.data(), rank, b + column * stride, stride,
                      std::min<int64_t>(kLanes, end - column), out + column);
    }
  }
}

void expand(const LoraExpandArgs& args) {
  const Ranks rank_of{args.ranks, args.max_rank()};
  const int32_t* column = args.columns.ptr<int32_t>();
  for (int64_t part = 0; part < args.num_parts(); ++part) {
    PYSERVE_CHECK(column[part] >= 0 && column[part] <= column[part + 1] &&
                      column[part + 1] <= args.n(),
                  args.out.op, ": part ", part, " has columns ", column[part], " to ",
                  column[part + 1], " of ", args.n());
  }
  const std::vector<Item> items =
      items_of(args.starts, args.num_tokens(), args.num_parts(), kExpandColumns,
               [&](int64_t slot, int64_t part) {
                 const int64_t first = column[part];
                 return std::pair(first, rank_of(slot, part) ? int64_t{column[part + 1]} : first);
               });
  dispatch_float<float, Bf16>(args.out, [&]<class T>(T) {
    const double bytes = static_cast<double>(args.max_rank() * sizeof(T) * kExpandColumns);
    const double cost = bytes * (0.035 + 0.016 * std::min(kTokens, args.num_tokens()));
    parallel_for(static_cast<int64_t>(items.size()), cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        expand_item<T>(args, items[i], rank_of(items[i].slot, items[i].part));
      }
    });
  });
}

void lora_expand(const Tensor& shrunk, const Tensor& b, const Tensor& starts, const Tensor& ranks,
                 const Tensor& columns, const Tensor& out) {
  const ViewReader read{"lora_expand", Place::kCpu};
  expand(lora_expand_args(read, shrunk, b, starts, ranks, columns, "out", out));
}

void lora_expand_silu_mul(const Tensor& shrunk, const Tensor& b, const Tensor& starts,
                          const Tensor& ranks, const Tensor& columns, const Tensor& gate_up,
                          const Tensor& out) {
  const ViewReader read{"lora_expand_silu_mul", Place::kCpu};
  const ActivationArgs activation = activation_args(read, gate_up, out);
  expand(lora_expand_args(read, shrunk, b, starts, ranks, columns, "gate_up", gate_up));
  activate(activation, [](Vec gate, Vec up) { return silu_mul(gate, up); });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&pyserve::lora_shrink));
  m.impl("lora_expand", TORCH_BOX(&pyserve::lora_expand));
  m.impl("lora_expand_silu_mul", TORCH_BOX(&pyserve::lora_expand_silu_mul));
}
