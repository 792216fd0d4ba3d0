// rms_norm and add_rms_norm on a CPU (Zhang and Sennrich 2019), float32 or bfloat16: out = x /
// sqrt(mean(x^2) + eps) * (weight + offset). add_rms_norm first adds x to the residual and norms
// the sum; with x_weight it adds the norm of x by x_weight, rounded, in place of x. Rows are split
// over threads. A row is read from memory once, and again from the L1 cache to be scaled. Sums are
// float32 in kLanes * 2 partial sums; results are rounded once, at the store.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "../common/args/norm.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

// With kAdd, residual[i] += x[i], rounded to T. Returns the sum of squares of what is normed.
template <class T, bool kAdd>
float squares(const T* x, T* residual, int64_t n) {
  Vec partial[2] = {};
  auto take = [&](Vec value, Vec& sums) { sums = fma(value, value, sums); };
  auto at = [&](int64_t i) {
    if constexpr (!kAdd) return load(x + i);
    store(residual + i, load(x + i) + load(residual + i));
    return load(residual + i);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    take(at(i), partial[0]);
    take(at(i + kLanes), partial[1]);
  }
  for (; i + kLanes <= n; i += kLanes) take(at(i), partial[0]);
  if (i < n) {
    if constexpr (kAdd) {
      store_first(residual + i, load_first(x + i, n - i) + load_first(residual + i, n - i), n - i);
    }
    take(load_first((kAdd ? residual : x) + i, n - i), partial[1]);
  }
  return sum(partial[0] + partial[1]);
}

template <class T>
void scale_row(const T* x, const T* weight, float offset, float factor, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(out + i, load(x + i) * factor * (load(weight + i) + offset));
  }
  if (i < n) {
    const Vec scale = load_first(weight + i, n - i) + offset;
    store_first(out + i, load_first(x + i, n - i) * factor * scale, n - i);
  }
}

// The factor of the norm for a row whose squares add up to `squares`.
inline float norm_factor(float squares, int64_t n, double eps) {
  return 1.0f / std::sqrt(squares / static_cast<float>(n) + static_cast<float>(eps));
}

// With kAdd, x is added to `residual`, which is then normed; otherwise x is normed. If x_weight is
// not null, x is first normed by it.
template <class T, bool kAdd>
void norm_rows(const NormArgs& args, const T* x_weight, double eps, double offset) {
  const View &x = args.x, &weight = args.weight, &out = args.out, &residual = args.residual;
  const int64_t n = x.size(x.dim - 1);
  const Rows x_rows = rows_of(x), out_rows = rows_of(out), residual_rows = rows_of(residual);
  const double cost = static_cast<double>(n) * (x_weight != nullptr ? 0.6 : kAdd ? 0.4 : 0.2);
  parallel_for(x_rows.count, cost, [&](int64_t begin, int64_t end) {
    std::vector<T> normed(x_weight != nullptr ? static_cast<size_t>(n) : 0);
    for (int64_t row = begin; row < end; ++row) {
      const T* x_row = x.ptr<T>() + row * x_rows.stride;
      if (x_weight != nullptr) {
        const float factor = norm_factor(squares<T, false>(x_row, nullptr, n), n, eps);
        scale_row<T>(x_row, x_weight, static_cast<float>(offset), factor, normed.data(), n);
        x_row = normed.data();
      }
      T* residual_row = kAdd ? residual.ptr<T>() + row * residual_rows.stride : nullptr;
      const float factor = norm_factor(squares<T, kAdd>(x_row, residual_row, n), n, eps);
      scale_row<T>(kAdd ? residual_row : x_row, weight.ptr<T>(), static_cast<float>(offset), factor,
                   out.ptr<T>() + row * out_rows.stride, n);
    }
  });
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out, double offset) {
  const NormArgs args = norm_args({"rms_norm", Place::kCpu}, x, nullptr, weight, out);
  if (num_elements(args.x) == 0) return;
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) {
    norm_rows<T, false>(args, nullptr, eps, offset);
  });
}

void add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                  const Tensor& out, double offset, const std::optional<Tensor>& x_weight) {
  const NormArgs args =
      norm_args({"add_rms_norm", Place::kCpu}, x, &residual, weight, out, x_weight);
  if (num_elements(args.x) == 0) return;
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) {
    norm_rows<T, true>(args, x_weight.has_value() ? args.x_weight.ptr<T>() : nullptr, eps, offset);
  });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&pyserve::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&pyserve::add_rms_norm));
}
