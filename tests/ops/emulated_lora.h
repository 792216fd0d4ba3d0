// What linears with adapters (few_rows_lora.cuh) need beyond emulated.h, and adapters for them.
#pragma once

#include "emulated.h"
#include "emulated_vec.h"

[[noreturn]] void __trap() { machine::fail("a kernel trapped"); }

namespace pyserve::gpu {

struct Device;
int32_t load_word(const int32_t* from) { return *from; }
// Now and then late, as a warp is that others run ahead of.
uint4 load_shared(uint32_t address) {
  const int turns = machine::random() % 8 == 0 ? static_cast<int>(machine::random() % 64) : 0;
  for (int i = 0; i < turns; ++i) machine::yield();
  uint4 value;
  std::memcpy(&value, machine::at(address), 16);
  return value;
}

#include "lora.h.inc"
#include "linear_lora.h.inc"
#include "segments.cuh.inc"

}  // namespace pyserve::gpu

namespace {

using namespace pyserve::gpu;

int any_of(std::initializer_list<int> choices) {
  return choices.begin()[machine::random() % choices.size()];
}

// Adapters of m rows of x, of which some may use none, and what was shrunk of these.
template <class T>
struct Adapters {
  int m, num_rows, num_parts, max_rank, num_splits;
  std::vector<int32_t> starts, ranks, bounds;
  std::vector<T> b;
  std::vector<float> shrunk;

  Adapters(int m, int num_rows, int num_parts)
      : m(m), num_rows(num_rows), num_parts(num_parts),
        max_rank(any_of({8, 16, 16, 24, 64, 104, 256})), num_splits(any_of({1, 3, 8})) {
    const int num_slots = any_of({1, 2, 9, 40});
    starts = {static_cast<int>(machine::random() % 2)};
    for (int s = 0; s < num_slots; ++s) {
      const int left = m - starts.back(), some = any_of({0, 1, 1, 2, 40});
      starts.push_back(starts.back() + std::min(left, num_slots == 1 ? left : some));
    }
    for (int part = 0; part <= num_parts; ++part) bounds.push_back(num_rows * part / num_parts);
    if (num_parts >= 3) bounds[1] += num_rows / 7;  // of different sizes
    for (int i = 0; i < num_slots * num_parts; ++i) {
      ranks.push_back(any_of({0, 1, max_rank / 2, max_rank, max_rank - 3}));
    }
    std::normal_distribution<float> normal(0.0f, 1 / std::sqrt(max_rank / 4.0f));
    b.resize(size_t(num_slots) * num_rows * max_rank);
    for (T& value : b) value = from_float<T>(normal(machine::random));
    for (int i = 0; i < num_slots * num_parts; ++i) {  // what nobody may look at
      for (int row = bounds[i % num_parts]; row < bounds[i % num_parts + 1]; ++row) {
        T* own = &b[(size_t(i / num_parts) * num_rows + row) * max_rank];
        std::fill(own + ranks[i], own + max_rank, from_float<T>(NAN));
      }
    }
    shrunk.assign(size_t(num_splits) * m * num_parts * max_rank, NAN);
    for (size_t i = 0; i < shrunk.size(); ++i) {
      const int r = i % max_rank, part = i / max_rank % num_parts;
      const int token = i / max_rank / num_parts % m;
      if (r < rank(token, part)) shrunk[i] = normal(machine::random);
    }
  }

  int slot_of(int token) const {
    for (size_t s = 0; s + 1 < starts.size(); ++s) {
      if (token >= starts[s] && token < starts[s + 1]) return static_cast<int>(s);
    }
    return -1;
  }
  int rank(int token, int part) const {
    const int slot = slot_of(token);
    return slot < 0 ? 0 : ranks[slot * num_parts + part];
  }

  LinearLora params() {
    const int64_t token = int64_t{num_parts} * max_rank;
    return {.rows = {starts.data(), ranks.data(), num_parts, static_cast<int>(starts.size()) - 1,
                     num_parts, max_rank, m},
            .shrunk = {shrunk.data(), m * token, token, max_rank, num_splits},
            .b = b.data(),
            .b_slot_stride = int64_t{num_rows} * max_rank,
            .b_stride = max_rank,
            .columns = bounds.data(),
            .num_rows = num_rows};
  }

  // What is added to the sum of a token and a row of weight.
  double added(int token, int row) const {
    const int slot = slot_of(token);
    if (slot < 0) return 0;
    int part = 0;
    while (row >= bounds[part + 1]) ++part;
    double sum = 0;
    for (int r = 0; r < rank(token, part); ++r) {
      double x = 0;
      for (int split = 0; split < num_splits; ++split) {
        x += shrunk[((size_t(split) * m + token) * num_parts + part) * max_rank + r];
      }
      sum += x * to_float(b[(size_t(slot) * num_rows + row) * max_rank + r]);
    }
    return sum;
  }

  std::pair<const unsigned char*, const unsigned char*> readable() const {
    const auto* begin = reinterpret_cast<const unsigned char*>(b.data());
    return {begin, begin + b.size() * sizeof(T)};
  }
};

}  // namespace
