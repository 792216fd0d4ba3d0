// Work of several cards together, by the memory of common/peers.h: all_reduce_add_norm,
// all_reduce_one_shot, all_reduce_two_shot, gather_rows and broadcast_tokens.
//
// All ranks launch the same ops in the same order with the same shapes, each on one stream. A
// kernel waits on the card for the others' data. Where that does not come in spin_ns the kernel
// traps, which is a CUDA error of this process: a peer that is gone does not hang the card for
// ever.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/peers.h"
#include "gpu/core/dtype.h"
#include "gpu/layers/norm.h"

namespace pyserve::gpu {

struct Peers {
  unsigned char* buffers[kMaxTpSize];  // of all ranks, as mapped here
  int32_t tp_rank, tp_size;
  int64_t spin_ns;
  bool is_trial;  // a wait that is given up is noted, and the kernel goes on with what is there
};

struct OneShotArea {
  int64_t offset;         // in each buffer
  int64_t message_bytes;  // room of a message
};

struct AllReduceNormParams {
  Peers peers;
  OneShotArea area;
  NormParams norm;  // x is this rank's part of the sum
};

struct OneShotParams {
  Peers peers;
  OneShotArea area;
  void* x;           // num_vecs * 16 bytes, in place
  int64_t num_vecs;
  Dtype dtype;  // 16 bits
};

struct TwoShotParams {
  Peers peers;
  int64_t reduce_offset, spread_offset, piece_bytes;
  void* x;  // as above
  int64_t num_vecs;
  Dtype dtype;
};

struct GatherParams {
  Peers peers;
  int64_t offset, part_bytes;
  const void* local;     // [num_rows, row_bytes]; strides in bytes
  int64_t local_stride;
  void* out;             // the leader's, [tp_size, num_rows, row_bytes]; null on the others
  int64_t out_part_stride, out_stride;
  int64_t num_rows, row_bytes;

  bool is_wide() const { return row_bytes % 16 == 0; }  // rows and strides are aligned so then
};

struct TokensParams {
  Peers peers;
  int64_t offset;
  int32_t* tokens;  // [num_tokens]
  int32_t num_tokens;
};

cudaError_t launch_all_reduce_add_norm(const AllReduceNormParams& params, cudaStream_t stream);
cudaError_t launch_all_reduce_one_shot(const OneShotParams& params, cudaStream_t stream);
cudaError_t launch_all_reduce_two_shot(const TwoShotParams& params, cudaStream_t stream);
cudaError_t launch_gather_rows(const GatherParams& params, cudaStream_t stream);
cudaError_t launch_broadcast_tokens(const TokensParams& params, cudaStream_t stream);

}  // namespace pyserve::gpu
