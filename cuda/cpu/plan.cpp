// plan_step on a CPU: applies a packed StepInput (common/step.h, int32) to the slots and derives
// the batch metadata of the step. It is serial, because a step has at most a few thousand words.
// Every value of the buffer is checked before it is used: offsets, slots, block indices and token
// ids.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <vector>

#include "../common/args/plan_step.h"

namespace pyserve {
namespace {

constexpr const char* kOp = "plan_step";

#define PLAN_CHECK(condition, ...) PYSERVE_CHECK(condition, kOp, ": bad step input: ", __VA_ARGS__)

// The buffer with its header checked: the sections lie inside it and in order.
struct StepWords {
  const int32_t* words;
  int64_t num_words;

  int64_t header(HeaderWord word) const { return words[word]; }
};

struct Slots {
  View slots, block_table, token_counts;
  int64_t block_size;

  int32_t* row(int64_t slot) const { return slots.ptr<int32_t>() + slot * slots.stride(0); }
  int64_t count() const { return slots.size(0); }
  int64_t vocab_size() const { return token_counts.size(1); }
};

struct Plan {
  View input_ids, positions, slot_mapping, row_slots, cu_seqlens_q, seq_lens, sample_rows;
};

StepWords checked_words(const View& step_input, const Plan& plan) {
  StepWords step{step_input.ptr<int32_t>(), 0};
  PLAN_CHECK(step.header(kHeaderMagic) == kStepMagic, "magic");
  step.num_words = step.header(kHeaderNumWords);
  PLAN_CHECK(step.num_words >= kHeaderWords && step.num_words <= step_input.size(0), "num_words ",
             step.num_words, " of ", step_input.size(0));
  const int64_t num_rows = step.header(kHeaderNumRows);
  const int64_t num_tokens = step.header(kHeaderNumTokens);
  PLAN_CHECK(num_rows >= 0 && num_rows <= plan.row_slots.size(0), num_rows, " rows, room for ",
             plan.row_slots.size(0));
  PLAN_CHECK(num_tokens >= 0 && num_tokens <= plan.input_ids.size(0), num_tokens,
             " tokens, room for ", plan.input_ids.size(0));
  int64_t end = kHeaderWords;
  auto section = [&](HeaderWord offset_word, int64_t count, int64_t min_words) {
    const int64_t offset = step.header(offset_word);
    PLAN_CHECK(count >= 0 && offset >= end && offset <= step.num_words - count * min_words,
               "section at ", offset, " with ", count, " entries");
    end = offset + count * min_words;
  };
  section(kHeaderRowsOffset, num_rows, kRowWords);
  section(kHeaderTokensOffset, 0, 0);
  section(kHeaderBlockUpdatesOffset, step.header(kHeaderNumBlockUpdates), kBlockUpdateWords);
  section(kHeaderSlotUpdatesOffset, step.header(kHeaderNumSlotUpdates), kSlotUpdateWords);
  return step;
}

void check_token_ids(const int32_t* ids, int64_t n, int64_t vocab_size, const char* what) {
  uint32_t largest = 0;  // as unsigned, a negative id is the largest
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, static_cast<uint32_t>(ids[i]));
  PLAN_CHECK(n == 0 || largest < vocab_size, what, " holds token id ",
             static_cast<int32_t>(largest), ", the vocabulary ", vocab_size);
}

void rebuild_counts(const Slots& slots, int64_t slot, const int32_t* prompt, int64_t num_prompt,
                    int64_t num_output) {
  int16_t* counts = slots.token_counts.ptr<int16_t>() + slot * slots.token_counts.stride(0);
  std::memset(counts, 0, slots.vocab_size() * sizeof *counts);
  const int32_t* output = prompt + num_prompt;
  for (int64_t i = 0; i < num_output; ++i) {
    if (counts[output[i]] != kMaxTokenCount) ++counts[output[i]];
  }
  for (int64_t i = 0; i < num_prompt; ++i) {
    counts[prompt[i]] = static_cast<int16_t>(counts[prompt[i]] | kInPrompt);
  }
}

void check_sampling(const int32_t* header, const int32_t* bias_values, int64_t num_bias) {
  auto real = [&](int word) { return std::bit_cast<float>(header[word]); };
  auto check = [](const char* name, float value, float low, float high) {
    PLAN_CHECK(value >= low && value <= high, name, " ", value);  // a NaN fails
  };
  constexpr float kLargest = std::numeric_limits<float>::max();
  constexpr float kLeast = std::numeric_limits<float>::min();
  check("temperature", real(kSlotTemperature), 0, kLargest);
  check("top_p", real(kSlotTopP), kLeast, 1);
  check("min_p", real(kSlotMinP), 0, 1);
  check("repetition penalty", real(kSlotRepetitionPenalty), kLeast, kLargest);
  check("presence penalty", real(kSlotPresencePenalty), -kLargest, kLargest);
  check("frequency penalty", real(kSlotFrequencyPenalty), -kLargest, kLargest);
  PLAN_CHECK(header[kSlotTopK] >= 0, "top_k ", header[kSlotTopK]);
  for (int64_t i = 0; i < num_bias; ++i) {
    check("logit bias", std::bit_cast<float>(bias_values[i]), -kLargest, kLargest);
  }
}

// Applies the slot update at word `at` and returns where the next one begins.
int64_t apply_slot_update(const StepWords& step, int64_t at, const Slots& slots) {
  constexpr int64_t kHead = int64_t{kSlotUpdateWords} + kSlotHeaderWords;
  PLAN_CHECK(at + kHead <= step.num_words, "slot update beyond the buffer");
  const int32_t* record = step.words + at;
  const int32_t* header = record + kSlotUpdateWords;
  const int64_t slot = record[kSlotUpdateSlot];
  const int64_t num_bias = header[kSlotNumBias], num_stop = header[kSlotNumStop];
  const int64_t num_prompt = record[kSlotUpdateNumPromptTokens];
  const int64_t num_output = record[kSlotUpdateNumOutputTokens];
  PLAN_CHECK(slot >= 0 && slot < slots.count(), "slot update of slot ", slot, " of ",
             slots.count());
  PLAN_CHECK(num_bias >= 0 && num_bias <= kMaxLogitBias, num_bias, " biases of slot ", slot);
  PLAN_CHECK(num_stop >= 0 && num_stop <= kMaxStopTokenIds, num_stop, " stop ids of slot ", slot);
  PLAN_CHECK(num_prompt >= 0 && num_output >= 0, "token counts of slot ", slot);
  const int64_t num_words = kHead + 2 * num_bias + num_stop + num_prompt + num_output;
  PLAN_CHECK(record[kSlotUpdateNumWords] == num_words && at + num_words <= step.num_words,
             "slot update of ", record[kSlotUpdateNumWords], " words, expected ", num_words);
  const int32_t* bias_ids = header + kSlotHeaderWords;
  const int32_t* bias_values = bias_ids + num_bias;
  const int32_t* stop_ids = bias_values + num_bias;
  const int32_t* tokens = stop_ids + num_stop;
  check_token_ids(bias_ids, num_bias, slots.vocab_size(), "logit bias");
  check_token_ids(stop_ids, num_stop + num_prompt + num_output, slots.vocab_size(), "slot update");
  PLAN_CHECK(header[kSlotLastToken] >= -1 && header[kSlotLastToken] < slots.vocab_size(),
             "last token ", header[kSlotLastToken], " of slot ", slot);
  PLAN_CHECK(header[kSlotNumComputed] >= 0, "num_computed ", header[kSlotNumComputed], " of slot ",
             slot);

  check_sampling(header, bias_values, num_bias);

  int32_t* row = slots.row(slot);
  std::memset(row, 0, kSlotWords * sizeof *row);
  std::copy_n(header, kSlotHeaderWords, row);
  std::copy_n(bias_ids, num_bias, row + kSlotBiasIds);
  std::copy_n(bias_values, num_bias, row + kSlotBiasValues);
  std::copy_n(stop_ids, num_stop, row + kSlotStopIds);
  if (row[kSlotHasPenalties] != 0) rebuild_counts(slots, slot, tokens, num_prompt, num_output);
  return at + num_words;
}

void apply_updates(const StepWords& step, const Slots& slots) {
  int64_t at = step.header(kHeaderSlotUpdatesOffset);
  for (int64_t i = 0; i < step.header(kHeaderNumSlotUpdates); ++i) {
    at = apply_slot_update(step, at, slots);
  }
  const View& table = slots.block_table;
  const int32_t* update = step.words + step.header(kHeaderBlockUpdatesOffset);
  for (int64_t i = 0; i < step.header(kHeaderNumBlockUpdates); ++i, update += kBlockUpdateWords) {
    const int64_t slot = update[kBlockUpdateSlot], index = update[kBlockUpdateIndex];
    PLAN_CHECK(slot >= 0 && slot < table.size(0), "block update of slot ", slot, " of ",
               table.size(0));
    PLAN_CHECK(index >= 0 && index < table.size(1), "block update of index ", index, " of ",
               table.size(1));
    PLAN_CHECK(update[kBlockUpdateBlockId] >= 0, "block update with block id ",
               update[kBlockUpdateBlockId]);
    table.ptr<int32_t>()[slot * table.stride(0) + index] = update[kBlockUpdateBlockId];
  }
}

// Fills in the positions and KV slots of a row's query_len tokens from position `start` on.
void fill_positions(const Slots& slots, int64_t slot, int64_t start, int64_t query_len,
                    int32_t* positions, int64_t* slot_mapping) {
  const int32_t* blocks = slots.block_table.ptr<int32_t>() + slot * slots.block_table.stride(0);
  for (int64_t i = 0; i < query_len; ++i) {
    const int64_t position = start + i;
    positions[i] = static_cast<int32_t>(position);
    slot_mapping[i] = int64_t{blocks[position / slots.block_size]} * slots.block_size +
                      position % slots.block_size;
  }
}

// Plans one row whose first token is token `begin` of the step. Returns its query length.
int64_t plan_row(const StepWords& step, int64_t r, int64_t begin, const Slots& slots,
                 const Plan& plan) {
  const int32_t* row = step.words + step.header(kHeaderRowsOffset) + r * kRowWords;
  const int64_t slot = row[kRowSlot], query_len = row[kRowQueryLen];
  PLAN_CHECK(slot >= 0 && slot < slots.count(), "row ", r, " of slot ", slot, " of ",
             slots.count());
  PLAN_CHECK(query_len > 0 && begin + query_len <= step.header(kHeaderNumTokens), "row ", r,
             " has ", query_len, " tokens");
  PLAN_CHECK(query_len <= step.header(kHeaderMaxQueryLen), "row ", r, " has ", query_len,
             " tokens, max_query_len is ", step.header(kHeaderMaxQueryLen));
  int32_t* state = slots.row(slot);
  const int32_t* ids = state + kSlotLastToken;
  const int64_t offset = row[kRowTokensOffset];
  if (offset == -1) {
    PLAN_CHECK(query_len == 1, "row ", r, " has no host tokens but ", query_len, " tokens");
  } else {
    const int64_t tokens = step.header(kHeaderTokensOffset);
    PLAN_CHECK(offset >= 0 && tokens + offset + query_len <= step.header(kHeaderBlockUpdatesOffset),
               "row ", r, "'s tokens lie outside their section");
    ids = step.words + tokens + offset;
  }
  check_token_ids(ids, query_len, slots.vocab_size(), "a row");
  const int64_t start = state[kSlotNumComputed], seq_len = start + query_len;
  const int64_t max_len = slots.block_table.size(1) * slots.block_size;
  PLAN_CHECK(start >= 0 && seq_len <= std::min<int64_t>(max_len, INT32_MAX), "row ", r,
             " has sequence length ", seq_len, ", at most ", max_len);
  std::copy_n(ids, query_len, plan.input_ids.ptr<int32_t>() + begin);
  fill_positions(slots, slot, start, query_len, plan.positions.ptr<int32_t>() + begin,
                 plan.slot_mapping.ptr<int64_t>() + begin);
  plan.row_slots.ptr<int32_t>()[r] = static_cast<int32_t>(slot);
  plan.seq_lens.ptr<int32_t>()[r] = static_cast<int32_t>(seq_len);
  state[kSlotNumComputed] = static_cast<int32_t>(seq_len);
  return query_len;
}

void pad(const Plan& plan, int64_t num_rows, int64_t num_tokens, int64_t num_samples) {
  const int64_t max_rows = plan.row_slots.size(0), max_tokens = plan.input_ids.size(0);
  auto fill = [](auto* begin, int64_t from, int64_t to, int value) {
    std::fill(begin + from, begin + to, value);
  };
  fill(plan.input_ids.ptr<int32_t>(), num_tokens, max_tokens, 0);
  fill(plan.positions.ptr<int32_t>(), num_tokens, max_tokens, 0);
  fill(plan.slot_mapping.ptr<int64_t>(), num_tokens, max_tokens, -1);
  fill(plan.row_slots.ptr<int32_t>(), num_rows, max_rows, -1);
  fill(plan.seq_lens.ptr<int32_t>(), num_rows, max_rows, 0);
  fill(plan.cu_seqlens_q.ptr<int32_t>(), num_rows + 1, max_rows + 1, static_cast<int>(num_tokens));
  fill(plan.sample_rows.ptr<int32_t>(), 2 * num_samples, 2 * max_rows, -1);
}

void plan_rows(const StepWords& step, const Slots& slots, const Plan& plan) {
  const int64_t num_rows = step.header(kHeaderNumRows);
  const int32_t* rows = step.words + step.header(kHeaderRowsOffset);
  std::vector<bool> seen(slots.count());
  int64_t num_tokens = 0, num_samples = 0;
  int32_t* cu_seqlens_q = plan.cu_seqlens_q.ptr<int32_t>();
  cu_seqlens_q[0] = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    num_tokens += plan_row(step, r, num_tokens, slots, plan);
    cu_seqlens_q[r + 1] = static_cast<int32_t>(num_tokens);
    const int32_t slot = rows[r * kRowWords + kRowSlot];
    PLAN_CHECK(!seen[slot], "slot ", slot, " has two rows");
    seen[slot] = true;
    if (rows[r * kRowWords + kRowSample] == 0) continue;
    int32_t* sample = plan.sample_rows.ptr<int32_t>() + 2 * num_samples++;
    sample[0] = static_cast<int32_t>(num_tokens - 1);
    sample[1] = slot;
  }
  PLAN_CHECK(num_tokens == step.header(kHeaderNumTokens), "num_tokens ",
             step.header(kHeaderNumTokens), ", the rows have ", num_tokens);
  PLAN_CHECK(num_samples == step.header(kHeaderNumSamples), "num_samples ",
             step.header(kHeaderNumSamples), ", the rows have ", num_samples);
  pad(plan, num_rows, num_tokens, num_samples);
}

void plan_step(const Tensor& step_input, const Tensor& slots_tensor, const Tensor& block_table,
               const Tensor& token_counts, int64_t block_size, const Tensor& input_ids,
               const Tensor& positions, const Tensor& slot_mapping, const Tensor& row_slots,
               const Tensor& cu_seqlens_q, const Tensor& seq_lens, const Tensor& sample_rows) {
  const PlanStepArgs args = plan_step_args(
      {kOp, Place::kCpu}, step_input, slots_tensor, block_table, token_counts, block_size,
      input_ids, positions, slot_mapping, row_slots, cu_seqlens_q, seq_lens, sample_rows);
  const Slots slots{args.slots, args.block_table, args.token_counts, block_size};
  const Plan plan{args.input_ids,    args.positions, args.slot_mapping, args.row_slots,
                  args.cu_seqlens_q, args.seq_lens,  args.sample_rows};
  const StepWords step = checked_words(args.step_input, plan);
  apply_updates(step, slots);
  plan_rows(step, slots, plan);
}

}  // namespace
}  // namespace pyserve

STABLE_TORCH_LIBRARY_IMPL(pyserve, CPU, m) { m.impl("plan_step", TORCH_BOX(&pyserve::plan_step)); }
