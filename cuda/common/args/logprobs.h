// The arguments of logprobs, checked. The row and token numbers themselves are checked by the
// kernel.
#pragma once

#include "../check.h"
#include "../limits.h"

namespace pyserve {

struct LogprobsArgs {
  View logits, rows, token_ids, token_logprobs, token_ranks, top_ids, top_logprobs;

  int64_t num_rows() const { return logits.size(0); }
  int64_t vocab_size() const { return logits.size(1); }
  int64_t num_asked() const { return rows.size(0); }
};

inline LogprobsArgs logprobs_args(const ViewReader& read, const Tensor& logits, const Tensor& rows,
                                  const Tensor& token_ids, const Tensor& token_logprobs,
                                  const Tensor& token_ranks, const Tensor& top_ids,
                                  const Tensor& top_logprobs) {
  const LogprobsArgs args{
      read("logits", logits, 2),
      read("rows", rows, 1, ScalarType::Int, LastDim::kStrided),
      read("token_ids", token_ids, 1, ScalarType::Int, LastDim::kStrided),
      read("token_logprobs", token_logprobs, 1, ScalarType::Float, LastDim::kStrided),
      read("token_ranks", token_ranks, 1, ScalarType::Int, LastDim::kStrided),
      read("top_ids", top_ids, 2, ScalarType::Int),
      read("top_logprobs", top_logprobs, 2, ScalarType::Float)};
  PYSERVE_CHECK(args.vocab_size() > 0 && args.vocab_size() <= kMaxVocabSize, read.op,
                ": a vocabulary of ", args.vocab_size(), ", at most ", kMaxVocabSize);
  check_size(args.token_ids, 0, args.num_rows());
  for (const View* view :
       {&args.token_logprobs, &args.token_ranks, &args.top_ids, &args.top_logprobs}) {
    check_size(*view, 0, args.num_asked());
  }
  check_size(args.top_ids, 1, kTopLogprobs);
  check_size(args.top_logprobs, 1, kTopLogprobs);
  return args;
}

}  // namespace pyserve
