// Philox4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as
// easy as 1, 2, 3"), for host and device code. The Python twin is pyserve/ops/philox.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyserve {

struct PhiloxWords {
  uint32_t word[4];
};

PYSERVE_HOST_DEVICE inline PhiloxWords philox4x32(PhiloxWords counter, uint32_t key_low,
                                                  uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * counter.word[0];
    const uint64_t second = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = {{static_cast<uint32_t>(second >> 32) ^ counter.word[1] ^ key_low,
                static_cast<uint32_t>(second),
                static_cast<uint32_t>(first >> 32) ^ counter.word[3] ^ key_high,
                static_cast<uint32_t>(first)}};
    key_low += 0x9E3779B9;
    key_high += 0xBB67AE85;
  }
  return counter;
}

}  // namespace pyserve
