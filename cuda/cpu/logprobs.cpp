// logprobs on a CPU: for given rows of logits, float32 or bfloat16: the log-softmax of one token,
// how many tokens have a larger logit, and the 20 most likely tokens.
//
// Two passes over a row. The first takes the maxima of chunks of 256 tokens: the largest is that of
// the row, and none of the 20 tokens is below the 20th largest maximum. The second sums exp, and
// looks for candidates only in chunks that reach this bound; they go into a short sorted list.
// Numerics: exp is float32; sums are float32 within a chunk and float64 over the chunks. A NaN
// counts as -inf.
// Floor: the bytes of the logits, once; but exp costs more than that on a CPU. Rows are split over
// threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "../common/args/logprobs.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "logprobs";
constexpr int64_t kChunk = 256;

struct Candidate {
  float logit;
  int32_t id;
};

// The largest logits so far, largest first, and the lowest id first among equal ones. Candidates
// must be offered in the order of their ids.
struct TopList {
  Candidate items[kTopLogprobs];
  int64_t size = 0;

  void offer(float logit, int32_t id) {
    if (size == kTopLogprobs && !(logit > items[size - 1].logit)) return;
    int64_t at = size < kTopLogprobs ? size++ : size - 1;
    for (; at > 0 && items[at - 1].logit < logit; --at) items[at] = items[at - 1];
    items[at] = {logit, id};
  }
};

inline Vec without_nan(Vec x) { return x == x ? x : splat(-INFINITY); }
inline float without_nan(float x) { return x == x ? x : -INFINITY; }

// Lanes behind the end of the row read as -inf.
template <class T>
Vec load_lanes(const T* logits, int64_t i, int64_t n) {
  if (i + kLanes <= n) return without_nan(load(logits + i));
  T lanes[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = logits[std::min(i + lane, n - 1)];
  Vec x = without_nan(load(lanes));
  for (int64_t lane = n - i; lane < kLanes; ++lane) x[lane] = -INFINITY;
  return x;
}

// The largest logit of each chunk of a row.
template <class T>
void chunk_maxima(const T* logits, int64_t n, std::vector<float>& maxima) {
  maxima.clear();
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, n);
    Vec largest = splat(-INFINITY);
    for (int64_t i = begin; i < end; i += kLanes) {
      largest = max(load_lanes(logits, i, end), largest);
    }
    maxima.push_back(max(largest));
  }
}

struct RowResult {
  double sum = 0;  // sum of exp(logit - largest)
  int64_t num_above = 0;
  TopList top;
};

template <class T>
RowResult scan_row(const T* logits, int64_t n, const std::vector<float>& maxima, float largest,
                   float bound, float token_logit) {
  RowResult result;
  const bool has_sum = std::isfinite(largest);
  for (int64_t begin = 0, chunk = 0; begin < n; begin += kChunk, ++chunk) {
    const int64_t end = std::min(begin + kChunk, n);
    Vec sums = {};
    IntVec above = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vec x = load_lanes(logits, i, end);
      above -= x > token_logit;
      // exp is clamped: far below the largest logit it gives e^-87 instead of less, which does not
      // change any sum.
      if (has_sum) sums += x == -INFINITY ? Vec{} : exp(x - largest);
    }
    result.sum += double{sum(sums)};
    for (int lane = 0; lane < kLanes; ++lane) result.num_above += above[lane];
    if (maxima[chunk] < bound) continue;
    for (int64_t i = begin; i < end; ++i) {
      const float x = without_nan(to_float(logits[i]));
      if (x >= bound) result.top.offer(x, static_cast<int32_t>(i));
    }
  }
  return result;
}

// Where the results for one row go.
struct Output {
  float* token_logprob;
  int32_t* token_rank;
  int32_t* top_ids;
  float* top_logprobs;

  void clear() const {
    *token_logprob = -INFINITY;
    *token_rank = 0;
    std::fill_n(top_ids, kTopLogprobs, -1);
    std::fill_n(top_logprobs, kTopLogprobs, -INFINITY);
  }
};

template <class T>
void logprobs_row(const T* logits, int64_t n, int64_t token_id, bool is_normalized,
                  const Output& out) {
  thread_local std::vector<float> maxima, largest_first;
  chunk_maxima(logits, n, maxima);
  float bound = -INFINITY;
  if (static_cast<int64_t>(maxima.size()) >= kTopLogprobs) {
    largest_first = maxima;
    const auto last = largest_first.begin() + kTopLogprobs - 1;
    std::nth_element(largest_first.begin(), last, largest_first.end(), std::greater<>{});
    bound = *last;
  }
  const float largest = *std::max_element(maxima.begin(), maxima.end());
  const float token_logit = token_id < 0 ? INFINITY : without_nan(to_float(logits[token_id]));
  const RowResult result = scan_row(logits, n, maxima, largest, bound, token_logit);

  const auto log_sum = static_cast<float>(std::log(result.sum));
  const auto value_of = [&](float logit) {
    if (!is_normalized) return logit;
    return std::isfinite(largest) ? (logit - largest) - log_sum : -INFINITY;
  };
  out.clear();
  if (token_id >= 0) {
    *out.token_logprob = value_of(token_logit);
    *out.token_rank = static_cast<int32_t>(1 + result.num_above);
  }
  for (int64_t i = 0; i < result.top.size; ++i) {
    out.top_ids[i] = result.top.items[i].id;
    out.top_logprobs[i] = value_of(result.top.items[i].logit);
  }
}

void logprobs(const Tensor& logits, const Tensor& rows, const Tensor& token_ids, bool is_normalized,
              const Tensor& token_logprobs, const Tensor& token_ranks, const Tensor& top_ids,
              const Tensor& top_logprobs) {
  const LogprobsArgs args = logprobs_args({kOp, Place::kCpu}, logits, rows, token_ids,
                                          token_logprobs, token_ranks, top_ids, top_logprobs);
  const int64_t vocab_size = args.vocab_size();
  const auto row_of = [&](int64_t i) -> int64_t {
    return args.rows.ptr<int32_t>()[i * args.rows.stride(0)];
  };
  const auto token_of = [&](int64_t row) -> int64_t {
    return args.token_ids.ptr<int32_t>()[row * args.token_ids.stride(0)];
  };
  for (int64_t i = 0; i < args.num_asked(); ++i) {
    const int64_t row = row_of(i);
    PYSERVE_CHECK(row >= -1 && row < args.num_rows(), kOp, ": row ", row, " of ", args.num_rows());
    PYSERVE_CHECK(row < 0 || (token_of(row) >= -1 && token_of(row) < vocab_size), kOp,
                  ": token id ", token_of(row), ", the vocabulary ", vocab_size);
  }
  const double cost = static_cast<double>(vocab_size) * 0.8;
  dispatch_float<float, Bf16>(args.logits, [&]<class T>(T) {
    parallel_for(args.num_asked(), cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = row_of(i);
        const Output out{args.token_logprobs.ptr<float>() + i * args.token_logprobs.stride(0),
                         args.token_ranks.ptr<int32_t>() + i * args.token_ranks.stride(0),
                         args.top_ids.ptr<int32_t>() + i * args.top_ids.stride(0),
                         args.top_logprobs.ptr<float>() + i * args.top_logprobs.stride(0)};
        if (row < 0) {
          out.clear();
        } else {
          logprobs_row(args.logits.ptr<T>() + row * args.logits.stride(0), vocab_size,
                       token_of(row), is_normalized, out);
        }
      }
    });
  });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) { m.impl("logprobs", TORCH_BOX(&pyserve::logprobs)); }
