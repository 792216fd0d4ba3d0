// What a linear does with its float32 sums s, bias included. The result is rounded once.
//   kStore    out[t, j] = s[t, j]
//   kAdd      out[t, j] = out[t, j] + s[t, j], in place
//   kSiluMul  out[t, j] = silu(s[t, j]) * s[t, n + j]: n rows of gate, then n rows of up
#pragma once

#include <cstdint>

namespace pyserve {

enum class Epilogue : int32_t { kStore, kAdd, kSiluMul };

// How many rows of the weight, and elements of the bias, belong to one column of out.
constexpr int64_t rows_per_column(Epilogue epilogue) {
  return epilogue == Epilogue::kSiluMul ? 2 : 1;
}

// An RMSNorm between two linears can be folded into them, because its factor rsqrt(mean(r^2) + eps)
// is one number per row. The linear that adds to the residual r also writes scaled = r * the norm's
// weight, and the sums of r^2 over each kSquaresColumns columns. The next linear multiplies its
// matrix by `scaled`, and then its sums by the factor, before it adds the bias.
constexpr int64_t kSquaresColumns = 16;

constexpr int64_t num_squares(int64_t columns) {
  return (columns + kSquaresColumns - 1) / kSquaresColumns;
}

}  // namespace pyserve
