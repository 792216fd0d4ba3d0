// route on a CPU: which experts each token goes to and with what weights, and the tokens sorted by
// expert. x and router are float32 or bfloat16.
//
// A token's logits are float32 sums by linear_rows.h, and its scores are float32. Among equal
// choices the lower expert is taken; a NaN counts as the least. The assignments of an expert are in
// the order of the tokens, so what is added up of them, and in which order, depends on the input
// alone.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "../common/args/experts.h"
#include "linear_rows.h"
#include "parallel.h"
#include "vec.h"

namespace pyserve {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kSumEps = 1e-20f;  // added to a sum of sigmoids, which may be 0, as in DeepSeek-V3

// Working memory for one token: values per expert and per group.
struct Room {
  std::vector<float> logits;  // rounded up to whole vectors
  std::vector<float> scores, choices, group_choices;
  std::vector<char> is_taken;

  explicit Room(const RouteArgs& args)
      : logits(args.router.size(0) + kLanes),
        scores(args.num_experts()),
        choices(args.num_experts()),
        group_choices(args.rule.num_groups),
        is_taken(args.num_experts()) {}
};

template <class T>
void compute_logits(const RouteArgs& args, int64_t token, float* logits) {
  const Shape shape{.m = 1,
                    .n = args.router.size(0),
                    .k = args.x.size(1),
                    .x_stride = args.x.stride(0),
                    .weight_stride = args.router.stride(0),
                    .out_stride = 0};
  const Matrix<T> matrix{args.router.ptr<T>(), nullptr};
  const T* x = args.x.ptr<T>() + token * args.x.stride(0);
  for (int64_t column = 0; column < shape.n; column += kLanes) {
    store(logits + column, block_sums<T, 1>(shape, x, matrix, column));
  }
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void compute_scores(const RouteArgs& args, const float* logits, float* scores) {
  const int64_t n = args.num_experts();
  if (args.rule.is_sigmoid) {
    for (int64_t i = 0; i < n; ++i) scores[i] = sigmoid(logits[i]);
    return;
  }
  const float most = *std::max_element(logits, logits + n);
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) sum += scores[i] = std::exp(logits[i] - most);
  for (int64_t i = 0; i < n; ++i) scores[i] /= sum;
}

// Calls fn(index) for the `count` largest of values[0, n), largest first, the lowest index first
// among equal ones.
template <class Fn>
void take_largest(const float* values, int64_t n, int64_t count, std::vector<char>& is_taken,
                  const Fn& fn) {
  std::fill_n(is_taken.begin(), n, 0);
  for (int64_t i = 0; i < count; ++i) {
    int64_t best = -1;
    for (int64_t j = 0; j < n; ++j) {
      if (!is_taken[j] && (best < 0 || values[j] > values[best])) best = j;
    }
    is_taken[best] = 1;
    fn(best);
  }
}

// The number by which a group of experts is chosen: its largest choice or, with sigmoids, the sum
// of the two largest.
float group_choice(const float* choices, int64_t n, bool is_sigmoid) {
  float first = -kInfinity, second = -kInfinity;
  for (int64_t i = 0; i < n; ++i) {
    second = std::max(second, std::min(first, choices[i]));
    first = std::max(first, choices[i]);
  }
  return is_sigmoid && n > 1 ? first + second : first;
}

// Computes the numbers by which experts are chosen; -inf in groups that are not chosen.
void compute_choices(const RouteArgs& args, Room& room) {
  const RouteRule& rule = args.rule;
  const int64_t n = args.num_experts(), size = n / rule.num_groups;
  for (int64_t i = 0; i < n; ++i) {
    const float choice =
        room.scores[i] + (args.correction_bias != nullptr ? args.correction_bias[i] : 0.0f);
    room.choices[i] = std::isnan(choice) ? -kInfinity : choice;
  }
  if (rule.top_groups == rule.num_groups) return;
  for (int64_t i = 0; i < rule.num_groups; ++i) {
    room.group_choices[i] = group_choice(&room.choices[i * size], size, rule.is_sigmoid);
  }
  take_largest(room.group_choices.data(), rule.num_groups, rule.top_groups, room.is_taken,
               [](int64_t) {});
  for (int64_t i = 0; i < n; ++i) {
    if (!room.is_taken[i / size]) room.choices[i] = -kInfinity;
  }
}

// Stores the token's logits, its experts (in its row of places) and its weights. For padding,
// experts are -1 and weights 0.
template <class T>
void route_token(const RouteArgs& args, int64_t token, Room& room) {
  compute_logits<T>(args, token, room.logits.data());
  std::memcpy(args.logits.ptr<float>() + token * args.logits.stride(0), room.logits.data(),
              args.router.size(0) * sizeof(float));
  int32_t* experts = args.places.ptr<int32_t>() + token * args.places.stride(0);
  float* weights = args.weights.ptr<float>() + token * args.weights.stride(0);
  if (args.slot_mapping.ptr<int64_t>()[token] < 0) {
    std::fill_n(experts, args.top_k(), -1);
    std::fill_n(weights, args.weights.size(1), 0.0f);
    return;
  }
  compute_scores(args, room.logits.data(), room.scores.data());
  compute_choices(args, room);
  int64_t j = 0;
  float sum_of_taken = args.rule.is_sigmoid ? kSumEps : 0.0f;
  take_largest(room.choices.data(), args.num_experts(), args.top_k(), room.is_taken,
               [&](int64_t expert) {
                 experts[j] = static_cast<int32_t>(expert);
                 weights[j++] = room.scores[expert];
                 sum_of_taken += room.scores[expert];
               });
  const float divisor = args.rule.is_normalized ? sum_of_taken : 1.0f;
  for (j = 0; j < args.top_k(); ++j) weights[j] = weights[j] / divisor * args.rule.scale;
  if (args.has_shared_gate()) weights[j] = sigmoid(room.logits[args.num_experts()]);
}

// Given each token's experts in places: computes the order and where each expert's part of it
// begins, and replaces each expert in places by the assignment's place in the order.
void sort_by_expert(const RouteArgs& args) {
  const int64_t num_tokens = args.num_tokens(), top_k = args.top_k();
  auto* offsets = args.offsets.ptr<int32_t>();
  auto* order = args.order.ptr<int32_t>();
  std::fill_n(offsets, args.num_experts() + 1, 0);
  std::fill_n(order, num_tokens * top_k, -1);
  const auto each = [&](const auto& fn) {
    for (int64_t token = 0; token < num_tokens; ++token) {
      int32_t* places = args.places.ptr<int32_t>() + token * args.places.stride(0);
      for (int64_t j = 0; j < top_k && places[j] >= 0; ++j) fn(places[j], token * top_k + j);
    }
  };
  each([&](int32_t expert, int64_t) { ++offsets[expert + 1]; });
  for (int64_t i = 0; i < args.num_experts(); ++i) offsets[i + 1] += offsets[i];
  std::vector<int32_t> next(offsets, offsets + args.num_experts());
  each([&](int32_t& place, int64_t assignment) {
    place = next[place]++;
    order[place] = static_cast<int32_t>(assignment);
  });
}

void route(const Tensor& x, const Tensor& router, const std::optional<Tensor>& correction_bias,
           const Tensor& slot_mapping, bool is_sigmoid, bool is_normalized, double scale,
           int64_t num_groups, int64_t top_groups, const Tensor& logits, const Tensor& weights,
           const Tensor& places, const Tensor& order, const Tensor& offsets) {
  const ViewReader read{"route", Place::kCpu};
  RouteArgs args = route_args(read, x, router, correction_bias, slot_mapping, logits, weights,
                              places, order, offsets);
  args.rule = route_rule(read.op, args.num_experts(), args.top_k(), is_sigmoid, is_normalized,
                         scale, num_groups, top_groups);
  dispatch_float<float, Bf16>(args.x, [&]<class T>(T) {
    const double cost = 0.3 * static_cast<double>(args.router.size(0) * args.x.size(1));
    parallel_for(args.num_tokens(), cost, [&](int64_t begin, int64_t end) {
      Room room(args);
      for (int64_t token = begin; token < end; ++token) route_token<T>(args, token, room);
    });
  });
  sort_by_expert(args);
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) { m.impl("route", TORCH_BOX(&pyserve::route)); }
