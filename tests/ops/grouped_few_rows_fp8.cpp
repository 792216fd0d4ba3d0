// grouped_few_rows_fp8.cuh on a CPU, by emulated.h: results are held against float64 sums. Prints what is
// wrong; its exit code is 1 then. Arguments: rounds of each tiling, groups of copies that a wait
// forgets.
#include "emulated.h"

namespace pyserve::gpu {

#include "emulated_grouped.h"

struct Fp8Scale {
  const float* data;
  int rows, columns, num_groups;
};

uint4 load_shared(uint32_t address) {
  uint4 value;
  std::memcpy(&value, machine::at(address), sizeof value);
  return value;
}

#include "few_rows.cuh.inc"
#include "fp8_numbers.cuh.inc"
#include "few_rows_fp8.cuh.inc"
#include "work_list.cuh.inc"
#include "grouped_few_rows.cuh.inc"
#include "grouped_few_rows_fp8.cuh.inc"
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

double number_of(int byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double value =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return byte >> 7 ? -value : value;
}

struct Shape {
  std::vector<int> counts;  // rows of each expert
  int top_k;                // 0: x stands in order
  int n, k, num_sms;
  bool has_blocks;
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
  std::vector<unsigned char> weight(num_experts * rows * s.k);
  for (auto& byte : weight) byte = machine::random() % 127 + machine::random() % 2 * 128;
  const int scale_rows = s.has_blocks ? 8 : 1, scale_columns = s.has_blocks ? 128 : s.k;
  const int num_groups = (s.k + scale_columns - 1) / scale_columns;
  const int scale_stride = (rows + scale_rows - 1) / scale_rows * num_groups;
  std::vector<float> scales(num_experts * scale_stride);
  for (auto& scale : scales) scale = (1 + machine::random() % 64) * 1e-5f;
  std::vector<__nv_bfloat16> out((num_rows + 1) * out_stride, {kPoison});
  const GroupedParams p{.x = x.data(),
                        .x_stride = stride,
                        .order = s.top_k == 0 ? nullptr : order.data(),
                        .top_k = top_k,
                        .weight = weight.data(),
                        .expert_stride = int64_t{rows} * s.k,
                        .weight_stride = s.k,
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
    return std::pair(first, first + sizeof(values[0]) * last);
  };
  machine::readable = {range(x, (std::max(num_tokens, 1) - 1) * stride + s.k),
                       range(weight, num_experts * rows * s.k)};
  launch_grouped_fp8_tiled<__nv_bfloat16, kEpilogue, Tile>(
      p, {scales.data(), scale_rows, scale_columns, num_groups}, scale_stride, s.num_sms, nullptr);

  int num_wrong = 0, expert = 0;
  for (int row = 0; row <= num_rows; ++row) {
    while (expert < num_experts && row >= offsets[expert + 1]) ++expert;
    double magnitude = 0;
    auto sum_of = [&](int weight_row) {
      const int token = s.top_k == 0 ? row : order[row] / top_k;
      const auto* from = weight.data() + (int64_t{expert} * rows + weight_row) * s.k;
      double sum = 0;
      for (int i = 0; i < s.k; ++i) {
        const int at = weight_row / scale_rows * num_groups + i / scale_columns;
        const double scale = scales[expert * scale_stride + at];
        const double term = to_float(x[token * stride + i]) * number_of(from[i]) * scale;
        sum += term, magnitude += std::abs(term);
      }
      return sum;
    };
    for (int j = 0; j < out_stride; ++j) {
      const __nv_bfloat16 result = out[row * out_stride + j];
      if (j >= s.n || row == num_rows) {
        num_wrong += result.bits != kPoison;
        continue;
      }
      magnitude = 1;
      double wanted = sum_of(j);
      if (kEpilogue == Epilogue::kSiluMul) {
        const double up = sum_of(s.n + j), gate = wanted;
        wanted *= up / (1 + std::exp(-wanted));
        magnitude *= 1 + std::abs(up) + std::abs(gate);
      }
      const double allowed = 0.004 * std::abs(wanted) + 3e-6 * magnitude;
      num_wrong += !(std::abs(to_float(result) - wanted) <= allowed);
    }
  }
  return num_wrong;
}

template <class Tile>
int check_all(int num_rounds) {
  constexpr int kColumns[] = {1, 8, 16, 33, 48, 72};
  constexpr int kDepths[] = {16, 112, 1024, 1040, 2064};
  int num_bad = 0;
  for (int round = 0; round < num_rounds; ++round) {
    auto pick = [](const auto& values) { return values[machine::random() % std::size(values)]; };
    auto up_to = [](int most) { return static_cast<int>(machine::random() % (most + 1)); };
    machine::lands_late = round % 2 == 0;
    Shape shape{{}, up_to(3), pick(kColumns), pick(kDepths), 1 + up_to(4), up_to(1) == 1};
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
  const int num_bad = check_all<Fp8Tiling<2, 5, 4>>(n) + check_all<Fp8Tiling<2, 4, 8>>(n) +
                      check_all<Fp8Tiling<1, 3, 4>>(n) + check_all<Fp8Tiling<1, 2, 8>>(n);
  return num_bad == 0 ? 0 : 1;
}
