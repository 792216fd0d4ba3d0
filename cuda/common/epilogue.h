// What becomes of the float32 sums s of a linear, bias included, before they are rounded, once:
//   kStore    out[t, j] = s[t, j]
//   kAdd      out[t, j] = out[t, j] + s[t, j], in place
//   kSiluMul  out[t, j] = silu(s[t, j]) * s[t, n + j]: n rows of gate, then n rows of up
#pragma once

#include <cstdint>

namespace pyserve {

enum class Epilogue : int32_t { kStore, kAdd, kSiluMul };

// Rows of weight, and elements of bias, for each column of out.
constexpr int64_t rows_per_column(Epilogue epilogue) {
  return epilogue == Epilogue::kSiluMul ? 2 : 1;
}

// An RMSNorm between two linears may be a factor: whoever adds to the residual r also writes
// scaled = r * the norm's weight, and the sums of r^2 over each kSquaresColumns columns; the next
// linear multiplies by `scaled`, and its sums by rsqrt(mean(r^2) + eps), before the bias.
constexpr int64_t kSquaresColumns = 16;

constexpr int64_t num_squares(int64_t columns) {
  return (columns + kSquaresColumns - 1) / kSquaresColumns;
}

}  // namespace pyserve
