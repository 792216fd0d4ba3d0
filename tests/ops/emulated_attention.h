// What the kernels of attention use beyond emulated.h, for the programs of them.
#pragma once

#include <bit>
#include <map>
#include <utility>

#include "emulated.h"
#include "emulated_vec.h"

#define __grid_constant__

struct int4 {
  int x, y, z, w;
};

template <class T>
T __ldcg(const T* from) {
  return *from;
}
uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
[[noreturn]] void __trap() { machine::fail("a kernel trapped"); }

namespace pyserve::gpu {

struct Device {
  int num_sms, smem_per_sm, smem_per_block;
};

Device emulated_device;  // current_device's

cudaError_t current_device(const Device** device) {
  *device = &emulated_device;
  return cudaSuccess;
}

float __shfl_xor_sync(unsigned, float x, int mask) {
  int word;
  std::memcpy(&word, &x, 4);
  word = __shfl_sync(kFullMask, word, machine::current % kWarpSize ^ mask);
  std::memcpy(&x, &word, 4);
  return x;
}

float __shfl_sync(unsigned mask, float x, int from) {
  int word;
  std::memcpy(&word, &x, 4);
  word = __shfl_sync(mask, word, from);
  std::memcpy(&x, &word, 4);
  return x;
}

unsigned __ballot_sync(unsigned, bool is_set) {
  machine::lane(machine::current % kWarpSize)[0] = is_set;
  machine::meet_warp();
  unsigned lanes = 0;
  for (int i = 0; i < kWarpSize; ++i) lanes |= machine::lane(i)[0] << i;
  machine::meet_warp();
  return lanes;
}

int __ffs(int x) { return std::countr_zero(static_cast<unsigned>(x)) + 1; }  // not of 0

float exp2_approx(float x) { return std::exp2(x); }

// What ldmatrix_x4 gives of each matrix, of its transpose.
void ldmatrix_x4_trans(uint32_t (&words)[4], uint32_t address) {
  const int lane = machine::current % kWarpSize;
  machine::lane(lane)[0] = address;
  machine::meet_warp();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const unsigned char* row = machine::at(machine::lane(8 * i + lane % 4 * 2 + j)[0]);
      std::memcpy(&pair[j], row + lane / 4 * 2, 2);
    }
    words[i] = pair[0] | uint32_t{pair[1]} << 16;
  }
  machine::meet_warp();
}

void named_barrier_sync(int id, int num_threads) {
  static std::map<std::pair<int, int>, machine::Barrier> barriers;  // by block and id
  machine::meet(barriers[{machine::block(), id}], num_threads);
}

bool arrives_last(int32_t* arrivals, int count, int32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    *flag = ++*arrivals == count;
    if (*flag) *arrivals = 0;
  }
  __syncthreads();
  return *flag != 0;
}

}  // namespace pyserve::gpu
