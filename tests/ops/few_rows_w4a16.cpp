// few_rows_w4a16.cuh on a CPU, by emulated.h: results are held against float64 sums of the matrix
// that pyserve/ops/w4a16.py describes. Prints what is wrong; its exit code is 1 then. Arguments:
// rounds of 16 numbers of rows, groups of copies that a wait forgets.
#include "emulated.h"

#include "common/w4a16.h"

namespace pyserve::gpu {
#include "few_rows.inc"
#include "few_rows_w4a16.inc"
}  // namespace pyserve::gpu

using namespace pyserve::gpu;
using namespace pyserve;

namespace {

constexpr uint16_t kPoison = 0x7fc1;

int pick(std::initializer_list<int> values) {
  return values.begin()[machine::random() % values.size()];
}

// Numbers, and what they are packed.
struct Matrix {
  int n, k;
  W4Format format;
  std::vector<double> numbers;
  std::vector<uint32_t> packed;

  int64_t num_units() const { return (k + format.unit_columns() - 1) / format.unit_columns(); }
  int64_t strip_words() const { return num_units() * format.unit_words(); }

  Matrix(int n, int k, const W4Format& format, bool has_zeros)
      : n(n), k(k), format(format), numbers(n * k), packed((n + 15) / 16 * strip_words()) {
    std::uniform_real_distribution<float> scales(0.004f, 0.02f);
    const int group_size = static_cast<int>(format.group_size);
    for (int r = 0; r < n; ++r) {
      for (int c = 0; c < k; c += group_size) {
        const float chosen = scales(machine::random);
        uint32_t scale, zero = has_zeros ? machine::random() % 16 : 8;
        std::memcpy(&scale, &chosen, 4);
        scale &= ~kW4ZeroMask;
        uint32_t* records = unit_of(r, c) + format.unit_blocks * kW4BlockWords;
        records[c / group_size % format.unit_records * kW4RecordWords + r % 16] = scale | zero;
        for (int i = c; i < c + group_size; ++i) {
          const uint32_t q = machine::random() % 16;
          const int s = i % 64 / 16, u = i % 16 / 8, t = i % 8 / 2, e = i % 2, half = r % 16 / 8;
          uint32_t* block = unit_of(r, i) + i % format.unit_columns() / 64 * kW4BlockWords;
          block[(4 * (r % 8) + t) * 4 + s] |= q << 4 * (half + 2 * u + 4 * e);
          numbers[r * k + i] = (double(q) - zero) * __uint_as_float(scale);
        }
      }
    }
  }

 private:
  uint32_t* unit_of(int row, int column) {
    const int64_t unit = row / 16 * num_units() + column / format.unit_columns();
    return packed.data() + unit * format.unit_words();
  }
};

template <class T>
struct Product {
  const Matrix& matrix;
  int m, num_sms;
  std::vector<T> x, bias, out;

  int x_stride() const { return matrix.k + 8; }
  int out_stride() const { return matrix.n + 3; }

  Product(const Matrix& matrix, int m, int num_sms, bool has_bias)
      : matrix(matrix), m(m), num_sms(num_sms), x(m * x_stride()), bias(has_bias ? matrix.n : 0) {
    std::normal_distribution<float> normal;
    for (T& value : x) value = from_float<T>(normal(machine::random));
    for (T& value : bias) value = from_float<T>(normal(machine::random));
  }

  // The first `rows` rows of x.
  template <class Tile>
  void run(int rows) {
    out.assign(m * out_stride(), T{kPoison});
    LinearParams p{x.data(), x_stride(), matrix.packed.data(), matrix.strip_words(),
                   bias.empty() ? nullptr : bias.data(), out.data(), out_stride(), rows, matrix.n,
                   matrix.k};
    const auto range = [](const auto& values, size_t count) {
      const auto* first = reinterpret_cast<const unsigned char*>(values.data());
      return std::pair(first, first + count * sizeof(values[0]));
    };
    machine::readable = {range(x, (rows - 1) * x_stride() + matrix.k),
                         range(matrix.packed, matrix.packed.size())};
    launch_w4a16_tiled<T, Tile>(p, num_sms, nullptr);
  }

  int num_wrong(int rows) const {
    const double rounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    int count = 0;
    for (int t = 0; t < m; ++t) {
      for (int j = 0; j < out_stride(); ++j) {
        const T result = out[t * out_stride() + j];
        if (t >= rows || j >= matrix.n) {
          count += result.bits != kPoison;
          continue;
        }
        double wanted = bias.empty() ? 0 : to_float(bias[j]);
        for (int i = 0; i < matrix.k; ++i) {
          wanted += double{to_float(x[t * x_stride() + i])} * matrix.numbers[j * matrix.k + i];
        }
        count += !(std::abs(to_float(result) - wanted) <= rounding * std::abs(wanted) + 2e-6);
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
};

// Every number of rows, in one or another tiling; those without zero points have them in the other
// type.
template <class T, int kGroupSize>
int check(const W4Format& format, int round) {
  using Tile = Tiles<kGroupSize>;
  int num_bad = 0;
  for (int m = 1; m <= 16; ++m) {
    machine::lands_late = machine::random() % 2 == 0;
    int k = pick({64, 192, 320, 704, 1088}) / kGroupSize * kGroupSize;
    if (kGroupSize == 32) k += pick({0, 32});
    k = std::max(k, kGroupSize);
    const bool has_zeros = (m + round + std::is_same_v<T, __half>) % 2 == 0;
    const Matrix matrix(pick({16, 40, 64, 80}), k, format, has_zeros);
    Product<T> product(matrix, m, pick({1, 2, 3, 5}), machine::random() % 2 == 0);
    const int tile = m > 8 ? 2 : pick({0, 1, 2});
    if (tile == 0) product.template run<typename Tile::Small>(m);
    if (tile == 1) product.template run<typename Tile::Deep>(m);
    if (tile == 2) product.template run<typename Tile::Wide>(m);
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
  Product<T> product(matrix, 16, 1, true);
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
