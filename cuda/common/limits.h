// The largest sizes that the ops support on every device. The Python twin is pyserve/limits.py.
#pragma once

#include <cstdint>

namespace pyserve {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxLatentSize = 1024;
constexpr int64_t kMaxLatentRopeDim = 256;
// So that a row's sum of integer weights stays below 2^53.
constexpr int64_t kMaxVocabSize = int64_t{1} << 19;
constexpr int64_t kTopLogprobs = 20;  // how many of the likeliest tokens logprobs reports for a row
constexpr int64_t kMaxExperts = 512;
constexpr int64_t kMaxTopExperts = 32;  // per token
constexpr int64_t kMaxExpertGroups = 32;

}  // namespace pyserve
