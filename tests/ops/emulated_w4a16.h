// A matrix of 4-bit integers for emulated.h's programs, packed as pyserve/ops/w4a16.py says.
#pragma once

#include "common/w4a16.h"
#include "emulated.h"

namespace {

using namespace pyserve;
using pyserve::gpu::__uint_as_float;

int pick(std::initializer_list<int> values) {
  return values.begin()[machine::random() % values.size()];
}

// Numbers, and what they are packed.
struct Matrix {
  int n, k;
  W4Format format;
  std::vector<double> numbers, scales;  // [n, k]
  std::vector<uint32_t> packed;

  int64_t num_units() const { return (k + format.unit_columns() - 1) / format.unit_columns(); }
  int64_t strip_words() const { return num_units() * format.unit_words(); }

  Matrix(int n, int k, const W4Format& format, bool has_zeros)
      : n(n), k(k), format(format), numbers(n * k), scales(n * k), packed((n + 15) / 16 * strip_words()) {
    std::uniform_real_distribution<float> some(0.004f, 0.02f);
    const int group_size = static_cast<int>(format.group_size);
    for (int r = 0; r < n; ++r) {
      for (int c = 0; c < k; c += group_size) {
        const float chosen = some(machine::random);
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
          scales[r * k + i] = __uint_as_float(scale);
          numbers[r * k + i] = (double(q) - zero) * scales[r * k + i];
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

}  // namespace
