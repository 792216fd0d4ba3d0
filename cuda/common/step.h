// The layout of a packed StepInput and of a slot row, shared by the packer (host.cpp), the
// plan_step op and the sampler. Everything is made of 32-bit words, little endian; floats are
// bit-cast. The Python twin is pyserve/ops/step_layout.py; a test compares the two.
//
//   StepInput  [ header | adapter starts | rows | host tokens | block updates | slot updates ]
//
// A row whose tokens_offset is -1 has one token, namely the one that its slot sampled last: the
// host need not know it yet. Slot updates are applied first, then block updates; then the rows are
// planned.
//
// A step with rows that use a LoRA adapter has adapter starts. The rows of such a step are sorted
// by adapter slot, the slot that their adapter has on the device; rows without an adapter come
// first. starts[s] is the first token whose adapter slot is s or greater, and one further word says
// where the tokens of the last slot end. The starts lie directly behind the header, so that
// lora_shrink and lora_expand can read them in place.
#pragma once

#include <cstdint>

namespace pyserve {

// Header words.
enum HeaderWord : int32_t {
  kHeaderMagic = 0,
  kHeaderNumRows,
  kHeaderNumTokens,
  kHeaderNumSamples,
  kHeaderRowsOffset,  // offsets are in words from the start of the buffer
  kHeaderTokensOffset,
  kHeaderNumBlockUpdates,
  kHeaderBlockUpdatesOffset,
  kHeaderNumSlotUpdates,
  kHeaderSlotUpdatesOffset,
  kHeaderNumWords,  // of the whole buffer
  // The largest query_len of a row; with the three counts it is the step's shape.
  kHeaderMaxQueryLen,
  kHeaderNumAdapterSlots,  // starts has one word more than this; 0: the step has no starts
  kHeaderWords = 16,
};
constexpr int32_t kStepMagic = 0x70797376;  // "pysv"

// One row: the part of one sequence that this step runs.
enum RowWord : int32_t {
  kRowSlot = 0,
  kRowQueryLen,
  kRowTokensOffset,  // in words from kHeaderTokensOffset; -1: the slot's last token
  kRowSample,        // 1: a token is sampled from the logits of the row's last token
  kRowWords = 4,
};

// One block update: block_table[slot, index] = block_id.
enum BlockUpdateWord : int32_t {
  kBlockUpdateSlot = 0,
  kBlockUpdateIndex,
  kBlockUpdateBlockId,
  kBlockUpdateWords = 3,
};

// A slot row: device state of one running sequence.
enum SlotWord : int32_t {
  kSlotNumComputed = 0,   // tokens whose KV is valid or in flight
  // The token sampled last; -1 before the first; 0 where sampling has failed.
  kSlotLastToken,
  kSlotMinTotalLen,       // while the new token's position is below this, stop ids are banned
  kSlotHasPenalties,      // 0 or 1; with 0 token_counts is neither read nor written
  kSlotTemperature,       // float; 0 is greedy
  kSlotTopP,              // float
  kSlotMinP,              // float
  kSlotTopK,              // 0 keeps all
  kSlotRepetitionPenalty,  // float
  kSlotPresencePenalty,    // float
  kSlotFrequencyPenalty,   // float
  kSlotSeedLow,           // 64-bit seed
  kSlotSeedHigh,
  kSlotSampleIndex,       // which of the request's n choices this sequence is
  kSlotNumBias,
  kSlotNumStop,
  kSlotHeaderWords = 16,
};
constexpr int32_t kMaxLogitBias = 300;
constexpr int32_t kMaxStopTokenIds = 64;
constexpr int32_t kSlotBiasIds = kSlotHeaderWords;
constexpr int32_t kSlotBiasValues = kSlotBiasIds + kMaxLogitBias;  // float
constexpr int32_t kSlotStopIds = kSlotBiasValues + kMaxLogitBias;
constexpr int32_t kSlotWords = kSlotStopIds + kMaxStopTokenIds;  // 680

// One slot update, of variable length: the words below, the kSlotHeaderWords of the slot row,
// num_bias ids, num_bias values and num_stop ids. Behind them come the tokens of the prompt and of
// the output from which token_counts is rebuilt.
enum SlotUpdateWord : int32_t {
  kSlotUpdateNumWords = 0,  // words of this record, which tell where the next one begins
  kSlotUpdateSlot,
  kSlotUpdateNumPromptTokens,  // tokens to count as prompt; 0 where the slot has no penalties
  kSlotUpdateNumOutputTokens,  // tokens to count as output; likewise
  kSlotUpdateWords = 4,
};

// token_counts is int16 [num_slots, vocab_size]: the sign bit marks a token of the prompt, the low
// 15 bits count it in the output (saturating).
constexpr int16_t kInPrompt = static_cast<int16_t>(0x8000);
constexpr int16_t kMaxTokenCount = 0x7fff;

}  // namespace pyserve
