// Data that the leader, rank 0, collects from the other ranks, and data that it sends to them:
//
//   gather_rows       on the leader, out[r] = the rows of rank r, bit for bit
//   broadcast_tokens  on all other ranks, tokens = the leader's tokens
//
// gather_rows: CTA b of another rank writes its share of the rows into the leader's buffer and
// raises a flag for CTA b of the leader, which copies that share to `out`. The buffer has room for
// one round only, so a rank first waits until every CTA of the leader has acknowledged the round
// before. That is usually long past. The grid and the width of a word are the same on all ranks,
// because they depend only on the shape of the rows. broadcast_tokens: one CTA. A token travels in
// a 64-bit word together with the number of its round, by which the reader sees that it has
// arrived. The buffer has room for two rounds, so the leader first waits until all ranks have
// acknowledged the round before the last.
// Floor: gather_rows is bound by the bytes at the rate of the link, plus a trip and a flag, 3 us;
// broadcast_tokens by one trip.
#pragma once

#include "gpu/comm/wait.cuh"
#include "gpu/core/pdl.cuh"

namespace pyserve::gpu {

constexpr int kLeader = 0;
constexpr int kGatherThreads = 512, kTokenThreads = 256;

// Calls fn(row, column) for each item of this thread's share of num_rows by num_columns items.
template <class Fn>
__device__ __forceinline__ void for_each(int64_t num_rows, int64_t num_columns, Fn&& fn) {
  const int64_t num_items = num_rows * num_columns;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t item = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; item < num_items;
       item += step) {
    fn(item / num_columns, item % num_columns);
  }
}

template <class Word>
__device__ __forceinline__ const Word& word_of(const void* rows, int64_t stride, int64_t row,
                                               int64_t column) {
  return static_cast<const Word*>(rows)[row * (stride / int64_t{sizeof(Word)}) + column];
}

template <class Word>
__device__ __forceinline__ Word& word_of(void* rows, int64_t stride, int64_t row, int64_t column) {
  return static_cast<Word*>(rows)[row * (stride / int64_t{sizeof(Word)}) + column];
}

// On the leader: copies its own rows from `local` (unless they are in place already) and then those
// of the other ranks from the buffer.
template <class Word>
__device__ __forceinline__ void collect(const GatherParams& p, uint32_t round) {
  const Peers& peers = p.peers;
  const int64_t num_columns = p.row_bytes / int64_t{sizeof(Word)};
  if (p.local != p.out) {
    for_each(p.num_rows, num_columns, [&](int64_t row, int64_t column) {
      word_of<Word>(p.out, p.out_stride, row, column) =
          word_of<Word>(p.local, p.local_stride, row, column);
    });
  }
  for (int from = 1; from < peers.tp_size; ++from) {
    if (threadIdx.x == 0) {
      const int32_t word = kControlGatherFlags + from * kMaxFlagCtas + blockIdx.x;
      wait_flag(peers, control_word(peers, kLeader, word), round);
    }
    __syncthreads();
    const unsigned char* sent =
        peers.buffers[kLeader] + p.offset + part_of(from, kLeader) * p.part_bytes;
    unsigned char* out = static_cast<unsigned char*>(p.out) + from * p.out_part_stride;
    for_each(p.num_rows, num_columns, [&](int64_t row, int64_t column) {
      word_of<Word>(out, p.out_stride, row, column) =
          load_system<Word>(sent + (row * num_columns + column) * int64_t{sizeof(Word)});
    });
    __syncthreads();
    for (unsigned i = blockIdx.x + threadIdx.x * gridDim.x; i < kMaxFlagCtas;
         i += blockDim.x * gridDim.x) {
      store_release(control_word(peers, from, kControlGatherAcks + i), round);
    }
  }
}

template <class Word>
__global__ void __launch_bounds__(kGatherThreads) gather_rows_kernel(const __grid_constant__ GatherParams p) {
  const Peers& peers = p.peers;
  pdl_wait();
  pdl_launch_dependents();
  const uint32_t round = own_word(peers, kControlGathered) + 1;
  if (peers.tp_rank == kLeader) {
    collect<Word>(p, round);
  } else {
    for (unsigned i = threadIdx.x; i < kMaxFlagCtas; i += blockDim.x) {
      wait_round(peers, control_word(peers, peers.tp_rank, kControlGatherAcks + i), round - 1);
    }
    __syncthreads();
    unsigned char* place =
        peers.buffers[kLeader] + p.offset + part_of(peers.tp_rank, kLeader) * p.part_bytes;
    const int64_t num_columns = p.row_bytes / int64_t{sizeof(Word)};
    for_each(p.num_rows, num_columns, [&](int64_t row, int64_t column) {
      store_system(place + (row * num_columns + column) * int64_t{sizeof(Word)},
                   word_of<Word>(p.local, p.local_stride, row, column));
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      const int32_t word = kControlGatherFlags + peers.tp_rank * kMaxFlagCtas + blockIdx.x;
      store_release(control_word(peers, kLeader, word), round);
    }
  }
  __syncthreads();  // all threads have read the number of the round
  set_own_words(peers, kControlGathered, kMaxFlagCtas, round);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) broadcast_tokens_kernel(const __grid_constant__ TokensParams p) {
  const Peers& peers = p.peers;
  pdl_launch_dependents();
  pdl_wait();
  const uint32_t round = own_word(peers, kControlTold) + 1;
  const int64_t offset = p.offset + (round % 2) * kMaxPeerTokens * int64_t{sizeof(uint64_t)};
  if (peers.tp_rank == kLeader) {
    const int to = threadIdx.x;
    if (to < peers.tp_size && to != kLeader) {
      wait_round(peers, control_word(peers, kLeader, kControlTokenAcks + to), round - 2);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.num_tokens; i += blockDim.x) {
      const uint64_t word = uint64_t{round} << 32 | static_cast<uint32_t>(p.tokens[i]);
      for (int other = 1; other < peers.tp_size; ++other) {
        store_system(peers.buffers[other] + offset + i * sizeof(word), word);
      }
    }
    __syncthreads();
  } else {
    const unsigned char* told = peers.buffers[peers.tp_rank] + offset;
    for (int i = threadIdx.x; i < p.num_tokens; i += blockDim.x) {
      Spin spin(peers);
      uint64_t word;
      do {
        word = load_system<uint64_t>(told + i * sizeof(word));
      } while (word >> 32 != round && spin.goes_on());
      p.tokens[i] = static_cast<int32_t>(word);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      store_release(control_word(peers, kLeader, kControlTokenAcks + peers.tp_rank), round);
    }
  }
  set_own_words(peers, kControlTold, 1, round);
}

}  // namespace pyserve::gpu
