// linear_fp8, grouped_linear_fp8 and dequantise_fp8 on a CPU: a linear with e4m3 weights for few
// rows of x, the same for experts, and the dequantised matrix.
//   out[t, j] = sum over i of x[t, i] * W[j, i], plus bias[j];  W = e4m3 * s
//   x [m, k], weight [n, k] as in the checkpoint, scales (pyserve/ops/fp8.py), bias [n], out [m, n]
// or an epilogue of these sums (common/epilogue.h). x and out are float32 or bfloat16.
//
// Work: 4 rows of the matrix are taken at a time, 64 columns (a block) of each, for 4 (then 2, then
// 1) rows of x. Where the CPU has bfloat16 products and byte lookups (AVX512-BF16 and VBMI), the 64
// weights become bfloat16, which holds every e4m3 exactly, by two lookup tables, one for the upper
// and one for the lower byte. Otherwise they become float32 by way of float16. Its exponent has one
// more bit and the bias 15 instead of 7, so the moved bits stand for exactly 2^-8 of the number.
// Rows of x are copied into the order in which the columns of a block are decoded.
// Numerics: float32 sums over a group of columns, times the scale, summed over the groups; the rest
// is as in strips.h. Where the CPU's bfloat16 products are used, bfloat16 denormals of x count as
// 0.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common/args/linear_fp8.h"
#include "parallel.h"
#include "strips.h"
#include "vec.h"

namespace pyserve {
namespace {

constexpr int64_t kBlock = 64;  // columns of a block
constexpr int kRows = 4;        // rows of the matrix taken at once
// How many columns ahead are prefetched, because the CPU's own prefetcher stops at the end of a
// page.
constexpr int64_t kAhead = 1024;

// ---- decoding -----------------------------------------------------------------------------------

// The factor from a decoded number to the e4m3 that it stands for: 2^8 where it came by way of
// float16.
#if defined(__AVX512BW__)
constexpr float kUnit = 256.0f;

// Decodes two vectors of neighbouring columns.
inline void decode_pair(const uint8_t* p, Vec& first, Vec& second) {
  __m256i bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const __m512i shifted = _mm512_slli_epi16(_mm512_maskz_cvtepu8_epi16(~__mmask32{0}, bytes), 8);
  // The sign stays in place; the shift gives the exponent a new bit, which is set to 0.
  const __m512i half =
      _mm512_and_si512(_mm512_srai_epi16(shifted, 1), _mm512_set1_epi16(int16_t(0xbfff)));
  const __m512i nan = _mm512_set1_epi16(0x3f80);
  const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(half, nan), nan);
  const __m512i whole = _mm512_mask_blend_epi16(is_nan, half, _mm512_set1_epi16(0x7e00));
  // The masked forms are used because gcc 12 gives a warning inside the plain ones.
  const __m256i lower = _mm512_maskz_extracti64x4_epi64(0xf, whole, 0);
  const __m256i upper = _mm512_maskz_extracti64x4_epi64(0xf, whole, 1);
  first = std::bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, lower));
  second = std::bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, upper));
}
#elif defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__)
constexpr float kUnit = 256.0f;

inline void decode_pair(const uint8_t* p, Vec& first, Vec& second) {
  __m128i bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8);
  const __m256i half =
      _mm256_and_si256(_mm256_srai_epi16(shifted, 1), _mm256_set1_epi16(int16_t(0xbfff)));
  const __m256i nan = _mm256_set1_epi16(0x3f80);
  const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, nan), nan);
  const __m256i whole =
      _mm256_or_si256(half, _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
  first = std::bit_cast<Vec>(_mm256_cvtph_ps(_mm256_castsi256_si128(whole)));
  second = std::bit_cast<Vec>(_mm256_cvtph_ps(_mm256_extracti128_si256(whole, 1)));
}
#else
constexpr float kUnit = 1.0f;

inline Vec decode(const uint8_t* p) {
  uint8_t __attribute__((vector_size(kLanes))) bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const UintVec byte = __builtin_convertvector(bytes, UintVec);
  const Vec normal = std::bit_cast<Vec>(((byte & 0x7fu) << 20) + (120u << 23));
  const Vec small = __builtin_convertvector(std::bit_cast<IntVec>(byte & 7u), Vec) * 0x1p-9f;
  UintVec bits = std::bit_cast<UintVec>((byte & 0x78u) != 0u ? normal : small);
  bits = (byte & 0x7fu) == 0x7fu ? UintVec{} + 0x7fc00000u : bits;
  return std::bit_cast<Vec>(bits | (byte & 0x80u) << 24);
}

inline void decode_pair(const uint8_t* p, Vec& first, Vec& second) {
  first = decode(p);
  second = decode(p + kLanes);
}
#endif

// ---- products -----------------------------------------------------------------------------------

// Products of float32: a block is kParts vectors, in order.
template <class T>
struct Product {
  static constexpr int kParts = kBlock / kLanes;
  static constexpr float kFactor = kUnit;
  using X = float;
  using Part = Vec;

  static void decode(const uint8_t* p, Part (&parts)[kParts]) {
    for (int i = 0; i < kParts; i += 2) decode_pair(p + i * kLanes, parts[i], parts[i + 1]);
  }
  static Part read(const X* p, int part) { return load(p + part * kLanes); }
  static Vec add(Vec sums, Part a, Part b) { return fma(a, b, sums); }
  static X arrange(const T* x, int i) { return to_float(x[i]); }
  static int column(int i) { return i; }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// The two bytes of the bfloat16 for each non-negative e4m3.
struct BytesOfBf16 {
  alignas(64) uint8_t upper[128];
  alignas(64) uint8_t lower[128];

  constexpr BytesOfBf16() : upper(), lower() {
    for (int i = 0; i < 128; ++i) {
      const int exponent = i >> 3, mantissa = i & 7;
      float value = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa) / 512.0f;
      for (int e = 1; e < exponent; ++e) value *= 2.0f;
      const uint32_t bits = i == 127 ? 0x7fc00000u : std::bit_cast<uint32_t>(value);
      upper[i] = bits >> 24;
      lower[i] = bits >> 16 & 0xff;
    }
  }
};
constexpr BytesOfBf16 kBytesOfBf16;

// Products of bfloat16. Of each 16 columns, the first 8 are in one part and the others in the
// second.
template <>
struct Product<Bf16> {
  static constexpr int kParts = 2;
  static constexpr float kFactor = 1.0f;
  using X = Bf16;
  using Part = __m512bh;

  static void decode(const uint8_t* p, Part (&parts)[kParts]) {
    const auto table = [](const uint8_t* bytes) { return _mm512_load_si512(bytes); };
    const __m512i bytes = _mm512_loadu_si512(p);
    __m512i upper = _mm512_permutex2var_epi8(table(kBytesOfBf16.upper), bytes,
                                             table(kBytesOfBf16.upper + 64));
    const __m512i lower = _mm512_permutex2var_epi8(table(kBytesOfBf16.lower), bytes,
                                                   table(kBytesOfBf16.lower + 64));
    const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
    upper = _mm512_ternarylogic_epi64(upper, bytes, sign, 0xf8);  // upper | (bytes & sign)
    parts[0] = std::bit_cast<Part>(_mm512_unpacklo_epi8(lower, upper));
    parts[1] = std::bit_cast<Part>(_mm512_unpackhi_epi8(lower, upper));
  }
  static Part read(const X* p, int part) {
    Part x;
    std::memcpy(&x, p + part * 2 * kLanes, sizeof x);
    return x;
  }
  static Vec add(Vec sums, Part a, Part b) {
    return std::bit_cast<Vec>(_mm512_dpbf16_ps(std::bit_cast<__m512>(sums), a, b));
  }
  static X arrange(const Bf16* x, int i) { return x[i]; }
  static int column(int i) { return i % 32 / 8 * 16 + i / 32 * 8 + i % 8; }
};
#endif

// ---- strips -------------------------------------------------------------------------------------

template <class T>
struct Fp8Strips {
  using P = Product<T>;
  using X = typename P::X;

  Fp8Matrix matrix;

  int64_t num_strips() const { return (matrix.n + kStripRows - 1) / kStripRows; }
  int64_t row_size() const { return (matrix.k + kBlock - 1) / kBlock * kBlock; }

  void arrange(const T* x, X* to) const {
    for (int64_t first = 0; first < matrix.k; first += kBlock) {
      const int64_t count = matrix.k - first;
      for (int i = 0; i < kBlock; ++i) {
        const int column = P::column(i);
        to[first + i] = column < count ? P::arrange(x + first, column) : X{};
      }
    }
  }

  double cost(int64_t m) const {  // measured: ns per byte of the matrix, and per byte and row of x
    const auto bytes = static_cast<double>(kStripRows * matrix.k);
    return bytes * (0.05 + 0.015 * static_cast<double>(m));
  }

  template <int kTokens>
  void multiply(int64_t index, int64_t strip, const X* x, int64_t x_stride,
                Vec (&totals)[kTokens][kStripRows]) const {
    for (int r = 0; r < kStripRows; r += kRows) {
      rows<kTokens>(index, strip * kStripRows + r, x, x_stride, totals, r);
    }
  }

 private:
  // totals[t][r + i] for the kRows rows from `row` on. Rows behind the last one repeat it.
  template <int kTokens>
  void rows(int64_t index, int64_t row, const X* x, int64_t x_stride,
            Vec (&totals)[kTokens][kStripRows], int r) const {
    const uint8_t* bytes[kRows];
    const float* scales[kRows];
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = std::min(row + i, matrix.n - 1);
      bytes[i] = matrix.row(index, at);
      scales[i] = matrix.scales_of(index, at);
      for (int t = 0; t < kTokens; ++t) totals[t][r + i] = Vec{};
    }
    const int64_t num_whole = matrix.k / kBlock * kBlock;
    int64_t first = 0;
    for (int64_t group = 0; first < matrix.k; ++group) {
      const int64_t end = std::min(first + matrix.scale_columns, matrix.k);
      Vec sums[kTokens][kRows] = {};
      for (; first < std::min(end, num_whole); first += kBlock) {
        // Behind the end of a row, the next data to be read is that of the row kRows further.
        const int64_t ahead = first + kAhead + (first + kAhead < matrix.k ? 0 : 3 * matrix.k);
        for (int i = 0; i < kRows; ++i) __builtin_prefetch(bytes[i] + ahead);
        const uint8_t* const here[kRows] = {bytes[0] + first, bytes[1] + first, bytes[2] + first,
                                            bytes[3] + first};
        add_block<kTokens>(here, x + first, x_stride, sums);
      }
      if (first < end) {  // less than a block is left
        uint8_t last[kRows][kBlock] = {};
        for (int i = 0; i < kRows; ++i) std::memcpy(last[i], bytes[i] + first, end - first);
        add_block<kTokens>({last[0], last[1], last[2], last[3]}, x + first, x_stride, sums);
        first = end;
      }
      for (int i = 0; i < kRows; ++i) {
        const Vec scale = splat(scales[i][group] * P::kFactor);
        for (int t = 0; t < kTokens; ++t) {
          totals[t][r + i] = fma(scale, sums[t][i], totals[t][r + i]);
        }
      }
    }
  }

  template <int kTokens>
  [[gnu::always_inline]] static void add_block(const uint8_t* const (&bytes)[kRows], const X* x,
                                               int64_t x_stride, Vec (&sums)[kTokens][kRows]) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      typename P::Part parts[P::kParts];
      P::decode(bytes[i], parts);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
        for (int part = 0; part < P::kParts; ++part) {
          sums[t][i] = P::add(sums[t][i], parts[part], P::read(x + t * x_stride, part));
        }
      }
    }
  }
};

// ---- the matrix as plain numbers ----------------------------------------------------------------

template <class T>
void dequantise_row(const Fp8Matrix& matrix, int64_t row, T* out) {
  const uint8_t* bytes = matrix.row(0, row);
  const float* scales = matrix.scales_of(0, row);
  constexpr int64_t kStep = 2 * kLanes;
  static_assert(kBlock % kStep == 0);
  const auto pair = [&](const uint8_t* from, int64_t column, T* to) {
    const float scale = scales[column / matrix.scale_columns];
    Vec first, second;
    decode_pair(from, first, second);
    store(to, first * kUnit * scale);
    store(to + kLanes, second * kUnit * scale);
  };
  int64_t i = 0;
  for (; i + kStep <= matrix.k; i += kStep) {
    __builtin_prefetch(bytes + i + kAhead);
    pair(bytes + i, i, out + i);
  }
  if (i == matrix.k) return;
  uint8_t last[kStep] = {};
  T whole[kStep];
  std::memcpy(last, bytes + i, matrix.k - i);
  pair(last, i, whole);
  std::memcpy(out + i, whole, (matrix.k - i) * sizeof(T));
}

// ---- the ops ------------------------------------------------------------------------------------

void linear_fp8(const Tensor& x, const Tensor& weight, const Tensor& scales, int64_t scale_rows,
                int64_t scale_columns, const std::optional<Tensor>& bias, const Tensor& out,
                int64_t epilogue, const std::optional<Tensor>& x_squares, double eps,
                const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& scaled,
                const std::optional<Tensor>& squares) {
  const LinearFp8Args args = linear_fp8_args(
      ViewReader{"linear_fp8", Place::kCpu}, x, weight, scales, scale_rows, scale_columns, bias,
      out, epilogue, {x_squares, norm_weight, scaled, squares});
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) {
    linear_by_strips<T>(Fp8Strips<T>{args.matrix}, args, args.epilogue, eps);
  });
}

void grouped_linear_fp8(const Tensor& x, const Tensor& weight, const Tensor& scales,
                        int64_t scale_rows, int64_t scale_columns,
                        const std::optional<Tensor>& order, const Tensor& offsets,
                        int64_t max_group, const Tensor& out) {
  const ViewReader read{"grouped_linear_fp8", Place::kCpu};
  const GroupedFp8Args args =
      grouped_fp8_args(read, weight, scales, scale_rows, scale_columns,
                       grouped_epilogue_args(read, x, order, offsets, max_group, out));
  dispatch_float<float, Bf16>(
      args.x, [&]<class T>(T) { grouped_by_strips<T>(Fp8Strips<T>{args.matrix}, args); });
}

void dequantise_fp8(const Tensor& weight, const Tensor& scales, int64_t scale_rows,
                    int64_t scale_columns, const Tensor& out) {
  const DequantiseFp8Args args = dequantise_fp8_args(
      ViewReader{"dequantise_fp8", Place::kCpu}, weight, scales, scale_rows, scale_columns, out);
  const auto cost = 0.1 * static_cast<double>(args.matrix.k);  // nanoseconds, measured
  dispatch_float<float, Bf16>(args.out, [&]<class T>(T) {
    parallel_for(args.matrix.n, cost, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        dequantise_row<T>(args.matrix, row, args.out.ptr<T>() + row * args.out.stride(0));
      }
    });
  });
}

// Whether linear_fp8 is faster for the rows of x than dequantising the matrix and multiplying.
// Measured with one thread and AVX-512 for [14336, 4096] in bfloat16, in ms of CPU time, linear_fp8
// / a product with a bfloat16 matrix: 2.3 / 3.9 at 1 row, 4.4 / 6.9 at 8, 14 / 15 at 32, 33 / 26 at
// 64, where dequantising takes 7 more. In float32: 3.0 / 7.2, 8.9 / 15, 34 / 38, 68 / 71. With AMX,
// products with a bfloat16 matrix take no longer for more rows.
bool serves_linear_fp8(const Tensor& x, const Tensor& /*weight*/) {
  const View rows = ViewReader{"serves_linear_fp8", Place::kCpu}("x", x, 2);
#ifdef __AMX_BF16__
  if (rows.dtype == ScalarType::BFloat16) return rows.size(0) <= 16;
#endif
  return rows.size(0) <= 64;
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("linear_fp8", TORCH_BOX(&pyserve::linear_fp8));
  m.impl("grouped_linear_fp8", TORCH_BOX(&pyserve::grouped_linear_fp8));
  m.impl("dequantise_fp8", TORCH_BOX(&pyserve::dequantise_fp8));
  m.impl("serves_linear_fp8", TORCH_BOX(&pyserve::serves_linear_fp8));
}
