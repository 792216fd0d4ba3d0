// What the ops take at most, on every device. The Python twin is pyserve/limits.py.
#pragma once

#include <cstdint>

namespace pyserve {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxLatentSize = 1024;
constexpr int64_t kMaxLatentRopeDim = 256;
constexpr int64_t kMaxVocabSize = int64_t{1} << 19;  // sums of weights of a row stay below 2^53
constexpr int64_t kTopLogprobs = 20;  // tokens that logprobs tells of a row, fixed
constexpr int64_t kMaxExperts = 512;
constexpr int64_t kMaxTopExperts = 32;  // of a token
constexpr int64_t kMaxExpertGroups = 32;

}  // namespace pyserve
