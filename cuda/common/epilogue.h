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

}  // namespace pyserve
