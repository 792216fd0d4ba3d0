// What linears with adapters (few_rows_lora.cuh) have beside emulated_sm90a.h, and adapters for them.
// All blocks of a grid run together, as they wait for each other.
#pragma once

#include "emulated_sm90a.h"

#define __host__

struct uint2 {
  uint32_t x, y;
};

[[noreturn]] void __trap() { machine::fail("a kernel trapped"); }

namespace pyserve::gpu {

bool waits = true;  // for what other blocks write
uint64_t counter = 0;  // of all launches
uint32_t number_of_launch() { return static_cast<uint32_t>(counter - 1 >> 16) + 1; }

template <class T>
T __ldcg(const T* from) {
  return *from;
}
int __popc(uint32_t word) { return __builtin_popcount(word); }
int __ffs(int word) { return __builtin_ffs(word); }
uint64_t fetch_add(uint64_t* word, uint64_t added) {
  const uint64_t before = *word;
  *word += added;
  return before;
}
void store_numbered(uint64_t* to, float value, uint32_t number) {
  std::memcpy(to, &value, 4);
  std::memcpy(reinterpret_cast<char*>(to) + 4, &number, 4);
}
uint2 load_numbered(const uint64_t* from) {
  machine::yield();
  const auto number = waits ? static_cast<uint32_t>(*from >> 32) : number_of_launch();
  return {static_cast<uint32_t>(*from), number};
}
uint4 load_line(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) machine::fail("a load that is not aligned");
  uint4 value;
  std::memcpy(&value, from, 16);
  return value;
}

#include "lora.h.inc"
#include "linear_lora.h.inc"

}  // namespace pyserve::gpu

namespace {

using namespace pyserve::gpu;

int any_of(std::initializer_list<int> choices) {
  return choices.begin()[machine::random() % choices.size()];
}

// Adapters of the rows of x, of which some use none.
template <class T>
struct Adapters {
  int m, num_rows, k, num_parts, max_rank, num_splits;
  std::vector<int32_t> starts, ranks, bounds;
  std::vector<T> a, b;
  std::vector<float> scales;
  std::vector<uint64_t> sums;  // of this and of what there was before

  Adapters(int m, int num_rows, int k, int num_parts)
      : m(m), num_rows(num_rows), k(k), num_parts(num_parts), max_rank(any_of({8, 16, 24, 64})),
        num_splits(any_of({1, 3, 8})) {
    const int num_slots = any_of({1, 2, 9});
    starts = {static_cast<int>(machine::random() % 2)};
    for (int s = 0; s < num_slots; ++s) {
      const int most = m - starts.back(), some = any_of({0, 1, 1, 2, 40});
      starts.push_back(starts.back() + std::min(most, num_slots == 1 ? most : some));
    }
    for (int part = 0; part <= num_parts; ++part) bounds.push_back(num_rows * part / num_parts);
    if (num_parts == 3) bounds[1] += num_rows / 7;  // of different sizes
    for (int i = 0; i < num_slots * num_parts; ++i) {
      ranks.push_back(any_of({0, 1, max_rank / 2, max_rank, max_rank - 3}));
      scales.push_back(0.5f + machine::random() % 100 / 100.0f);
    }
    a = numbers(size_t(num_slots) * num_parts * max_rank * k, 1 / std::sqrt(float(k)));
    b = numbers(size_t(num_slots) * num_rows * max_rank, 1.0f);
    for (int i = 0; i < num_slots * num_parts; ++i) {  // what nobody may look at
      for (int r = ranks[i]; r < max_rank; ++r) {
        std::fill_n(&a[(size_t(i) * max_rank + r) * k], k, from_float<T>(NAN));
        for (int row = bounds[i % num_parts]; row < bounds[i % num_parts + 1]; ++row) {
          b[(size_t(i / num_parts) * num_rows + row) * max_rank + r] = from_float<T>(NAN);
        }
      }
    }
  }

  // With sums as of an earlier launch.
  LinearLora params() {
    const int64_t token = int64_t{num_parts} * max_rank;
    sums.resize(num_splits * m * token, counter >> 16 << 32);
    for (uint64_t& sum : sums) sum = sum >> 32 << 32 | 0x7fc00000;  // NaN, and the number stays
    return {.rows = {starts.data(), ranks.data(), num_parts, static_cast<int>(starts.size()) - 1,
                     num_parts, max_rank, m},
            .a = a.data(),
            .a_slot_stride = token * k,
            .a_part_stride = int64_t{max_rank} * k,
            .a_stride = k,
            .scales = scales.data(),
            .scales_stride = num_parts,
            .sums = {sums.data(), m * token, token, max_rank, num_splits},
            .b = b.data(),
            .b_slot_stride = int64_t{num_rows} * max_rank,
            .b_stride = max_rank,
            .num_rows = num_rows,
            .columns = bounds.data(),
            .counter = &counter};
  }

  // What is added to the sums of a token, whose x this is, by row of weight.
  std::vector<double> added(int token, const T* x) const {
    std::vector<double> sums(num_rows);
    for (int slot = 0; slot + 1 < static_cast<int>(starts.size()); ++slot) {
      if (token < starts[slot] || token >= starts[slot + 1]) continue;
      for (int part = 0; part < num_parts; ++part) {
        const int own = slot * num_parts + part;
        for (int r = 0; r < ranks[own]; ++r) {
          double sum = 0;
          for (int i = 0; i < k; ++i) {
            sum += double{to_float(x[i])} * to_float(a[(size_t(own) * max_rank + r) * k + i]);
          }
          for (int row = bounds[part]; row < bounds[part + 1]; ++row) {
            sums[row] += sum * scales[own] *
                         to_float(b[(size_t(slot) * num_rows + row) * max_rank + r]);
          }
        }
      }
    }
    return sums;
  }

 private:
  static std::vector<T> numbers(size_t count, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<T> values(count);
    for (T& value : values) value = from_float<T>(normal(machine::random));
    return values;
  }
};

}  // namespace
