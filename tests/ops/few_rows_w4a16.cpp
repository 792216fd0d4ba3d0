// few_rows_w4a16.cuh on a CPU, by emulated.h: results are held against float64 sums of the matrix
// that pyserve/ops/w4a16.py describes. Prints what is wrong; its exit code is 1 then. Arguments:
// rounds of numbers of rows, groups of copies that a wait forgets.
#include "emulated.h"

#include "common/w4a16.h"

namespace pyserve::gpu {
#include "few_rows.cuh.inc"
#include "w4a16_words.cuh.inc"
#include "few_rows_w4a16.cuh.inc"
}  // namespace pyserve::gpu

#include "emulated_w4a16.h"

using namespace pyserve::gpu;
using namespace pyserve;

namespace {

constexpr uint16_t kPoison = 0x7fc1;

template <class T, Epilogue kEpilogue>
struct Product {
  const Matrix& matrix;
  int m, num_sms;
  bool has_norm;
  std::vector<T> x, bias, norm_weight, before, out, scaled;
  std::vector<float> x_squares, squares;

  int n() const { return matrix.n / static_cast<int>(rows_per_column(kEpilogue)); }
  int num_squares() const { return (n() + 15) / 16; }
  int num_x_squares() const { return (matrix.k + 15) / 16; }
  int x_stride() const { return matrix.k + 8; }
  int out_stride() const { return n() + 3; }

  Product(const Matrix& matrix, int m, int num_sms, bool has_bias, bool has_norm)
      : matrix(matrix), m(m), num_sms(num_sms), has_norm(has_norm), x(m * x_stride()),
        bias(has_bias ? matrix.n : 0), norm_weight(n()), before(m * out_stride(), T{kPoison}),
        x_squares(m * num_x_squares()) {
    std::normal_distribution<float> normal;
    for (T& value : x) value = from_float<T>(normal(machine::random));
    for (T& value : bias) value = from_float<T>(normal(machine::random));
    for (T& value : norm_weight) value = from_float<T>(normal(machine::random));
    for (float& value : x_squares) value = 1 + std::abs(normal(machine::random));
    for (int i = 0; i < m * n() && kEpilogue == Epilogue::kAdd; ++i) {
      before[i / n() * out_stride() + i % n()] = from_float<T>(normal(machine::random));
    }
  }

  // The first `rows` rows of x.
  template <class Tile>
  void run(int rows) {
    out = before;
    scaled.assign(m * out_stride(), T{kPoison});
    squares.assign(m * num_squares(), NAN);
    LinearParams p{x.data(), x_stride(), matrix.packed.data(), matrix.strip_words(),
                   bias.empty() ? nullptr : bias.data(), out.data(), out_stride(), rows, n(),
                   matrix.k};
    if (has_norm && kEpilogue == Epilogue::kAdd) {
      p.norm_weight = norm_weight.data(), p.scaled = scaled.data();
      p.scaled_stride = out_stride();
      p.squares = squares.data(), p.squares_stride = num_squares();
    } else if (has_norm) {
      p.x_squares = x_squares.data(), p.x_squares_stride = num_x_squares(), p.eps = 1e-5f;
    }
    const auto range = [](const auto& values, size_t count) {
      const auto* first = reinterpret_cast<const unsigned char*>(values.data());
      return std::pair(first, first + count * sizeof(values[0]));
    };
    machine::readable = {range(x, (rows - 1) * x_stride() + matrix.k),
                         range(matrix.packed, matrix.packed.size())};
    launch_w4a16_tiled<T, kEpilogue, Tile>(p, num_sms, nullptr);
  }

  double sum_of(int t, int row) const {
    double sum = 0, factor = 1;
    for (int i = 0; i < matrix.k; ++i) {
      sum += double{to_float(x[t * x_stride() + i])} * matrix.numbers[row * matrix.k + i];
    }
    if (has_norm && kEpilogue != Epilogue::kAdd) {
      double squared = 0;
      for (int i = 0; i < num_x_squares(); ++i) squared += x_squares[t * num_x_squares() + i];
      factor = 1 / std::sqrt(squared / matrix.k + 1e-5);
    }
    return sum * factor + (bias.empty() ? 0 : to_float(bias[row]));
  }

  int num_wrong(int rows) const {
    const double rounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    const bool leaves_norm = has_norm && kEpilogue == Epilogue::kAdd;
    int count = 0;
    for (int t = 0; t < m; ++t) {
      std::vector<double> wanted_squares(num_squares());
      for (int j = 0; j < out_stride(); ++j) {
        const int at = t * out_stride() + j;
        if (t >= rows || j >= n()) {
          count += out[at].bits != before[at].bits || scaled[at].bits != kPoison;
          continue;
        }
        double wanted = sum_of(t, j);
        if (kEpilogue == Epilogue::kAdd) wanted += to_float(before[at]);
        if (kEpilogue == Epilogue::kSiluMul) {
          wanted = wanted / (1 + std::exp(-wanted)) * sum_of(t, n() + j);
        }
        const float result = to_float(out[at]);
        count += !(std::abs(result - wanted) <= rounding * std::abs(wanted) + 4e-6);
        wanted_squares[j / 16] += double{result} * result;
        const T product = from_float<T>(result * to_float(norm_weight[j]));
        count += scaled[at].bits != (leaves_norm ? product.bits : kPoison);
      }
      for (int i = 0; leaves_norm && t < rows && i < num_squares(); ++i) {
        const double difference = squares[t * num_squares() + i] - wanted_squares[i];
        count += !(std::abs(difference) <= 1e-5 * wanted_squares[i]);
      }
    }
    return count;
  }
};

template <int kGroupSize>
struct Tiles {
  using Small = W4Tiling<kGroupSize, 1, 2, 99>;
  using Deep = W4Tiling<kGroupSize, 1, kGroupSize == 32 ? 5 : 6, 227>;
  using Wide = W4Tiling<kGroupSize, 2, kGroupSize == 32 ? 3 : 4, 227>;
  using Medium = W4Tiling<kGroupSize, 4, 2, 99, 4>;
};

// Every number of rows, in one or another tiling, with an epilogue for each group size; those without
// zero points have them in the other type.
template <class T, int kGroupSize>
int check(const W4Format& format, int round) {
  using Tile = Tiles<kGroupSize>;
  constexpr Epilogue kEpilogue = kGroupSize == 32   ? Epilogue::kAdd
                                 : kGroupSize == 64 ? Epilogue::kSiluMul
                                                    : Epilogue::kStore;
  int num_bad = 0;
  for (int m = 1; m <= 32; m += m < 16 ? 1 : 5) {
    machine::lands_late = machine::random() % 2 == 0;
    int k = pick({64, 192, 320, 704, 1088}) / kGroupSize * kGroupSize;
    if (kGroupSize == 32) k += pick({0, 32});
    k = std::max(k, kGroupSize);
    const bool has_zeros = (m + round + std::is_same_v<T, __half>) % 2 == 0;
    const int n = kEpilogue == Epilogue::kSiluMul ? pick({32, 96, 160}) : pick({16, 40, 64, 80});
    const Matrix matrix(n, k, format, has_zeros);
    const bool has_bias = machine::random() % 2 == 0, has_norm = machine::random() % 2 == 0;
    Product<T, kEpilogue> product(matrix, m, pick({1, 2, 3, 5}), has_bias, has_norm);
    const int tile = m > 16 ? 3 : m > 8 ? pick({2, 3}) : pick({0, 1, 2});
    if (tile == 0) product.template run<typename Tile::Small>(m);
    if (tile == 1) product.template run<typename Tile::Deep>(m);
    if (tile == 2) product.template run<typename Tile::Wide>(m);
    if (tile == 3) product.template run<typename Tile::Medium>(m);
    const int wrong = product.num_wrong(m);
    if (wrong == 0) continue;
    ++num_bad;
    std::printf("groups of %d, tiling %d, %s, m %d, n %d, k %d, %d SMs, late %d: %d wrong\n",
                kGroupSize, tile, std::is_same_v<T, __half> ? "float16" : "bfloat16", m, matrix.n,
                k, product.num_sms, machine::lands_late, wrong);
    machine::end_if_expected();
  }
  return num_bad;
}

// No other row, nor how x is brought, changes a row's bits.
template <class T>
int check_rows(int k) {
  using Tile = Tiles<128>;
  const Matrix matrix(32, k, kW4Formats[2], true);
  Product<T, Epilogue::kStore> product(matrix, 16, 1, true, false);
  product.template run<typename Tile::Wide>(16);
  int num_bad = product.num_wrong(16) != 0;
  const std::vector<T> all = product.out;
  for (const int m : {1, 8, 9}) {
    if (m == 9) product.template run<typename Tile::Wide>(m);
    if (m == 8) product.template run<typename Tile::Deep>(m);
    if (m == 1) product.template run<typename Tile::Small>(m);
    for (int i = 0; i < m * product.out_stride(); ++i) {
      num_bad += product.out[i].bits != all[i].bits;
    }
  }
  if (num_bad != 0) std::printf("k %d: %d numbers differ by the number of rows\n", k, num_bad);
  return num_bad;
}

template <class T>
int check_all(int num_rounds) {
  int num_bad = 0;
  for (int round = 0; round < num_rounds; ++round) {
    num_bad += check<T, 32>(kW4Formats[0], round) + check<T, 64>(kW4Formats[1], round) +
               check<T, 128>(kW4Formats[2], round);
  }
  return num_bad;
}

}  // namespace

int main(int, char** argv) {
  const int num_rounds = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  int num_bad = check_all<__nv_bfloat16>(num_rounds) + check_all<__half>(num_rounds);
  if (machine::num_too_early == 0) num_bad += check_rows<__nv_bfloat16>(6400);
  return num_bad == 0 ? 0 : 1;
}
