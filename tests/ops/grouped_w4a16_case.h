// Rows of x, those of an expert by its matrix of 4-bit integers, and what is to come out of them:
// shared by the programs of the kernels that do it.
#pragma once

#include "emulated_w4a16.h"

namespace {

using namespace pyserve::gpu;

struct GroupedShape {
  int n, k;  // n: columns of out
  int top_k, num_sms, format;
  std::vector<int> counts;  // rows of each expert
};

// With an order, rows of x are found by it; else they stand in order.
template <class T>
struct GroupedCase {
  static constexpr uint16_t kPoison = 0x7fc1;

  GroupedShape shape;
  Epilogue epilogue;
  bool has_order;
  int num_experts, num_rows, num_tokens;
  std::vector<int32_t> offsets, order;
  std::vector<Matrix> matrices;
  std::vector<uint32_t> packed;
  std::vector<T> x, out;

  int top_k() const { return has_order ? shape.top_k : 1; }
  int x_stride() const { return shape.k + 8; }
  int out_stride() const { return shape.n + 8; }
  int token_of(int row) const { return has_order ? order[row] / top_k() : row; }

  GroupedCase(const GroupedShape& shape, Epilogue epilogue, bool has_order)
      : shape(shape), epilogue(epilogue), has_order(has_order),
        num_experts(static_cast<int>(shape.counts.size())), offsets(num_experts + 1) {
    const int rows = static_cast<int>(rows_per_column(epilogue)) * shape.n;
    for (int e = 0; e < num_experts; ++e) {
      offsets[e + 1] = offsets[e] + shape.counts[e];
      matrices.emplace_back(rows, shape.k, kW4Formats[shape.format], machine::random() % 2 == 0);
      packed.insert(packed.end(), matrices[e].packed.begin(), matrices[e].packed.end());
    }
    num_rows = offsets.back();
    num_tokens = std::max(1, (num_rows + top_k() - 1) / top_k());
    order.assign(num_tokens * top_k(), -1);
    for (int row = 0; row < num_rows; ++row) order[row] = row;
    std::shuffle(order.begin(), order.begin() + num_rows, machine::random);
    x.resize(num_tokens * x_stride());
    std::normal_distribution<float> normal;
    for (T& value : x) value = from_float<T>(normal(machine::random));
    out.assign((num_rows + 1) * out_stride(), T{kPoison});
    const auto range = [](const auto& values, size_t count) {
      const auto* first = reinterpret_cast<const unsigned char*>(values.data());
      return std::pair(first, first + count * sizeof(values[0]));
    };
    machine::readable = {range(x, (num_tokens - 1) * x_stride() + shape.k),
                         range(packed, packed.size())};
  }

  GroupedParams params() {
    const int64_t strip_words = matrices[0].strip_words();
    const auto expert_words = static_cast<int64_t>(matrices[0].packed.size());
    return {.x = x.data(),
            .x_stride = x_stride(),
            .order = has_order ? order.data() : nullptr,
            .top_k = top_k(),
            .weight = packed.data(),
            .expert_stride = expert_words,
            .weight_stride = strip_words,
            .offsets = offsets.data(),
            .sorted_x = nullptr,
            .sorted_x_stride = 0,
            .out = out.data(),
            .out_stride = out_stride(),
            .max_rows = num_rows,
            .num_experts = num_experts,
            .n = shape.n,
            .k = shape.k,
            .dtype = std::is_same_v<T, __half> ? Dtype::kFloat16 : Dtype::kBfloat16,
            .epilogue = epilogue};
  }

  // Of all results, and of what may not be written. weight_of(number, scale) is what the kernel
  // multiplies by.
  template <class Fn>
  int num_wrong(Fn weight_of, double absolute) const {
    const double rounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    int count = 0, expert = 0;
    for (int row = 0; row <= num_rows; ++row) {
      while (expert < num_experts && row >= offsets[expert + 1]) ++expert;
      const auto sum_of = [&](int weight_row) {
        const Matrix& matrix = matrices[expert];
        double sum = 0;
        for (int i = 0; i < shape.k; ++i) {
          const int at = weight_row * shape.k + i;
          sum += to_float(x[token_of(row) * x_stride() + i]) *
                 weight_of(matrix.numbers[at], matrix.scales[at]);
        }
        return sum;
      };
      for (int j = 0; j < out_stride(); ++j) {
        const T result = out[row * out_stride() + j];
        if (row == num_rows || j >= shape.n) {
          count += result.bits != kPoison;
          continue;
        }
        double wanted = sum_of(j);
        if (epilogue == Epilogue::kSiluMul) {
          wanted = wanted / (1 + std::exp(-wanted)) * sum_of(shape.n + j);
        }
        count += !(std::abs(to_float(result) - wanted) <= rounding * std::abs(wanted) + absolute);
      }
    }
    return count;
  }
};

}  // namespace
