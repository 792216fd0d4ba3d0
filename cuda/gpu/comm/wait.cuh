// How threads wait for other cards, and for how long.
#pragma once

#include "gpu/comm/comm.h"
#include "gpu/comm/system.cuh"

namespace pyserve::gpu {

__device__ __forceinline__ void* control_word(const Peers& peers, int32_t owner, int32_t word) {
  return peers.buffers[owner] + int64_t{4} * word;
}

// A wait of one thread.
class Spin {
 public:
  __device__ explicit Spin(const Peers& peers) : peers_(peers) {}

  // Called after each look in vain: whether to look again. False in a trial alone.
  __device__ bool goes_on() {
    if (++num_looks_ % kLooksPerClock != 0) return true;
    const int64_t now = now_ns();
    if (first_ns_ == 0) first_ns_ = now;
    if (now - first_ns_ < peers_.spin_ns) return true;
    if (!peers_.is_trial) __trap();
    store_system(control_word(peers_, peers_.tp_rank, kControlIsGivenUp), uint32_t{1});
    return false;
  }

 private:
  static constexpr uint32_t kLooksPerClock = 256;
  const Peers& peers_;
  uint32_t num_looks_ = 0;
  int64_t first_ns_ = 0;
};

// Waits for a flag of `round`. It is not written in every round, so that an older one may seem to be
// ahead; nor again before this wait is over.
__device__ __forceinline__ void wait_flag(const Peers& peers, const void* flag, uint32_t round) {
  Spin spin(peers);
  while (load_acquire(flag) != round && spin.goes_on()) {
  }
}

// Waits until a word that is written in every round has come to `round`, or further.
__device__ __forceinline__ void wait_round(const Peers& peers, const void* word, uint32_t round) {
  Spin spin(peers);
  while (static_cast<int32_t>(load_acquire(word) - round) < 0 && spin.goes_on()) {
  }
}

// What each CTA of a kernel has for itself: a word for it alone, so that no CTA waits for another
// one. Those of CTAs that this launch does not have are kept in step.
__device__ __forceinline__ void set_own_words(const Peers& peers, int32_t first_word,
                                              int32_t num_words, uint32_t value) {
  for (unsigned i = blockIdx.x + threadIdx.x * gridDim.x; i < static_cast<unsigned>(num_words);
       i += blockDim.x * gridDim.x) {
    store_system(control_word(peers, peers.tp_rank, first_word + i), value);
  }
}

__device__ __forceinline__ uint32_t own_word(const Peers& peers, int32_t first_word) {
  return load_system<uint32_t>(control_word(peers, peers.tp_rank, first_word + blockIdx.x));
}

}  // namespace pyserve::gpu
