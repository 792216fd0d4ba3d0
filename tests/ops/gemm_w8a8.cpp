// gemm_w8a8.cuh in its frame and what rounds x for it, on a CPU, by emulated_sm90a.h: rounded rows are
// held against the definition in pyserve/ops/fp8.py, results against float64 sums of them. Prints what
// is wrong; its exit code is 1 then. Arguments: rounds of all tilings, products that each wait forgets.
#include "emulated_sm90a.h"

namespace pyserve::gpu {
namespace gemm = pyserve::gpu;
constexpr cudaError_t cudaErrorNotSupported = 2;
#include "fp8.h.inc"
#include "w8a8.h.inc"
#include "quantise_rows.cuh.inc"
#include "gemm_frame.cuh.inc"
#include "gemm_estimate.h.inc"
#include "gemm_sm90a.cuh.inc"
#include "gemm_w8a8.cuh.inc"
#include "gemm_w8a8_sm90a.cu.inc"
}  // namespace pyserve::gpu

using namespace pyserve::gpu;

namespace {

constexpr uint16_t kPoison = 0x7fc1;

int pick(std::initializer_list<int> values) {
  return values.begin()[machine::random() % values.size()];
}

template <class T>
struct Case {
  int m, n, k, scale_rows, scale_columns;
  Epilogue epilogue;
  std::vector<uint8_t> weight;
  std::vector<float> scales;
  std::vector<T> x, bias, before, out;
  std::vector<uint8_t> scratch;
  int pass_rows;

  int rows() const { return n * static_cast<int>(rows_per_column(epilogue)); }  // of weight
  int num_groups() const { return (k + scale_columns - 1) / scale_columns; }
  int x_groups() const { return (k + 127) / 128; }
  int x_stride() const { return k + 8; }
  int out_stride() const { return n + 8; }

  Case(int m, int n, int k, int scale_rows, int scale_columns, Epilogue epilogue, bool has_bias,
       int pass_rows)
      : m(m), n(n), k(k), scale_rows(scale_rows), scale_columns(scale_columns),
        epilogue(epilogue), weight(rows() * k),
        scales((rows() + scale_rows - 1) / scale_rows * num_groups()), x(m * x_stride()),
        bias(has_bias ? rows() : 0), before((m + 1) * out_stride(), T{kPoison}),
        pass_rows(pass_rows) {
    std::normal_distribution<float> normal;
    for (uint8_t& byte : weight) byte = from_float_e4m3(64 * normal(machine::random));
    // So that products of two sums are no infinity in float16.
    const float most = epilogue == Epilogue::kSiluMul ? 32768 : 64;
    for (float& scale : scales) scale = std::exp(normal(machine::random)) / most;
    for (int i = 0; i < m * x_stride(); ++i) {
      // A group of zeros, and one of large numbers.
      const float size = i / 128 % 7 == 0 ? 0 : i / 128 % 7 == 1 ? 8 : 1;
      x[i] = from_float<T>(size * normal(machine::random));
    }
    for (T& value : bias) value = from_float<T>(normal(machine::random));
    for (int i = 0; i < m * n && epilogue == Epilogue::kAdd; ++i) {
      before[i / n * out_stride() + i % n] = from_float<T>(normal(machine::random));
    }
  }

  bool run(int num_sms) {
    out = before;
    const int64_t num_bytes = w8_row_bytes(k) * pass_rows + 3;
    scratch.assign(num_bytes + 16, 0x7f);
    const auto begin = (reinterpret_cast<uintptr_t>(scratch.data()) + 15) / 16 * 16;
    LinearParams p{x.data(), x_stride(), weight.data(), k, bias.empty() ? nullptr : bias.data(),
                   out.data(), out_stride(), m, n, k};
    p.epilogue = epilogue;
    p.dtype = std::is_same_v<T, __half> ? Dtype::kFloat16 : Dtype::kBfloat16;
    const Fp8Scale scale{scales.data(), scale_rows, scale_columns, num_groups()};
    return can_gemm_w8a8_sm90a(p, scale) &&
           launch_gemm_w8a8_sm90a(p, scale, reinterpret_cast<void*>(begin), num_bytes, {num_sms},
                                  nullptr) == cudaSuccess;
  }

  // A row of x as it is multiplied.
  std::vector<double> rounded(int row) const {
    std::vector<double> values(k);
    for (int group = 0; group < x_groups(); ++group) {
      const int end = std::min(k, group * 128 + 128);
      float largest = 0x1p-100f;
      for (int i = group * 128; i < end; ++i) {
        largest = std::max(largest, std::abs(to_float(x[row * x_stride() + i])));
      }
      const float factor = 448 / largest, scale = largest / 448;
      for (int i = group * 128; i < end; ++i) {
        const float number = to_float(x[row * x_stride() + i]) * factor;
        values[i] = double{to_float_e4m3(from_float_e4m3(number))} * scale;
      }
    }
    return values;
  }

  std::vector<double> weights(int row) const {
    std::vector<double> values(k);
    for (int i = 0; i < k; ++i) {
      const float scale = scales[row / scale_rows * num_groups() + i / scale_columns];
      values[i] = double{to_float_e4m3(weight[row * k + i])} * scale;
    }
    return values;
  }

  int num_wrong() const {
    const double rounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    std::vector<std::vector<double>> of_rows;
    for (int j = 0; j < rows(); ++j) of_rows.push_back(weights(j));
    int count = 0;
    for (int t = 0; t <= m; ++t) {
      const std::vector<double> left = t < m ? rounded(t) : std::vector<double>();
      for (int j = 0; j < out_stride(); ++j) {
        const T result = out[t * out_stride() + j];
        if (t == m || j >= n) {
          count += result.bits != kPoison;
          continue;
        }
        double sizes = 0;  // of all that is added up
        const auto sum_of = [&](int row) {
          double sum = bias.empty() ? 0 : to_float(bias[row]);
          for (int i = 0; i < k; ++i) {
            sum += left[i] * of_rows[row][i];
            sizes += std::abs(left[i] * of_rows[row][i]);
          }
          return sum;
        };
        double wanted = sum_of(j);
        if (epilogue == Epilogue::kSiluMul) {
          const double up = sum_of(n + j), gate = wanted;
          wanted = gate / (1 + std::exp(-gate)) * up;
          sizes *= std::abs(gate) + std::abs(up);
        }
        if (epilogue == Epilogue::kAdd) wanted += to_float(before[t * out_stride() + j]);
        const double allowed = rounding * std::abs(wanted) + 1e-6 * sizes + 1e-6;
        count += !(std::abs(to_float(result) - wanted) <= allowed);
      }
    }
    return count;
  }
};

template <class T>
int check(int tiling) {
  const auto epilogue = static_cast<Epilogue>(machine::random() % 3);
  const bool is_paired = epilogue == Epilogue::kSiluMul;
  // Where k is divided, a half of it may be more than a ring holds.
  const bool is_long = !is_paired && kW8Tilings[tiling - 1].parts > 1 && machine::random() % 4 == 0;
  const int k = is_long ? 3456 : pick({64, 128, 192, 400, 512});
  // Of rows, of parts of blocks, of blocks.
  const int scale_rows = pick({1, 64, 128}), scale_columns = scale_rows == 1 ? k : 128;
  const int n = is_long                       ? 64
                : scale_rows > 1 && is_paired ? pick({64, 128, 192})
                                              : pick({24, 64, 136, 192});
  const int m = is_long ? pick({3, 17}) : pick({3, 17, 64, 75, 130});
  const int pass_rows = m == 75 ? 40 : m;
  machine::lands_late = machine::random() % 2 == 0;
  Case<T> given(m, n, k, scale_rows, scale_columns, epilogue, machine::random() % 2 == 0,
                pass_rows);
  linear_trial().w8a8_tiling = tiling;
  const int num_sms = pick({2, 4});
  const int wrong = given.run(num_sms) ? given.num_wrong() : -1;
  if (wrong == 0) return 0;
  std::printf("tiling %d, %s, epilogue %d, m %d, n %d, k %d, scales %d x %d, %d SMs, late %d: "
              "%d wrong\n",
              tiling, std::is_same_v<T, __half> ? "float16" : "bfloat16",
              static_cast<int>(epilogue), m, n, k, scale_rows, scale_columns, num_sms,
              machine::lands_late, wrong);
  machine::end_if_expected();
  return 1;
}

}  // namespace

int main(int, char** argv) {
  const int num_rounds = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  int num_bad = 0;
  for (int i = 0; i < num_rounds * kNumW8Tilings; ++i) {
    const int tiling = i % kNumW8Tilings + 1;
    num_bad += i % 2 == 0 ? check<__nv_bfloat16>(tiling) : check<__half>(tiling);
  }
  return num_bad == 0 ? 0 : 1;
}
