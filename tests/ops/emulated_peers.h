// Several cards on a CPU, for the kernels between ranks: what emulated.h has for one card's block,
// with the blocks of all ranks taking turns at once. A store to a buffer is under way for a while:
// it lands word by word, in any order but that of one address, and a rank's stores to other cards
// may land after its kernel has ended. A flag that releases waits for its block's stores.
#pragma once

#include <map>
#include <string>

#include "common/peers.h"
#include "emulated.h"
#include "emulated_vec.h"

namespace machine {

int blocks_of_rank = 1;
std::vector<unsigned> grids;  // of each rank's kernel
bool is_release_lost = false, is_clear_lost = false;

struct Store {
  unsigned char* target;
  int size, block;
  uint64_t value;
  bool is_local;
};
int64_t now = 0, last_allowed = 0;
std::map<int64_t, std::vector<Store>> flying;        // by the time at which they land
std::map<const void*, int64_t> landings;             // the last one of an address
std::array<int, kMaxThreads / kLanes> num_flying{};  // of a block
std::array<int, pyserve::kMaxTpSize> num_local{};    // of a rank, to its own memory
std::vector<std::pair<const void*, const void*>> memories;  // of the ranks, first and end
int longest_flight = 8;

int rank() { return block() / blocks_of_rank; }

void sometimes_yield(int one_in) {
  if (random() % one_in == 0) yield();
}

bool is_local(const void* target) {
  const auto& [begin, end] = memories[rank()];
  return target >= begin && target < end;
}

void start(void* target, int size, uint64_t value) {
  auto* address = static_cast<unsigned char*>(target);
  int64_t& landing = landings[address];
  landing = std::max(landing, now + 1 + static_cast<int64_t>(random() % longest_flight));
  flying[landing].push_back({address, size, block(), value, is_local(target)});
  ++num_flying[block()];
  num_local[rank()] += is_local(target);
}

// Once in each turn of all threads.
void land_due() {
  if (++now > last_allowed) fail("wrong: a wait without end");
  for (auto first = flying.begin(); first != flying.end() && first->first <= now;) {
    for (const Store& store : first->second) {
      std::memcpy(store.target, &store.value, store.size);
      --num_flying[store.block];
      num_local[store.block / blocks_of_rank] -= store.is_local;
    }
    first = flying.erase(first);
  }
}

struct RankIndex {
  operator unsigned() const { return block() % blocks_of_rank; }
};
struct RankGrid {
  operator unsigned() const { return grids[rank()]; }
};
struct RankThreads {
  operator unsigned() const { return block_threads; }
};

}  // namespace machine

struct {
  machine::RankIndex x;
} rank_block;
struct {
  machine::RankGrid x;
} rank_grid;
struct {
  machine::RankThreads x;
} blockDim;
#define blockIdx rank_block
#define gridDim rank_grid
#define __grid_constant__

void __trap() { machine::fail("wrong: a trap"); }

namespace pyserve::gpu {

void forget_origin(uint4&) {}

template <int kMaxThreads>
float block_sum(float x) {
  static std::array<std::array<float, machine::kMaxThreads>, machine::kMaxThreads / 32> shown;
  std::array<float, machine::kMaxThreads>& own = shown[machine::block()];
  own[threadIdx.x] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < machine::block_threads; ++i) sum += own[i];
  machine::sometimes_yield(4);
  return sum;
}

void store_system(void* target, const uint4& value) {
  const uint32_t words[4] = {value.x, value.y, value.z, value.w};
  machine::sometimes_yield(8);
  // Vectors go to a rank's own memory to clear it, and for nothing else.
  const bool is_lost = machine::is_clear_lost && machine::is_local(target);
  for (int i = 0; i < 4 && !is_lost; ++i) {
    machine::start(static_cast<uint32_t*>(target) + i, 4, words[i]);
  }
}
template <class Word>
void store_system(void* target, Word value) {
  machine::sometimes_yield(8);
  machine::start(target, sizeof(value), value);
}

template <class Word>
Word load_system(const void* source) {
  machine::sometimes_yield(4);
  Word value;
  if constexpr (std::is_same_v<Word, uint4>) {
    uint32_t words[4];
    for (uint32_t& word : words) {
      word = load_system<uint32_t>(static_cast<const uint32_t*>(source) + (&word - words));
    }
    std::memcpy(&value, words, 16);
  } else {
    std::memcpy(&value, source, sizeof(value));
  }
  return value;
}

void store_release(void* flag, uint32_t value) {
  while (machine::num_flying[machine::block()] > 0 && !machine::is_release_lost) machine::yield();
  store_system(flag, value);
}
uint32_t load_acquire(const void* flag) {
  machine::yield();
  return load_system<uint32_t>(flag);
}
int64_t now_ns() { return machine::now; }

}  // namespace pyserve::gpu
