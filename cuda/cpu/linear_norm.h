// An RMSNorm between two linears as a factor (common/epilogue.h): what linear.cpp does for it
// besides the products. It exists so that what a GPU does can also be served and tested on a CPU;
// there it is faster only for a single row.
#pragma once

#include <cmath>
#include <numeric>
#include <vector>

#include "../common/args/linear.h"
#include "vec.h"

namespace pyserve {
namespace {

// The factors of the RMSNorm in front for the sums of each of m rows of k columns; empty where
// there is no norm.
inline std::vector<float> norm_factors(const Squares& squares, int64_t m, int64_t k, double eps) {
  if (squares.data == nullptr) return {};
  std::vector<float> factors(m);
  for (int64_t t = 0; t < m; ++t) {
    const float* row = squares.row(t);
    const float sum = std::accumulate(row, row + num_squares(k), 0.0f);
    const float mean = sum / static_cast<float>(k);
    factors[t] = 1.0f / std::sqrt(mean + static_cast<float>(eps));
  }
  return factors;
}

// Computes `scaled` and `squares`, which the RMSNorm behind the linear needs, from out.
template <class T>
void scale_for_norm(const LinearArgs& args) {
  const T* weight = static_cast<const T*>(args.norm_weight);
  for (int64_t t = 0; t < args.m(); ++t) {
    const T* row = args.out.ptr<T>() + t * args.out.stride(0);
    T* scaled = args.scaled.ptr<T>() + t * args.scaled.stride(0);
    for (int64_t first = 0; first < args.n(); first += kSquaresColumns) {
      const int64_t last = std::min(first + kSquaresColumns, args.n());
      Vec squares{};
      for (int64_t i = first; i < last; i += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, last - i);
        const Vec value = load_first(row + i, count);
        squares = fma(value, value, squares);
        store_first(scaled + i, value * load_first(weight + i, count), count);
      }
      args.squares.row(t)[first / kSquaresColumns] = sum(squares);
    }
  }
}

}  // namespace
}  // namespace pyserve
