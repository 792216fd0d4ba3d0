// How threads wait for other devices, and for how long.
#pragma once

#include "gpu/comm/comm.h"
#include "gpu/comm/system.cuh"

namespace pyserve::gpu {

__device__ __forceinline__ void* control_word(const Peers& peers, int32_t owner, int32_t word) {
  return peers.buffers[owner] + int64_t{4} * word;
}

// One thread's wait, with its time limit.
class Spin {
 public:
  __device__ explicit Spin(const Peers& peers) : peers_(peers) {}

  // Called after each look that found nothing; says whether to look again. After spin_ns it traps;
  // only in a trial does it return false.
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

// Waits until a flag equals `round`. It tests for equality and not for "at least": a flag is not
// written in every round, so after the numbers have wrapped around an old one might look newer. The
// flag cannot move past `round` before this wait is over.
__device__ __forceinline__ void wait_flag(const Peers& peers, const void* flag, uint32_t round) {
  Spin spin(peers);
  while (load_acquire(flag) != round && spin.goes_on()) {
  }
}

// Waits until a word that is written in every round has reached `round` or a later one.
__device__ __forceinline__ void wait_round(const Peers& peers, const void* word, uint32_t round) {
  Spin spin(peers);
  while (static_cast<int32_t>(load_acquire(word) - round) < 0 && spin.goes_on()) {
  }
}

// Sets the words that hold a number for each CTA of an op's kernels, so that no CTA must wait for
// another one to read it. The words of CTAs that this grid does not have are set too, for a later
// launch with a larger grid.
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
