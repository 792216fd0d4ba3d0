// The activation of gated MLPs over rows: one pass over memory, with the rows split over threads.
#pragma once

#include "../common/args/activation.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

template <class T, class Fn>
void activate_row(const T* gate, const T* up, T* out, int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, fn(load(gate + i), load(up + i)));
  if (i < n) {
    store_first(out + i, fn(load_first(gate + i, n - i), load_first(up + i, n - i)), n - i);
  }
}

// Writes fn(gate, up) for each element.
template <class Fn>
void activate(const ActivationArgs& args, const Fn& fn) {
  const View &gate_up = args.gate_up, &out = args.out;
  const int64_t num_tokens = out.size(0), n = out.size(1);
  dispatch_float<float, Bf16>(gate_up, [&]<class T>(T) {
    parallel_for(num_tokens, static_cast<double>(n) * 0.5, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = gate_up.ptr<T>() + row * gate_up.stride(0);
        activate_row<T>(gate, gate + n, out.ptr<T>() + row * out.stride(0), n, fn);
      }
    });
  });
}

}  // namespace
}  // namespace pyserve
