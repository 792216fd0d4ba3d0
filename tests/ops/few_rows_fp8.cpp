// few_rows_fp8.cuh on a CPU, by emulated.h: results are held against float64 sums. Prints what is
// wrong; its exit code is 1 then. Arguments: rounds of each tiling, groups of copies that a wait
// forgets.
#include "emulated.h"

namespace pyserve::gpu {

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
}  // namespace pyserve::gpu

using namespace pyserve::gpu;

namespace {

constexpr uint16_t kPoison = 0x7fc1;

int pick(std::vector<int> values) { return values[machine::random() % values.size()]; }

template <class T>
std::vector<T> randoms(size_t count, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<T> values(count);
  for (auto& value : values) value = from_float<T>(normal(machine::random));
  return values;
}

double number_of(int byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double value =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return byte >> 7 ? -value : value;
}

struct Shape {
  int m, n, k, num_sms, scale_rows, scale_columns;
  bool has_bias, has_norm;
};

// The number of results that are wrong.
template <class T, Epilogue kEpilogue, class Tile>
int check(const Shape& s) {
  const int rows = kEpilogue == Epilogue::kSiluMul ? 2 * s.n : s.n;
  const int stride = s.k + 8, out_stride = s.n + 3;
  const int k_squares = (s.k + 15) / 16, n_squares = (s.n + 15) / 16;
  const int num_groups = (s.k + s.scale_columns - 1) / s.scale_columns;
  const auto x = randoms<T>(s.m * stride, 1.0f), bias = randoms<T>(rows, 1.0f);
  const auto norm_weight = randoms<T>(s.n, 1.0f);
  std::vector<unsigned char> weight(rows * s.k);
  for (auto& byte : weight) {
    do byte = machine::random() % 256;
    while ((byte & 0x7f) == 0x7f);
  }
  std::vector<float> scales((rows + s.scale_rows - 1) / s.scale_rows * num_groups);
  for (auto& scale : scales) scale = (1 + machine::random() % 64) * 1e-5f;
  auto out = randoms<T>(s.m * out_stride, 1.0f);
  const auto before = out;
  std::vector<T> scaled(out.size(), T{kPoison});
  std::vector<float> x_squares(s.m * k_squares, 1.5f), squares(s.m * n_squares, NAN);
  LinearParams p{x.data(), stride, weight.data(), s.k, s.has_bias ? bias.data() : nullptr,
                 out.data(), out_stride, s.m, s.n, s.k};
  const bool has_factor = s.has_norm && kEpilogue != Epilogue::kAdd;
  const bool leaves_norm = s.has_norm && kEpilogue == Epilogue::kAdd;
  if (has_factor) p.x_squares = x_squares.data(), p.x_squares_stride = k_squares, p.eps = 1e-5f;
  if (leaves_norm) {
    p.norm_weight = norm_weight.data(), p.scaled = scaled.data(), p.scaled_stride = out_stride;
    p.squares = squares.data(), p.squares_stride = n_squares;
  }
  const auto range = [](const auto& values, size_t count) {
    const auto* first = reinterpret_cast<const unsigned char*>(values.data());
    return std::pair(first, first + count * sizeof(values[0]));
  };
  machine::readable = {range(x, (s.m - 1) * stride + s.k), range(weight, weight.size())};
  launch_fp8_tiled<T, kEpilogue, Tile>(
      p, {scales.data(), s.scale_rows, s.scale_columns, num_groups}, s.num_sms, nullptr);

  const double factor = has_factor ? 1 / std::sqrt(k_squares * 1.5 / s.k + 1e-5) : 1;
  int num_wrong = 0;
  for (int t = 0; t < s.m; ++t) {
    const auto sum_of = [&](int row, double* magnitude) {
      double sum = 0;
      for (int i = 0; i < s.k; ++i) {
        const double scale = scales[row / s.scale_rows * num_groups + i / s.scale_columns];
        const double term = to_float(x[t * stride + i]) * number_of(weight[row * s.k + i]) * scale;
        sum += term, *magnitude += std::abs(term);
      }
      return sum * factor + (s.has_bias ? to_float(bias[row]) : 0);
    };
    std::vector<double> wanted_squares(n_squares);
    for (int j = 0; j < out_stride; ++j) {
      const int at = t * out_stride + j;
      if (j >= s.n) {
        num_wrong += out[at].bits != before[at].bits;
        continue;
      }
      double magnitude = 0, wanted = sum_of(j, &magnitude);
      if (kEpilogue == Epilogue::kAdd) wanted += to_float(before[at]);
      if (kEpilogue == Epilogue::kSiluMul) {
        const double up = sum_of(s.n + j, &magnitude);
        magnitude *= 1 + std::abs(up) + std::abs(wanted);
        wanted = wanted / (1 + std::exp(-wanted)) * up;
      }
      const float result = to_float(out[at]);
      num_wrong += !(std::abs(result - wanted) <= 0.004 * std::abs(wanted) + 3e-6 * magnitude + 1e-6);
      wanted_squares[j / 16] += double{result} * result;
      const T product = from_float<T>(result * to_float(norm_weight[j]));
      num_wrong += scaled[at].bits != (leaves_norm ? product.bits : kPoison);
    }
    for (int i = 0; leaves_norm && i < n_squares; ++i) {
      num_wrong += !(std::abs(squares[t * n_squares + i] - wanted_squares[i]) <=
                     1e-5 * wanted_squares[i]);
    }
  }
  return num_wrong;
}

template <class T, class Tile>
int check_all(int num_rounds) {
  int num_bad = 0;
  for (int round = 0; round < num_rounds; ++round) {
    machine::lands_late = round % 2 == 0;
    const int k = pick({16, 112, 128, 1024, 1040, 2192});
    const bool has_blocks = machine::random() % 2 == 0;
    const Shape shape{1 + static_cast<int>(machine::random() % Tile::kTokens),
                      pick({1, 8, 16, 33, 48, 72}),
                      k,
                      1 + static_cast<int>(machine::random() % 4),
                      has_blocks ? pick({8, 128}) : 1,
                      has_blocks ? 128 : k,
                      machine::random() % 2 == 0,
                      machine::random() % 2 == 0};
    const int wrong[] = {check<T, Epilogue::kStore, Tile>(shape),
                         check<T, Epilogue::kAdd, Tile>(shape),
                         check<T, Epilogue::kSiluMul, Tile>(shape)};
    for (int epilogue = 0; epilogue < 3; ++epilogue) {
      if (wrong[epilogue] == 0) continue;
      ++num_bad;
      std::printf("%s, %d weight rows, %d tokens, epilogue %d, m %d, n %d, k %d, %d SMs, scales of "
                  "%d by %d: %d wrong\n",
                  std::is_same_v<T, __half> ? "float16" : "bfloat16", Tile::kRows, Tile::kTokens,
                  epilogue, shape.m, shape.n, k, shape.num_sms, shape.scale_rows,
                  shape.scale_columns, wrong[epilogue]);
      machine::end_if_expected();
    }
  }
  return num_bad;
}

template <class T>
int check_tilings(int n) {
  return check_all<T, Fp8Tiling<2, 5, 4>>(n) + check_all<T, Fp8Tiling<2, 4, 8>>(n) +
         check_all<T, Fp8Tiling<1, 3, 4>>(n) + check_all<T, Fp8Tiling<1, 2, 8>>(n);
}

}  // namespace

int main(int, char** argv) {
  const int n = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  return check_tilings<__nv_bfloat16>(n) + check_tilings<__half>(n) == 0 ? 0 : 1;
}
