// grouped_gemm_w4a16_sm90a.cu on a CPU, by emulated_sm90a.h: results are held against float64 sums of
// the matrices that pyserve/ops/w4a16.py describes. Prints what is wrong; its exit code is 1 then.
// Arguments: rounds of all tiles, products that each wait forgets.
#include "emulated_sm90a.h"

#include "common/w4a16.h"

namespace pyserve::gpu {
namespace gemm = pyserve::gpu;
#include "emulated_grouped.h"

#include "w4a16.h.inc"
#include "w4a16_words.cuh.inc"
#include "gemm_frame.cuh.inc"
#include "gemm_w4a16.cuh.inc"
#include "work_list.cuh.inc"
#include "grouped_schedule.cuh.inc"
#include "grouped_w4a16.h.inc"
#include "grouped_gemm_w4a16_sm90a.cu.inc"
}  // namespace pyserve::gpu

#include "emulated_w4a16.h"
#include "grouped_w4a16_case.h"

using namespace pyserve::gpu;

namespace {

// A weight as the kernel multiplies by it: the scale rounded to T, then the product.
template <class T>
double weight_of(double number, double scale) {
  const float rounded = to_float(from_float<T>(static_cast<float>(scale)));
  return to_float(from_float<T>(static_cast<float>(std::round(number / scale)) * rounded));
}

template <class T, int kTokens, bool kIsPaired, bool kIsWhole = false>
int check(int format) {
  machine::lands_late = machine::random() % 2 == 0;
  const int k = format == 0 ? pick({288, 352}) : format == 1 ? pick({256, 320}) : pick({256, 384});
  using Tile = W4Tile<T, kTokens == 128 ? 2 : 4, kTokens, kIsPaired, true, 1, kIsWhole>;
  const int most = Tile::kOutColumns;
  GroupedShape shape{.n = kIsPaired ? pick({16, 80, most + 16}) : pick({40, most + 24}),
                     .k = k,
                     .top_k = 1,
                     .num_sms = pick({1, 2, 3}),
                     .format = format};
  // Experts without rows, with some, with a whole tile or more than one.
  shape.counts = {pick({0, 1}), pick({0, 7}), pick({kTokens, kTokens + 9})};
  std::shuffle(shape.counts.begin(), shape.counts.end(), machine::random);
  GroupedCase<T> one(shape, kIsPaired ? Epilogue::kSiluMul : Epilogue::kStore, false);
  const GroupedParams p = one.params();
  const bool has_run =
      can_gemm_grouped_w4a16_sm90a(p) &&
      launch_grouped_w4<Tile>(p, kW4Formats[format].group_size, {shape.num_sms}, nullptr) ==
          cudaSuccess;
  const int wrong = has_run ? one.num_wrong(weight_of<T>, 2e-5) : -1;
  if (wrong == 0) return 0;
  std::printf("format %d, %d tokens, %s, paired %d, n %d, k %d, %d rows of %d experts, %d SMs, "
              "late %d: %d wrong\n",
              format, kTokens, std::is_same_v<T, __half> ? "float16" : "bfloat16", kIsPaired,
              shape.n, k, one.num_rows, one.num_experts, shape.num_sms, machine::lands_late, wrong);
  machine::end_if_expected();
  return 1;
}

template <class T, int kTokens>
int check_both(int format) {
  constexpr int kWholeFormat = 2;  // groups of 128
  static_assert(kW4Formats[kWholeFormat].group_size == W4PieceFormat::kWholeGroup);
  int num_bad = check<T, kTokens, false>(format) + check<T, kTokens, true>(format);
  if constexpr (kTokens < 128) {
    num_bad += check<T, kTokens, false, true>(kWholeFormat);
    num_bad += check<T, kTokens, true, true>(kWholeFormat);
  }
  return num_bad;
}

}  // namespace

int main(int, char** argv) {
  const int num_rounds = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  int num_bad = 0;
  for (int i = 0; i < num_rounds; ++i) {
    num_bad += check_both<__nv_bfloat16, 32>(i % 3) + check_both<__half, 32>((i + 1) % 3) +
               check_both<__nv_bfloat16, 64>((i + 2) % 3) + check_both<__half, 64>(i % 3) +
               check_both<__nv_bfloat16, 128>((i + 1) % 3) + check_both<__half, 128>((i + 2) % 3);
  }
  return num_bad == 0 ? 0 : 1;
}
