// Layout of a packed StepInput and of a slot row, shared by the packer (host.cpp), the plan op and
// the sampler. Everything is 32-bit words, little endian; floats are bit-cast. The Python twin is
// pyserve/ops/step_layout.py; a test compares the two.
//
//   StepInput  [ header | adapter starts | rows | host tokens | block updates | slot updates ]
//
// A row whose tokens_offset is -1 has one token, the one its slot sampled last: the host need not
// know it yet. Slot updates are applied first, then block updates, then rows are planned.
//
// Adapter starts are there in a step with rows that use an adapter. Its rows stand sorted by the
// slot that their adapter has on the device, those without one first; then starts[s] is the first
// token of slot s or a later one, and one word more says where the last slot's tokens end. They
// stand right behind the header, so that ops read them where they are (lora_shrink, lora_expand).
#pragma once

#include <cstdint>

namespace pyserve {

// Header words.
enum HeaderWord : int32_t {
  kHeaderMagic = 0,
  kHeaderNumRows,
  kHeaderNumTokens,
  kHeaderNumSamples,
  kHeaderRowsOffset,  // offsets are words from the start of the buffer
  kHeaderTokensOffset,
  kHeaderNumBlockUpdates,
  kHeaderBlockUpdatesOffset,
  kHeaderNumSlotUpdates,
  kHeaderSlotUpdatesOffset,
  kHeaderNumWords,  // of the whole buffer
  kHeaderMaxQueryLen,  // of the rows; with the three counts the step's shape
  kHeaderNumAdapterSlots,  // of the starts, which are one more; 0: there are none
  kHeaderWords = 16,
};
constexpr int32_t kStepMagic = 0x70797376;  // "pysv"

// One row: the part of one sequence that this step runs.
enum RowWord : int32_t {
  kRowSlot = 0,
  kRowQueryLen,
  kRowTokensOffset,  // words from kHeaderTokensOffset, or -1: the slot's last token
  kRowSample,        // 1: the row's last token is sampled from
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
  kSlotLastToken,         // sampled last, -1 before the first; 0 where sampling has failed
  kSlotMinTotalLen,       // stop ids are banned while the new token's position is below
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
  kSlotSampleIndex,       // which of the n choices
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
// num_bias ids, num_bias values, num_stop ids, then the tokens token_counts is rebuilt from.
enum SlotUpdateWord : int32_t {
  kSlotUpdateNumWords = 0,  // of this record, to find the next
  kSlotUpdateSlot,
  kSlotUpdateNumPromptTokens,  // counted as prompt; 0 where the slot has no penalties
  kSlotUpdateNumOutputTokens,  // counted as output; likewise
  kSlotUpdateWords = 4,
};

// token_counts is int16 [num_slots, vocab_size]: the sign bit marks a token of the prompt, the low
// 15 bits count it in the output (saturating).
constexpr int16_t kInPrompt = static_cast<int16_t>(0x8000);
constexpr int16_t kMaxTokenCount = 0x7fff;

}  // namespace pyserve
