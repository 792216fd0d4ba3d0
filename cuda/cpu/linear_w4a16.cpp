// linear_w4a16, grouped_linear_w4a16 and dequantise_w4a16 on a CPU: a linear with 4-bit integers
// for few rows of x, the same for experts, and the dequantised matrix.
//   out[t, j] = sum over i of x[t, i] * W[j, i], plus bias[j];  W = (q - z) * s
//   x [m, k], packed (pyserve/ops/w4a16.py), bias [n], out [m, n]
// or an epilogue of these sums (common/epilogue.h). x and out are float32 or bfloat16.
//
// The work is to stream the matrix once, as fast as memory delivers it. Threads split the strips of
// 16 rows. The 16 words that hold two rows of a block are read at once, and each of their 8 nibbles
// becomes q - z, by a 16-entry table lookup where the CPU has one (AVX-512), otherwise by
// arithmetic. x is copied as float32 into the order of these words, and its rows are taken 4 (then
// 2, then 1) at a time. bfloat16 products were not faster where the CPU has them: 4.0 against 2.4
// ms at one row by [14336, 4096] and 26 against 21 at 16 (Intel with AMX, one thread), because it
// issues one of them per cycle, of two elements per lane, but two float32 FMAs.
// Numerics: q - z is exact; float32 sums over a group, times the scale, summed over the groups;
// then the lanes as a tree, the bias, and one rounding. A row's result never depends on what else
// is in a batch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common/args/linear_w4a16.h"
#include "parallel.h"
#include "strips.h"
#include "vec.h"

namespace pyserve {
namespace {

constexpr int kRowWords = 16;  // words of two rows of a block
constexpr int kChunks = kRowWords / kLanes;
// How many words ahead are prefetched, because the CPU's own prefetcher follows a strip only to the
// end of a page. With one thread, one row by [14336, 4096] takes 3.8 ms with this and 7.9 without.
constexpr int64_t kAhead = 2048;

// ---- q - z, and products ------------------------------------------------------------------------

// q - z for each zero point z and all q.
struct Differences {
  alignas(64) float rows[16][16];

  constexpr Differences() : rows() {
    for (int z = 0; z < 16; ++z) {
      for (int q = 0; q < 16; ++q) rows[z][q] = static_cast<float>(q - z);
    }
  }
};
constexpr Differences kDifferences;

inline UintVec load_words(const uint32_t* p) {
  UintVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// For tables of two groups: sets `bit` in the lanes that belong to the second group.
inline __attribute__((unused)) UintVec step_bit(uint32_t bit) {
  UintVec bits = {};
  for (int lane = 0; lane < kLanes; ++lane) bits[lane] = lane % 4 >= 2 ? bit : 0;
  return bits;
}

// Products of float32: each nibble of a word is one factor. Where a block has two groups (kRecords
// == 2), the lanes of steps 0 and 1 belong to the first group, those of steps 2 and 3 to the
// second.
template <class T, int kRecords>
struct Product {
  // Of 16 columns each; part p is nibbles 2 p (row g) and 2 p + 1 (row g + 8).
  static constexpr int kParts = 4;
  using X = float;                  // x in the order it is read: [block][part][kRowWords]
  using Part = Vec;

#ifdef __AVX512F__
  __m512 first, second;
  Product(uint32_t z0, uint32_t z1)
      : first(_mm512_load_ps(kDifferences.rows[z0])),
        second(_mm512_load_ps(kDifferences.rows[z1])) {}
  Vec decode(UintVec words) const {
    if constexpr (kRecords == 1) {  // the lookup uses only the lowest 4 bits
      return std::bit_cast<Vec>(_mm512_maskz_permutexvar_ps(
          0xffff, std::bit_cast<__m512i>(words), first));
    }
    const auto index = std::bit_cast<__m512i>((words & 15u) | step_bit(16));
    return std::bit_cast<Vec>(_mm512_permutex2var_ps(first, index, second));
  }
#else
  Vec zero;
  Product(uint32_t z0, uint32_t z1) : zero(splat(static_cast<float>(z0))) {
    for (int lane = 0; kRecords == 2 && lane < kLanes; ++lane) {
      if (lane % 4 >= 2) zero[lane] = static_cast<float>(z1);
    }
  }
  Vec decode(UintVec words) const {
    return __builtin_convertvector(std::bit_cast<IntVec>(words & 15u), Vec) - zero;
  }
#endif

  static Part read(const X* p) { return load(p); }
  static Vec add(Vec sums, Part a, Part b) { return fma(a, b, sums); }

  // Copies `count` columns of a block of x into the order in which they are read; columns behind
  // them become 0.
  static void arrange(const T* x, int64_t count, X* to) {
    for (int part = 0; part < kParts; ++part) {
      for (int lane = 0; lane < kRowWords; ++lane) {
        const int column = 16 * (lane % 4) + 8 * (part % 2) + 2 * (lane / 4) + part / 2;
        to[part * kRowWords + lane] = column < count ? to_float(x[column]) : 0.0f;
      }
    }
  }
};

// ---- strips -------------------------------------------------------------------------------------

// What the records of a unit say about a row.
template <int kRecords>
struct RowRecord {
  uint32_t z0, z1;
  Vec scale;

  RowRecord(const uint32_t* records, int row) {
    const uint32_t first = records[row], last = records[(kRecords - 1) * kW4RecordWords + row];
    z0 = first & 15;
    z1 = last & 15;
    scale = splat(std::bit_cast<float>(first & ~kW4ZeroMask));
    if constexpr (kRecords == 2) {
      const Vec other = splat(std::bit_cast<float>(last & ~kW4ZeroMask));
      scale = step_bit(1) == 1u ? other : scale;
    }
  }
};

// totals[t][r] += row r of the unit times row t of x.
template <class T, int kTokens, int kBlocks, int kRecords>
[[gnu::always_inline]] inline void add_unit(const uint32_t* words,
                                            const typename Product<T, kRecords>::X* x,
                                            int64_t x_stride,
                                            Vec (&totals)[kTokens][kStripRows]) {
  using P = Product<T, kRecords>;
  const uint32_t* records = words + kBlocks * kW4BlockWords;
#pragma GCC unroll 1
  for (int g = 0; g < 8; ++g) {
    __builtin_prefetch(words + kAhead + g * kBlocks * kRowWords);
    if (kBlocks == 2) __builtin_prefetch(words + kAhead + g * kBlocks * kRowWords + kRowWords);
    const RowRecord<kRecords> upper(records, g), lower(records, 8 + g);
    const P of_upper(upper.z0, upper.z1), of_lower(lower.z0, lower.z1);
    Vec sums[kTokens][2] = {};
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 4
      for (int c = 0; c < kChunks; ++c) {
        const UintVec row = load_words(words + b * kW4BlockWords + g * kRowWords + c * kLanes);
#pragma GCC unroll 4
        for (int part = 0; part < P::kParts; ++part) {
          const auto first = of_upper.decode(row >> (8 * part));
          const auto second = of_lower.decode(row >> (8 * part + 4));
          const int64_t at = (b * P::kParts + part) * kRowWords + c * kLanes;
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) {
            const auto from = P::read(x + t * x_stride + at);
            sums[t][0] = P::add(sums[t][0], first, from);
            sums[t][1] = P::add(sums[t][1], second, from);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      totals[t][g] = fma(upper.scale, sums[t][0], totals[t][g]);
      totals[t][8 + g] = fma(lower.scale, sums[t][1], totals[t][8 + g]);
    }
  }
}

template <class T, int kBlocks, int kRecords>
struct W4Strips {
  using P = Product<T, kRecords>;
  using X = typename P::X;
  static constexpr int64_t kUnitWords = kBlocks * kW4BlockWords + kRecords * kW4RecordWords;
  static constexpr int64_t kBlockX = P::kParts * kRowWords;

  W4Matrix matrix;
  int64_t k;

  int64_t num_strips() const { return matrix.num_strips; }
  int64_t row_size() const { return matrix.num_units * kBlocks * kBlockX; }

  void arrange(const T* x, X* to) const {
    for (int64_t i = 0; i < matrix.num_units * kBlocks; ++i) {
      P::arrange(x + i * kW4BlockColumns, k - i * kW4BlockColumns, to + i * kBlockX);
    }
  }

  double cost(int64_t m) const {  // measured: ns per byte of the matrix, and per byte and row of x
    const auto bytes = static_cast<double>(matrix.strip_words() * sizeof(uint32_t));
    return bytes * (0.06 + 0.03 * static_cast<double>(m));
  }

  template <int kTokens>
  void multiply(int64_t index, int64_t strip, const X* x, int64_t x_stride,
                Vec (&totals)[kTokens][kStripRows]) const {
    const uint32_t* words =
        matrix.words + (index * matrix.num_strips + strip) * matrix.num_units * kUnitWords;
    for (auto& of_row : totals) std::fill_n(of_row, kStripRows, Vec{});
    for (int64_t unit = 0; unit < matrix.num_units; ++unit) {
      add_unit<T, kTokens, kBlocks, kRecords>(words + unit * kUnitWords,
                                              x + unit * kBlocks * kBlockX, x_stride, totals);
    }
  }
};

// Calls fn(strips) with the type for the matrix's group size.
template <class T, class Fn>
void with_strips(const W4Matrix& matrix, int64_t k, const Fn& fn) {
  if (matrix.format.group_size == 32) return fn(W4Strips<T, 1, 2>{matrix, k});
  if (matrix.format.group_size == 64) return fn(W4Strips<T, 1, 1>{matrix, k});
  fn(W4Strips<T, 2, 1>{matrix, k});
}

// ---- the matrix as plain numbers ----------------------------------------------------------------

// (q - z) * s for all q, for one row of a unit: in its first group and in its last one.
template <class T>
struct RowNumbers {
  T numbers[2][16];

  RowNumbers(const uint32_t* records, int64_t count, int r) {
    for (int i = 0; i < 2; ++i) {
      const uint32_t record = records[i * (count - 1) * kW4RecordWords + r];
      const float scale = std::bit_cast<float>(record & ~kW4ZeroMask);
      const float* differences = kDifferences.rows[record & 15];
      for (int q = 0; q < 16; q += kLanes) store(numbers[i] + q, load(differences + q) * scale);
    }
  }

  // Writes the 64 columns of a block. `words` are the block's words of the row, to be shifted by
  // `shift` for the row's half.
  void write(const uint32_t* words, int shift, T* out) const {
    for (int s = 0; s < 4; ++s) {
      const T* table = numbers[s / 2];
      for (int t = 0; t < 4; ++t) {
        const uint32_t word = words[4 * t + s] >> shift;
        for (int u = 0; u < 2; ++u) {
          out[16 * s + 8 * u + 2 * t] = table[(word >> (8 * u)) & 15];
          out[16 * s + 8 * u + 2 * t + 1] = table[(word >> (8 * u + 16)) & 15];
        }
      }
    }
  }
};

#ifdef __AVX512BW__
// The same in one register: number q of the first group is element 2 q, number q of the last group
// is element 2 q + 1.
template <>
struct RowNumbers<Bf16> {
  UintVec numbers;

  RowNumbers(const uint32_t* records, int64_t count, int r)
      : numbers(rounded(records[r]) | rounded(records[(count - 1) * kW4RecordWords + r]) << 16) {}

  static UintVec rounded(uint32_t record) {
    const float scale = std::bit_cast<float>(record & ~kW4ZeroMask);
    return round_to_bf16(load(kDifferences.rows[record & 15]) * scale);
  }

  void write(const uint32_t* words, int shift, Bf16* out) const {
    const UintVec row = load_words(words) >> shift;
    const __m512i first = look_up(row << 1), second = look_up(row >> 7);
    // Pair 8 s + 4 u + t of the columns is in lane 4 t + s of register u; adding 16 to an index
    // selects the second register.
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i next = _mm512_add_epi32(order, _mm512_set1_epi32(2));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi32(first, order, second));
    _mm512_storeu_si512(out + 2 * kLanes, _mm512_permutex2var_epi32(first, next, second));
  }

  __m512i look_up(UintVec pairs) const {
    const auto index = std::bit_cast<__m512i>((pairs & 0x001e001eu) | step_bit(0x00010001));
    return _mm512_permutexvar_epi16(index, std::bit_cast<__m512i>(numbers));
  }
};
#endif

template <class T>
void dequantise_strip(const W4Matrix& matrix, int64_t strip, int num_rows, int64_t k,
                      int64_t stride, T* out) {
  const W4Format& format = matrix.format;
  const uint32_t* words = matrix.words + strip * matrix.strip_words();
  for (int64_t unit = 0; unit < matrix.num_units; ++unit, words += format.unit_words()) {
    const uint32_t* records = words + format.unit_blocks * kW4BlockWords;
    for (int r = 0; r < num_rows; ++r) {
      __builtin_prefetch(words + kAhead + r * kRowWords);
      const RowNumbers<T> numbers(records, format.unit_records, r);
      const int shift = r < 8 ? 0 : 4;
      for (int64_t b = 0; b < format.unit_blocks; ++b) {
        const int64_t column = unit * format.unit_columns() + b * kW4BlockColumns;
        const uint32_t* row = words + b * kW4BlockWords + r % 8 * kRowWords;
        T* to = out + r * stride + column;
        if (column + kW4BlockColumns <= k) {
          numbers.write(row, shift, to);
        } else {  // the second half of the last block may be padding
          T whole[kW4BlockColumns];
          numbers.write(row, shift, whole);
          std::memcpy(to, whole, (k - column) * sizeof(T));
        }
      }
    }
  }
}

// ---- the ops ------------------------------------------------------------------------------------

void linear_w4a16(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                  const Tensor& out, int64_t epilogue, const std::optional<Tensor>& x_squares,
                  double eps, const std::optional<Tensor>& norm_weight,
                  const std::optional<Tensor>& scaled, const std::optional<Tensor>& squares) {
  const LinearW4Args args =
      linear_w4_args(ViewReader{"linear_w4a16", Place::kCpu}, x, packed, bias, out, epilogue,
                     {x_squares, norm_weight, scaled, squares});
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) {
    with_strips<T>(args.matrix, args.k(), [&](const auto& strips) {
      linear_by_strips<T>(strips, args, args.epilogue, eps);
    });
  });
}

void grouped_linear_w4a16(const Tensor& x, const Tensor& packed,
                          const std::optional<Tensor>& order, const Tensor& offsets,
                          int64_t max_group, const std::optional<Tensor>& sorted_x,
                          const Tensor& out) {
  const ViewReader read{"grouped_linear_w4a16", Place::kCpu};
  const GroupedW4Args args = grouped_w4_args(
      read, packed, sorted_x, grouped_epilogue_args(read, x, order, offsets, max_group, out));
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) {
    with_strips<T>(args.matrix, args.k(),
                   [&](const auto& strips) { grouped_by_strips<T>(strips, args); });
  });
}

void dequantise_w4a16(const Tensor& packed, const Tensor& out) {
  const DequantiseW4Args args =
      dequantise_w4_args(ViewReader{"dequantise_w4a16", Place::kCpu}, packed, out);
  const int64_t n = args.out.size(0), k = args.out.size(1);
  const auto cost = 0.15 * static_cast<double>(kStripRows * k);  // nanoseconds, measured
  dispatch_float<float, Bf16>(args.out, [&]<class T>(T) {
    parallel_for(args.matrix.num_strips, cost, [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t row = strip * kStripRows, stride = args.out.stride(0);
        dequantise_strip<T>(args.matrix, strip, static_cast<int>(std::min(kStripRows, n - row)), k,
                            stride, args.out.ptr<T>() + row * stride);
      }
    });
  });
}

// Whether linear_w4a16 is faster for the rows of x than dequantising the matrix and multiplying.
// Measured with one thread and AMX for [14336, 4096] in bfloat16, in ms of CPU time, linear_w4a16 /
// dequantising 4 MB at a time and multiplying: 2.4 / 17 at 1 row, 21 / 16-20 at 16; a matrix that
// already is bfloat16 takes 14.5 at either. In float32: 47 / 142 at 32 rows.
bool serves_linear_w4a16(const Tensor& x, const Tensor& /*packed*/) {
  const View rows = ViewReader{"serves_linear_w4a16", Place::kCpu}("x", x, 2);
#ifdef __AMX_BF16__
  if (rows.dtype == ScalarType::BFloat16) return rows.size(0) <= 8;
#endif
  return rows.size(0) <= 32;
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("linear_w4a16", TORCH_BOX(&pyserve::linear_w4a16));
  m.impl("grouped_linear_w4a16", TORCH_BOX(&pyserve::grouped_linear_w4a16));
  m.impl("dequantise_w4a16", TORCH_BOX(&pyserve::dequantise_w4a16));
  m.impl("serves_linear_w4a16", TORCH_BOX(&pyserve::serves_linear_w4a16));
}
