// The ops between ranks on 2, 4 and 8 ranks that are never in step: random ops of random shapes, of
// which every element of every rank is compared. Argument: 0; 1: releases do not wait; 2: clears are
// lost. Prints what is wrong; its exit code is 1 then.
#include "emulated_peers.h"

namespace pyserve::gpu {

#include "norm.h.inc"
#include "comm.h.inc"
#include "norm_row.cuh.inc"
#include "wait.cuh.inc"
#include "one_shot.cuh.inc"
#include "two_shot.cuh.inc"
#include "rows.cuh.inc"

namespace {

constexpr int64_t kOneShotAt = 16 << 10, kMessageBytes = 2048, kPieceBytes = 1024;
constexpr int64_t kReduceAt = kOneShotAt + 3 * 7 * kMessageBytes;
constexpr int64_t kSpreadAt = kReduceAt + 7 * kPieceBytes, kGatherAt = kSpreadAt + 7 * kPieceBytes;
constexpr int64_t kTokensAt = kGatherAt + 7 * kMessageBytes;
constexpr int64_t kBufferBytes = kTokensAt + 2 * 8 * kMaxPeerTokens;
constexpr int kMaxNumbers = 1024;  // 16-bit, of a message
static_assert(4 * kControlWords <= kOneShotAt);

enum class Op { kNorm, kOneShot, kTwoShot, kGather, kTokens, kCount };

struct Step {
  Op op;
  int num_rows, width, seed;  // a message is num_rows * width numbers
  bool is_half;
};

struct alignas(16) Numbers {
  uint16_t at[kMaxNumbers * kMaxTpSize];
};

struct Rank {
  std::vector<uint4> memory = std::vector<uint4>(kBufferBytes / 16);
  Numbers x, residual, weight, out;
  int32_t tokens[kMaxNumbers];
  Peers peers;
  machine::Barrier barrier;
};

int tp_size;
std::vector<Rank> ranks;
std::vector<std::vector<uint16_t>> first_outs;  // of the rank that was first with a step

uint32_t hash(uint32_t x) {
  x = (x ^ x >> 16) * 0x45d9f3bu;
  x = (x ^ x >> 16) * 0x45d9f3bu;
  return x ^ x >> 16;
}

// What a rank has at a place: any number, of which some are zeros of either sign, and few NaN.
uint16_t number(const Step& step, int rank, int index) {
  const uint32_t bits = hash(step.seed * 977 + rank * 131071 + index);
  const int pair = hash(step.seed + rank * 7919 + index / 2) % 8;
  if (pair == 0) return 0x8000;  // both of a word
  if (bits % 9 == 0) return bits & 0x80 ? 0x8000 : 0;
  if (bits % 1999 == 0) return 0xffff;
  const float value = (static_cast<int>(bits >> 8 & 0xfff) - 2048) / 256.0f;
  return step.is_half ? from_float<__half>(value).bits : from_float<__nv_bfloat16>(value).bits;
}

template <class T>
void prepare(const Step& step, int r) {
  Rank& rank = ranks[r];
  const int count = step.num_rows * step.width;
  for (int i = 0; i < count; ++i) {
    rank.x.at[i] = number(step, r, i);
    rank.residual.at[i] = number(step, 100, i);
    rank.tokens[i] = r == kLeader ? static_cast<int>(hash(step.seed + i)) : -1;
  }
  for (int i = 0; i < step.width; ++i) rank.weight.at[i] = number(step, 101, i);
  std::memset(&rank.out, 0xee, sizeof(rank.out));
}

template <class T>
float sum_at(const Step& step, int index) {
  float sum = 0;
  for (int r = 0; r < tp_size; ++r) sum += to_float(T{number(step, r, index)});
  return to_float(from_float<T>(sum));
}

bool is_same(uint16_t a, float expected, bool is_half) {
  const float value = is_half ? to_float(__half{a}) : to_float(__nv_bfloat16{a});
  return value == expected || (std::isnan(value) && std::isnan(expected));
}

template <class T>
bool is_norm_right(const Step& step, const Rank& rank, int index) {
  const int row = index / step.width * step.width;
  auto kept = [&](int i) {
    return to_float(from_float<T>(sum_at<T>(step, i) + to_float(T{number(step, 100, i)})));
  };
  if (!is_same(rank.residual.at[index], kept(index), step.is_half)) return false;
  double squares = 0;
  for (int i = row; i < row + step.width; ++i) squares += double{kept(i)} * kept(i);
  const double weight = to_float(T{number(step, 101, index - row)}) + 0.5;
  const double expected = kept(index) / std::sqrt(squares / step.width + 1e-3) * weight;
  const double value = to_float(T{rank.out.at[index]});
  if (std::isnan(expected)) return std::isnan(value);
  return std::abs(value - expected) <= std::abs(expected) / 100 + 1e-6;
}

template <class T>
bool is_right(const Step& step, int r, int index) {
  const Rank& rank = ranks[r];
  switch (step.op) {
    case Op::kNorm:
      return index >= step.num_rows * step.width || is_norm_right<T>(step, rank, index);
    case Op::kGather: {
      const int size = step.num_rows * step.width;
      if (r != kLeader) return true;
      return rank.out.at[index] == number(step, index / size, index % size);
    }
    case Op::kTokens: return rank.tokens[index] == static_cast<int>(hash(step.seed + index));
    default: return is_same(rank.x.at[index], sum_at<T>(step, index), step.is_half);
  }
}

template <class T>
void check(const Step& step, size_t index, int r) {
  const int count = step.num_rows * step.width * (step.op == Op::kGather ? tp_size : 1);
  for (int i = 0; i < count; ++i) {
    if (is_right<T>(step, r, i)) continue;
    std::printf("wrong: step %zu, op %d, rank %d of %d, element %d of %d\n", index,
                static_cast<int>(step.op), r, tp_size, i, count);
    std::exit(1);
  }
  if (step.op != Op::kNorm) return;
  const std::vector<uint16_t> out(ranks[r].out.at, ranks[r].out.at + count);
  if (first_outs[index].empty()) first_outs[index] = out;
  if (first_outs[index] != out) machine::fail("wrong: ranks differ");
}

template <class T, int kTpSize>
void run(const Step& step, int r) {
  Rank& rank = ranks[r];
  const OneShotArea area{kOneShotAt, kMessageBytes};
  const int64_t num_vecs = step.num_rows * step.width / kVec;
  switch (step.op) {
    case Op::kNorm: {
      const NormParams norm{.x = &rank.x, .x_stride = step.width, .residual = &rank.residual,
                            .residual_stride = step.width, .weight = &rank.weight,
                            .out = &rank.out, .out_stride = step.width,
                            .num_rows = step.num_rows, .hidden = step.width, .eps = 1e-3f,
                            .offset = 0.5f, .dtype = Dtype::kBfloat16};
      return all_reduce_add_norm_kernel<T, kTpSize, kNormVecs>({rank.peers, area, norm});
    }
    case Op::kOneShot:
      return all_reduce_one_shot_kernel<T, kTpSize>(
          {rank.peers, area, &rank.x, num_vecs, Dtype::kBfloat16});
    case Op::kTwoShot:
      return all_reduce_two_shot_kernel<T, kTpSize>({rank.peers, kReduceAt, kSpreadAt, kPieceBytes,
                                                     &rank.x, num_vecs, Dtype::kBfloat16});
    case Op::kGather: {
      const int64_t row_bytes = 2 * step.width;
      const GatherParams params{rank.peers, kGatherAt, kMessageBytes, &rank.x, row_bytes,
                                r == kLeader ? &rank.out : nullptr, step.num_rows * row_bytes,
                                row_bytes, step.num_rows, row_bytes};
      return params.is_wide() ? gather_rows_kernel<uint4>(params)
                              : gather_rows_kernel<uint16_t>(params);
    }
    default:
      return broadcast_tokens_kernel<kTokenThreads>(
          {rank.peers, kTokensAt, rank.tokens, step.num_rows * step.width});
  }
}

// One thread's life: all steps of its rank.
template <int kTpSize>
void live(const std::vector<Step>& steps) {
  const int r = machine::rank(), num_threads = machine::blocks_of_rank * machine::block_threads;
  const bool is_first = machine::current % num_threads == 0;
  Rank& rank = ranks[r];
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    if (is_first) {
      for (int late = machine::random() % 4 == 0 ? machine::random() % 80 : 0; late > 0; --late) {
        machine::yield();
      }
      step.is_half ? prepare<__half>(step, r) : prepare<__nv_bfloat16>(step, r);
      const bool is_free = step.op == Op::kNorm || step.op == Op::kOneShot;
      machine::grids[r] = 1 + (step.seed + (is_free ? r : 0)) % machine::blocks_of_rank;
      if (step.op == Op::kTokens) machine::grids[r] = 1;
    }
    machine::meet(rank.barrier, num_threads);
    if (blockIdx.x < machine::grids[r]) {
      step.is_half ? run<__half, kTpSize>(step, r) : run<__nv_bfloat16, kTpSize>(step, r);
    }
    machine::meet(rank.barrier, num_threads);
    if (!is_first) continue;
    // What the kernel has stored here is there when the next one starts; to others it may not be.
    while (machine::num_local[r] > 0) machine::yield();
    step.is_half ? check<__half>(step, i, r) : check<__nv_bfloat16>(step, i, r);
  }
}

std::vector<Step> random_steps(int count) {
  std::vector<Step> steps;
  for (int i = 0; i < count; ++i) {
    Step step{static_cast<Op>(machine::random() % static_cast<int>(Op::kCount)), 1, 8,
              static_cast<int>(machine::random() % 100000), machine::random() % 2 == 0};
    if (i % 8 > 2) step.op = steps.back().op;  // in a row, so that a rank can get ahead
    const bool is_odd = step.op == Op::kGather && machine::random() % 2 == 0;
    step.width = is_odd ? 1 + machine::random() % 40 : 8 * (1 + machine::random() % 16);
    step.num_rows = 1 + machine::random() % std::min(6, kMaxNumbers / step.width);
    steps.push_back(step);
  }
  return steps;
}

template <int kTpSize>
void run_ranks(int num_steps, int num_blocks, int num_threads, int longest_flight) {
  tp_size = kTpSize;
  ranks = std::vector<Rank>(tp_size);
  for (int r = 0; r < tp_size; ++r) {
    auto* words = reinterpret_cast<uint32_t*>(ranks[r].memory.data());
    std::fill(words + kOneShotAt / 4, words + kReduceAt / 4, kAbsent);
    for (int other = 0; other < tp_size; ++other) {
      ranks[r].peers.buffers[other] =
          reinterpret_cast<unsigned char*>(ranks[other].memory.data());
    }
    ranks[r].peers.tp_rank = r, ranks[r].peers.tp_size = tp_size;
    ranks[r].peers.spin_ns = int64_t{1} << 40;
  }
  first_outs.assign(num_steps, {});
  machine::grids.assign(tp_size, 1);
  machine::landings.clear();
  machine::memories.clear();
  for (const Rank& rank : ranks) {
    machine::memories.emplace_back(rank.memory.data(), rank.memory.data() + rank.memory.size());
  }
  machine::longest_flight = longest_flight;
  machine::last_allowed = machine::now + (num_steps + 1) * 10000;
  machine::blocks_of_rank = num_blocks;
  machine::num_blocks = num_blocks * tp_size, machine::block_threads = num_threads;
  const std::vector<Step> steps = random_steps(num_steps);
  machine::body = [&] { live<kTpSize>(steps); };
  machine::between = machine::land_due;
  machine::run_blocks();
  while (!machine::flying.empty()) machine::land_due();
}

}  // namespace
}  // namespace pyserve::gpu

int main(int, char** arguments) {
  machine::is_release_lost = arguments[1][0] == '1';
  machine::is_clear_lost = arguments[1][0] == '2';
  const int num_steps = std::atoi(arguments[2]);
  pyserve::gpu::run_ranks<2>(num_steps, 3, 64, 8);
  pyserve::gpu::run_ranks<4>(num_steps, 2, 32, 24);
  pyserve::gpu::run_ranks<8>(num_steps / 2, 2, 32, 8);
}
