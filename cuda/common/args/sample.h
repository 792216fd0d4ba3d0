// The arguments of sample, checked. The content of the slots is checked by the kernel.
#pragma once

#include "../check.h"
#include "../limits.h"
#include "../step.h"

namespace pyserve {

struct SampleArgs {
  View logits, sample_slots, slots, token_counts, sampled;

  int64_t num_rows() const { return logits.size(0); }
  int64_t vocab_size() const { return logits.size(1); }
};

inline SampleArgs sample_args(const ViewReader& read, const Tensor& logits,
                              const Tensor& sample_slots, const Tensor& slots,
                              const Tensor& token_counts, const Tensor& sampled) {
  const SampleArgs args{read("logits", logits, 2),
                        read("sample_slots", sample_slots, 1, ScalarType::Int, LastDim::kStrided),
                        read("slots", slots, 2, ScalarType::Int),
                        read("token_counts", token_counts, 2, ScalarType::Short),
                        read("sampled", sampled, 1, ScalarType::Int)};
  PYSERVE_CHECK(args.vocab_size() > 0 && args.vocab_size() <= kMaxVocabSize, read.op,
                ": a vocabulary of ", args.vocab_size(), ", at most ", kMaxVocabSize);
  check_size(args.sample_slots, 0, args.num_rows());
  check_size(args.sampled, 0, args.num_rows());
  check_size(args.slots, 1, kSlotWords);
  check_size(args.token_counts, 0, args.slots.size(0));
  check_size(args.token_counts, 1, args.vocab_size());
  return args;
}

}  // namespace pyserve
