// apply_bitmask on a CPU: logits [num_rows, vocab_size], float32 or bfloat16, become -inf, in
// place, where the mask of their row has no bit. Allowed logits are not changed. Where 32 tokens
// are all allowed or all forbidden, they are not even read; that is the usual case, since a grammar
// allows a handful of tokens or nearly all.
//
// Bound by the bytes of the mask and of the logits that become -inf. Rows are split over threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "../common/args/bitmask.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "apply_bitmask";
constexpr int kWordBits = 32;

// The bits of logits, for float32 and bfloat16.
template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using Element = uint32_t;
  using Vector = UintVec;
  static constexpr Element kMinusInf = 0xff800000u;
};
template <>
struct BitsOf<Bf16> {
  using Element = uint16_t;
  using Vector = HalfVec;
  static constexpr Element kMinusInf = 0xff80u;
};

// Sets those of the 32 logits at x to -inf that have no bit in `word`.
template <class Bits>
void mask_word(typename Bits::Element* x, uint32_t word) {
  using Vector = typename Bits::Vector;
  using Element = typename Bits::Element;
  Vector lane_bits;
  for (int lane = 0; lane < kLanes; ++lane) lane_bits[lane] = static_cast<Element>(1u << lane);
  const Vector minus_inf = Vector{} + Bits::kMinusInf;
  for (int i = 0; i < kWordBits; i += kLanes) {
    Vector values;
    std::memcpy(&values, x + i, sizeof values);
    const auto part = static_cast<Element>(word >> i);
    const Vector bits = (Vector{} + part) & lane_bits;
    values = bits == 0 ? minus_inf : values;
    std::memcpy(x + i, &values, sizeof values);
  }
}

template <class Bits>
void mask_row(typename Bits::Element* x, int64_t vocab_size, const int32_t* mask,
              int64_t num_words) {
  const int64_t num_whole = std::min(num_words, vocab_size / kWordBits);
  for (int64_t i = 0; i < num_whole; ++i) {
    const auto word = static_cast<uint32_t>(mask[i]);
    if (word == 0) {
      std::fill_n(x + i * kWordBits, kWordBits, Bits::kMinusInf);
    } else if (word != std::numeric_limits<uint32_t>::max()) {
      mask_word<Bits>(x + i * kWordBits, word);
    }
  }
  for (int64_t i = num_whole * kWordBits; i < vocab_size; ++i) {
    const int64_t word = i / kWordBits;
    const bool is_allowed =
        word < num_words && (static_cast<uint32_t>(mask[word]) >> i % kWordBits & 1) != 0;
    if (!is_allowed) x[i] = Bits::kMinusInf;
  }
}

void apply_bitmask(const Tensor& logits_tensor, const Tensor& bitmask_tensor,
                   const Tensor& rows_tensor) {
  const BitmaskArgs args =
      bitmask_args({kOp, Place::kCpu}, logits_tensor, bitmask_tensor, rows_tensor);
  const auto row_of = [&](int64_t i) -> int64_t {
    return args.rows.ptr<int32_t>()[i * args.rows.stride(0)];
  };
  for (int64_t i = 0; i < args.num_masked(); ++i) {
    PYSERVE_CHECK(row_of(i) >= -1 && row_of(i) < args.num_rows(), kOp, ": row ", row_of(i), " of ",
                  args.num_rows());
  }
  const int64_t vocab_size = args.vocab_size();
  const double cost = static_cast<double>(vocab_size) * 0.15;
  dispatch_float<float, Bf16>(args.logits, [&]<class T>(T) {
    using Bits = BitsOf<T>;
    parallel_for(args.num_masked(), cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (row_of(i) < 0) continue;
        mask_row<Bits>(
            args.logits.ptr<typename Bits::Element>() + row_of(i) * args.logits.stride(0),
            vocab_size, args.bitmask.ptr<int32_t>() + i * args.bitmask.stride(0),
            args.num_words());
      }
    });
  });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) {
  m.impl("apply_bitmask", TORCH_BOX(&pyserve::apply_bitmask));
}
