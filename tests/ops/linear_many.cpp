// linear_many.h by itself, built for a CPU without bfloat16 products: prints the largest error of
// any result against sums in double, 1 being the most that its rounding may make.
#include "cpu/linear_many.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

extern "C" {

int32_t torch_get_num_threads(uint32_t* count) { return *count = 1, 0; }

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t,
                           void (*call)(int64_t, int64_t, void*), void* context) {
  const int64_t middle = begin + (end - begin) / 3;  // as two threads would have it
  call(begin, middle, context);
  call(middle, end, context);
  return 0;
}
}

namespace pyserve {
namespace {

Bf16 rounded(double x) {
  const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(x));
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <Epilogue kEpilogue>
double worst(int64_t m, int64_t n, int64_t k, bool has_bias) {
  constexpr int64_t kPad = 3;  // strides, and what must not be written
  const int64_t rows = n * rows_per_column(kEpilogue);
  std::mt19937 random(static_cast<unsigned>(m * 31 + n * 7 + k));
  std::normal_distribution<double> normal;
  const auto make = [&](int64_t count) {
    std::vector<Bf16> values(count);
    for (Bf16& value : values) value = rounded(normal(random));
    return values;
  };
  const std::vector<Bf16> x = make(m * (k + kPad)), weight = make(rows * (k + kPad));
  const std::vector<Bf16> bias = make(rows);
  const std::vector<Bf16> before = make(m * (n + kPad));
  std::vector<Bf16> out = before;
  const Shape shape{m, n, k, k + kPad, k + kPad, n + kPad};
  const Matrix<Bf16> matrix{weight.data(), has_bias ? bias.data() : nullptr};
  linear_many<kEpilogue>(shape, x.data(), matrix, out.data());
  double worst = 0;
  for (int64_t t = 0; t < m; ++t) {
    const auto sum = [&](int64_t j) {
      double total = has_bias ? to_float(bias[j]) : 0;
      for (int64_t i = 0; i < k; ++i) {
        total += double{to_float(x[t * (k + kPad) + i])} * to_float(weight[j * (k + kPad) + i]);
      }
      return total;
    };
    for (int64_t j = 0; j < n + kPad; ++j) {
      const int64_t at = t * (n + kPad) + j;
      double expected = to_float(before[at]);
      if (j < n) {
        const double own = sum(j);
        if (kEpilogue == Epilogue::kSiluMul) {
          expected = own / (1 + std::exp(-own)) * sum(n + j);
        } else {
          expected = own + (kEpilogue == Epilogue::kAdd ? expected : 0);
        }
      }
      // What float32 sums are off by counts as nothing next to a sum of k products of about 1.
      const double unit = std::abs(expected) / 256 + 1e-5 * std::sqrt(double(k + 1)) * 8;
      worst = std::max(worst, std::abs(to_float(out[at]) - expected) / (j < n ? unit : 1e-30));
    }
  }
  return worst;
}

}  // namespace
}  // namespace pyserve

int main() {
  using pyserve::Epilogue;
  static_assert(!pyserve::kHasProducts);
  double worst = 0;
  for (const int64_t m : {1, 5, 6, 7, 12, 13, 65, 200}) {
    for (const auto& [n, k] : {std::pair{64, 64}, {1, 1}, {3, 7}, {16, 300}, {17, 33}, {33, 50},
                               {99, 259}, {40, 2100}, {8, 0}, {5, 30000}}) {
      if (k > 3000 && m > 13) continue;  // takes long, and rows are told apart by the others
      for (const bool has_bias : {false, true}) {
        worst = std::max({worst, pyserve::worst<Epilogue::kStore>(m, n, k, has_bias),
                          pyserve::worst<Epilogue::kAdd>(m, n, k, has_bias),
                          pyserve::worst<Epilogue::kSiluMul>(m, n, k, has_bias)});
      }
    }
  }
  std::printf("%.4f\n", worst);
}
