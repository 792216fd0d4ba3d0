// Runs work on torch's own threads, but only where it pays. With OMP_WAIT_POLICY=passive a parallel
// region costs 5 to 7 us while the threads are warm, and up to 80 us once they sleep (on 2 cores).
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace pyserve {

inline int64_t num_threads() {
  uint32_t count = 1;
  return torch_get_num_threads(&count) == 0 ? count : 1;
}

// Calls fn(begin, end) for parts of [0, count), on several threads if the whole is worth at least
// kParallelCost nanoseconds; `cost` is that of one element. A step of the demo model at batch 16 on
// 2 cores took 1.85 ms with this limit, 2.0 ms with 50 us and 4.1 ms with 10 us, whether threads
// spin or not.
constexpr double kParallelCost = 250000;

template <class Fn>
void parallel_for(int64_t count, double cost, const Fn& fn) {
  if (count <= 0) return;
  if (count == 1 || static_cast<double>(count) * cost < kParallelCost) {
    fn(int64_t{0}, count);
    return;
  }
  const auto grain =
      std::max<int64_t>(1, static_cast<int64_t>(kParallelCost / 2 / std::max(cost, 1e-3)));
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Fn*>(context))(begin, end);
  };
  // Some parts may have run already and changed their arguments in place, so trying again would be
  // wrong.
  if (torch_parallel_for(0, count, grain, call, const_cast<Fn*>(&fn)) != 0) {
    throw std::runtime_error("a parallel region failed");
  }
}

}  // namespace pyserve
