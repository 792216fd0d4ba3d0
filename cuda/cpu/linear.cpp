// linear for few rows of x: out[t, j] = sum over i of x[t, i] * weight[j, i], plus bias[j].
//   x [m, k], weight [n, k], bias [n], out [m, n]; weight lies as in the checkpoint
//
// With few rows the work is to stream the weight once, as fast as memory gives it. Threads split n.
// Two ways, chosen by dtype, n and k alone:
//   tiles   bfloat16 on a CPU with AMX. A tile of weight is 16 rows by 32 of k as they lie, one of
//           x is transposed in pairs; 64 columns by 16 rows of x, or 32 by 32, at once.
//   blocks  the rest. kLanes sums at once: 4 (then 2, then 1) rows of x by kLanes / 4 (2, 1) of
//           weight, each sum one vector of partial sums over all of k, added up as a tree.
// Numerics: float32 sums, then the bias, then one rounding. The order of a sum does not depend on
// m, block or thread: what else is in a batch never changes a row's result. bfloat16 denormals
// count as 0 where the CPU's own bfloat16 products are used.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../common/args/linear.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

// ---- products of elements -----------------------------------------------------------------------

// How elements of type T are read and multiplied: kStep of them at once.
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

struct Shape {
  int64_t m, n, k, x_stride, weight_stride, out_stride;
};

// Output columns [column, column + kLanes / kTokens) of kTokens rows; `x` and `out` are at the
// first of them. Columns from n on are computed from the last row of weight and not stored.
template <class T, int kTokens>
void block(const Shape& shape, const T* x, const T* weight, const T* bias, int64_t column, T* out) {
  constexpr int kRows = kLanes / kTokens;
  using D = Dot<T>;
  const T* rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = weight + std::min(column + r, shape.n - 1) * shape.weight_stride;
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

  const int64_t count = std::min<int64_t>(kRows, shape.n - column);
  float added[kLanes] = {};
  if (bias != nullptr) {
    for (int t = 0; t < kTokens; ++t) {
      for (int64_t r = 0; r < count; ++r) added[t * kRows + r] = to_float(bias[column + r]);
    }
  }
  T rounded[kLanes];
  store(rounded, sum_rows(sums) + load(added));
  for (int t = 0; t < kTokens; ++t) {
    T* to = out + t * shape.out_stride + column;
    if (count == kRows) {
      std::memcpy(to, rounded + t * kRows, kRows * sizeof(T));
    } else {
      std::memcpy(to, rounded + t * kRows, count * sizeof(T));
    }
  }
}

// kLanes columns, or those up to n, of kTokens rows.
template <class T, int kTokens>
void block_row(const Shape& shape, const T* x, const T* weight, const T* bias, int64_t column,
               T* out) {
  constexpr int kRows = kLanes / kTokens;
  const int64_t end = std::min(column + kLanes, shape.n);
  for (; column < end; column += kRows) block<T, kTokens>(shape, x, weight, bias, column, out);
}

// kLanes columns of all rows.
template <class T>
void block_columns(const Shape& shape, const T* x, const T* weight, const T* bias, int64_t column,
                   T* out) {
  for (int64_t t = 0; t < shape.m;) {
    const T* from = x + t * shape.x_stride;
    T* to = out + t * shape.out_stride;
    if (t + 4 <= shape.m) {
      block_row<T, 4>(shape, from, weight, bias, column, to);
      t += 4;
    } else if (t + 2 <= shape.m) {
      block_row<T, 2>(shape, from, weight, bias, column, to);
      t += 2;
    } else {
      block_row<T, 1>(shape, from, weight, bias, column, to);
      t += 1;
    }
  }
}

// ---- tiles --------------------------------------------------------------------------------------

#ifdef __AMX_BF16__

constexpr int64_t kTileRows = 16;             // of weight, and of x
constexpr int64_t kTileDepth = 32;            // of k
constexpr int64_t kPackedTile = 16 * kLanes;  // floats, each holding a pair of bfloat16
static_assert(kLanes == kTileRows);

constexpr int64_t kGroupColumns = 4 * kTileRows;  // what a thread takes at once

// Asks Linux for the tile registers, once for the process.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, XFEATURE_XTILE_DATA
  static const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return may;
}

// The calling thread's tile registers, all of 16 rows by 64 bytes, for as long as it lives.
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

// x as tiles [ceil(m / 16)][k / 32][16 pairs of k][16 rows of x]; rows behind m are 0.
void pack_x(const Shape& shape, const Bf16* x, float* packed) {
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

// 16 columns of a product of tiles, and those of them that are stored. The last panel of weight
// starts early enough to be whole; its first columns are stored by the panel before.
struct Panel {
  int64_t first, begin, end;

  Panel(int64_t column, int64_t n)
      : first(std::min(column, n - kTileRows)),
        begin(std::min(column, n)),
        end(std::min(column + kTileRows, n)) {}
};

// out[t0 + t, panel] = sums[column][t] + bias, rounded.
void store_panel(const Shape& shape, const float* sums, const Panel& panel, const Bf16* bias,
                 int64_t t0, Bf16* out) {
  if (panel.begin >= panel.end || t0 >= shape.m) return;
  Vec rows[kLanes];
  for (int r = 0; r < kLanes; ++r) rows[r] = load(sums + r * kLanes);
  transpose(rows);
  const Vec added = bias != nullptr ? load(bias + panel.first) : Vec{};
  for (int64_t t = 0; t < std::min(kTileRows, shape.m - t0); ++t) {
    Bf16* row = out + (t0 + t) * shape.out_stride;
    if (panel.begin == panel.first) {
      store(row + panel.first, rows[t] + added);
    } else {
      Bf16 rounded[kLanes];
      store(rounded, rows[t] + added);
      std::memcpy(row + panel.begin, rounded + (panel.begin - panel.first),
                  (panel.end - panel.begin) * sizeof(Bf16));
    }
  }
}

// Columns [column, column + 64) of rows [t0, t0 + 16) of x.
void tiles_4x1(const Shape& shape, const float* packed, const Bf16* weight, const Bf16* bias,
               int64_t column, int64_t t0, Bf16* out) {
  const Panel panels[4] = {{column, shape.n},
                           {column + kTileRows, shape.n},
                           {column + 2 * kTileRows, shape.n},
                           {column + 3 * kTileRows, shape.n}};
  const Bf16* rows[4];
  for (int p = 0; p < 4; ++p) rows[p] = weight + panels[p].first * shape.weight_stride;
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
  for (int p = 0; p < 4; ++p) store_panel(shape, sums[p], panels[p], bias, t0, out);
}

// Columns [column, column + 32) of rows [t0, t0 + 32) of x.
void tiles_2x2(const Shape& shape, const float* packed, const Bf16* weight, const Bf16* bias,
               int64_t column, int64_t t0, Bf16* out) {
  const Panel panels[2] = {{column, shape.n}, {column + kTileRows, shape.n}};
  const Bf16* rows[2];
  for (int p = 0; p < 2; ++p) rows[p] = weight + panels[p].first * shape.weight_stride;
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
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, rows[1] + i, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[4][kTileRows * kLanes];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  for (int p = 0; p < 4; ++p) {
    store_panel(shape, sums[p], panels[p / 2], bias, t0 + p % 2 * kTileRows, out);
  }
}

void linear_tiles(const Shape& shape, const Bf16* x, const Bf16* weight, const Bf16* bias,
                  double cost, Bf16* out) {
  thread_local std::vector<float> packed_x;
  packed_x.resize((shape.m + kTileRows - 1) / kTileRows * kTileRows * shape.k / 2);
  float* packed = packed_x.data();
  pack_x(shape, x, packed);
  const int64_t num_groups = (shape.n + kGroupColumns - 1) / kGroupColumns;
  parallel_for(num_groups, cost * kGroupColumns, [&](int64_t begin, int64_t end) {
    const TileRegisters registers;
    asm volatile("" ::: "memory");  // loads of tiles come after the stores that fill packed
    for (int64_t column = begin * kGroupColumns; column < end * kGroupColumns;
         column += kGroupColumns) {
      int64_t t = 0;
      for (; t + kTileRows < shape.m; t += 2 * kTileRows) {
        tiles_2x2(shape, packed, weight, bias, column, t, out);
        tiles_2x2(shape, packed, weight, bias, column + 2 * kTileRows, t, out);
      }
      if (t < shape.m) tiles_4x1(shape, packed, weight, bias, column, t, out);
    }
  });
}

#endif

// ---- the op -------------------------------------------------------------------------------------

// The factors of both costs are measured: nanoseconds a byte of weight, and a byte and row of x.
template <class T>
void linear_any(const Shape& shape, const T* x, const T* weight, const T* bias, T* out) {
  const auto bytes = static_cast<double>(shape.k * sizeof(T));  // of a column's weight
  const auto rows = static_cast<double>(shape.m);
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<T, Bf16>) {
    if (shape.k % kTileDepth == 0 && shape.n >= kTileRows && may_use_tiles()) {
      return linear_tiles(shape, x, weight, bias, bytes * (0.035 + 0.0007 * rows), out);
    }
  }
#endif
  const int64_t num_panels = (shape.n + kLanes - 1) / kLanes;
  const double cost = kLanes * bytes * (0.035 + 0.008 * rows);
  parallel_for(num_panels, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      block_columns<T>(shape, x, weight, bias, i * kLanes, out);
    }
  });
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& out) {
  const LinearArgs args = linear_args({"linear", Place::kCpu}, x, weight, bias, out);
  const Shape shape{.m = args.m(),
                    .n = args.n(),
                    .k = args.k(),
                    .x_stride = args.x.stride(0),
                    .weight_stride = args.weight.stride(0),
                    .out_stride = args.out.stride(0)};
  if (shape.m == 0 || shape.n == 0) return;
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) {
    linear_any<T>(shape, args.x.ptr<T>(), args.weight.ptr<T>(), static_cast<const T*>(args.bias),
                  args.out.ptr<T>());
  });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) { m.impl("linear", TORCH_BOX(&pyserve::linear)); }
