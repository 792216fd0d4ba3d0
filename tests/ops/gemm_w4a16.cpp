// gemm_w4a16.cuh in its frame, on a CPU, by emulated_sm90a.h: results are held against float64 sums of
// the matrix that pyserve/ops/w4a16.py describes. Prints what is wrong; its exit code is 1 then.
// Arguments: rounds of all tilings, products that each wait forgets.
#include "emulated_sm90a.h"

#include "common/w4a16.h"

namespace pyserve::gpu {
namespace gemm = pyserve::gpu;
#include "w4a16.h.inc"
#include "w4a16_words.cuh.inc"
#include "gemm_frame.cuh.inc"
#include "gemm_estimate.h.inc"
#include "gemm_w4a16.cuh.inc"
#include "gemm_w4a16_sm90a.cu.inc"
}  // namespace pyserve::gpu

#include "emulated_w4a16.h"

using namespace pyserve::gpu;

namespace {

constexpr uint16_t kPoison = 0x7fc1;

template <class T>
struct Product {
  const Matrix& matrix;
  Epilogue epilogue;
  int m;
  std::vector<T> x, bias, before, out;

  int n() const { return matrix.n / static_cast<int>(rows_per_column(epilogue)); }
  int x_stride() const { return matrix.k + 8; }
  int out_stride() const { return n() + 8; }

  Product(const Matrix& matrix, Epilogue epilogue, int m, bool has_bias)
      : matrix(matrix), epilogue(epilogue), m(m), x(m * x_stride()),
        bias(has_bias ? matrix.n : 0), before((m + 1) * out_stride(), T{kPoison}) {
    std::normal_distribution<float> normal;
    for (T& value : x) value = from_float<T>(normal(machine::random));
    for (T& value : bias) value = from_float<T>(normal(machine::random));
    for (int i = 0; i < m * n() && epilogue == Epilogue::kAdd; ++i) {
      before[i / n() * out_stride() + i % n()] = from_float<T>(normal(machine::random));
    }
  }

  bool run(int num_sms) {
    out = before;
    LinearParams p{x.data(), x_stride(), matrix.packed.data(), matrix.strip_words(),
                   bias.empty() ? nullptr : bias.data(), out.data(), out_stride(), m, n(),
                   matrix.k};
    p.epilogue = epilogue;
    p.dtype = std::is_same_v<T, __half> ? Dtype::kFloat16 : Dtype::kBfloat16;
    return can_gemm_w4a16_sm90a(p) &&
           launch_gemm_w4a16_sm90a(p, matrix.format.group_size, {num_sms}, nullptr) == cudaSuccess;
  }

  // A row of the matrix as the kernel multiplies by it: the scale rounded to T, then the product.
  std::vector<double> weights(int row) const {
    std::vector<double> values(matrix.k);
    for (int i = 0; i < matrix.k; ++i) {
      const double number = matrix.numbers[row * matrix.k + i];
      const double scale = matrix.scales[row * matrix.k + i];
      const float rounded = to_float(from_float<T>(static_cast<float>(scale)));
      values[i] = to_float(from_float<T>(static_cast<float>(std::round(number / scale)) * rounded));
    }
    return values;
  }

  int num_wrong() const {
    const double rounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    int count = 0;
    for (int j = 0; j < out_stride(); ++j) {
      const bool is_there = j < n(), is_paired = epilogue == Epilogue::kSiluMul;
      const auto first = weights(is_there ? j : 0), second = weights(is_there && is_paired ? n() + j : 0);
      for (int t = 0; t <= m; ++t) {
        const T result = out[t * out_stride() + j];
        if (t == m || !is_there) {
          count += result.bits != kPoison;
          continue;
        }
        const auto sum_of = [&](const std::vector<double>& weight, int row) {
          double sum = bias.empty() ? 0 : to_float(bias[row]);
          for (int i = 0; i < matrix.k; ++i) sum += to_float(x[t * x_stride() + i]) * weight[i];
          return sum;
        };
        double wanted = sum_of(first, j);
        if (epilogue == Epilogue::kAdd) wanted += to_float(before[t * out_stride() + j]);
        if (is_paired) wanted = wanted / (1 + std::exp(-wanted)) * sum_of(second, n() + j);
        count += !(std::abs(to_float(result) - wanted) <= rounding * std::abs(wanted) + 2e-5);
      }
    }
    return count;
  }
};

template <class T>
int check(int tiling, int format) {
  const W4Format& chosen = kW4Formats[format];
  const auto epilogue = static_cast<Epilogue>(machine::random() % 3);
  int k = pick({256, 320, 384, 448, 640});
  if (format == 0) k += pick({0, 32});
  if (format == 2) k = k / 128 * 128;
  const bool has_zeros = machine::random() % 2 == 0, has_bias = machine::random() % 2 == 0;
  // Half a strip more than one, in the tile of four, unless gate and up are whole strips.
  const int n = epilogue == Epilogue::kSiluMul ? pick({96, 160, 224}) : pick({24, 96, 160, 224});
  const Matrix matrix(n, k, chosen, has_zeros);
  machine::lands_late = machine::random() % 2 == 0;
  Product<T> product(matrix, epilogue, pick({17, 31, 40, 64, 75, 270}), has_bias);
  linear_trial().w4a16_tiling = tiling;
  const int num_sms = pick({2, 4, 6});
  const bool has_run = product.run(num_sms);
  const int wrong = has_run ? product.num_wrong() : -1;
  if (wrong == 0) return 0;
  std::printf("groups of %d, tiling %d, %s, epilogue %d, m %d, n %d, k %d, %d SMs, late %d: %d wrong\n",
              static_cast<int>(chosen.group_size), tiling,
              std::is_same_v<T, __half> ? "float16" : "bfloat16", static_cast<int>(epilogue),
              product.m, product.n(), k, num_sms, machine::lands_late, wrong);
  machine::end_if_expected();
  return 1;
}

}  // namespace

int main(int, char** argv) {
  const int num_rounds = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  int num_bad = 0;
  for (int i = 0; i < num_rounds * kNumW4Tilings; ++i) {
    const int tiling = i % kNumW4Tilings + 1, format = static_cast<int>(machine::random() % 3);
    num_bad += i % 2 == 0 ? check<__nv_bfloat16>(tiling, format) : check<__half>(tiling, format);
  }
  return num_bad == 0 ? 0 : 1;
}
