// The kernels of adapters (cuda/gpu/lora) on a CPU, by emulated_sm90a.h: both together, results are
// held against float64 sums. Prints what is wrong; its exit code is 1 then. Arguments: rounds, and
// 1 to expect the sums of other adapters, which must be found wrong.
#include "emulated_sm90a.h"

[[noreturn]] void __trap() { machine::fail("a kernel trapped"); }

namespace pyserve::gpu {
float __fdividef(float a, float b) { return a / b; }
float exp2_approx(float x) { return std::exp2(x); }

// Of either kind by turns: with little shared memory, and with much.
Device card{132};
cudaError_t current_device(const Device** device) {
  card.smem_per_block = (card.smem_per_block == 99 * 1024 ? 227 : 99) * 1024;
  *device = &card;
  return cudaSuccess;
}

#include "gate.cuh.inc"
#include "lora.h.inc"
#include "segments.cuh.inc"
#include "shrink.cuh.inc"
#include "shrink_many.cu.inc"
}  // namespace pyserve::gpu
namespace pyserve::gpu::shrink {
#include "shrink.cu.inc"
}  // namespace pyserve::gpu::shrink
namespace pyserve::gpu::expand {
#include "expand.cuh.inc"
namespace many {
#include "staging.cuh.inc"
#include "expand_many.cu.inc"
}  // namespace many
}  // namespace pyserve::gpu::expand
namespace pyserve::gpu {
cudaError_t launch_lora_expand_many(const LoraExpandParams& params, cudaStream_t stream) {
  return expand::many::launch_lora_expand_many(params, stream);
}
}  // namespace pyserve::gpu
namespace pyserve::gpu::expand {
#include "expand.cu.inc"
}  // namespace pyserve::gpu::expand

using namespace pyserve::gpu;

namespace {

constexpr float kEps = 1e-5f;
int shift = 0;  // of the slots that are expected

template <class T>
std::vector<T> randoms(size_t count, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<T> values(count);
  for (auto& value : values) value = from_float<T>(normal(machine::random));
  return values;
}

int any_of(std::initializer_list<int> choices) {
  return choices.begin()[machine::random() % choices.size()];
}

template <class T>
std::pair<const unsigned char*, const unsigned char*> range(const std::vector<T>& values) {
  const auto* begin = reinterpret_cast<const unsigned char*>(values.data());
  return {begin, begin + values.size() * sizeof(T)};
}

// Tokens of each slot behind `first` without, and `last` more; parts' columns; one line of a
// failure.
struct Shape {
  std::vector<int> tokens;
  int first, last, num_parts, part_columns, max_rank, k, num_splits;
  bool is_gated, has_norm;

  int num_tokens() const {
    int sum = first + last;
    for (const int count : tokens) sum += count;
    return sum;
  }
  int num_slots() const { return static_cast<int>(tokens.size()); }
  int columns() const { return num_parts * part_columns; }
};

template <class T>
struct Case {
  Shape s;
  std::vector<T> x, a, b, old, out;
  std::vector<int32_t> starts, ranks, bounds;
  std::vector<float> scales, squares, shrunk;
  int num_squares, out_stride;

  explicit Case(const Shape& shape) : s(shape) {
    const int num_tokens = s.num_tokens();
    x = randoms<T>(size_t(num_tokens) * s.k, 1.0f);
    const size_t num_rows = size_t(s.num_slots()) * s.num_parts * s.max_rank;
    a = randoms<T>(num_rows * s.k, 1 / std::sqrt(float(s.k)));
    // Of any rank what is added is as large as what it is added to: it has 16 bits where that has 8.
    const float b_scale = 1 / std::sqrt(std::max(4.0f, s.max_rank / 4.0f));
    b = randoms<T>(size_t(s.num_slots()) * s.columns() * s.max_rank, b_scale);
    old = randoms<T>(size_t(num_tokens) * s.columns(), 1.0f);
    starts = {s.first};
    for (const int count : s.tokens) starts.push_back(starts.back() + count);
    for (int i = 0; i < s.num_slots() * s.num_parts; ++i) {
      ranks.push_back(any_of({0, 1, s.max_rank / 2, s.max_rank, s.max_rank}));
      scales.push_back(0.5f + machine::random() % 100 / 100.0f);
    }
    for (int part = 0; part <= s.num_parts; ++part) bounds.push_back(part * s.part_columns);
    num_squares = (s.k + 15) / 16;
    for (int i = 0; i < num_tokens * num_squares; ++i) {
      squares.push_back(1.0f + machine::random() % 100);
    }
    shrunk.assign(size_t(s.num_splits) * num_tokens * s.num_parts * s.max_rank, NAN);
    out_stride = s.is_gated ? s.columns() / 2 : s.columns();
    out = s.is_gated ? std::vector<T>(size_t(num_tokens) * out_stride, from_float<T>(NAN)) : old;
    poison();
  }

  int rank(int slot, int part) const { return ranks[slot * s.num_parts + part]; }

  // What lies behind a rank.
  void poison() {
    for (int slot = 0; slot < s.num_slots(); ++slot) {
      for (int part = 0; part < s.num_parts; ++part) {
        for (int r = rank(slot, part); r < s.max_rank; ++r) {
          const size_t row = size_t(slot * s.num_parts + part) * s.max_rank + r;
          std::fill_n(&a[row * s.k], s.k, from_float<T>(NAN));
          for (int c = 0; c < s.part_columns; ++c) {
            const size_t column = size_t(slot) * s.columns() + part * s.part_columns + c;
            b[column * s.max_rank + r] = from_float<T>(NAN);
          }
        }
      }
    }
  }

  void launch() {
    const LoraRows rows{starts.data(), ranks.data(), s.num_parts, s.num_slots(), s.num_parts,
                        s.max_rank, s.num_tokens()};
    const int64_t token = s.num_parts * s.max_rank;
    const LoraShrunk between{shrunk.data(), s.num_tokens() * token, token, s.max_rank,
                             s.num_splits};
    const Dtype dtype =
        std::is_same_v<T, __nv_bfloat16> ? Dtype::kBfloat16 : Dtype::kFloat16;
    const LoraShrinkParams down{.rows = rows,
                                .x = x.data(),
                                .x_stride = s.k,
                                .a = a.data(),
                                .a_slot_stride = token * s.k,
                                .a_part_stride = int64_t{s.max_rank} * s.k,
                                .a_stride = s.k,
                                .scales = scales.data(),
                                .scales_stride = s.num_parts,
                                .x_squares = s.has_norm ? squares.data() : nullptr,
                                .x_squares_stride = num_squares,
                                .eps = kEps,
                                .out = between,
                                .k = s.k,
                                .dtype = dtype};
    machine::readable = {range(x), range(a)};
    shrink::launch_lora_shrink(down, nullptr);
    const LoraExpandParams up{.rows = rows,
                              .shrunk = between,
                              .b = b.data(),
                              .b_slot_stride = int64_t{s.columns()} * s.max_rank,
                              .b_stride = s.max_rank,
                              .columns = bounds.data(),
                              .gate_up = s.is_gated ? old.data() : nullptr,
                              .gate_up_stride = s.columns(),
                              .out = out.data(),
                              .out_stride = out_stride,
                              .n = out_stride,
                              .dtype = dtype};
    machine::readable = {range(old), range(out)};
    // Either kernel, for any number of tokens: which is faster is another matter.
    const bool is_many = s.num_tokens() > kManyTokens || machine::random() % 2 == 0;
    (is_many ? launch_lora_expand_many : expand::launch_lora_expand)(up, nullptr);
  }

  // What a token's columns become, before any activation.
  std::vector<double> sums(int token) const {
    std::vector<double> sum(s.columns());
    for (int c = 0; c < s.columns(); ++c) sum[c] = to_float(old[size_t(token) * s.columns() + c]);
    int slot = 0;
    while (slot < s.num_slots() && token >= starts[slot + 1]) ++slot;
    if (token < starts[0] || slot == s.num_slots()) return sum;
    slot = (slot + shift) % s.num_slots();
    double factor = 1;
    if (s.has_norm) {
      double total = 0;
      for (int i = 0; i < num_squares; ++i) total += squares[token * num_squares + i];
      factor = 1 / std::sqrt(total / s.k + kEps);
    }
    for (int part = 0; part < s.num_parts; ++part) {
      for (int r = 0; r < rank(slot, part); ++r) {
        double product = 0;
        const size_t row = size_t(slot * s.num_parts + part) * s.max_rank + r;
        for (int i = 0; i < s.k; ++i) {
          product += double{to_float(x[size_t(token) * s.k + i])} * to_float(a[row * s.k + i]);
        }
        product *= factor * scales[slot * s.num_parts + part];
        for (int c = part * s.part_columns; c < (part + 1) * s.part_columns; ++c) {
          sum[c] += product * to_float(b[(size_t(slot) * s.columns() + c) * s.max_rank + r]);
        }
      }
    }
    return sum;
  }

  // What is shrunk keeps 16 bits and its products are some 16, of numbers below 1 as a rule.
  void check() const {
    const double half = std::is_same_v<T, __nv_bfloat16> ? 1.0 / 256 : 1.0 / 2048;
    for (int token = 0; token < s.num_tokens(); ++token) {
      const std::vector<double> sum = sums(token);
      for (int c = 0; c < out_stride; ++c) {
        double expected = sum[c], size = 1 + std::abs(sum[c]);
        if (s.is_gated) {
          const double up = sum[out_stride + c];
          expected = sum[c] / (1 + std::exp(-sum[c])) * up;
          size *= 1 + std::abs(up);
        }
        const double found = to_float(out[size_t(token) * out_stride + c]);
        if (std::abs(found - expected) <= half * std::abs(expected) + 6e-3 * half * size) continue;
        std::printf(
            "wrong: token %d of %d, column %d: %g instead of %g (%d parts of %d, rank %d, k %d, "
            "%d splits, gated %d, norm %d)\n",
            token, s.num_tokens(), c, found, expected, s.num_parts, s.part_columns, s.max_rank, s.k,
            s.num_splits, s.is_gated, s.has_norm);
        std::exit(1);
      }
    }
  }
};

template <class T>
void run(const Shape& shape) {
  Case<T> c(shape);
  c.launch();
  c.check();
}

void run_both(const Shape& shape) {
  run<__nv_bfloat16>(shape);
  run<__half>(shape);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  shift = std::atoi(argv[2]);
  for (int round = 0; round < std::atoi(argv[1]); ++round) {
    machine::lands_late = round % 2 == 1;
    // One token, as at one user; few; more than few, split or not, in tiles of 32 to 128 tokens.
    run_both({{0, 1, 0}, 0, 0, 3, 72, 16, 1024, 8, false, true});
    run_both({{3, 1}, 1, 0, 2, 24, 40, 2600, 8, false, true});
    run_both({{1, 0}, 0, 0, 2, 160, 16, 2600, 2, true, true});
    run_both({{5, 0, 19, 1}, 2, 3, 2, 40, any_of({8, 12, 24}), 256, any_of({1, 3}), false, false});
    run_both({{5, 17, 0, 1}, 2, 3, any_of({1, 2}), 40, any_of({4, 16, 20}), 288, 2, true, false});
    run_both({{33, 70, 1}, 1, 4, 2, 48, any_of({16, 40}), 600, 3, false, true});
    run_both({{40, 0, 66}, 3, 2, 2, 136, any_of({16, 40}), 64, 2, true, false});
    // Many: more stages of k than are on their way, more tokens than there is room for at once.
    run_both({{1, 66}, 3, 2, 2, 136, any_of({16, 40}), any_of({552, 1000}), 1, false, true});
    run_both({{132, 0, 3}, 1, 2, 2, 40, 72, any_of({8, 200}), 1, true, false});
    run_both({{205, 70}, 1, 0, 1, 48, any_of({16, 132}), 72, any_of({1, 2}), false, false});
    // So many that they are split in any number: some have less of k, or nothing.
    run_both({{300, 0, 215}, 1, 2, 3, 24, any_of({8, 16}), 400, any_of({3, 8}), false, true});
    // Neither rows nor columns begin where 16 bytes do.
    run_both({{3, 18}, 1, 1, 3, 37, 7, 53, 2, false, false});
    run_both({{3, 70}, 1, 1, 2, 37, 7, 53, 1, true, true});
  }
}
