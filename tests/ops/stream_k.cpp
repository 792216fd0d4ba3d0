// stream_k.h on a CPU: each stage of each tile is in one piece, and the parts of a tile are where
// those who add them look. Prints what is wrong; its exit code is 1 then.
#include "gpu/linear/stream_k.h"

#include <cstdio>
#include <set>
#include <utility>
#include <vector>

using namespace pyserve::gpu;

namespace {

// What is wrong with a division, or null.
const char* fault(int num_tiles, int num_stages, int max_ctas, int min_run) {
  const StreamK division(num_tiles, num_stages, max_ctas, min_run);
  const int all = num_tiles * num_stages;
  if (division.num_ctas < 1 || division.num_ctas > max_ctas) return "number of CTAs";
  if (division.num_ctas > 1 && all / division.num_ctas < min_run) return "a run that is too short";
  if (division.begin(0) != 0 || division.begin(division.num_ctas) != all) return "ends";
  std::vector<std::vector<std::pair<int, Piece>>> pieces(num_tiles);  // by CTA
  std::set<std::pair<int, bool>> places;
  for (int cta = 0; cta < division.num_ctas; ++cta) {
    const int length = division.begin(cta + 1) - division.begin(cta);
    if (length != all / division.num_ctas && length != all / division.num_ctas + 1) return "a run";
    const Run run(division, cta);
    int num_taken = 0;
    bool has_whole = false;
    for (int i = 0; i < run.num_pieces(); ++i) {
      const Piece piece = run.piece(i);
      if (piece.count < 1 || piece.stage < 0 || piece.stage + piece.count > num_stages) {
        return "a piece";
      }
      num_taken += piece.count;
      pieces.at(piece.tile).emplace_back(cta, piece);
      if (division.is_whole(piece)) {
        has_whole = true;
      } else if (has_whole) {
        return "a part behind a whole tile";
      } else if (!places.emplace(cta, piece.stage == 0).second) {
        return "two parts in one place";
      }
    }
    if (num_taken != length) return "stages of a run";
  }
  std::set<int> firsts;  // whose arrivals are counted
  for (int tile = 0; tile < num_tiles; ++tile) {
    const Parts parts = division.parts(tile);
    if (parts.count != static_cast<int>(pieces[tile].size())) return "number of parts";
    if (parts.count > 1 && !firsts.insert(parts.first).second) return "two tiles of one counter";
    int stage = 0;
    for (int i = 0; i < parts.count; ++i) {
      const auto& [cta, piece] = pieces[tile][i];
      if (cta != parts.first + i || piece.stage != stage) return "the order of parts";
      if (division.is_whole(piece) != (parts.count == 1)) return "who is alone";
      stage += piece.count;
    }
    if (stage != num_stages) return "stages of a tile";
  }
  return nullptr;
}

}  // namespace

int main() {
  int num_bad = 0;
  auto check = [&](int num_tiles, int num_stages, int max_ctas, int min_run) {
    const char* what = fault(num_tiles, num_stages, max_ctas, min_run);
    if (what == nullptr) return;
    ++num_bad;
    std::printf("%d tiles of %d stages, %d CTAs, runs of %d: %s\n", num_tiles, num_stages, max_ctas,
                min_run, what);
  };
  for (int num_tiles = 1; num_tiles < 20; ++num_tiles) {
    for (int num_stages = 1; num_stages < 20; ++num_stages) {
      for (const int max_ctas : {1, 2, 3, 7, 13, 20}) {
        for (const int min_run : {1, 2, 4}) check(num_tiles, num_stages, max_ctas, min_run);
      }
    }
  }
  for (const int max_ctas : {78, 114, 132}) {  // those of a Llama-3.1-8B layer, and its head
    for (const auto& [num_tiles, num_stages] :
         {std::pair{48, 64}, {32, 64}, {224, 64}, {32, 224}, {1002, 64}}) {
      check(num_tiles, num_stages, max_ctas, 4);
    }
  }
  return num_bad == 0 ? 0 : 1;
}
