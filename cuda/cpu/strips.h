// Products of few rows of x with matrices that are stored in a packed format of their own: with one
// matrix, or of each expert's rows with that expert's matrix. The work is to stream the matrices
// once, as fast as memory delivers them. Threads split the strips of 16 rows.
//
// A Strips class says how a format is stored and how a strip of it is multiplied:
//   X                               element type of x in the order in which it is read
//   row_size()                      number of X in a row of x
//   arrange(x, to)                  copies a row of x into that order
//   cost(m)                         nanoseconds for a strip and m rows of x
//   multiply<kTokens>(index, strip, x, x_stride, totals)
//                                   totals[t][r] = a vector of partial sums, of row t of x by row
//                                   r of the strip of matrix `index`
//   num_strips()                    strips of each matrix
// Numerics: the lanes of a total are added as a tree; then come the norm's factor, the bias, the
// epilogue, and one rounding. A row's result never depends on what else is in a batch.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/args/experts.h"
#include "../common/args/linear.h"
#include "../common/w4a16.h"
#include "linear_norm.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

// Rows [begin, begin + m) of x and out, which use matrix `index`.
struct StripGroup {
  int64_t index, begin, m;
};

template <class T>
struct StripOut {
  T* out;
  int64_t stride;
  int64_t n;                       // rows of a matrix
  const T* bias = nullptr;         // may be null
  const float* factors = nullptr;  // factors of the sums of each row of x; may be null
  bool is_adding = false;          // whether results are added to out
  float* sums = nullptr;           // [m, n]: if not null, takes the sums with bias in place of out

  // Finishes kTokens rows of x from t on, for one strip.
  template <int kTokens>
  void put(int64_t t, int64_t strip, Vec (&totals)[kTokens][kStripRows]) const {
    const int64_t row = strip * kStripRows;
    const auto count = static_cast<int>(std::min(kStripRows, n - row));
    for (int i = 0; i < kTokens; ++i) {
      for (int r = 0; r < count; r += kLanes) put_lanes(t + i, row + r, count - r, totals[i] + r);
    }
  }

 private:
  void put_lanes(int64_t t, int64_t row, int count, Vec* totals) const {
    const int num_here = std::min(kLanes, count);
    Vec result = sum_rows(totals);
    if (factors != nullptr) result *= splat(factors[t]);
    if (bias != nullptr) result += load_first(bias + row, num_here);
    if (sums != nullptr) {
      store_first(sums + t * n + row, result, num_here);
      return;
    }
    T* to = out + t * stride + row;
    if (is_adding) result = load_first(to, num_here) + result;
    store_first(to, result, num_here);
  }
};

// Multiplies a strip by all rows of a group; x points to the group's first row.
template <class Strips, class T>
void multiply_strip(const Strips& strips, const StripGroup& group, int64_t strip,
                    const typename Strips::X* x, const StripOut<T>& out) {
  const int64_t row_size = strips.row_size();
  const auto rows = [&]<int kTokens>(int64_t t) {
    Vec totals[kTokens][kStripRows];
    strips.template multiply<kTokens>(group.index, strip, x + t * row_size, row_size, totals);
    out.template put<kTokens>(group.begin + t, strip, totals);
  };
  int64_t t = 0;
  for (; t + 4 <= group.m; t += 4) rows.template operator()<4>(t);
  if (t + 2 <= group.m) {
    rows.template operator()<2>(t);
    t += 2;
  }
  if (t < group.m) rows.template operator()<1>(t);
}

// Arranges all rows of x and multiplies every group by its matrix. row_of(t) is where row t of x
// lies.
template <class Strips, class T, class RowOf>
void multiply_groups(const Strips& strips, const std::vector<StripGroup>& groups, int64_t num_rows,
                     const RowOf& row_of, const StripOut<T>& out) {
  if (groups.empty()) return;
  const int64_t row_size = strips.row_size();
  thread_local std::vector<typename Strips::X> arranged;
  arranged.resize(num_rows * row_size);
  auto* rows = arranged.data();
  const double row_cost = 1.0 * static_cast<double>(row_size);  // nanoseconds, measured
  parallel_for(num_rows, row_cost, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) strips.arrange(row_of(t), rows + t * row_size);
  });
  double cost = 0.0;
  for (const StripGroup& group : groups) cost += strips.cost(group.m);
  const int64_t num_strips = strips.num_strips();
  const auto count = static_cast<int64_t>(groups.size());
  cost /= static_cast<double>(count);
  parallel_for(count * num_strips, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const StripGroup& group = groups[i / num_strips];
      multiply_strip(strips, group, i % num_strips, rows + group.begin * row_size, out);
    }
  });
}

// out = silu(gate) * up, with sums [m, 2 n] = gate | up.
template <class T>
void activate(const View& out, int64_t m, const float* sums) {
  const int64_t n = out.size(1);
  const double cost = 1.0 * static_cast<double>(n);  // nanoseconds
  parallel_for(m, cost, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* gate = sums + t * 2 * n;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, n - i);
        const Vec result = silu_mul(load_first(gate + i, count), load_first(gate + n + i, count));
        store_first(out.ptr<T>() + t * out.stride(0) + i, result, count);
      }
    }
  });
}

// A linear with its epilogue.
template <class T, class Strips>
void linear_by_strips(const Strips& strips, const LinearArgs& args, Epilogue epilogue, double eps) {
  const int64_t m = args.m(), weight_rows = args.n() * rows_per_column(epilogue);
  if (m == 0 || args.n() == 0) return;
  const bool is_paired = epilogue == Epilogue::kSiluMul;
  const std::vector<float> factors = norm_factors(args.x_squares, args.m(), args.k(), eps);
  std::vector<float> sums(is_paired ? m * weight_rows : 0);
  const StripOut<T> out{.out = args.out.ptr<T>(),
                        .stride = args.out.stride(0),
                        .n = weight_rows,
                        .bias = static_cast<const T*>(args.bias),
                        .factors = factors.empty() ? nullptr : factors.data(),
                        .is_adding = epilogue == Epilogue::kAdd,
                        .sums = is_paired ? sums.data() : nullptr};
  const auto row_of = [&](int64_t t) { return args.x.ptr<T>() + t * args.x.stride(0); };
  multiply_groups(strips, {{0, 0, m}}, m, row_of, out);
  if (is_paired) activate<T>(args.out, m, sums.data());
  if (args.norm_weight != nullptr) scale_for_norm<T>(args);
}

// A group for each expert that has rows.
inline std::vector<StripGroup> strip_groups(const GroupedArgs& args) {
  check_groups(args);
  const auto* offsets = args.offsets.ptr<int32_t>();
  std::vector<StripGroup> groups;
  for (int64_t i = 0; i < args.num_experts(); ++i) {
    const int64_t m = offsets[i + 1] - offsets[i];
    if (m > 0) groups.push_back({i, offsets[i], m});
  }
  return groups;
}

// The linears of all experts, with their epilogue.
template <class T, class Strips>
void grouped_by_strips(const Strips& strips, const GroupedEpilogueArgs& args) {
  const std::vector<StripGroup> groups = strip_groups(args);
  if (groups.empty() || args.n() == 0) return;
  const int64_t num_rows = groups.back().begin + groups.back().m;
  const bool is_paired = args.epilogue == Epilogue::kSiluMul;
  const int64_t weight_rows = args.n() * rows_per_column(args.epilogue);
  std::vector<float> sums(is_paired ? num_rows * weight_rows : 0);
  const StripOut<T> out{.out = args.out.ptr<T>(),
                        .stride = args.out.stride(0),
                        .n = weight_rows,
                        .sums = is_paired ? sums.data() : nullptr};
  const auto row_of = [&](int64_t row) {
    const int64_t token = args.order == nullptr ? row : args.order[row] / args.top_k;
    return args.x.ptr<T>() + token * args.x.stride(0);
  };
  multiply_groups(strips, groups, num_rows, row_of, out);
  if (is_paired) activate<T>(args.out, num_rows, sums.data());
}

}  // namespace
}  // namespace pyserve
