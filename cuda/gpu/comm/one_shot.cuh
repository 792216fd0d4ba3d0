// The sum over all ranks of a small message of bfloat16 or float16, in one trip over the links:
// every rank writes its addend into the buffers of all other ranks, and each rank then adds up what
// it has received. Each op is one kernel and uses no flags:
//
//   all_reduce_add_norm   residual += sum of x, out = rms_norm(residual); x [num_rows, hidden]
//   all_reduce_one_shot   x = sum of x, of num_vecs vectors of 16 bytes
//
// Arrival: a 32-bit word that has not arrived holds the marker kAbsent, the bits of two negative
// zeros. A word of the message with these bits is sent as two positive zeros, which changes no sum,
// because sums begin with +0; NaNs of any bits pass unchanged. A vector of 16 bytes may arrive word
// by word, so each of its words is checked. Whoever reads a vector sets its place back to kAbsent.
//
// Rounds: the area has room for the messages of three successive calls, called rounds. A rank is
// never two rounds ahead of another, because it can finish round e only with the other's message of
// round e. In round e + 3 a rank reuses the place of round e, which the reader has cleared in round
// e. The reader has also finished round e + 1 by then: otherwise it would not have sent its message
// of round e + 2, without which the writer could not have reached round e + 3. Two rounds would
// suffice only if a kernel's clearing stores could never come after the next kernel's arrivals;
// with three this does not matter.
//
// Work: vectors are spread over threads and CTAs. Each rank may do so in its own way, so the grids
// need not be equal. All CTAs of a grid run at the same time, and each sends all of its vectors
// before it waits for any.
// Numerics: every rank adds in float32, from 0 and in the order of the ranks, so all ranks get the
// same bits. The sum is rounded, then added to the residual and normed by the same code as
// add_rms_norm.
// Floor: one trip takes 1 to 2 us, and (tp_size - 1) messages come in at the rate of the links.
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

// sum += each of the parts, in their order.
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

// The messages of one round.
template <class T, int kTpSize>
class OneShot {
 public:
  __device__ OneShot(const Peers& peers, const OneShotArea& area)
      : peers_(peers),
        message_bytes_(static_cast<uint32_t>(area.message_bytes)),
        round_(own_word(peers, kControlRounds)),
        offset_(static_cast<uint32_t>(area.offset) + round_ * (kTpSize - 1) * message_bytes_) {}

  __device__ void send(const uint4& own, int vec) const {
#pragma unroll 1  // unrolled, the addresses of all ranks would not fit the registers
    for (int i = 1; i < kTpSize; ++i) {
      // Begins with the next rank, so that not all ranks write to the same one first.
      const int to = (peers_.tp_rank + i) % kTpSize;
      store_system(peers_.buffers[to] + place(peers_.tp_rank, to, vec), own);
    }
  }

  // The sum of all ranks' addends of a vector, of which `own` is this rank's; sets the places of
  // the other ranks back to kAbsent.
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

  // Moves on to the next round. Called by all threads of the block, behind a barrier after which
  // none of them uses the round any more.
  __device__ void end() const {
    set_own_words(peers_, kControlRounds, kMaxRoundCtas,
                  round_ + 1 == kOneShotRounds ? 0 : round_ + 1);
  }

 private:
  static constexpr int kGroup = kTpSize < 4 ? kTpSize : 4;  // more would not fit the registers

  __device__ uint32_t place(int source, int owner, int vec) const {
    return offset_ + part_of(source, owner) * message_bytes_ + 16 * vec;
  }
  // Loads the addends of kGroup ranks together, and again until all of them have arrived.
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
  const uint32_t offset_;  // of this round's messages, the same in every buffer
};

template <class T, int kTpSize, int kVecs>
__global__ void __launch_bounds__(kMaxNormThreads)
    all_reduce_add_norm_kernel(const __grid_constant__ AllReduceNormParams p) {
  const NormParams& norm = p.norm;
  // Vectors of a row; 32 bits suffice, since a message is small.
  const int num_vecs = static_cast<int>(norm.hidden / kVec);
  const int num_rows = static_cast<int>(norm.num_rows);
  const T* x = static_cast<const T*>(norm.x);
  const T* weight = static_cast<const T*>(norm.weight);
  // For 8 ranks the parts leave no registers for the weights.
  constexpr bool kHoldsWeights = kTpSize < 8;
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
    __syncthreads();  // the shared memory of block_sum may be written again
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
  __syncthreads();  // all threads have read the number of the round
  round.end();
}

}  // namespace pyserve::gpu
