// grouped_few_rows.cuh on a CPU, by emulated.h: results are held against float64 sums. Prints what is
// wrong; its exit code is 1 then. Arguments: rounds of each tiling, groups of copies that a wait
// forgets.
#include "emulated.h"

namespace pyserve::gpu {

#include "emulated_grouped.h"

#include "few_rows.cuh.inc"
#include "work_list.cuh.inc"
#include "grouped_few_rows.cuh.inc"
}  // namespace pyserve::gpu

using namespace pyserve::gpu;

namespace {

constexpr uint16_t kPoison = 0x7fc1;

std::vector<__nv_bfloat16> randoms(size_t count, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<__nv_bfloat16> values(count);
  for (auto& value : values) value = from_float<__nv_bfloat16>(normal(machine::random));
  return values;
}

struct Shape {
  std::vector<int> counts;  // rows of each expert
  int top_k;                // 0: x stands in order
  int n, k, num_sms;
};

// The number of results that are wrong.
template <Epilogue kEpilogue, class Tile>
int check(const Shape& s) {
  const int num_experts = static_cast<int>(s.counts.size());
  std::vector<int32_t> offsets(num_experts + 1);
  for (int e = 0; e < num_experts; ++e) offsets[e + 1] = offsets[e] + s.counts[e];
  const int num_rows = offsets.back(), top_k = std::max(s.top_k, 1);
  const int num_tokens = (num_rows + top_k - 1) / top_k;
  std::vector<int32_t> order(num_tokens * top_k, -1);
  for (int row = 0; row < num_rows; ++row) order[row] = row;
  std::shuffle(order.begin(), order.begin() + num_rows, machine::random);
  const int rows = kEpilogue == Epilogue::kSiluMul ? 2 * s.n : s.n;
  const int stride = s.k + 8, out_stride = s.n + 3;
  const auto x = randoms(std::max(num_tokens, 1) * stride, 1.0f);
  const auto weight = randoms(num_experts * rows * stride, 0.06f);
  std::vector<__nv_bfloat16> out((num_rows + 1) * out_stride, {kPoison});
  const GroupedParams p{.x = x.data(),
                        .x_stride = stride,
                        .order = s.top_k == 0 ? nullptr : order.data(),
                        .top_k = top_k,
                        .weight = weight.data(),
                        .expert_stride = int64_t{rows} * stride,
                        .weight_stride = stride,
                        .offsets = offsets.data(),
                        .sorted_x = nullptr,
                        .sorted_x_stride = 0,
                        .out = out.data(),
                        .out_stride = out_stride,
                        .max_rows = num_rows,
                        .num_experts = num_experts,
                        .n = s.n,
                        .k = s.k,
                        .dtype = Dtype::kBfloat16,
                        .epilogue = kEpilogue};
  const auto range = [](const auto& values, int last) {
    const auto* first = reinterpret_cast<const unsigned char*>(values.data());
    return std::pair(first, first + 2 * last);
  };
  machine::readable = {range(x, (std::max(num_tokens, 1) - 1) * stride + s.k),
                       range(weight, (num_experts * rows - 1) * stride + s.k)};
  launch_grouped_tiled<__nv_bfloat16, kEpilogue, Tile>(p, s.num_sms, nullptr);

  int num_wrong = 0, expert = 0;
  for (int row = 0; row <= num_rows; ++row) {
    while (expert < num_experts && row >= offsets[expert + 1]) ++expert;
    auto sum_of = [&](int weight_row) {
      const int token = s.top_k == 0 ? row : order[row] / top_k;
      const auto* from = weight.data() + (int64_t{expert} * rows + weight_row) * stride;
      double sum = 0;
      for (int i = 0; i < s.k; ++i) {
        sum += double{to_float(x[token * stride + i])} * to_float(from[i]);
      }
      return sum;
    };
    for (int j = 0; j < out_stride; ++j) {
      const __nv_bfloat16 result = out[row * out_stride + j];
      if (j >= s.n || row == num_rows) {
        num_wrong += result.bits != kPoison;
        continue;
      }
      double wanted = sum_of(j);
      if (kEpilogue == Epilogue::kSiluMul) wanted *= sum_of(s.n + j) / (1 + std::exp(-wanted));
      num_wrong += !(std::abs(to_float(result) - wanted) <= 0.004 * std::abs(wanted) + 1e-4);
    }
  }
  return num_wrong;
}

template <class Tile>
int check_all(int num_rounds) {
  constexpr int kColumns[] = {1, 8, 16, 33, 48, 72};
  constexpr int kDepths[] = {8, 72, 512, 520, 1032};
  int num_bad = 0;
  for (int round = 0; round < num_rounds; ++round) {
    auto pick = [](const auto& values) { return values[machine::random() % std::size(values)]; };
    auto up_to = [](int most) { return static_cast<int>(machine::random() % (most + 1)); };
    machine::lands_late = round % 2 == 0;
    Shape shape{{}, up_to(3), pick(kColumns), pick(kDepths), 1 + up_to(4)};
    // Experts without rows, with some, with whole blocks and with more than one.
    const int counts[] = {0, 0, 1, Tile::kTokens, up_to(Tile::kTokens), 2 * Tile::kTokens + 1};
    for (int e = 0; e < 1 + up_to(5); ++e) shape.counts.push_back(pick(counts));
    if (round == 0) shape.counts = std::vector<int>(37, 0), shape.counts[35] = 1;
    const int wrong[] = {check<Epilogue::kStore, Tile>(shape),
                         check<Epilogue::kSiluMul, Tile>(shape)};
    for (int epilogue = 0; epilogue < 2; ++epilogue) {
      if (wrong[epilogue] == 0) continue;
      ++num_bad;
      std::printf("%d weight rows, %d tokens, epilogue %d, top %d, n %d, k %d, %d SMs: %d wrong\n",
                  Tile::kRows, Tile::kTokens, epilogue, shape.top_k, shape.n, shape.k,
                  shape.num_sms, wrong[epilogue]);
      machine::end_if_expected();
    }
  }
  return num_bad;
}

}  // namespace

int main(int, char** argv) {
  const int n = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  const int num_bad = check_all<Tiling<2, 4, 16>>(n) + check_all<Tiling<2, 3, 32>>(n) +
                      check_all<Tiling<1, 10, 1>>(n) + check_all<Tiling<1, 9, 4>>(n) +
                      check_all<Tiling<1, 8, 8>>(n) + check_all<Tiling<1, 3, 8>>(n);
  return num_bad == 0 ? 0 : 1;
}
