// few_rows_w4a16_lora.cuh on a CPU, by emulated.h: results are held against float64 sums of the
// base's 4-bit integers and of what adapters add. Prints what is wrong; its exit code is 1 then.
// Arguments: rounds, groups of copies that a wait forgets.
#include "emulated_lora.h"

#include "common/w4a16.h"

namespace pyserve::gpu {
#include "few_rows.cuh.inc"
#include "few_rows_lora.cuh.inc"
#include "w4a16_words.cuh.inc"
#include "few_rows_w4a16.cuh.inc"
#include "few_rows_w4a16_lora.cuh.inc"
}  // namespace pyserve::gpu

#include "emulated_w4a16.h"

namespace {

// The number of results that are wrong; -1: the adapters have no room.
template <class T, Epilogue kEpilogue, class Tile>
int check(const W4Format& format, int m, int n, int k, int num_sms) {
  const int rows = static_cast<int>(rows_per_column(kEpilogue)) * n, k_squares = (k + 15) / 16;
  const Matrix matrix(rows, k, format, machine::random() % 2 == 0);
  std::normal_distribution<float> normal;
  std::vector<T> x(m * k), bias(rows), residual(m * n);
  for (std::vector<T>* values : {&x, &bias, &residual}) {
    for (T& value : *values) value = from_float<T>(normal(machine::random));
  }
  std::vector<float> x_squares(m * k_squares, 7.0f);
  const bool has_norm = kEpilogue != Epilogue::kAdd && machine::random() % 2 == 0;
  std::vector<T> out = residual;
  Adapters<T> adapters(m, rows, kEpilogue == Epilogue::kSiluMul ? any_of({1, 2}) : 3);
  LinearParams p{x.data(), k, matrix.packed.data(), matrix.strip_words(), bias.data(), out.data(),
                 n, m, n, k};
  if (has_norm) p.x_squares = x_squares.data(), p.x_squares_stride = k_squares, p.eps = 1e-5f;
  const auto range = [](const auto& values) {
    const auto* first = reinterpret_cast<const unsigned char*>(values.data());
    return std::pair(first, first + sizeof(values[0]) * values.size());
  };
  machine::readable = {range(x), range(matrix.packed), adapters.readable()};
  const LinearLora lora = adapters.params();
  if (!W4LoraPlan<kEpilogue, Tile>(p, lora, num_sms).fits()) return -1;
  launch_w4a16_lora_tiled<T, kEpilogue, Tile>(p, lora, num_sms, nullptr);

  const double factor = has_norm ? 1 / std::sqrt(7.0 * k_squares / k + 1e-5) : 1.0;
  const double half = std::is_same_v<T, __nv_bfloat16> ? 1.0 / 256 : 1.0 / 2048;
  int num_wrong = 0;
  for (int t = 0; t < m; ++t) {
    auto sum_of = [&](int row) {
      double sum = adapters.added(t, row);
      for (int i = 0; i < k; ++i) {
        sum += double{to_float(x[t * k + i])} * matrix.numbers[row * k + i];
      }
      return sum * factor + to_float(bias[row]);
    };
    for (int j = 0; j < n; ++j) {
      const int at = t * n + j;
      double wanted = sum_of(j), size = 1 + std::abs(wanted);
      if (kEpilogue == Epilogue::kAdd) wanted += to_float(residual[at]);
      if (kEpilogue == Epilogue::kSiluMul) {
        const double up = sum_of(n + j);
        size *= 1 + std::abs(up);
        wanted *= up / (1 + std::exp(-wanted));
      }
      const double result = to_float(out[at]);
      num_wrong += !(std::abs(result - wanted) <= half * std::abs(wanted) + 8e-3 * half * size);
    }
  }
  return num_wrong;
}

// Some numbers of rows by every epilogue. num_run: how many had room.
template <class T, int kGroupSize>
int check_group(const W4Format& format, int& num_run) {
  using Tile = W4DeepSm90a<kGroupSize>;
  int num_bad = 0;
  for (int m : {1, 2, 5, 8}) {
    machine::lands_late = machine::random() % 2 == 0;
    int k = std::max(any_of({64, 320, 704, 1088, 2304}) / kGroupSize * kGroupSize, kGroupSize);
    int n = any_of({16, 32, 80}), num_sms = any_of({1, 2, 3, 4});
    // Many strips, so that the buffers of B are used again, ahead of slower warps.
    if (machine::random() % 3 == 0) {
      n = 304, k = any_of({128, 1088}) / kGroupSize * kGroupSize, num_sms = 1;
    }
    const int ragged = n - any_of({0, 8});
    for (const int wrong : {check<T, Epilogue::kStore, Tile>(format, m, ragged, k, num_sms),
                            check<T, Epilogue::kAdd, Tile>(format, m, ragged, k, num_sms),
                            check<T, Epilogue::kSiluMul, Tile>(format, m, n, k, num_sms)}) {
      num_run += wrong >= 0;
      if (wrong <= 0) continue;
      ++num_bad;
      std::printf("groups of %d, %s, m %d, n %d, k %d, %d SMs: %d wrong\n", kGroupSize,
                  std::is_same_v<T, __half> ? "float16" : "bfloat16", m, n, k, num_sms, wrong);
      machine::end_if_expected();
    }
  }
  return num_bad;
}

template <class T>
int check_all(int num_rounds) {
  int num_bad = 0, num_run = 0;
  for (int round = 0; round < num_rounds; ++round) {
    num_bad += check_group<T, 32>(kW4Formats[0], num_run);
    num_bad += check_group<T, 64>(kW4Formats[1], num_run);
    num_bad += check_group<T, 128>(kW4Formats[2], num_run);
  }
  if (num_run == 0) std::printf("no adapters have room\n");
  return num_bad + (num_run == 0);
}

}  // namespace

int main(int, char** argv) {
  const int n = std::atoi(argv[1]);
  machine::num_too_early = std::atoi(argv[2]);
  return check_all<__nv_bfloat16>(n) + check_all<__half>(n) == 0 ? 0 : 1;
}
