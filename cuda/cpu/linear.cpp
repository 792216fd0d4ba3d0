// linear on a CPU for few rows of x: out[t, j] = sum over i of x[t, i] * weight[j, i], plus
// bias[j]; and the epilogues of linear_add and linear_silu_mul (common/epilogue.h).
//   x [m, k], weight [n, k] as in the checkpoint, bias [n], out [m, n]; float32 or bfloat16
//
// With few rows the work is to stream the weight once, as fast as memory delivers it. Threads split
// n, and linear_rows.h multiplies. On a CPU without instructions for bfloat16 products torch has
// nothing fast for bfloat16, so more rows are served here too, by linear_many.h.
// Numerics: float32 sums, then the bias, then the epilogue, then one rounding. The order of a sum
// depends neither on the block or thread, nor on m while m is small. So a row's result never
// depends on what else is in such a batch. Where the CPU's bfloat16 products are used, bfloat16
// denormals count as 0.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "../common/args/linear.h"
#include "linear_many.h"
#include "linear_norm.h"
#include "linear_rows.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

#ifdef __AMX_BF16__
template <Epilogue kEpilogue>
void linear_tiles(const Shape& shape, const Bf16* x, const Matrix<Bf16>& matrix, Bf16* out) {
  constexpr int64_t kColumns = kTileColumns<kEpilogue>;  // columns that a thread takes at once
  thread_local std::vector<float> packed_x;
  packed_x.resize(packed_floats(shape));
  float* packed = packed_x.data();
  pack_x(shape, x, packed);
  const double cost = kColumns * column_cost<kEpilogue, Bf16>(shape, true);
  parallel_for_tiles((shape.n + kColumns - 1) / kColumns, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      tile_columns<kEpilogue>(shape, packed, matrix, i * kColumns, out);
    }
  });
}
#endif

template <Epilogue kEpilogue, class T>
void linear_any(const Shape& shape, const T* x, const Matrix<T>& matrix, T* out) {
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<T, Bf16>) {
    if (fits_tiles(shape)) return linear_tiles<kEpilogue>(shape, x, matrix, out);
  }
#endif
  if constexpr (std::is_same_v<T, Bf16> && !kHasProducts) {
    if (shape.m > kFewBf16Rows && matrix.factors == nullptr) {
      return linear_many<kEpilogue>(shape, x, matrix, out);
    }
  }
  const double cost = kLanes * column_cost<kEpilogue, T>(shape, false);
  parallel_for((shape.n + kLanes - 1) / kLanes, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      block_columns<kEpilogue, T>(shape, x, matrix, i * kLanes, out);
    }
  });
}

template <Epilogue kEpilogue>
void run(const LinearArgs& args, double eps) {
  const Shape shape{.m = args.m(),
                    .n = args.n(),
                    .k = args.k(),
                    .x_stride = args.x.stride(0),
                    .weight_stride = args.weight.stride(0),
                    .out_stride = args.out.stride(0)};
  if (shape.m == 0 || shape.n == 0) return;
  const std::vector<float> factors = norm_factors(args.x_squares, args.m(), args.k(), eps);
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) {
    const Matrix<T> matrix{args.weight.ptr<T>(), static_cast<const T*>(args.bias),
                           factors.empty() ? nullptr : factors.data()};
    linear_any<kEpilogue, T>(shape, args.x.ptr<T>(), matrix, args.out.ptr<T>());
    if (args.norm_weight != nullptr) scale_for_norm<T>(args);
  });
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& out, const std::optional<Tensor>& x_squares, double eps) {
  const ViewReader read{"linear", Place::kCpu};
  LinearArgs args = linear_args(read, Epilogue::kStore, x, weight, bias, out);
  read_x_squares(read, x_squares, args);
  run<Epilogue::kStore>(args, eps);
}

void linear_add(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const Tensor& residual, const std::optional<Tensor>& norm_weight,
                const std::optional<Tensor>& scaled, const std::optional<Tensor>& squares) {
  const ViewReader read{"linear_add", Place::kCpu};
  LinearArgs args = linear_args(read, Epilogue::kAdd, x, weight, bias, residual);
  read_norm(read, norm_weight, scaled, squares, args);
  run<Epilogue::kAdd>(args, 0.0);
}

void linear_silu_mul(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& out, const std::optional<Tensor>& x_squares, double eps) {
  const ViewReader read{"linear_silu_mul", Place::kCpu};
  LinearArgs args = linear_args(read, Epilogue::kSiluMul, x, weight, bias, out);
  read_x_squares(read, x_squares, args);
  run<Epilogue::kSiluMul>(args, eps);
}

// Whether this linear is at least as fast as torch for m rows and `weight`. Measured over the 33
// matrices of the demo model in bfloat16, one thread with AMX, in us, own / torch: 610 / 1400 at 1
// row, 660 / 1490 at 16, 1240 / 1940 at 64; equal at 128. In float32 they are equal up to 16 rows;
// at 32 torch takes 3/4 of the time. With only AVX2, 1024 rows by [1152, 256] in bfloat16 take 5.2
// / 34 ms, and 5.6 if torch first widens them to float32; with AVX-512 but without bfloat16
// products 3.1 / 7.2.
bool serves_linear(const Tensor& weight, int64_t m, int64_t /*epilogue*/) {
  const bool is_float = weight.scalar_type() == ScalarType::Float;
  return m <= (is_float ? kFewFloatRows : kFewBf16Rows) || !(is_float || kHasProducts);
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("linear", TORCH_BOX(&pyserve::linear));
  m.impl("linear_add", TORCH_BOX(&pyserve::linear_add));
  m.impl("linear_silu_mul", TORCH_BOX(&pyserve::linear_silu_mul));
  m.impl("serves_linear", TORCH_BOX(&pyserve::serves_linear));
}
