// The launcher of sample, its parameters and its workspace.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "gpu/core/dtype.h"

namespace pyserve::gpu {

struct SampleParams {
  const void* logits;  // [num_rows, vocab_size], vocab contiguous; strides in elements
  int64_t logits_stride;
  Dtype dtype;
  const int32_t* sample_slots;  // [num_rows], -1: padding
  int64_t sample_slots_stride;
  int32_t* slots;  // [num_slots, kSlotWords], common/step.h
  int64_t slots_stride, num_slots;
  int16_t* token_counts;  // [num_slots, vocab_size]
  int64_t token_counts_stride;
  int32_t* sampled;  // [num_rows]
  int32_t num_rows, vocab_size;
  uint64_t* workspace;  // sample_workspace_words words with any content
};

constexpr int kMaxSplits = 32;       // CTAs that may share a row
constexpr int kNumParts = 1024;      // parts of a row whose maxima are kept
constexpr int kMaxSplitRows = 128;   // with more rows, each row has one CTA
constexpr int kMinListWords = 2248;  // a histogram of exponents, two bins per word
constexpr int kMaxListWords = 4096;  // candidates, or sums by chunk of 256 tokens

// What the CTAs of a row tell each other through the workspace.
struct SampleRowWork {
  struct {
    float largest;  // largest adjusted logit of the CTA; NaN where one is NaN or +inf
    int32_t octet;  // the first octet that holds it
  } partial[kMaxSplits];
  uint32_t num_arrived;  // CTAs that have finished their share
  uint32_t num_listed;
  uint64_t mass;  // sum of the weights, for top-p without top-k
  uint32_t parts[kNumParts];  // keys of the maxima of the parts
};
constexpr int64_t kSampleRowWords = sizeof(SampleRowWork) / sizeof(uint64_t);

constexpr int64_t sample_list_words(int64_t vocab_size) {
  return std::min<int64_t>(std::max<int64_t>(vocab_size, kMinListWords), kMaxListWords);
}

// The workspace in 64-bit words: a SampleRowWork for each row, then a list for each row where rows
// may be shared. The Python twin is pyserve/ops/sample_workspace.py.
constexpr int64_t sample_workspace_words(int64_t num_rows, int64_t vocab_size) {
  return num_rows * kSampleRowWords +
         std::min<int64_t>(num_rows, kMaxSplitRows) * sample_list_words(vocab_size);
}

cudaError_t launch_sample(const SampleParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
