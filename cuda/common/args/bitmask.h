// The arguments of apply_bitmask, checked. The row numbers themselves are checked by the kernel.
#pragma once

#include "../check.h"
#include "../limits.h"

namespace pyserve {

struct BitmaskArgs {
  View logits, bitmask, rows;

  int64_t num_rows() const { return logits.size(0); }
  int64_t vocab_size() const { return logits.size(1); }
  int64_t num_masked() const { return rows.size(0); }
  int64_t num_words() const { return bitmask.size(1); }  // words of the mask of one row
};

inline BitmaskArgs bitmask_args(const ViewReader& read, const Tensor& logits,
                                const Tensor& bitmask, const Tensor& rows) {
  const BitmaskArgs args{read("logits", logits, 2),
                         read("bitmask", bitmask, 2, ScalarType::Int),
                         read("rows", rows, 1, ScalarType::Int, LastDim::kStrided)};
  PYSERVE_CHECK(args.vocab_size() > 0 && args.vocab_size() <= kMaxVocabSize, read.op,
                ": a vocabulary of ", args.vocab_size(), ", at most ", kMaxVocabSize);
  check_size(args.bitmask, 0, args.num_masked());
  const int64_t most = (args.vocab_size() + 31) / 32;
  PYSERVE_CHECK(args.num_words() <= most, read.op, ": a mask of ", args.num_words(),
                " words for a vocabulary of ", args.vocab_size(), ", at most ", most);
  return args;
}

}  // namespace pyserve
