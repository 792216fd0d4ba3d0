// The ops in which several devices work together, through the buffers of common/peers.h:
// all_reduce_add_norm, all_reduce_one_shot, all_reduce_two_shot, gather_rows and broadcast_tokens.
//
// All ranks launch the same ops in the same order with the same shapes, each rank on one stream. A
// kernel waits on the device for the data of the other ranks. If the data does not come within
// spin_ns, the kernel traps, which is a CUDA error of this process: a rank that has died does not
// hang the others for ever.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/peers.h"
#include "gpu/core/dtype.h"
#include "gpu/layers/norm.h"

namespace pyserve::gpu {

struct Peers {
  unsigned char* buffers[kMaxTpSize];  // the buffers of all ranks, as mapped in this process
  int32_t tp_rank, tp_size;
  int64_t spin_ns;
  bool is_trial;  // a given-up wait is recorded, and the kernel goes on with what it has
};

struct OneShotArea {
  int64_t offset;         // the same offset in the buffer of each rank
  int64_t message_bytes;  // the largest message
};

struct AllReduceNormParams {
  Peers peers;
  OneShotArea area;
  NormParams norm;  // norm.x is this rank's addend
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
  void* x;  // as in OneShotParams
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

  // If so, rows and strides are aligned to 16 bytes too.
  bool is_wide() const { return row_bytes % 16 == 0; }
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
