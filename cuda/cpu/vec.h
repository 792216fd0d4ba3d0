// Vectors of floats for the CPU ops. They use the compiler's vector extensions, so that one source
// serves AVX-512, AVX2, NEON and plain SSE2. bfloat16 is converted by shifts; all arithmetic is
// float32.
//
// The build forbids the compiler to fuse a * b + c on its own (-ffp-contract=off). Fused operations
// are written as `fma`; the sampler, whose results are specified bit for bit, has none.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace pyserve {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using IntVec = int32_t __attribute__((vector_size(kLanes * 4)));
using UintVec = uint32_t __attribute__((vector_size(kLanes * 4)));
using HalfVec = uint16_t __attribute__((vector_size(kLanes * 2)));

struct Bf16 {
  uint16_t bits;
};

inline Vec splat(float x) { return x - Vec{}; }

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The compiler's own conversion takes three instructions even where the CPU has a single one.
inline UintVec widen(HalfVec half) {
#if defined(__AVX512F__)
  // The masked form is used because gcc 12 gives a warning inside the plain one.
  return std::bit_cast<UintVec>(_mm512_maskz_cvtepu16_epi32(0xffff, std::bit_cast<__m256i>(half)));
#elif defined(__AVX2__)
  return std::bit_cast<UintVec>(_mm256_cvtepu16_epi32(std::bit_cast<__m128i>(half)));
#else
  return __builtin_convertvector(half, UintVec);
#endif
}

inline Vec load(const Bf16* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof half);
  return std::bit_cast<Vec>(widen(half) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// The bfloat16 bits of each lane, in its lower half. Rounds to nearest, ties to even; a NaN stays a
// NaN.
inline UintVec round_to_bf16(Vec v) {
  const UintVec bits = std::bit_cast<UintVec>(v);
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UintVec quiet = (bits >> 16) | 0x40;
  return v == v ? rounded : quiet;
}

inline void store(Bf16* p, Vec v) {
  const HalfVec half = __builtin_convertvector(round_to_bf16(v), HalfVec);
  std::memcpy(p, &half, sizeof half);
}

// Loads 2 * kLanes elements in the order that is cheapest for T: floats as they lie, of bfloat16
// the even ones in a and the odd ones in b. It is for computations that do not depend on the order
// of a row's elements, such as a dot product with a row that was loaded the same way.
inline void load_pair(const float* p, Vec& a, Vec& b) {
  a = load(p);
  b = load(p + kLanes);
}

inline void load_pair(const Bf16* p, Vec& a, Vec& b) {
  UintVec words;
  std::memcpy(&words, p, sizeof words);
  a = std::bit_cast<Vec>(words << 16);
  b = std::bit_cast<Vec>(words & 0xffff0000u);
}

inline void store_pair(float* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}

inline void store_pair(Bf16* p, Vec a, Vec b) {
  const UintVec words = round_to_bf16(a) | (round_to_bf16(b) << 16);
  std::memcpy(p, &words, sizeof words);
}

// Only the first n < kLanes elements: the others read as 0 and are not written.
template <class T>
Vec load_first(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <class T>
void store_first(T* p, Vec v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return std::bit_cast<Vec>(_mm512_fmadd_ps(std::bit_cast<__m512>(a), std::bit_cast<__m512>(b),
                                            std::bit_cast<__m512>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return std::bit_cast<Vec>(_mm256_fmadd_ps(std::bit_cast<__m256>(a), std::bit_cast<__m256>(b),
                                            std::bit_cast<__m256>(c)));
#elif defined(__ARM_NEON)
  return std::bit_cast<Vec>(vfmaq_f32(std::bit_cast<float32x4_t>(c), std::bit_cast<float32x4_t>(a),
                                      std::bit_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Whether any lane is not 0.
inline bool any(IntVec v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(std::bit_cast<__m512i>(v), std::bit_cast<__m512i>(v)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(std::bit_cast<__m256i>(v), std::bit_cast<__m256i>(v));
#else
  return ((v[0] | v[1]) | (v[2] | v[3])) != 0;
#endif
}

// Lane j of the result is lane j ^ kWidth of v.
template <int kWidth, int... kLane>
Vec swap_lanes(Vec v, std::integer_sequence<int, kLane...>) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, (kLane ^ kWidth)...);
#else
  return __builtin_shuffle(v, IntVec{(kLane ^ kWidth)...});
#endif
}

// Combines all lanes by fn, halves first.
template <int kWidth = kLanes / 2, class Fn>
float reduce(Vec v, const Fn& fn) {
  v = fn(v, swap_lanes<kWidth>(v, std::make_integer_sequence<int, kLanes>{}));
  if constexpr (kWidth == 1) {
    return v[0];
  } else {
    return reduce<kWidth / 2>(v, fn);
  }
}

inline float sum(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return a + b; });
}

inline float max(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return max(a, b); });
}

// Within each block of 2 * kWidth lanes, the result takes the lower kWidth lanes of a and then
// those of b; with kUpper, the upper ones.
template <int kWidth, bool kUpper, int... kLane>
Vec interleave(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
#define PYSERVE_SOURCE_LANE                                                       \
  ((kLane & ~(2 * kWidth - 1)) + (kLane & (kWidth - 1)) + (kUpper ? kWidth : 0) + \
   ((kLane & kWidth) ? kLanes : 0))...
#ifdef __clang__
  return __builtin_shufflevector(a, b, PYSERVE_SOURCE_LANE);
#else
  return __builtin_shuffle(a, b, IntVec{PYSERVE_SOURCE_LANE});
#endif
#undef PYSERVE_SOURCE_LANE
}

template <int kWidth, bool kUpper>
Vec interleave(Vec a, Vec b) {
  return interleave<kWidth, kUpper>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Lane i of the result is the sum of the lanes of rows[i]. rows is overwritten.
template <int kWidth = kLanes / 2>
[[gnu::always_inline]] inline Vec sum_rows(Vec* rows) {
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) {
    rows[i] = interleave<kWidth, false>(rows[i], rows[i + kWidth]) +
              interleave<kWidth, true>(rows[i], rows[i + kWidth]);
  }
  if constexpr (kWidth == 1) {
    return rows[0];
  } else {
    return sum_rows<kWidth / 2>(rows);
  }
}

// Transposes the kLanes x kLanes matrix with the given rows.
template <int kWidth = kLanes / 2>
[[gnu::always_inline]] inline void transpose(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kWidth) continue;
    const Vec a = rows[i], b = rows[i + kWidth];
    rows[i] = interleave<kWidth, false>(a, b);
    rows[i + kWidth] = interleave<kWidth, true>(a, b);
  }
  if constexpr (kWidth > 1) transpose<kWidth / 2>(rows);
}

// Adding this to x rounds x, if |x| < 2^22, to an integer, which is then in the low bits of the
// sum.
constexpr float kRoundShift = 12582912.0f;  // 1.5 * 2^23

// 2^n, given n + kRoundShift with -126 <= n <= 127.
inline Vec pow2_of_shifted(Vec shifted) {
  return std::bit_cast<Vec>((std::bit_cast<UintVec>(shifted) << 23) + (127u << 23));
}

// 2^x for x <= 127, and 0 below -126; a NaN stays a NaN. The relative error is below 2e-7.
inline Vec exp2(Vec x) {
  const Vec clamped = x < -126.0f ? splat(-126.0f) : x;
  const Vec shifted = clamped + kRoundShift;
  const Vec f = clamped - (shifted - kRoundShift);
  // The polynomial with the least maximum relative error for 2^f on [-1/2, 1/2] and p(0) = 1.
  Vec p = splat(1.3264727e-3f);
  p = fma(p, f, splat(9.6715129e-3f));
  p = fma(p, f, splat(5.5507337e-2f));
  p = fma(p, f, splat(2.4022242e-1f));
  p = fma(p, f, splat(6.9314698e-1f));
  p = fma(p, f, splat(1.0f));
  p *= pow2_of_shifted(shifted);
  return x < -126.0f ? Vec{} : p;
}

// e^x with a relative error below 2e-7 for -87 <= x <= 88. x is clamped to that range; a NaN stays
// a NaN.
inline Vec exp(Vec x) {
  Vec clamped = x < -87.0f ? splat(-87.0f) : x;
  clamped = clamped > 88.0f ? splat(88.0f) : clamped;
  const Vec shifted = fma(clamped, splat(1.44269504f), splat(kRoundShift));
  const Vec n = shifted - kRoundShift;
  Vec r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  // Coefficients of the Cephes library's expf (Moshier 1989).
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return p * pow2_of_shifted(shifted);
}

// silu(gate) * up (Shazeer 2020); exp has a relative error below 2e-7.
inline Vec silu_mul(Vec gate, Vec up) { return gate / (1.0f + exp(-gate)) * up; }

// gelu(gate) * up with the tanh approximation of gelu (Hendrycks and Gimpel 2016). With u =
// sqrt(2/pi) (x + 0.044715 x^3), x (1 + tanh(u)) / 2 equals x / (1 + e^(-2u)).
inline Vec gelu_tanh_mul(Vec gate, Vec up) {
  const Vec twice_u = gate * fma(gate * gate, splat(0.0713548163f), splat(1.59576912f));
  return gate / (1.0f + exp(-twice_u)) * up;
}

// tanh(x) with a relative error below 3e-7, as 1 - 2 / (e^2x + 1) or, near 0, where that would
// cancel, by the polynomial of the Cephes library's tanhf (Moshier 1989).
inline Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = fma(p, square, splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  const Vec near = fma(p * square, x, x), far = 1.0f - 2.0f / (exp(x + x) + 1.0f);
  return square < 0.390625f ? near : far;
}

}  // namespace pyserve
