// few_rows_lora.cuh on a CPU, by emulated.h: results are held against float64 sums of the base and
// of what adapters add, and do not depend on the other rows. Prints what is wrong; its exit code is
// 1 then. Arguments: rounds of each tiling, groups of copies that a wait forgets.
#include "emulated_lora.h"

namespace pyserve::gpu {
#include "few_rows.cuh.inc"
#include "few_rows_lora.cuh.inc"
}  // namespace pyserve::gpu

namespace {

struct Shape {
  int m, n, k, num_sms, num_parts;
  bool has_bias, has_norm;
};

template <class T>
std::vector<T> randoms(size_t count, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<T> values(count);
  for (auto& value : values) value = from_float<T>(normal(machine::random));
  return values;
}

// The number of results that are wrong; -1: the adapters have no room.
template <class T, Epilogue kEpilogue, class Tile>
int check(const Shape& s) {
  const int rows = static_cast<int>(rows_per_column(kEpilogue)) * s.n;
  const int stride = s.k + 8, k_squares = (s.k + 15) / 16, n_squares = (s.n + 15) / 16;
  const auto x = randoms<T>(s.m * stride, 1.0f), weight = randoms<T>(rows * stride, 0.06f);
  const auto bias = randoms<T>(rows, 1.0f), norm_weight = randoms<T>(s.n, 1.0f);
  const auto residual = randoms<T>(s.m * s.n, 1.0f);
  std::vector<T> out = residual, scaled = residual;
  std::vector<float> x_squares(s.m * k_squares, 7.0f), squares(s.m * n_squares, NAN);
  Adapters<T> adapters(s.m, rows, s.num_parts);
  LinearParams p{x.data(), stride, weight.data(), stride, s.has_bias ? bias.data() : nullptr,
                 out.data(), s.n, s.m, s.n, s.k};
  const bool is_factor = s.has_norm && kEpilogue != Epilogue::kAdd;
  const bool leaves_norm = s.has_norm && kEpilogue == Epilogue::kAdd;
  if (is_factor) p.x_squares = x_squares.data(), p.x_squares_stride = k_squares, p.eps = 1e-5f;
  if (leaves_norm) {
    p.norm_weight = norm_weight.data(), p.scaled = scaled.data(), p.scaled_stride = s.n;
    p.squares = squares.data(), p.squares_stride = n_squares;
  }
  const auto range = [](const auto& values) {
    const auto* first = reinterpret_cast<const unsigned char*>(values.data());
    return std::pair(first, first + 2 * values.size());
  };
  machine::readable = {range(x), range(weight), adapters.readable()};
  const LinearLora lora = adapters.params();
  if (!fits_lora<kEpilogue, Tile>(p, lora, s.num_sms)) return -1;
  launch_lora_tiled<T, kEpilogue, Tile>(p, lora, s.num_sms, nullptr);

  const double factor = is_factor ? 1 / std::sqrt(7.0 * k_squares / s.k + 1e-5) : 1.0;
  const double half = std::is_same_v<T, __nv_bfloat16> ? 1.0 / 256 : 1.0 / 2048;
  int num_wrong = 0;
  for (int t = 0; t < s.m; ++t) {
    auto sum_of = [&](int row) {
      double sum = adapters.added(t, row);
      for (int i = 0; i < s.k; ++i) {
        sum += double{to_float(x[t * stride + i])} * to_float(weight[row * stride + i]);
      }
      return sum * factor + (s.has_bias ? to_float(bias[row]) : 0.0f);
    };
    std::vector<double> sums(n_squares);
    for (int j = 0; j < s.n; ++j) {
      const int at = t * s.n + j;
      double wanted = sum_of(j), size = 1 + std::abs(wanted);
      if (kEpilogue == Epilogue::kAdd) wanted += to_float(residual[at]);
      if (kEpilogue == Epilogue::kSiluMul) {
        const double up = sum_of(s.n + j);
        size *= 1 + std::abs(up);
        wanted *= up / (1 + std::exp(-wanted));
      }
      const double result = to_float(out[at]);
      num_wrong += !(std::abs(result - wanted) <= half * std::abs(wanted) + 8e-3 * half * size);
      sums[j / 16] += result * result;
      const float product = to_float(out[at]) * to_float(norm_weight[j]);
      const auto bits = leaves_norm ? from_float<T>(product).bits : residual[at].bits;
      num_wrong += scaled[at].bits != bits;
    }
    for (int i = 0; leaves_norm && i < n_squares; ++i) {
      num_wrong += !(std::abs(squares[t * n_squares + i] - sums[i]) <= 1e-5 * sums[i]);
    }
  }
  return num_wrong;
}

template <class T, class Tile>
int check_all(int num_rounds) {
  int num_bad = 0, num_run = 0;
  for (int round = 0; round < num_rounds; ++round) {
    machine::lands_late = round % 2 == 0;
    auto up_to = [](int most) { return 1 + static_cast<int>(machine::random() % most); };
    const int m = round == 0 ? Tile::kTokens : up_to(Tile::kTokens);
    Shape shape{m, any_of({8, 16, 33, 72, 130}), any_of({8, 72, 520, 1032, 2312}), up_to(4),
                any_of({1, 2, 3, 4}), up_to(2) == 1, up_to(2) == 1};
    // Many groups, so that the buffers of B are used again, ahead of slower warps.
    if (round % 4 == 3) shape.n = 264, shape.k = any_of({72, 520}), shape.num_sms = 1;
    Shape paired = shape;
    paired.num_parts = any_of({1, 2});
    const int wrong[] = {check<T, Epilogue::kStore, Tile>(shape),
                         check<T, Epilogue::kAdd, Tile>(shape),
                         check<T, Epilogue::kSiluMul, Tile>(paired)};
    for (int epilogue = 0; epilogue < 3; ++epilogue) {
      num_run += wrong[epilogue] >= 0;
      if (wrong[epilogue] <= 0) continue;
      ++num_bad;
      std::printf("%s, %d tokens, epilogue %d, m %d, n %d, k %d, %d SMs: %d wrong\n",
                  std::is_same_v<T, __half> ? "float16" : "bfloat16", Tile::kTokens, epilogue,
                  shape.m, shape.n, shape.k, shape.num_sms, wrong[epilogue]);
      machine::end_if_expected();
    }
  }
  if (num_run == 0) std::printf("%d tokens: no adapters have room\n", Tile::kTokens);
  return num_bad + (num_run == 0);
}

// The bits of a row do not depend on which slot its adapter is in, nor on the other rows.
template <class Tile>
int check_rows() {
  using T = __nv_bfloat16;
  constexpr int kRows = 40, kColumns = 1032;
  const auto x = randoms<T>(Tile::kTokens * kColumns, 1.0f);
  const auto weight = randoms<T>(kRows * kColumns, 0.06f);
  Adapters<T> adapters(Tile::kTokens, kRows, 2);
  std::vector<T> together(Tile::kTokens * kRows);
  const auto range = [](const auto& values) {
    const auto* first = reinterpret_cast<const unsigned char*>(values.data());
    return std::pair(first, first + 2 * values.size());
  };
  machine::readable = {range(x), range(weight), adapters.readable()};
  LinearParams p{x.data(), kColumns, weight.data(), kColumns, nullptr, together.data(), kRows,
                 Tile::kTokens, kRows, kColumns};
  LinearLora lora = adapters.params();
  if (!fits_lora<Epilogue::kStore, Tile>(p, lora, 2)) return 0;
  launch_lora_tiled<T, Epilogue::kStore, Tile>(p, lora, 2, nullptr);
  const Adapters<T> all = adapters;
  int num_bad = 0;
  for (int token = 0; token < Tile::kTokens; token += 3) {
    std::vector<T> alone(kRows);
    const int slot = all.slot_of(token);
    for (size_t s = 0; s < all.starts.size(); ++s) adapters.starts[s] = slot < 0 || int(s) > slot;
    LinearParams one = p;
    one.x = &x[token * kColumns], one.out = alone.data(), one.m = 1;
    LinearLora own = lora;
    own.rows.num_tokens = 1, own.shrunk.data += token * lora.shrunk.stride;
    launch_lora_tiled<T, Epilogue::kStore, Tiling<1, 10, 1>>(one, own, 3, nullptr);
    for (int i = 0; i < kRows; ++i) num_bad += alone[i].bits != together[token * kRows + i].bits;
  }
  if (num_bad != 0) {
    std::printf("%d tokens: %d results depend on other rows\n", Tile::kTokens, num_bad);
  }
  return num_bad;
}

template <class T>
int check_tilings(int n) {
  return check_all<T, Tiling<1, 10, 1>>(n) + check_all<T, Tiling<1, 8, 8>>(n) +
         check_all<T, Tiling<1, 3, 8>>(n);
}

}  // namespace

int main(int, char** argv) {
  const int n = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  int num_bad = check_tilings<__nv_bfloat16>(n) + check_tilings<__half>(n);
  for (int i = 0; i < n && machine::num_too_early == 0; ++i) {
    num_bad += check_rows<Tiling<1, 8, 8>>() + check_rows<Tiling<1, 3, 8>>();
  }
  return num_bad == 0 ? 0 : 1;
}
