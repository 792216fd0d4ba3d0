// How a matrix product is divided evenly over the SMs (stream-K, Osama et al. 2023): its tiles, of
// num_stages stages of k each, are one row of stages that is cut into runs of equal length, one a
// CTA. A run is pieces of tiles: behind the end of one, and the beginning of another, whole tiles.
// So every CTA reads as many bytes as the others, where whole tiles would leave SMs without work:
// 224 tiles are 2 rounds of 132 SMs, 85 % full, 32 tiles a quarter of one.
//
// A tile of several pieces is a sum of parts, in the order of k, which is that of the CTAs. What is
// added in which order depends on the matrix and on the number of SMs, not on the rows of x.
#pragma once

#include <algorithm>

#include "common/host_device.h"

namespace pyserve::gpu {

// Stages [stage, stage + count) of a tile.
struct Piece {
  int tile, stage, count;
};

// Who has the parts of a tile: `count` CTAs from `first` on.
struct Parts {
  int first, count;
};

struct StreamK {
  int num_stages;  // of a tile
  int num_ctas;
  int least, more;  // stages of a run: `more` CTAs have one beyond `least`

  // num_tiles * num_stages is an int. A run is at least min_run stages, if there are as many.
  StreamK(int num_tiles, int num_stages, int max_ctas, int min_run) : num_stages(num_stages) {
    const int all = num_tiles * num_stages;
    num_ctas = std::clamp(all / min_run, 1, max_ctas);
    least = all / num_ctas;
    more = all % num_ctas;
  }

  // The first stage of a run, of all tiles'.
  PYSERVE_HOST_DEVICE int begin(int cta) const {
    return cta * least + (cta < more ? cta : more);
  }
  PYSERVE_HOST_DEVICE int cta_of(int stage) const {
    const int longer = more * (least + 1);
    return stage < longer ? stage / (least + 1) : more + (stage - longer) / least;
  }
  PYSERVE_HOST_DEVICE Parts parts(int tile) const {
    const int first = cta_of(tile * num_stages);
    return {first, cta_of((tile + 1) * num_stages - 1) - first + 1};
  }
  PYSERVE_HOST_DEVICE bool is_whole(const Piece& piece) const { return piece.count == num_stages; }
};

// The pieces of a CTA's run in the order in which it takes them: what it shares comes first, so
// that others find it, and so that copies go on while it waits for theirs.
struct Run {
  int begin, end, num_stages;
  int first_whole, num_whole;  // tiles
  bool has_end, has_beginning;  // of a tile that is not whole

  PYSERVE_HOST_DEVICE Run(const StreamK& division, int cta)
      : begin(division.begin(cta)),
        end(division.begin(cta + 1)),
        num_stages(division.num_stages),
        first_whole((begin + num_stages - 1) / num_stages),
        num_whole(end / num_stages - first_whole),
        has_end(begin % num_stages != 0),
        has_beginning(num_whole >= 0 && end % num_stages != 0) {}

  PYSERVE_HOST_DEVICE int num_pieces() const {
    return has_end + has_beginning + (num_whole > 0 ? num_whole : 0);
  }
  PYSERVE_HOST_DEVICE Piece piece(int index) const {
    if (has_end && index-- == 0) {
      const int next = first_whole * num_stages;
      return {first_whole - 1, begin % num_stages, (end < next ? end : next) - begin};
    }
    if (has_beginning && index-- == 0) return {first_whole + num_whole, 0, end % num_stages};
    return {first_whole + index, 0, num_stages};
  }
};

}  // namespace pyserve::gpu
