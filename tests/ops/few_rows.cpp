// few_rows.cuh on a CPU, by emulated.h: results are held against float64 sums. Prints what is
// wrong; its exit code is 1 then. Arguments: rounds of each tiling, groups of copies that a wait
// forgets.
#include "emulated.h"

namespace pyserve::gpu {
#include "few_rows.cuh.inc"
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
  int m, n, k, num_sms;
  bool has_bias, has_norm;
};

// The number of results that are wrong.
template <Epilogue kEpilogue, class Tile>
int check(const Shape& s) {
  const int rows = kEpilogue == Epilogue::kSiluMul ? 2 * s.n : s.n;
  const int stride = s.k + 8, out_stride = s.n + 3;
  const int k_squares = (s.k + 15) / 16, n_squares = (s.n + 15) / 16;
  const auto x = randoms(s.m * stride, 1.0f), weight = randoms(rows * stride, 0.06f);
  const auto bias = randoms(rows, 1.0f), norm_weight = randoms(s.n, 1.0f);
  std::vector<__nv_bfloat16> out(s.m * out_stride, {kPoison}), scaled = out;
  const auto residual = randoms(s.m * out_stride, 1.0f);
  if (kEpilogue == Epilogue::kAdd) {
    for (int i = 0; i < s.m * s.n; ++i) {
      const int at = i / s.n * out_stride + i % s.n;
      out[at] = residual[at];
    }
  }
  std::vector<float> x_squares(s.m * k_squares, 7.0f), squares(s.m * n_squares, NAN);
  LinearParams p{x.data(), stride, weight.data(), stride, s.has_bias ? bias.data() : nullptr,
                 out.data(), out_stride, s.m, s.n, s.k};
  const bool is_factor = s.has_norm && kEpilogue != Epilogue::kAdd;
  const bool leaves_norm = s.has_norm && kEpilogue == Epilogue::kAdd;
  if (is_factor) p.x_squares = x_squares.data(), p.x_squares_stride = k_squares, p.eps = 1e-5f;
  if (leaves_norm) {
    p.norm_weight = norm_weight.data(), p.scaled = scaled.data(), p.scaled_stride = out_stride;
    p.squares = squares.data(), p.squares_stride = n_squares;
  }
  const auto range = [](const auto& values, int last) {
    const auto* first = reinterpret_cast<const unsigned char*>(values.data());
    return std::pair(first, first + 2 * last);
  };
  machine::readable = {range(x, (s.m - 1) * stride + s.k),
                       range(weight, (rows - 1) * stride + s.k)};
  launch_tiled<__nv_bfloat16, kEpilogue, Tile>(p, s.num_sms, nullptr);

  const double factor = is_factor ? 1 / std::sqrt(7.0 * k_squares / s.k + 1e-5) : 1.0;
  int num_wrong = 0;
  for (int t = 0; t < s.m; ++t) {
    auto sum_of = [&](int row) {
      double sum = 0;
      for (int i = 0; i < s.k; ++i) {
        sum += double{to_float(x[t * stride + i])} * to_float(weight[row * stride + i]);
      }
      return sum * factor + (s.has_bias ? to_float(bias[row]) : 0.0f);
    };
    std::vector<double> sums(n_squares);
    for (int j = 0; j < out_stride; ++j) {
      const int at = t * out_stride + j;
      if (j >= s.n) {
        num_wrong += out[at].bits != kPoison || scaled[at].bits != kPoison;
        continue;
      }
      double wanted = sum_of(j);
      if (kEpilogue == Epilogue::kAdd) wanted += to_float(residual[at]);
      if (kEpilogue == Epilogue::kSiluMul) wanted *= sum_of(s.n + j) / (1 + std::exp(-wanted));
      const double result = to_float(out[at]);
      num_wrong += !(std::abs(result - wanted) <= 0.004 * std::abs(wanted) + 1e-4);
      sums[j / 16] += result * result;
      const float product = to_float(out[at]) * to_float(norm_weight[j]);
      const uint16_t bits = leaves_norm ? from_float<__nv_bfloat16>(product).bits : kPoison;
      num_wrong += scaled[at].bits != bits;
    }
    for (int i = 0; leaves_norm && i < n_squares; ++i) {
      num_wrong += !(std::abs(squares[t * n_squares + i] - sums[i]) <= 1e-5 * sums[i]);
    }
  }
  return num_wrong;
}

template <class Tile>
int check_all(int num_rounds) {
  constexpr int kColumns[] = {1, 8, 16, 33, 130, 200, 48, 72};
  constexpr int kDepths[] = {8, 72, 512, 520, 1032, 2056};
  int num_bad = 0;
  for (int round = 0; round < num_rounds; ++round) {
    auto pick = [](const auto& values) { return values[machine::random() % std::size(values)]; };
    machine::lands_late = round % 2 == 0;
    auto up_to = [](int most) { return 1 + static_cast<int>(machine::random() % most); };
    const int m = round == 0 ? Tile::kTokens : up_to(Tile::kTokens);
    const Shape shape{m, pick(kColumns), pick(kDepths), up_to(5), up_to(2) == 1, up_to(2) == 1};
    const int wrong[] = {check<Epilogue::kStore, Tile>(shape), check<Epilogue::kAdd, Tile>(shape),
                         check<Epilogue::kSiluMul, Tile>(shape)};
    for (int epilogue = 0; epilogue < 3; ++epilogue) {
      if (wrong[epilogue] == 0) continue;
      ++num_bad;
      std::printf("%d weight rows, %d tokens, epilogue %d, m %d, n %d, k %d, %d SMs: %d wrong\n",
                  Tile::kRows, Tile::kTokens, epilogue, shape.m, shape.n, shape.k, shape.num_sms,
                  wrong[epilogue]);
      machine::end_if_expected();
    }
  }
  return num_bad;
}

}  // namespace

int main(int, char** argv) {
  const int n = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  const int num_bad = check_all<Tiling<2, 4, 16>>(n) + check_all<Tiling<1, 6, 16>>(n) +
                      check_all<Tiling<2, 3, 32>>(n) + check_all<Tiling<1, 10, 1>>(n) +
                      check_all<Tiling<1, 9, 4>>(n) + check_all<Tiling<1, 8, 8>>(n) +
                      check_all<Tiling<1, 3, 8>>(n);
  return num_bad == 0 ? 0 : 1;
}
