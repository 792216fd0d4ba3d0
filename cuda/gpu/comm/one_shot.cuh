// The sum over all ranks of a small message, in one trip over the links: every rank writes its part
// to all others, and adds up what it was sent. One kernel, no flags: a word says itself that it is
// there, by not being what it was cleared to. With residual and norm behind the sum:
//
//   all_reduce_add_norm   residual += sum of x, out = rms_norm(residual)
//   all_reduce_one_shot   x = sum of x
//
// Absent is the word of two negative zeros. One in the message is sent as positive zeros instead,
// which changes no sum that begins with 0; NaN of any bits passes. A vector of 16 bytes may arrive
// word by word, so each word of it is looked at. Who reads a vector clears it.
//
// Three rounds' messages have room. A rank is never two rounds ahead of another: it ends round e
// only with the other's part of e. So what a rank writes in round e + 3 goes where the reader has
// cleared in round e, and the reader has ended e + 1 since, or its part of e + 2 would not have
// been there. Two rounds would do if a kernel's clears were never later than the writes of the next
// one; with three nothing depends on it.
//
// Which thread or CTA takes a vector is each rank's own affair: the grids need not be equal. All
// CTAs fit the card at a time, and each sends all of its vectors before it waits.
// Numerics: as float32 from 0 on in the order of ranks, on every rank, so all have the same bits;
// rounded, then added to the residual and normed as add_rms_norm does, thread by thread.
// Floor: one trip, 1 to 2 us; bytes, (tp_size - 1) messages in at the link's rate.
#pragma once

#include "gpu/comm/wait.cuh"
#include "gpu/core/block.cuh"
#include "gpu/core/pdl.cuh"
#include "gpu/layers/norm_row.cuh"

namespace pyserve::gpu {

constexpr int kOneShotThreads = 256;
constexpr uint32_t kAbsent = 0x80008000u;

__device__ __forceinline__ bool is_there(const uint4& vec) {
  return vec.x != kAbsent && vec.y != kAbsent && vec.z != kAbsent && vec.w != kAbsent;
}

__device__ __forceinline__ uint4 sendable(const uint4& vec) {
  return {vec.x == kAbsent ? 0 : vec.x, vec.y == kAbsent ? 0 : vec.y,
          vec.z == kAbsent ? 0 : vec.z, vec.w == kAbsent ? 0 : vec.w};
}

// sum += parts, one after another.
template <class T, int kCount>
__device__ __forceinline__ void add_parts(float (&sum)[kVec], const uint4 (&parts)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float values[kVec];
    unpack<T>(parts[i], values);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum[j] += values[j];
  }
}

// One round's messages.
template <class T, int kTpSize>
class OneShot {
 public:
  __device__ OneShot(const Peers& peers, const OneShotArea& area)
      : peers_(peers),
        message_bytes_(static_cast<uint32_t>(area.message_bytes)),
        round_(own_word(peers, kControlRounds)),
        offset_(static_cast<uint32_t>(area.offset) + round_ * (kTpSize - 1) * message_bytes_) {}

  __device__ void send(const uint4& own, int vec) const {
#pragma unroll 1  // the addresses of all would not fit the registers
    for (int i = 1; i < kTpSize; ++i) {
      const int to = (peers_.tp_rank + i) % kTpSize;  // not all to the same one at a time
      store_system(peers_.buffers[to] + place(peers_.tp_rank, to, vec), own);
    }
  }

  // The sum of the ranks' parts of a vector, of which `own` is ours; clears the others' places.
  __device__ uint4 receive(const uint4& own, int vec) const {
    float sum[kVec] = {};
#pragma unroll
    for (int first = 0; first < kTpSize; first += kGroup) {
      uint4 parts[kGroup];
      wait(parts, first, own, vec);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (first + i == peers_.tp_rank) continue;
        store_system(peers_.buffers[peers_.tp_rank] + place(first + i, peers_.tp_rank, vec),
                     uint4{kAbsent, kAbsent, kAbsent, kAbsent});
      }
      add_parts<T>(sum, parts);
    }
    return pack<T>(sum);
  }

  // Called by all threads of the block when none of them is at work any more.
  __device__ void end() const {
    set_own_words(peers_, kControlRounds, kMaxRoundCtas,
                  round_ + 1 == kOneShotRounds ? 0 : round_ + 1);
  }

 private:
  static constexpr int kGroup = kTpSize < 4 ? kTpSize : 4;  // more would not fit the registers

  __device__ uint32_t place(int source, int owner, int vec) const {
    return offset_ + part_of(source, owner) * message_bytes_ + 16 * vec;
  }
  // Parts of kGroup ranks, asked for together, and again until they are there.
  __device__ void wait(uint4 (&parts)[kGroup], int first, const uint4& own, int vec) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      parts[i] = own;
      if (first + i != peers_.tp_rank) parts[i] = load(first + i, vec);
    }
    Spin spin(peers_);
    while (true) {
      bool is_complete = true;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (is_there(parts[i])) continue;
        parts[i] = load(first + i, vec);
        is_complete = false;
      }
      if (is_complete || !spin.goes_on()) return;
    }
  }
  __device__ uint4 load(int source, int vec) const {
    return load_system<uint4>(peers_.buffers[peers_.tp_rank] +
                              place(source, peers_.tp_rank, vec));
  }

  const Peers& peers_;
  const uint32_t message_bytes_;
  const uint32_t round_;
  const uint32_t offset_;  // of its messages, in every buffer
};

template <class T, int kTpSize, int kVecs>
__global__ void __launch_bounds__(kMaxNormThreads)
    all_reduce_add_norm_kernel(const __grid_constant__ AllReduceNormParams p) {
  const NormParams& norm = p.norm;
  const int num_vecs = static_cast<int>(norm.hidden / kVec);  // of a row; a message is small
  const int num_rows = static_cast<int>(norm.num_rows);
  const T* x = static_cast<const T*>(norm.x);
  const T* weight = static_cast<const T*>(norm.weight);
  constexpr bool kHoldsWeights = kTpSize < 8;  // with more parts they would not fit the registers
  uint4 weights[kVecs];
  const auto load_weight = [&](int i) {
    const int vec = threadIdx.x + i * blockDim.x;
    weights[i] = vec < num_vecs ? load_vec(weight + vec * kVec) : uint4{};
  };
  pdl_launch_dependents();
  if constexpr (kHoldsWeights) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) load_weight(i);
  }
  pdl_wait();
  const OneShot<T, kTpSize> round(p.peers, p.area);
  for (int row = blockIdx.x; row < num_rows; row += gridDim.x) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int vec = threadIdx.x + i * blockDim.x;
      if (vec >= num_vecs) continue;
      round.send(sendable(load_vec(x + row * norm.x_stride + vec * kVec)), row * num_vecs + vec);
    }
  }
  for (int row = blockIdx.x; row < num_rows; row += gridDim.x) {
    T* residual = static_cast<T*>(norm.residual) + row * norm.residual_stride;
    uint4 held[kVecs], added[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int vec = threadIdx.x + i * blockDim.x;
      held[i] = added[i] = uint4{};
      if (vec >= num_vecs) continue;
      held[i] = sendable(load_vec(x + row * norm.x_stride + vec * kVec));
      added[i] = load_vec(residual + vec * kVec);
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int vec = threadIdx.x + i * blockDim.x;
      if (vec < num_vecs) {
        held[i] = round.receive(held[i], row * num_vecs + vec);
        add_rounded<T>(held[i], added[i]);
        store_vec(residual + vec * kVec, held[i]);
      }
      squares = add_squares<T>(held[i], squares);
    }
    const float sum = block_sum<kMaxNormThreads>(squares);
    const float factor = norm_factor(sum, norm.hidden, norm.eps);
    T* out = static_cast<T*>(norm.out) + row * norm.out_stride;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int vec = threadIdx.x + i * blockDim.x;
      if constexpr (!kHoldsWeights) load_weight(i);
      uint4 scale = weights[i];
      const uint4 result = normed<T>(held[i], scale, factor, norm.offset);
      if (vec < num_vecs) store_vec(out + vec * kVec, result);
    }
    __syncthreads();  // the sum's shared memory is free again
  }
  round.end();
}

template <class T, int kTpSize>
__global__ void __launch_bounds__(kOneShotThreads) all_reduce_one_shot_kernel(const __grid_constant__ OneShotParams p) {
  T* x = static_cast<T*>(p.x);
  const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  pdl_launch_dependents();
  pdl_wait();
  const OneShot<T, kTpSize> round(p.peers, p.area);
  for (int vec = first; vec < p.num_vecs; vec += step) {
    round.send(sendable(load_vec(x + vec * kVec)), vec);
  }
  for (int vec = first; vec < p.num_vecs; vec += step) {
    store_vec(x + vec * kVec, round.receive(sendable(load_vec(x + vec * kVec)), vec));
  }
  __syncthreads();  // all threads know which round it is
  round.end();
}

}  // namespace pyserve::gpu
