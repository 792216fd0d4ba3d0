// The products behind linear.cpp and experts.cpp: rows of x times a matrix that lies as in the
// checkpoint, for as many columns of out as a thread takes at once.
//
// There are two ways, chosen by dtype, n and k alone:
//   tiles   bfloat16 on a CPU with AMX. A tile of weight is 16 rows by 32 of k as they lie in
//           memory; a tile of x is transposed in pairs of k. One call multiplies 64 columns by 16
//           rows of x, or 32 by 32.
//   blocks  everything else. kLanes sums at once: 4 (then 2, then 1) rows of x by kLanes / 4 (/ 2,
//           / 1) rows of weight. Each sum is one vector of partial sums over all of k, whose lanes
//           are added as a tree.
// The order of a sum depends neither on the block nor on m.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../common/epilogue.h"
#include "linear_many.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

// ---- products of elements -----------------------------------------------------------------------

// How elements of type T are read and multiplied, kStep of them at a time.
template <class T>
struct Dot {
  using Part = Vec;
  static constexpr int64_t kStep = kLanes;
  static Part read(const T* p) { return load(p); }
  static Part read_first(const T* p, int64_t n) { return load_first(p, n); }
  static Vec add(Vec sums, Part a, Part b) { return fma(a, b, sums); }
};

#ifdef __AVX512BF16__
template <>
struct Dot<Bf16> {
  using Part = __m512bh;
  static constexpr int64_t kStep = 2 * kLanes;
  static Part read(const Bf16* p) {
    Part part;
    std::memcpy(&part, p, sizeof part);
    return part;
  }
  static Part read_first(const Bf16* p, int64_t n) {
    Bf16 lanes[kStep] = {};
    std::memcpy(lanes, p, n * sizeof(Bf16));
    return read(lanes);
  }
  static Vec add(Vec sums, Part a, Part b) {
    return std::bit_cast<Vec>(_mm512_dpbf16_ps(std::bit_cast<__m512>(sums), a, b));
  }
};
#endif

// ---- blocks -------------------------------------------------------------------------------------

// The sums, with factors and bias, of columns [column, column + kLanes / kTokens) of kTokens rows,
// token by token. Columns from n on repeat the last row of weight.
template <class T, int kTokens>
[[gnu::always_inline]] inline Vec block_sums(const Shape& shape, const T* x,
                                             const Matrix<T>& matrix, int64_t column) {
  constexpr int kRows = kLanes / kTokens;
  using D = Dot<T>;
  const T* rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = matrix.weight + std::min(column + r, shape.n - 1) * shape.weight_stride;
  }
  Vec sums[kLanes] = {};
  auto step = [&](auto&& read, int64_t i) {
    typename D::Part weight_parts[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) weight_parts[r] = read(rows[r] + i);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const auto x_part = read(x + t * shape.x_stride + i);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        sums[t * kRows + r] = D::add(sums[t * kRows + r], x_part, weight_parts[r]);
      }
    }
  };
  int64_t i = 0;
  for (; i + D::kStep <= shape.k; i += D::kStep) step([](const T* p) { return D::read(p); }, i);
  if (i < shape.k) step([&](const T* p) { return D::read_first(p, shape.k - i); }, i);

  float added[kLanes] = {};
  if (matrix.bias != nullptr) {
    const int64_t count = std::min<int64_t>(kRows, shape.n - column);
    for (int t = 0; t < kTokens; ++t) {
      for (int64_t r = 0; r < count; ++r) added[t * kRows + r] = to_float(matrix.bias[column + r]);
    }
  }
  Vec result = sum_rows(sums);
  if (matrix.factors != nullptr) {
    float factors[kLanes];
    for (int i = 0; i < kLanes; ++i) factors[i] = matrix.factors[i / kRows];
    result *= load(factors);
  }
  return result + load(added);
}

// Computes columns [column, column + kLanes / kTokens) of kTokens rows, up to column n. `x` and
// `out` point to the first of these rows.
template <Epilogue kEpilogue, class T, int kTokens>
void block(const Shape& shape, const T* x, const Matrix<T>& matrix, int64_t column, T* out) {
  constexpr int kRows = kLanes / kTokens;
  const int64_t count = std::min<int64_t>(kRows, shape.n - column);
  Vec result = block_sums<T, kTokens>(shape, x, matrix, column);
  if constexpr (kEpilogue == Epilogue::kAdd) {
    T residual[kLanes] = {};
    for (int t = 0; t < kTokens; ++t) {
      std::memcpy(residual + t * kRows, out + t * shape.out_stride + column, count * sizeof(T));
    }
    result = load(residual) + result;
  } else if constexpr (kEpilogue == Epilogue::kSiluMul) {
    result = silu_mul(result, block_sums<T, kTokens>(shape, x, matrix.up(shape), column));
  }
  T rounded[kLanes];
  store(rounded, result);
  for (int t = 0; t < kTokens; ++t) {
    T* to = out + t * shape.out_stride + column;
    if (count == kRows) {
      std::memcpy(to, rounded + t * kRows, kRows * sizeof(T));
    } else {
      std::memcpy(to, rounded + t * kRows, count * sizeof(T));
    }
  }
}

// Computes kLanes columns, or those up to n, of kTokens rows.
template <Epilogue kEpilogue, class T, int kTokens>
void block_row(const Shape& shape, const T* x, Matrix<T> matrix, int64_t t, int64_t column,
               T* out) {
  if (matrix.factors != nullptr) matrix.factors += t;
  constexpr int kRows = kLanes / kTokens;
  const int64_t end = std::min(column + kLanes, shape.n);
  for (; column < end; column += kRows) {
    block<kEpilogue, T, kTokens>(shape, x, matrix, column, out);
  }
}

// Computes kLanes columns of all rows.
template <Epilogue kEpilogue, class T>
void block_columns(const Shape& shape, const T* x, const Matrix<T>& matrix, int64_t column,
                   T* out) {
  for (int64_t t = 0; t < shape.m;) {
    const T* from = x + t * shape.x_stride;
    T* to = out + t * shape.out_stride;
    if (t + 4 <= shape.m) {
      block_row<kEpilogue, T, 4>(shape, from, matrix, t, column, to);
      t += 4;
    } else if (t + 2 <= shape.m) {
      block_row<kEpilogue, T, 2>(shape, from, matrix, t, column, to);
      t += 2;
    } else {
      block_row<kEpilogue, T, 1>(shape, from, matrix, t, column, to);
      t += 1;
    }
  }
}

// ---- tiles --------------------------------------------------------------------------------------

#ifdef __AMX_BF16__

constexpr int64_t kTileRows = 16;             // rows of weight, and of x
constexpr int64_t kTileDepth = 32;            // columns of k
constexpr int64_t kPackedTile = 16 * kLanes;  // in floats, each of which holds a pair of bfloat16
static_assert(kLanes == kTileRows);

// Asks Linux for permission to use the tile registers, once per process.
inline bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, XFEATURE_XTILE_DATA
  static const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return may;
}

// Configures the calling thread's tile registers, all as 16 rows of 64 bytes, for the lifetime of
// this object.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Packs x as tiles [ceil(m / 16)][k / 32][16 pairs of k][16 rows of x]; rows from m on are 0.
inline void pack_x(const Shape& shape, const Bf16* x, float* packed) {
  for (int64_t t = 0; t < shape.m; t += kTileRows) {
    for (int64_t i = 0; i < shape.k; i += kTileDepth, packed += kPackedTile) {
      Vec rows[kLanes] = {};
      for (int64_t r = 0; r < std::min(kTileRows, shape.m - t); ++r) {
        std::memcpy(&rows[r], x + (t + r) * shape.x_stride + i, sizeof(Vec));
      }
      transpose(rows);
      for (int r = 0; r < kLanes; ++r) store(packed + r * kLanes, rows[r]);
    }
  }
}

// The 16 columns of a product of tiles, and which of them are stored. The last panel of weight
// begins early enough to be whole; its first columns are stored by the panel before.
struct Panel {
  int64_t first, begin, end;

  Panel(int64_t column, int64_t n)
      : first(std::min(column, n - kTileRows)),
        begin(std::min(column, n)),
        end(std::min(column + kTileRows, n)) {}
};

// rows[t] = sums[column][t] * factor + bias, for `count` rows of x from t0 on.
inline void panel_rows(const float* sums, const Panel& panel, const Matrix<Bf16>& matrix, int64_t t0,
                int64_t count, Vec* rows) {
  for (int r = 0; r < kLanes; ++r) rows[r] = load(sums + r * kLanes);
  transpose(rows);
  if (matrix.factors != nullptr) {
    for (int64_t r = 0; r < count; ++r) rows[r] *= matrix.factors[t0 + r];
  }
  if (matrix.bias == nullptr) return;
  for (int r = 0; r < kLanes; ++r) rows[r] += load(matrix.bias + panel.first);
}

// out[t0 + t, panel] = the epilogue of sums[column][t] + bias, rounded. With kSiluMul, up_sums are
// the sums of the rows of up.
template <Epilogue kEpilogue>
void store_panel(const Shape& shape, const float* sums, const float* up_sums, const Panel& panel,
                 const Matrix<Bf16>& matrix, int64_t t0, Bf16* out) {
  if (panel.begin >= panel.end || t0 >= shape.m) return;
  Vec rows[kLanes], up[kLanes];
  const int64_t count = std::min(kTileRows, shape.m - t0);
  panel_rows(sums, panel, matrix, t0, count, rows);
  if constexpr (kEpilogue == Epilogue::kSiluMul) {
    panel_rows(up_sums, panel, matrix.up(shape), t0, count, up);
  }
  for (int64_t t = 0; t < count; ++t) {
    Bf16* row = out + (t0 + t) * shape.out_stride;
    Vec result = rows[t];
    if constexpr (kEpilogue == Epilogue::kSiluMul) result = silu_mul(result, up[t]);
    if (panel.begin == panel.first) {
      if constexpr (kEpilogue == Epilogue::kAdd) result = load(row + panel.first) + result;
      store(row + panel.first, result);
    } else {  // the columns before `begin` may belong to another thread
      Bf16 rounded[kLanes] = {};
      if constexpr (kEpilogue == Epilogue::kAdd) {
        std::memcpy(rounded + (panel.begin - panel.first), row + panel.begin,
                    (panel.end - panel.begin) * sizeof(Bf16));
        result = load(rounded) + result;
      }
      store(rounded, result);
      std::memcpy(row + panel.begin, rounded + (panel.begin - panel.first),
                  (panel.end - panel.begin) * sizeof(Bf16));
    }
  }
}

// The panels of weight for kCount tiles that are multiplied together: those of neighbouring columns
// of out or, with kSiluMul, kCount / 2 of gate and then the matching ones of up.
template <Epilogue kEpilogue, int kCount>
struct Panels {
  static constexpr bool kIsPaired = kEpilogue == Epilogue::kSiluMul;
  static constexpr int kColumnPanels = kIsPaired ? kCount / 2 : kCount;
  static constexpr int64_t kColumns = kColumnPanels * kTileRows;  // of out

  Panel columns[kColumnPanels];
  const Bf16* rows[kCount];

  Panels(const Shape& shape, const Matrix<Bf16>& matrix, int64_t column)
      : Panels(shape, matrix, column, std::make_integer_sequence<int, kColumnPanels>{}) {}

  // Stores the sums of kCount tiles for rows [t0, t0 + 16) of x.
  void store(const Shape& shape, const float (&sums)[kCount][kTileRows * kLanes],
             const Matrix<Bf16>& matrix, int64_t t0, Bf16* out) const {
    for (int p = 0; p < kColumnPanels; ++p) {
      const float* up = kIsPaired ? sums[kColumnPanels + p] : nullptr;
      store_panel<kEpilogue>(shape, sums[p], up, columns[p], matrix, t0, out);
    }
  }

 private:
  template <int... kPanel>
  Panels(const Shape& shape, const Matrix<Bf16>& matrix, int64_t column,
         std::integer_sequence<int, kPanel...>)
      : columns{Panel(column + kPanel * kTileRows, shape.n)...} {
    for (int p = 0; p < kCount; ++p) {
      const Bf16* weight = p < kColumnPanels ? matrix.weight : matrix.up(shape).weight;
      rows[p] = weight + columns[p % kColumnPanels].first * shape.weight_stride;
    }
  }
};

// Multiplies 4 panels by rows [t0, t0 + 16) of x.
template <Epilogue kEpilogue>
void tiles_4x1(const Shape& shape, const float* packed, const Matrix<Bf16>& matrix, int64_t column,
               int64_t t0, Bf16* out) {
  const Panels<kEpilogue, 4> panels(shape, matrix, column);
  const auto& rows = panels.rows;
  const int64_t stride = shape.weight_stride * static_cast<int64_t>(sizeof(Bf16));
  const float* x = packed + t0 * shape.k / 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < shape.k; i += kTileDepth, x += kPackedTile) {
    _tile_loadd(6, x, 64);
    _tile_loadd(4, rows[0] + i, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, rows[1] + i, stride);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, rows[2] + i, stride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, rows[3] + i, stride);
    _tile_dpbf16ps(3, 5, 6);
  }
  alignas(64) float sums[4][kTileRows * kLanes];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  panels.store(shape, sums, matrix, t0, out);
}

// Multiplies 2 panels by rows [t0, t0 + 32) of x.
template <Epilogue kEpilogue>
void tiles_2x2(const Shape& shape, const float* packed, const Matrix<Bf16>& matrix, int64_t column,
               int64_t t0, Bf16* out) {
  const Panels<kEpilogue, 2> panels(shape, matrix, column);
  const auto& rows = panels.rows;
  const int64_t stride = shape.weight_stride * static_cast<int64_t>(sizeof(Bf16));
  const float* x0 = packed + t0 * shape.k / 2;
  const float* x1 = x0 + kTileRows * shape.k / 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < shape.k; i += kTileDepth, x0 += kPackedTile, x1 += kPackedTile) {
    _tile_loadd(4, rows[0] + i, stride);
    _tile_loadd(6, x0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, x1, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, rows[1] + i, stride);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[2][2][kTileRows * kLanes];  // [first 16 rows of x, second 16 rows][panel]
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  _tile_stored(2, sums[1][0], 64);
  _tile_stored(3, sums[1][1], 64);
  panels.store(shape, sums[0], matrix, t0, out);
  panels.store(shape, sums[1], matrix, t0 + kTileRows, out);
}

// The columns of out that tile_columns computes: 64, or 32 with kSiluMul.
template <Epilogue kEpilogue>
constexpr int64_t kTileColumns = Panels<kEpilogue, 4>::kColumns;

// Computes kTileColumns columns of all rows; `packed` comes from pack_x.
template <Epilogue kEpilogue>
void tile_columns(const Shape& shape, const float* packed, const Matrix<Bf16>& matrix,
                  int64_t column, Bf16* out) {
  int64_t t = 0;
  for (; t + kTileRows < shape.m; t += 2 * kTileRows) {
    tiles_2x2<kEpilogue>(shape, packed, matrix, column, t, out);
    tiles_2x2<kEpilogue>(shape, packed, matrix, column + kTileColumns<kEpilogue> / 2, t, out);
  }
  if (t < shape.m) tiles_4x1<kEpilogue>(shape, packed, matrix, column, t, out);
}

inline int64_t packed_floats(const Shape& shape) {
  return (shape.m + kTileRows - 1) / kTileRows * kTileRows * shape.k / 2;
}

inline bool fits_tiles(const Shape& shape) {
  return shape.k % kTileDepth == 0 && shape.n >= kTileRows && may_use_tiles();
}

// Calls fn(begin, end) for parts of [0, count) on several threads, each with its tile registers
// configured.
template <class Fn>
void parallel_for_tiles(int64_t count, double cost, const Fn& fn) {
  parallel_for(count, cost, [&](int64_t begin, int64_t end) {
    const TileRegisters registers;
    asm volatile("" ::: "memory");  // keeps tile loads behind the stores that fill packed
    fn(begin, end);
  });
}

#endif

// ---- costs --------------------------------------------------------------------------------------

// The cost of one column of out for m rows, in nanoseconds. The factors are measured: nanoseconds
// per byte of weight, and per byte and row of x.
template <Epilogue kEpilogue, class T>
double column_cost(const Shape& shape, bool has_tiles) {
  const auto bytes = static_cast<double>(shape.k * sizeof(T) * rows_per_column(kEpilogue));
  return bytes * (0.035 + (has_tiles ? 0.0007 : 0.008) * static_cast<double>(shape.m));
}

}  // namespace
}  // namespace pyserve
