// all_reduce_two_shot: x = sum of x over all ranks, of messages too large to be sent to everyone.
// The message is divided in tp_size pieces. A rank sends each other one its piece, adds up its own
// (reduce), sends the sum to all others and takes theirs (spread): 2 (tp_size - 1) / tp_size of
// the message over each link, where one shot takes tp_size - 1.
//
// CTA b of a rank waits for CTA b of the others alone, by flags that hold the number of the round:
// all ranks have the same grid, which depends on the message alone. A piece's vectors are dealt out
// to threads in the same way on all ranks and in both halves, but nothing rests on it: a flag is
// behind a barrier of its block.
//
// One round's pieces have room. A rank sends a piece of round e + 1 when its kernel of e has ended,
// so all others have told it by then that their sums, and with them their pieces of e, are done
// with; and it spreads a sum of e + 1 when all others have sent pieces of e + 1, so their kernels
// of e have ended, which copied the sums of e.
// Numerics: as float32 in the order of ranks, by the one rank that adds; one rounding.
// Floor: bytes, as above; two trips, two flags, 6 to 8 us.
#pragma once

#include "gpu/comm/one_shot.cuh"

namespace pyserve::gpu {

constexpr int kTwoShotThreads = 512;

// Tells each other rank's CTA of this number what the block has written to that rank.
__device__ __forceinline__ void raise_flags(const Peers& peers, int32_t flags, uint32_t round) {
  __syncthreads();
  const int to = threadIdx.x;
  if (to >= peers.tp_size || to == peers.tp_rank) return;
  const int32_t word = flags + peers.tp_rank * kMaxFlagCtas + blockIdx.x;
  store_release(control_word(peers, to, word), round);
}

// Waits for what those of all others have written.
__device__ __forceinline__ void await_flags(const Peers& peers, int32_t flags, uint32_t round) {
  const int from = threadIdx.x;
  if (from < peers.tp_size && from != peers.tp_rank) {
    const int32_t word = flags + from * kMaxFlagCtas + blockIdx.x;
    wait_flag(peers, control_word(peers, peers.tp_rank, word), round);
  }
  __syncthreads();
}

template <class T, int kTpSize>
__global__ void __launch_bounds__(kTwoShotThreads) all_reduce_two_shot_kernel(const __grid_constant__ TwoShotParams p) {
  const Peers& peers = p.peers;
  const int own = peers.tp_rank;
  T* x = static_cast<T*>(p.x);
  const int64_t piece = (p.num_vecs + kTpSize - 1) / kTpSize;  // vectors; the last may have fewer
  const int64_t first = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  const auto size_of = [&](int rank) {
    const int64_t left = p.num_vecs - rank * piece;
    return left < piece ? left : piece;
  };
  pdl_wait();
  pdl_launch_dependents();
  const uint32_t round = own_word(peers, kControlReduced) + 1;

#pragma unroll
  for (int i = 1; i < kTpSize; ++i) {
    const int to = (own + i) % kTpSize;
    const T* source = x + to * piece * kVec;
    unsigned char* place = peers.buffers[to] + p.reduce_offset + part_of(own, to) * p.piece_bytes;
    for (int64_t vec = first; vec < size_of(to); vec += step) {
      store_system(place + 16 * vec, load_vec(source + vec * kVec));
    }
  }
  raise_flags(peers, kControlReduceFlags, round);
  await_flags(peers, kControlReduceFlags, round);

  const unsigned char* sent = peers.buffers[own] + p.reduce_offset;
  T* sums = x + own * piece * kVec;
  for (int64_t vec = first; vec < size_of(own); vec += step) {
    uint4 parts[kTpSize];
#pragma unroll
    for (int r = 0; r < kTpSize; ++r) {
      parts[r] = r == own ? load_vec(sums + vec * kVec)
                          : load_system<uint4>(sent + part_of(r, own) * p.piece_bytes + 16 * vec);
    }
    float added[kVec] = {};
    add_parts<T>(added, parts);
    const uint4 sum = pack<T>(added);
    store_vec(sums + vec * kVec, sum);
#pragma unroll
    for (int i = 1; i < kTpSize; ++i) {
      const int to = (own + i) % kTpSize;
      store_system(peers.buffers[to] + p.spread_offset + part_of(own, to) * p.piece_bytes +
                       16 * vec,
                   sum);
    }
  }
  raise_flags(peers, kControlSpreadFlags, round);
  await_flags(peers, kControlSpreadFlags, round);

  const unsigned char* spread = peers.buffers[own] + p.spread_offset;
#pragma unroll
  for (int i = 1; i < kTpSize; ++i) {
    const int from = (own + i) % kTpSize;
    T* target = x + from * piece * kVec;
    for (int64_t vec = first; vec < size_of(from); vec += step) {
      store_vec(target + vec * kVec, load_system<uint4>(spread + part_of(from, own) * p.piece_bytes +
                                                        16 * vec));
    }
  }
  set_own_words(peers, kControlReduced, kMaxFlagCtas, round);
}

}  // namespace pyserve::gpu
