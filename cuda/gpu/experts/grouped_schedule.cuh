// Which tiles a cluster computes of a product of many rows by their experts' matrices. Each CTA
// makes its list from the offsets, so the grid is the same wherever the tokens go.
//
// Args has `mates`, the number of CTAs that share a tile's weight (gemm_frame.cuh),
// num_column_tiles, and weight_rows, the number of rows of one expert.
#pragma once

#include "gpu/experts/work_list.cuh"

namespace pyserve::gpu::gemm {

// Where a CTA's tile lies. Its rows begin at `row`; those from end_row on belong to another expert.
struct GroupedTile {
  int row, end_row;
  int column, weight_row;
};

// The tiles of a cluster, one after another. Within an expert the columns run through groups of a
// few row tiles, so that the tiles which the whole device computes at one time are close to a
// square.
struct GroupedSchedule {
  WorkPlace place;
  int step;

  template <class Args>
  __device__ explicit GroupedSchedule(const Args& a)
      : place(static_cast<int>(blockIdx.x) / a.mates), step(static_cast<int>(gridDim.x) / a.mates) {}
  __device__ bool has_more(const WorkList& list) { return place.is_there(list); }
  __device__ void advance() { place.item += step; }

  // The current tile, of tile_rows rows by `columns` columns of out, for the CTA at `rank` of its
  // cluster.
  template <class Args>
  __device__ GroupedTile tile(const Args& a, const WorkList& list, int tile_rows, int columns,
                              int rank) const {
    constexpr int kGroupRows = 8;
    const int first = list.first_row[place.entry], end = list.end_row[place.entry];
    const int num_row_tiles = (end - first + tile_rows * a.mates - 1) / (tile_rows * a.mates);
    const int index = place.item - list.first_item[place.entry];
    const int group = index / (kGroupRows * a.num_column_tiles);
    const int within = index - group * kGroupRows * a.num_column_tiles;
    const int rows = min(kGroupRows, num_row_tiles - group * kGroupRows);
    const int row_tile = group * kGroupRows + within % rows, column = within / rows * columns;
    return {first + (row_tile * a.mates + rank) * tile_rows, end, column,
            list.expert[place.entry] * a.weight_rows + column};
  }
};

}  // namespace pyserve::gpu::gemm
