// sample on a CPU: draws one token per row of logits [num_samples, vocab_size], float32 or
// bfloat16, by the sampling parameters in the row's slot, in this order:
//   logit bias -> ban of stop ids -> repetition, frequency, presence penalty -> temperature ->
//   top-k -> min-p -> top-p -> draw
//
// It follows the twin in pyserve/ops/reference.py bit for bit. A token's weight is round(exp((logit
// - max) / temperature) * 2^34), computed without fused operations. Weights are integers whose sums
// are exact in float64, so the result depends neither on the order of a sum, nor on the number of
// threads, nor on the batch. top-k keeps the largest logits, top-p and min-p the largest weights,
// and of equal ones each keeps the lowest ids. The draw is one Philox4x32-10 number with key (seed)
// and counter (position, sample index), by which the CDF of the survivors, in the order of ids, is
// inverted.
//
// Nothing is sorted. A threshold is found by bisection over the bits of a float; each step is one
// vectorised pass over candidates that a cheap bound has selected before. Rows are split over
// threads.
#include <torch/csrc/stable/library.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>

#include "../common/args/sample.h"
#include "../common/philox.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "sample";
constexpr float kGreedyTemperature = 1e-5f;  // a row with a lower temperature is greedy
constexpr int kWeightBits = 34;
constexpr int64_t kChunk = 4 * kLanes;  // tokens per partial sum of the draw

struct Slot {
  int32_t* words;

  int32_t integer(int word) const { return words[word]; }
  float real(int word) const { return std::bit_cast<float>(words[word]); }
};

// Memory that only grows. Growing it loses the content.
template <class T>
class Buffer {
 public:
  T* get(int64_t n) {
    if (n > capacity_) {
      data_.reset(new T[n]);
      capacity_ = n;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t capacity_ = 0;
};

// The buffers of one thread, kept between calls.
struct Scratch {
  Buffer<float> logits, maxima, values, weights;
  Buffer<double> mass;
  Buffer<int32_t> ids;
};

// Tokens that may still be drawn, in the order of their ids. If ids is null, token i has index i.
struct Survivors {
  const int32_t* ids;
  const float* weights;
  int64_t n;
};

// ---- logits -------------------------------------------------------------------------------------

// The largest logit; NaN if any is NaN or +inf.
float scan(const float* logits, int64_t n) {
  Vec largest = splat(-INFINITY);
  IntVec bad = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec x = load(logits + i);
    largest = max(x, largest);
    bad |= ~(x < INFINITY);
  }
  float result = max(largest);
  bool is_bad = any(bad);
  for (; i < n; ++i) {
    result = std::max(result, logits[i]);
    is_bad |= !(logits[i] < INFINITY);
  }
  return is_bad ? NAN : result;
}

void copy_logits(const float* logits, int64_t n, float* out) {
  std::memcpy(out, logits, n * sizeof *out);
}

void copy_logits(const Bf16* logits, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(logits + i));
  for (; i < n; ++i) out[i] = to_float(logits[i]);
}

void apply_penalties(const Slot& slot, const int16_t* counts, int64_t n, float* logits) {
  const float repetition = slot.real(kSlotRepetitionPenalty);
  const float frequency = slot.real(kSlotFrequencyPenalty);
  const float presence = slot.real(kSlotPresencePenalty);
  constexpr int64_t kWord = sizeof(uint64_t) / sizeof(int16_t);
  auto apply = [&](int64_t i) {
    if (counts[i] == 0) return;
    const int num_output = counts[i] & kMaxTokenCount;
    float x = logits[i] > 0 ? logits[i] / repetition : logits[i] * repetition;
    x -= frequency * static_cast<float>(num_output);
    x -= num_output > 0 ? presence : 0.0f;
    logits[i] = x;
  };
  int64_t i = 0;
  for (; i + kWord <= n; i += kWord) {
    uint64_t word;
    std::memcpy(&word, counts + i, sizeof word);
    if (word == 0) continue;
    for (int64_t j = i; j < i + kWord; ++j) apply(j);
  }
  for (; i < n; ++i) apply(i);
}

struct Logits {
  const float* values;
  float largest;  // NaN if any is NaN or +inf
};

// The row's logits as float32, after bias, ban and penalties.
template <class T>
Logits adjusted_logits(const T* logits, int64_t n, const Slot& slot, const int16_t* counts,
                       Scratch& scratch) {
  const int32_t num_bias = slot.integer(kSlotNumBias);
  const bool is_banned = slot.integer(kSlotNumStop) > 0 &&
                         slot.integer(kSlotNumComputed) < slot.integer(kSlotMinTotalLen);
  const bool has_penalties = slot.integer(kSlotHasPenalties) != 0;
  const bool is_plain = num_bias == 0 && !is_banned && !has_penalties;
  if constexpr (std::is_same_v<T, float>) {
    if (is_plain) return {logits, scan(logits, n)};
  }
  float* out = scratch.logits.get(n);
  copy_logits(logits, n, out);
  const float largest = scan(out, n);
  if (is_plain || std::isnan(largest)) return {out, largest};
  for (int32_t i = 0; i < num_bias; ++i) {
    out[slot.integer(kSlotBiasIds + i)] += slot.real(kSlotBiasValues + i);
  }
  for (int32_t i = 0; is_banned && i < slot.integer(kSlotNumStop); ++i) {
    out[slot.integer(kSlotStopIds + i)] = -INFINITY;
  }
  if (has_penalties) apply_penalties(slot, counts, n, out);
  return {out, scan(out, n)};
}

// The index of the first element equal to `value`, which must exist.
int64_t index_of(const float* x, int64_t n, float value) {
  int64_t i = 0;
  while (i + kChunk <= n) {
    IntVec found = {};
    for (int64_t j = i; j < i + kChunk; j += kLanes) found |= load(x + j) == value;
    if (any(found)) break;
    i += kChunk;
  }
  while (i < n && x[i] != value) ++i;
  return i;
}

// ---- weights ------------------------------------------------------------------------------------

// round(exp(x) * 2^34) for x <= 0. The order of operations is the specification, and none is fused.
inline Vec quantized_exp(Vec x) {
  constexpr float kCoefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                     4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  x = x < -30.0f ? splat(-30.0f) : x;
  const Vec shifted = x * 1.44269504088896341f + kRoundShift;
  const Vec n = shifted - kRoundShift;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(kCoefficients[0]);
  for (int i = 1; i < 6; ++i) p = p * r + kCoefficients[i];
  const Vec y = ((p * (r * r) + r) + 1.0f) * pow2_of_shifted(shifted + float{kWeightBits});
  // Adding 2^23 rounds smaller numbers to integers; larger floats are integers already.
  return y < 0x1p23f ? (y + 0x1p23f) - 0x1p23f : y;
}

// Vectors of as many floats as a register holds doubles.
using ShortVec = float __attribute__((vector_size(kLanes * 2)));
using DoubleVec = double __attribute__((vector_size(kLanes * 4)));
constexpr int kDoubles = kLanes / 2;

// The sum of the weights that are >= threshold. n is a multiple of kLanes.
double mass_from(const float* weights, int64_t n, float threshold) {
  DoubleVec mass[2] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int half = 0; half < 2; ++half) {
      ShortVec w;
      std::memcpy(&w, weights + i + half * kDoubles, sizeof w);
      mass[half] += __builtin_convertvector(w >= threshold ? w : ShortVec{}, DoubleVec);
    }
  }
  mass[0] += mass[1];
  double total = 0;
  for (int lane = 0; lane < kDoubles; ++lane) total += mass[0][lane];
  return total;
}

// The weights of n logits, with those below min_weight set to 0. `out` has room for whole vectors
// and is filled up with 0 behind n.
void weigh(const float* logits, int64_t n, float largest, const Slot& slot, float* out) {
  const float factor = 1.0f / slot.real(kSlotTemperature);
  const float min_weight =
      std::nearbyint(slot.real(kSlotMinP) * static_cast<float>(int64_t{1} << kWeightBits));
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec x = i + kLanes <= n ? load(logits + i) : load_first(logits + i, n - i);
    const Vec weight = quantized_exp((x - largest) * factor);
    store(out + i, weight < min_weight ? Vec{} : weight);
  }
  for (int64_t i = n; i % kLanes != 0; ++i) out[i] = 0;
}

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// ---- selection ----------------------------------------------------------------------------------

// The key of a float: integers in the order of the floats' values.
inline int32_t to_ordered(float x) {
  const auto bits = std::bit_cast<int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float from_ordered(int32_t i) { return std::bit_cast<float>(i ^ ((i >> 31) & 0x7fffffff)); }

// How many of n values are >= threshold. n is a multiple of kLanes.
int64_t count_from(const float* values, int64_t n, float threshold) {
  IntVec count = {};
  for (int64_t i = 0; i < n; i += kLanes) count -= load(values + i) >= threshold;
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
  return total;
}

// A float t in [low, high] with amount(t) >= target: the largest such t, or any one whose amount is
// at most target + slack. amount(t) must fall as t grows, and amount(low) >= target.
template <class Amount>
float find_threshold(float low, float high, double target, double slack, const Amount& amount) {
  int64_t good = to_ordered(low), end = int64_t{to_ordered(high)} + 1;
  while (end - good > 1) {
    const int64_t middle = good + (end - good) / 2;
    const double found = amount(from_ordered(static_cast<int32_t>(middle)));
    (found >= target ? good : end) = middle;
    if (found >= target && found <= target + slack) break;
  }
  return from_ordered(static_cast<int32_t>(good));
}

// Calls take(i) for all i with x[i] >= bound, in order, and for some other i as well.
template <class Take>
void visit_from(const float* x, int64_t n, float bound, const Take& take) {
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    IntVec found = {};
    for (int64_t j = i; j < i + kChunk; j += kLanes) found |= load(x + j) >= bound;
    if (!any(found)) continue;
    for (int64_t j = i; j < i + kChunk; ++j) take(j);
  }
  for (; i < n; ++i) take(i);
}

// A bound that is not above the k-th largest of n logits: the k-th largest, or hardly less, of
// maxima over disjoint parts.
float top_k_bound(const float* logits, int64_t n, int64_t k, float largest, Scratch& scratch) {
  const int64_t depth = std::clamp<int64_t>(n / (4 * k), 1, 64);
  const int64_t num_parts = n / (depth * kLanes) * kLanes;
  if (num_parts < k) return -INFINITY;
  float* maxima = scratch.maxima.get(num_parts);
  for (int64_t i = 0; i < num_parts; i += kLanes) {
    const float* part = logits + i * depth;
    Vec part_max = load(part);
    for (int64_t j = 1; j < depth; ++j) part_max = max(load(part + j * kLanes), part_max);
    store(maxima + i, part_max);
  }
  const auto target = static_cast<double>(k);
  return find_threshold(-INFINITY, largest, target, target, [&](float threshold) {
    return static_cast<double>(count_from(maxima, num_parts, threshold));
  });
}

// Keeps the k largest logits in the order of their ids, and of equal ones those with the lowest
// ids, in scratch.values and scratch.ids, which have room for whole vectors. Returns how many were
// kept.
int64_t keep_top_k(const float* logits, int64_t n, int64_t k, float largest, Scratch& scratch) {
  const float bound = top_k_bound(logits, n, k, largest, scratch);
  float* values = scratch.values.get(padded(n) + kLanes);
  int32_t* ids = scratch.ids.get(padded(n) + kLanes);
  int64_t count = 0;
  visit_from(logits, n, bound, [&](int64_t i) {
    values[count] = logits[i];
    ids[count] = static_cast<int32_t>(i);
    count += logits[i] >= bound;
  });
  std::fill(values + count, values + padded(count), -INFINITY);
  const float threshold =
      find_threshold(bound, largest, static_cast<double>(k), 0, [&](float candidate) {
        return static_cast<double>(count_from(values, padded(count), candidate));
      });
  int64_t num_equal = k;
  for (int64_t i = 0; i < count; ++i) num_equal -= values[i] > threshold;
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool keep = values[i] > threshold || (values[i] == threshold && num_equal-- > 0);
    values[kept] = values[i];
    ids[kept] = ids[i];
    kept += keep;
  }
  return kept;
}

// Keeps the smallest set of the largest weights whose mass reaches top_p * total. The survivors'
// arrays are then in scratch.values and scratch.ids.
Survivors keep_top_p(const Survivors& in, float top_p, Scratch& scratch) {
  // In peaked rows few tokens reach the mass, so candidates are first selected by a coarse bound.
  const double target = double{top_p} * mass_from(in.weights, padded(in.n), 1.0f);
  float bound = 1.0f;
  for (const float candidate : {0x1p30f, 0x1p26f, 0x1p20f}) {
    if (mass_from(in.weights, padded(in.n), candidate) < target) continue;
    bound = candidate;
    break;
  }
  float* weights = scratch.values.get(padded(in.n) + kLanes);
  int32_t* ids = scratch.ids.get(padded(in.n) + kLanes);
  int64_t n = 0;
  visit_from(in.weights, in.n, bound, [&](int64_t i) {
    weights[n] = in.weights[i];
    ids[n] = in.ids != nullptr ? in.ids[i] : static_cast<int32_t>(i);
    n += in.weights[i] >= bound;
  });
  std::fill(weights + n, weights + padded(n), 0.0f);
  const float threshold = find_threshold(bound, 0x1p34f, target, 0, [&](float candidate) {
    return mass_from(weights, padded(n), candidate);
  });
  double before = mass_from(weights, padded(n), std::nextafter(threshold, INFINITY));
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    bool keep = weights[i] > threshold;
    if (weights[i] == threshold && before < target) {
      before += double{threshold};
      keep = true;
    }
    weights[kept] = weights[i];
    ids[kept] = ids[i];
    kept += keep;
  }
  std::fill(weights + kept, weights + padded(kept), 0.0f);
  return {ids, weights, kept};
}

// ---- draw ---------------------------------------------------------------------------------------

// floor(u / 2^64 * total) for a random 64-bit u and an integer total below 2^53.
double draw_below(const Slot& slot, double total) {
  const PhiloxWords random =
      philox4x32({{static_cast<uint32_t>(slot.integer(kSlotNumComputed)),
                   static_cast<uint32_t>(slot.integer(kSlotSampleIndex)), 0, 0}},
                 static_cast<uint32_t>(slot.integer(kSlotSeedLow)),
                 static_cast<uint32_t>(slot.integer(kSlotSeedHigh)));
  const uint64_t u = uint64_t{random.word[1]} << 32 | random.word[0];
  return static_cast<double>(static_cast<uint64_t>(
      (static_cast<unsigned __int128>(u) * static_cast<uint64_t>(total)) >> 64));
}

// The first survivor at which the running sum of weights exceeds the drawn number; -1 if there is
// no survivor.
int64_t draw(const Survivors& in, const Slot& slot, Scratch& scratch) {
  const int64_t num_chunks = (in.n + kChunk - 1) / kChunk;
  double* masses = scratch.mass.get(num_chunks);
  double total = 0;
  for (int64_t c = 0; c < num_chunks; ++c) {
    const int64_t begin = c * kChunk;
    masses[c] = mass_from(in.weights + begin, std::min(padded(in.n) - begin, kChunk), 0.0f);
    total += masses[c];
  }
  if (!(total > 0)) return -1;
  double left = draw_below(slot, total);
  int64_t c = 0;
  for (; c + 1 < num_chunks && left >= masses[c]; ++c) left -= masses[c];
  int64_t i = c * kChunk;
  for (; i + 1 < in.n && left >= double{in.weights[i]}; ++i) left -= double{in.weights[i]};
  return in.ids != nullptr ? in.ids[i] : i;
}

// ---- the op -------------------------------------------------------------------------------------

template <class T>
int64_t sample_row(const T* logits, int64_t n, const Slot& slot, const int16_t* counts) {
  thread_local Scratch scratch;
  const auto [adjusted, largest] = adjusted_logits(logits, n, slot, counts, scratch);
  if (!std::isfinite(largest)) return -1;
  const float* values = adjusted;
  if (slot.real(kSlotTemperature) < kGreedyTemperature) return index_of(values, n, largest);

  const int64_t top_k = slot.integer(kSlotTopK);
  Survivors survivors{nullptr, nullptr, n};
  if (top_k > 0 && top_k < n) {
    survivors.n = keep_top_k(values, n, top_k, largest, scratch);
    survivors.ids = scratch.ids.get(0);
    values = scratch.values.get(0);
  }
  float* weights = scratch.weights.get(padded(survivors.n));
  weigh(values, survivors.n, largest, slot, weights);
  survivors.weights = weights;
  const float top_p = slot.real(kSlotTopP);
  if (top_p < 1.0f) survivors = keep_top_p(survivors, top_p, scratch);
  return draw(survivors, slot, scratch);
}

void check_slot(const Slot& slot, int64_t vocab_size) {
  const int32_t num_bias = slot.integer(kSlotNumBias), num_stop = slot.integer(kSlotNumStop);
  PYSERVE_CHECK(
      num_bias >= 0 && num_bias <= kMaxLogitBias && num_stop >= 0 && num_stop <= kMaxStopTokenIds,
      kOp, ": a slot has ", num_bias, " biases and ", num_stop, " stop ids");
  uint32_t largest = 0;
  for (int32_t i = 0; i < num_bias; ++i) {
    largest = std::max(largest, static_cast<uint32_t>(slot.integer(kSlotBiasIds + i)));
  }
  for (int32_t i = 0; i < num_stop; ++i) {
    largest = std::max(largest, static_cast<uint32_t>(slot.integer(kSlotStopIds + i)));
  }
  PYSERVE_CHECK(largest < vocab_size, kOp, ": a slot holds token id ",
                static_cast<int32_t>(largest), ", the vocabulary ", vocab_size);
}

template <class T>
void sample_rows(const SampleArgs& args) {
  const View &logits = args.logits, &slots = args.slots, &token_counts = args.token_counts;
  const int64_t vocab_size = args.vocab_size();
  const double cost = static_cast<double>(vocab_size) * 0.5;
  parallel_for(logits.size(0), cost, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot_id = args.sample_slots.ptr<int32_t>()[row * args.sample_slots.stride(0)];
      int32_t& result = args.sampled.ptr<int32_t>()[row];
      result = 0;
      if (slot_id < 0) continue;
      const Slot slot{slots.ptr<int32_t>() + slot_id * slots.stride(0)};
      int16_t* counts = token_counts.ptr<int16_t>() + slot_id * token_counts.stride(0);
      result = static_cast<int32_t>(
          sample_row(logits.ptr<T>() + row * logits.stride(0), vocab_size, slot, counts));
      // A failed row leaves a token that is in range, because the row's next step may be queued
      // already.
      slot.words[kSlotLastToken] = std::max(result, 0);
      if (result >= 0 && slot.integer(kSlotHasPenalties) != 0 &&
          (counts[result] & kMaxTokenCount) != kMaxTokenCount) {
        ++counts[result];
      }
    }
  });
}

void sample(const Tensor& logits_tensor, const Tensor& sample_slots_tensor,
            const Tensor& slots_tensor, const Tensor& token_counts_tensor,
            const std::optional<Tensor>& /*workspace*/, const Tensor& sampled_tensor) {
  const SampleArgs args = sample_args({kOp, Place::kCpu}, logits_tensor, sample_slots_tensor,
                                      slots_tensor, token_counts_tensor, sampled_tensor);
  const View& slots = args.slots;
  for (int64_t row = 0; row < args.num_rows(); ++row) {
    const int64_t slot = args.sample_slots.ptr<int32_t>()[row * args.sample_slots.stride(0)];
    PYSERVE_CHECK(slot >= -1 && slot < slots.size(0), kOp, ": slot ", slot, " of ", slots.size(0));
    if (slot >= 0) check_slot({slots.ptr<int32_t>() + slot * slots.stride(0)}, args.vocab_size());
  }
  dispatch_float<float, Bf16>(args.logits, [&]<class T>(T) { sample_rows<T>(args); });
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) { m.impl("sample", TORCH_BOX(&pyserve::sample)); }
