// Several linears at once: groups of rows, each group with a matrix of its own, all with the same n
// and k. Threads share the columns of all matrices, because a single one may be too small to share.
// The products are those of linear_rows.h, for as many rows as a group has.
#pragma once

#include <type_traits>
#include <vector>

#include "linear_many.h"
#include "linear_rows.h"
#include "parallel.h"

namespace pyserve {
namespace {

// At least one row, and the rows' matrix.
template <class T>
struct Group {
  Shape shape;
  Matrix<T> matrix;
  const T* x;
  T* out;
  int64_t packed = 0;  // where its rows begin among those packed by pack_x
};

// The mean cost over all groups of `columns` columns, in nanoseconds.
template <Epilogue kEpilogue, class T>
double mean_cost(const std::vector<Group<T>>& groups, int64_t columns, bool has_tiles) {
  double sum = 0.0;
  for (const Group<T>& group : groups) {
    sum += column_cost<kEpilogue, T>(group.shape, has_tiles) * static_cast<double>(columns);
  }
  return sum / static_cast<double>(groups.size());
}

#ifdef __AMX_BF16__
template <Epilogue kEpilogue>
void grouped_tiles(std::vector<Group<Bf16>>& groups, int64_t n) {
  constexpr int64_t kColumns = kTileColumns<kEpilogue>;
  thread_local std::vector<float> packed_x;
  int64_t num_floats = 0;
  for (Group<Bf16>& group : groups) {
    group.packed = num_floats;
    num_floats += packed_floats(group.shape);
  }
  packed_x.resize(num_floats);
  float* packed = packed_x.data();
  for (const Group<Bf16>& group : groups) pack_x(group.shape, group.x, packed + group.packed);
  const int64_t parts = (n + kColumns - 1) / kColumns;
  const double cost = mean_cost<kEpilogue>(groups, kColumns, true);
  const auto count = static_cast<int64_t>(groups.size()) * parts;
  parallel_for_tiles(count, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Group<Bf16>& group = groups[i / parts];
      tile_columns<kEpilogue>(group.shape, packed + group.packed, group.matrix,
                              i % parts * kColumns, group.out);
    }
  });
}
#endif

template <Epilogue kEpilogue, class T>
void grouped_blocks(const std::vector<Group<T>>& groups, int64_t n) {
  const int64_t parts = (n + kLanes - 1) / kLanes;
  const double cost = mean_cost<kEpilogue>(groups, kLanes, false);
  parallel_for(static_cast<int64_t>(groups.size()) * parts, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Group<T>& group = groups[i / parts];
      block_columns<kEpilogue, T>(group.shape, group.x, group.matrix, i % parts * kLanes,
                                  group.out);
    }
  });
}

template <Epilogue kEpilogue, class T>
void linear_groups(std::vector<Group<T>>& groups, int64_t n) {
  if (groups.empty() || n == 0) return;
  if constexpr (std::is_same_v<T, Bf16>) {
#ifdef __AMX_BF16__
    if (fits_tiles(groups[0].shape)) return grouped_tiles<kEpilogue>(groups, n);
#endif
    if constexpr (!kHasProducts) {
      std::erase_if(groups, [](const Group<T>& group) {
        const bool has_many = group.shape.m > kFewBf16Rows;
        if (has_many) linear_many<kEpilogue>(group.shape, group.x, group.matrix, group.out);
        return has_many;
      });
      if (groups.empty()) return;
    }
  }
  grouped_blocks<kEpilogue, T>(groups, n);
}

}  // namespace
}  // namespace pyserve
