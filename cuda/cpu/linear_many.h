// linear for more rows than linear.cpp serves by streaming the weight, on a CPU without bfloat16
// products: x and weight are widened to float32 once and multiplied as outer products.
//
// A panel is 2 vectors of columns: neighbouring ones or, with kSiluMul, one of gate and one of up.
// Its weight is transposed to [k][2][kLanes], so that each lane holds one sum. Each element of x is
// multiplied by both vectors. kBlockRows rows of x are taken at a time, whose sums fill the
// registers. Rows of x are processed in slices that fit L2. Each sum runs over k from begin to end
// in a single lane.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/epilogue.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

#ifdef __AVX512BF16__
constexpr bool kHasProducts = true;  // the CPU has an instruction for bfloat16 products
#else
constexpr bool kHasProducts = false;
#endif
constexpr int64_t kFewBf16Rows = 64, kFewFloatRows = 16;  // with more rows torch is faster

struct Shape {
  int64_t m, n, k, x_stride, weight_stride, out_stride;
};

// weight [n, k], bias [n], and the factor of the sums of each row of x, [m]. Bias and factors may
// be null.
template <class T>
struct Matrix {
  const T* weight;
  const T* bias;
  const float* factors = nullptr;

  // The part of the matrix behind the first n rows: the rows of up.
  Matrix up(const Shape& shape) const {
    return {weight + shape.n * shape.weight_stride, bias != nullptr ? bias + shape.n : nullptr,
            factors};
  }
};

constexpr int kBlockRows = kLanes == 16 ? 12 : 6;  // each with two vectors of sums
constexpr int64_t kSliceBytes = 256 * 1024;        // of rows of x in a slice
constexpr int64_t kWideBytes = 16 << 20;           // the most of x that is held as float32

// to[i * 2 * kLanes + r] = rows[r][i]
inline void transpose_rows(const Bf16* const (&rows)[kLanes], int64_t k, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    Vec part[kLanes];
    for (int r = 0; r < kLanes; ++r) part[r] = load(rows[r] + i);
    transpose(part);
    for (int j = 0; j < kLanes; ++j) store(to + (i + j) * 2 * kLanes, part[j]);
  }
  for (; i < k; ++i) {
    for (int r = 0; r < kLanes; ++r) to[i * 2 * kLanes + r] = to_float(rows[r][i]);
  }
}

// One of a panel's two vectors: its columns of out from `column` on, and the first of their rows in
// weight.
struct Part {
  int64_t column, count, weight_row;
};

template <Epilogue kEpilogue>
struct ManyPanel {
  static constexpr bool kIsPaired = kEpilogue == Epilogue::kSiluMul;
  static constexpr int64_t kColumns = kIsPaired ? kLanes : 2 * kLanes;  // of out

  Part parts[2];

  ManyPanel(const Shape& shape, int64_t column) {
    for (int p = 0; p < 2; ++p) {
      const int64_t at = kIsPaired ? column : std::min(column + p * kLanes, shape.n);
      parts[p] = {at, std::min<int64_t>(kLanes, shape.n - at), (kIsPaired ? p * shape.n : 0) + at};
    }
  }

  void pack(const Shape& shape, const Matrix<Bf16>& matrix, float* panel) const {
    for (int p = 0; p < 2; ++p) {
      const Part& part = parts[p];
      const Bf16* rows[kLanes];
      for (int r = 0; r < kLanes; ++r) {  // columns behind the last one may use any row
        const int64_t row = r < part.count ? part.weight_row + r : 0;
        rows[r] = matrix.weight + row * shape.weight_stride;
      }
      transpose_rows(rows, shape.k, panel + p * kLanes);
    }
  }

  void store_row(const Vec (&sums)[2], const Matrix<Bf16>& matrix, Bf16* out) const {
    Vec results[2] = {sums[0], sums[1]};
    for (int p = 0; p < 2 && matrix.bias != nullptr; ++p) {
      results[p] += load_first(matrix.bias + parts[p].weight_row, parts[p].count);
    }
    if constexpr (kIsPaired) results[0] = silu_mul(results[0], results[1]);
    for (int p = 0; p < (kIsPaired ? 1 : 2); ++p) {
      const int64_t count = parts[p].count;
      Bf16* to = out + parts[p].column;
      if constexpr (kEpilogue == Epilogue::kAdd) results[p] = load_first(to, count) + results[p];
      Bf16 rounded[kLanes];
      store(rounded, results[p]);
      std::memcpy(to, rounded, count * sizeof(Bf16));
    }
  }
};

// Multiplies a block of kBlockRows rows of x, which lie k apart, by a panel and stores the first
// num_rows rows.
template <Epilogue kEpilogue>
void block_of_many(const Shape& shape, const float* x, const float* weight,
                   const ManyPanel<kEpilogue>& panel, const Matrix<Bf16>& matrix, int64_t num_rows,
                   Bf16* out) {
  Vec sums[kBlockRows][2] = {};
  for (int64_t i = 0; i < shape.k; ++i, weight += 2 * kLanes) {
    const Vec first = load(weight), second = load(weight + kLanes);
#pragma GCC unroll 12
    for (int t = 0; t < kBlockRows; ++t) {
      const Vec element = splat(x[t * shape.k + i]);
      sums[t][0] = fma(element, first, sums[t][0]);
      sums[t][1] = fma(element, second, sums[t][1]);
    }
  }
  for (int64_t t = 0; t < num_rows; ++t) {
    panel.store_row(sums[t], matrix, out + t * shape.out_stride);
  }
}

template <Epilogue kEpilogue>
void linear_wide(const Shape& shape, const Bf16* x, const Matrix<Bf16>& matrix, Bf16* out) {
  using Panel = ManyPanel<kEpilogue>;
  const int64_t num_blocks = (shape.m + kBlockRows - 1) / kBlockRows;
  thread_local std::vector<float> wide_x;
  wide_x.resize(num_blocks * kBlockRows * shape.k);
  float* rows = wide_x.data();
  // Both costs are in nanoseconds, measured with AVX2.
  const auto row_cost = 0.05 * static_cast<double>(shape.k);
  parallel_for(num_blocks * kBlockRows, row_cost, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {  // rows behind the last one may hold anything
      const Bf16* from = x + std::min(t, shape.m - 1) * shape.x_stride;
      float* to = rows + t * shape.k;
      int64_t i = 0;
      for (; i + kLanes <= shape.k; i += kLanes) store(to + i, load(from + i));
      for (; i < shape.k; ++i) to[i] = to_float(from[i]);
    }
  });
  const int64_t block_bytes = kBlockRows * std::max<int64_t>(shape.k, 1) * sizeof(float);
  const int64_t slice = std::max<int64_t>(kSliceBytes / block_bytes, 4);  // in blocks
  const int64_t num_panels = (shape.n + Panel::kColumns - 1) / Panel::kColumns;
  const auto panel_cost = 0.28 * static_cast<double>(shape.k * shape.m);
  parallel_for(num_panels, panel_cost, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> weight;
    weight.resize(2 * kLanes * shape.k);
    for (int64_t first = 0; first < num_blocks; first += slice) {
      for (int64_t p = begin; p < end; ++p) {
        const Panel panel(shape, p * Panel::kColumns);
        panel.pack(shape, matrix, weight.data());
        for (int64_t b = first; b < std::min(first + slice, num_blocks); ++b) {
          const int64_t t = b * kBlockRows;
          block_of_many<kEpilogue>(shape, rows + t * shape.k, weight.data(), panel, matrix,
                                   std::min<int64_t>(kBlockRows, shape.m - t),
                                   out + t * shape.out_stride);
        }
      }
    }
  });
}

template <Epilogue kEpilogue>
void linear_many(const Shape& shape, const Bf16* x, const Matrix<Bf16>& matrix, Bf16* out) {
  const int64_t row_bytes = std::max<int64_t>(shape.k, 1) * sizeof(float);
  const int64_t most = std::max<int64_t>(kWideBytes / row_bytes / kBlockRows, 1) * kBlockRows;
  for (int64_t t = 0; t < shape.m; t += most) {
    Shape rows = shape;
    rows.m = std::min(most, shape.m - t);
    linear_wide<kEpilogue>(rows, x + t * shape.x_stride, matrix, out + t * shape.out_stride);
  }
}

}  // namespace
}  // namespace pyserve
