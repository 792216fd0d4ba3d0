// all_reduce_two_shot: x = sum of x over all ranks, in bfloat16 or float16, for messages too large
// to send to every rank. The message is divided into tp_size pieces, one per rank. Each rank sends
// every other rank that one's piece, adds up its own piece (reduce), then sends the sum to all
// others and receives theirs (spread). Each link carries 2 (tp_size - 1) / tp_size of the message;
// one shot would carry tp_size - 1 messages.
//
// Work: CTA b of a rank waits only for CTA b of the other ranks, by flags that hold the number of
// the round. Hence the grid must be the same on all ranks; it depends only on the size of the
// message. The vectors of a piece are also dealt out to threads in the same way on all ranks and in
// both halves. Nothing relies on that within a CTA, since each flag is raised and awaited with a
// barrier of its block.
//
// Rounds: the buffer has room for the pieces of one round only, which is enough. A rank sends
// pieces of round e + 1 only after its kernel of round e has ended, and that needed the sums of all
// other ranks; they had finished reading their pieces of round e by then. And it spreads sums of
// round e + 1 only once all others have sent pieces of e + 1, so their kernels of round e, which
// copied the sums of e, have ended.
// Numerics: one rank adds each piece in float32, from 0 and in the order of the ranks, and rounds
// once.
// Floor: the bytes above, plus two trips and two flags, 6 to 8 us.
#pragma once

#include "gpu/comm/one_shot.cuh"

namespace pyserve::gpu {

constexpr int kTwoShotThreads = 512;

// Tells CTA blockIdx.x of every other rank that this block's writes to that rank are complete.
__device__ __forceinline__ void raise_flags(const Peers& peers, int32_t flags, uint32_t round) {
  __syncthreads();
  const int to = threadIdx.x;
  if (to >= peers.tp_size || to == peers.tp_rank) return;
  const int32_t word = flags + peers.tp_rank * kMaxFlagCtas + blockIdx.x;
  store_release(control_word(peers, to, word), round);
}

// Waits for the same flags from CTA blockIdx.x of every other rank.
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
  // In vectors; the last piece may have fewer.
  const int64_t piece = (p.num_vecs + kTpSize - 1) / kTpSize;
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
