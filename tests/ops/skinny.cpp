// skinny_sm90a.cuh on a CPU, by emulated_sm90a.h: results are held against float64 sums, and those
// of fewer rows of x, with CTAs in another order, against the same. Prints what is wrong; its exit
// code is 1 then. Arguments: rounds, products that each wait forgets.
#include "emulated_sm90a.h"

#define PYSERVE_HOST_DEVICE

namespace pyserve::gpu {
namespace gemm = pyserve::gpu;
namespace skinny = pyserve::gpu;
#include "gemm_frame.cuh.inc"
#include "stream_k.h.inc"
#include "stream_k.cuh.inc"
cudaError_t current_device(const Device** device);
#include "skinny_sm90a.cuh.inc"
constexpr int64_t kMaxSkinnyRows = 128;
struct LinearTrial {
  int64_t skinny_tile_rows = -1;
};
LinearTrial& linear_trial() {
  static LinearTrial trial;
  return trial;
}
#include "skinny_sm90a.h.inc"
#include "skinny_sm90a.cu.inc"
}  // namespace pyserve::gpu

using namespace pyserve::gpu;

namespace {

constexpr uint16_t kPoison = 0x7fc1;
Device device;
std::vector<float4> room_sums(2 * PartRoom::kMaxCtas * 8 * 16 * 32);
std::vector<int> room_arrivals(PartRoom::kMaxCtas * PartRoom::kWarps);

}  // namespace

namespace pyserve::gpu {
cudaError_t current_device(const Device** found) {
  *found = &device;
  return cudaSuccess;
}
cudaError_t part_room(PartRoom* room) {
  *room = {room_sums.data(), room_arrivals.data()};
  return cudaSuccess;
}
}  // namespace pyserve::gpu

namespace {

template <class T>
std::vector<T> randoms(size_t count, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<T> values(count);
  for (T& value : values) value = from_float<T>(normal(machine::random));
  return values;
}

template <class T>
struct Product {
  Epilogue epilogue;
  int m, n, k;
  bool has_norm;
  int rows = n * static_cast<int>(rows_per_column(epilogue)), stride = k + 8, out_stride = n + 8;
  int k_squares = (k + 15) / 16, n_squares = (n + 15) / 16;
  std::vector<T> x, weight, bias, norm_weight, before, out, scaled;
  std::vector<float> x_squares, squares;

  Product(Epilogue epilogue, int m, int n, int k, bool has_bias, bool has_norm)
      : epilogue(epilogue), m(m), n(n), k(k), has_norm(has_norm), x(randoms<T>(m * stride, 1.0f)),
        weight(randoms<T>(rows * stride, 0.06f)), bias(randoms<T>(has_bias ? rows : 0, 1.0f)),
        norm_weight(randoms<T>(n, 1.0f)), before((m + 1) * out_stride, T{kPoison}),
        x_squares(m * k_squares) {
    for (int i = 0; i < m * k_squares; ++i) x_squares[i] = 1.0f + i / k_squares % 7;
    const auto residual = randoms<T>(m * n, 1.0f);
    for (int i = 0; i < m * n && epilogue == Epilogue::kAdd; ++i) {
      before[i / n * out_stride + i % n] = residual[i];
    }
  }
  bool is_factor() const { return has_norm && epilogue != Epilogue::kAdd; }
  bool leaves_norm() const { return has_norm && epilogue == Epilogue::kAdd; }

  // Of the last `count` rows alone.
  bool run(int num_sms, int count) {
    out = before;
    scaled.assign(before.size(), T{kPoison});
    squares.assign(m * n_squares, NAN);
    const int first = m - count;
    LinearParams p{x.data() + first * stride, stride, weight.data(), stride,
                   bias.empty() ? nullptr : bias.data(), out.data() + first * out_stride, out_stride,
                   count, n, k};
    p.epilogue = epilogue;
    p.dtype = std::is_same_v<T, __half> ? Dtype::kFloat16 : Dtype::kBfloat16;
    if (is_factor()) {
      p.x_squares = x_squares.data() + first * k_squares, p.x_squares_stride = k_squares;
      p.eps = 1e-5f;
    }
    if (leaves_norm()) {
      p.norm_weight = norm_weight.data(), p.scaled = scaled.data() + first * out_stride;
      p.scaled_stride = out_stride;
      p.squares = squares.data() + first * n_squares, p.squares_stride = n_squares;
    }
    device.num_sms = num_sms;
    if (!can_skinny_sm90a(p) || launch_skinny_sm90a(p, nullptr) != cudaSuccess) return false;
    return std::all_of(room_arrivals.begin(), room_arrivals.end(), [](int i) { return i == 0; });
  }

  double sum_of(int t, int row) const {
    double sum = 0;
    for (int i = 0; i < k; ++i) {
      sum += double{to_float(x[t * stride + i])} * to_float(weight[row * stride + i]);
    }
    if (is_factor()) sum /= std::sqrt(double{x_squares[t * k_squares]} * k_squares / k + 1e-5);
    return sum + (bias.empty() ? 0.0f : to_float(bias[row]));
  }

  int num_wrong(int count) const {
    int wrong = 0;
    const double rounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    for (int t = 0; t <= m; ++t) {
      std::vector<double> sums(n_squares);
      for (int j = 0; j < out_stride; ++j) {
        const T result = out[t * out_stride + j], product = scaled[t * out_stride + j];
        if (t == m || t < m - count || j >= n) {
          wrong += result.bits != before[t * out_stride + j].bits || product.bits != kPoison;
          continue;
        }
        double wanted = sum_of(t, j);
        if (epilogue == Epilogue::kAdd) wanted += to_float(before[t * out_stride + j]);
        if (epilogue == Epilogue::kSiluMul) {
          wanted = wanted / (1 + std::exp(-wanted)) * sum_of(t, n + j);
        }
        wrong += !(std::abs(to_float(result) - wanted) <= rounding * std::abs(wanted) + 5e-5);
        sums[j / 16] += double{to_float(result)} * to_float(result);
        const T scaled_one = from_float<T>(to_float(result) * to_float(norm_weight[j]));
        wrong += product.bits != (leaves_norm() ? scaled_one.bits : kPoison);
      }
      for (int i = 0; leaves_norm() && t < m && t >= m - count && i < n_squares; ++i) {
        wrong += !(std::abs(squares[t * n_squares + i] - sums[i]) <= 1e-5 * sums[i]);
      }
    }
    return wrong;
  }
};

int up_to(int most) { return 1 + static_cast<int>(machine::random() % most); }

template <class T>
int check(Epilogue epilogue, int m, int n, int k, int num_sms) {
  const bool has_bias = up_to(2) == 1, has_norm = up_to(4) == 1;
  machine::lands_late = up_to(2) == 1;
  linear_trial().skinny_tile_rows = 64 * up_to(2);
  Product<T> product(epilogue, m, n, k, has_bias, has_norm);
  int wrong = product.run(num_sms, m) ? product.num_wrong(m) : -1;
  if (wrong == 0 && machine::num_too_early == 0) {  // of fewer rows, in another order
    const auto all = product.out;
    const int few = 33;
    wrong = product.run(num_sms, few) ? 0 : -2;
    for (int i = (m - few) * product.out_stride; i < m * product.out_stride; ++i) {
      wrong += product.out[i].bits != all[i].bits;
    }
  }
  if (wrong == 0) return 0;
  std::printf("%s, epilogue %d, m %d, n %d, k %d, %d SMs, bias %d, norm %d, late %d: %d wrong\n",
              std::is_same_v<T, __half> ? "float16" : "bfloat16", static_cast<int>(epilogue), m, n, k,
              num_sms, has_bias, has_norm, machine::lands_late, wrong);
  machine::end_if_expected();
  return 1;
}

}  // namespace

int main(int, char** argv) {
  machine::between = machine::land_some;
  const int num_rounds = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  constexpr int kColumns[] = {8, 136, 200}, kDepths[] = {64, 72, 320};
  constexpr int kRows[] = {33, 48, 64, 65, 104, 128};
  auto pick = [](const auto& values) { return values[machine::random() % std::size(values)]; };
  int num_bad = 0;
  for (int i = 0; i < 3 * num_rounds; ++i) {
    const auto epilogue = static_cast<Epilogue>(i % 3);
    const int m = pick(kRows), n = pick(kColumns), k = pick(kDepths), num_sms = up_to(9);
    num_bad += i % 2 == 0 ? check<__nv_bfloat16>(epilogue, m, n, k, num_sms)
                          : check<__half>(epilogue, m, n, k, num_sms);
  }
  return num_bad == 0 ? 0 : 1;
}
