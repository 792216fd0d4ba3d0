// grouped_few_rows_w4a16.cuh on a CPU, by emulated.h: results are held against float64 sums of the
// matrices that pyserve/ops/w4a16.py describes. Prints what is wrong; its exit code is 1 then.
// Arguments: rounds of each tiling, groups of copies that a wait forgets.
#include "emulated.h"

#include "common/w4a16.h"

namespace pyserve::gpu {

#include "emulated_grouped.h"

#include "few_rows.cuh.inc"
#include "w4a16_words.cuh.inc"
#include "few_rows_w4a16.cuh.inc"
#include "work_list.cuh.inc"
#include "grouped_few_rows.cuh.inc"
#include "grouped_few_rows_w4a16.cuh.inc"
}  // namespace pyserve::gpu

#include "emulated_w4a16.h"
#include "grouped_w4a16_case.h"

using namespace pyserve::gpu;

namespace {

template <Epilogue kEpilogue, class T, class Tile>
int check_one(const GroupedShape& shape, bool has_order) {
  GroupedCase<T> one(shape, kEpilogue, has_order);
  launch_grouped_w4a16_tiled<T, kEpilogue, Tile>(one.params(), shape.num_sms, nullptr);
  return one.num_wrong([](double number, double /*scale*/) { return number; }, 4e-6);
}

template <class T, class Tile>
int check_all(int num_rounds, int format) {
  int num_bad = 0;
  for (int round = 0; round < num_rounds; ++round) {
    machine::lands_late = round % 2 == 0;
    int k = pick({64, 192, 320, 704, 1088}) / Tile::kGroupSize * Tile::kGroupSize;
    if (Tile::kGroupSize == 32) k += pick({0, 32});
    const bool is_plain = machine::random() % 2 == 0;
    GroupedShape shape{.n = is_plain ? pick({8, 32, 40, 77}) : pick({16, 32, 48}),
                       .k = std::max(k, Tile::kGroupSize),
                       .top_k = pick({1, 2, 3}),
                       .num_sms = pick({1, 2, 3, 5}),
                       .format = format};
    // Experts without rows, with some, with whole blocks and with more than one.
    for (int e = 0; e < pick({1, 2, 3, 5}); ++e) {
      shape.counts.push_back(pick({0, 1, 3, Tile::kTokens, 2 * Tile::kTokens + 1}));
    }
    if (round == 0) shape.counts = std::vector<int>(37, 0), shape.counts[35] = 1;
    const int wrong = is_plain ? check_one<Epilogue::kStore, T, Tile>(shape, false)
                               : check_one<Epilogue::kSiluMul, T, Tile>(shape, true);
    if (wrong == 0) continue;
    ++num_bad;
    std::printf("groups of %d, %d tokens, %s, n %d, k %d, %d SMs, late %d: %d wrong\n",
                Tile::kGroupSize, Tile::kTokens, is_plain ? "in order" : "by order", shape.n,
                shape.k, shape.num_sms, machine::lands_late, wrong);
    machine::end_if_expected();
  }
  return num_bad;
}

template <class T, int kGroupSize>
int check_tilings(int num_rounds, int format) {
  constexpr bool kIsFine = kGroupSize == 32;
  return check_all<T, W4Tiling<kGroupSize, 1, 2, 99>>(num_rounds, format) +
         check_all<T, W4Tiling<kGroupSize, 1, kGroupSize == 128 ? 6 : 5, 227>>(num_rounds, format) +
         check_all<T, W4Tiling<kGroupSize, 2, kIsFine ? 3 : 4, 227>>(num_rounds, format);
}

}  // namespace

int main(int, char** argv) {
  const int n = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  const int num_bad = check_tilings<__nv_bfloat16, 32>(n, 0) + check_tilings<__half, 64>(n, 1) +
                      check_tilings<__nv_bfloat16, 128>(n, 2) + check_tilings<__half, 128>(n, 2);
  return num_bad == 0 ? 0 : 1;
}
