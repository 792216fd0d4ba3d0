// The keys and values of the step itself, where the decode kernel does the work of rope_write_kv:
// it takes them from qkv, rotates the keys, and puts both into a warp's stage and into the caches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/decode_loader.cuh"
#include "gpu/core/rotate.cuh"
#include "gpu/core/vec.cuh"

namespace pyserve::gpu::decode {

// The first key at or behind `from` that belongs to this step, to the item and to this warp; -1 if
// there is none.
__device__ __forceinline__ int first_new_key(const Work& work, int from) {
  const int warp = threadIdx.x / kWarpSize;
  int key = max(max(from, work.item.kv_begin), work.seq_len - work.query_len);
  while (key < work.item.kv_end && key % kKvTile / kWarpKeys != warp) ++key;
  return key < work.item.kv_end && work.slot >= 0 ? key : -1;
}

__device__ __forceinline__ const float* cos_sin_of(const Decode& d, int position) {
  // Packed rows behind the last one have positions behind the row's end; their results are not
  // used.
  const int64_t row = min(int64_t{position}, d.rope.max_position - 1);
  return d.rope.cos_sin + row * d.rope.cos_sin_stride;
}

// One key of this step and its value, on the way from qkv to a warp's stage and to the caches. The
// first lanes hold 8 elements of the key and the 8 elements that are rotated with them. Lanes from
// 8 on hold 8 elements of the value; with head_dim 256 all lanes do. A kernel of Kind::kGeneral has
// no registers to load cosines and sines ahead; it reads them when it rotates the key.
template <class T, int kHeadDim, Kind kKind>
class NewKey {
  static constexpr int kHalf = kHeadDim / 2, kRowBytes = kSmemRowBytes<T, kHeadDim>;
  static constexpr bool kHasBoth = kHeadDim > 128;  // some lanes hold parts of both key and value
  static constexpr int kFirstValueLane = kHasBoth ? 0 : 8;

 public:
  __device__ NewKey(const Decode& d, int kv_head) : d_(d), kv_head_(kv_head) {
    const int lane = threadIdx.x % kWarpSize;
    has_key_ = lane < kHalf / kVec;
    chunk_ = has_key_ ? lane : lane - kFirstValueLane;
    has_value_ = lane >= kFirstValueLane && chunk_ < kHeadDim / kVec;
  }

  // Starts to load the key at `position` of the row, and its value.
  __device__ void load(const Work& work, int position) {
    position_ = position;
    const int64_t context = work.seq_len - work.query_len;
    const int64_t at = (work.first_query + position - context) * d_.rope.token_stride +
                       kv_head_ * kHeadDim + chunk_ * kVec;
    block_ = d_.p.block_table[work.slot * d_.p.block_table_stride +
                              (position >> d_.p.block_size_log2)];
    if (has_key_) {
      const T* key = static_cast<const T*>(d_.rope.keys) + at;
      data_[0] = load_vec(key);
      data_[1] = load_vec(key + kHalf);
      if constexpr (kKind != Kind::kGeneral) load_angles();
    }
    if (has_value_) {
      value() = load_vec(static_cast<const T*>(d_.rope.values) + at);
    }
  }

  // Stores both to the caches and to row `row` of a stage, whose values lie part_bytes behind its
  // keys.
  __device__ void store(unsigned char* stage, int row, int part_bytes) {
    if (static_cast<uint32_t>(block_) >= static_cast<uint32_t>(d_.p.num_blocks)) __trap();
    const int64_t block = block_, token = position_ & ((1 << d_.p.block_size_log2) - 1);
    unsigned char* to = stage + row * kRowBytes;
    if (has_key_) {
      turn();
      T* cache = static_cast<T*>(const_cast<void*>(d_.p.key_cache)) +
                 block * d_.p.key_block_stride + token * d_.p.key_token_stride +
                 kv_head_ * d_.p.key_head_stride + chunk_ * kVec;
      store_vec(cache, data_[0]);
      store_vec(cache + kHalf, data_[1]);
      put(to, row, chunk_, data_[0]);
      put(to, row, chunk_ + kHalf / kVec, data_[1]);
    }
    if (has_value_) {
      T* cache = static_cast<T*>(const_cast<void*>(d_.p.value_cache)) +
                 block * d_.p.value_block_stride + token * d_.p.value_token_stride +
                 kv_head_ * d_.p.value_head_stride + chunk_ * kVec;
      store_vec(cache, value());
      put(to + part_bytes, row, chunk_, value());
    }
  }

  __device__ int position() const { return position_; }
  __device__ void forget() { position_ = -1; }

 private:
  __device__ uint4& value() { return data_[kHasBoth ? 2 : 0]; }

  static __device__ void put(unsigned char* to, int row, int chunk, const uint4& data) {
    *reinterpret_cast<uint4*>(to + (chunk ^ row % 8) * 16) = data;
  }

  __device__ void load_angles() {
    const float4* cos_sin =
        reinterpret_cast<const float4*>(cos_sin_of(d_, position_) + chunk_ * kVec);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      cosines_[i] = cos_sin[i];
      sines_[i] = cos_sin[kHalf / 4 + i];
    }
  }

  __device__ void turn() {
    if constexpr (kKind == Kind::kGeneral) load_angles();
    float a[kVec], b[kVec];
    unpack<T>(data_[0], a);
    unpack<T>(data_[1], b);
    const float* cosines = reinterpret_cast<const float*>(cosines_);
    const float* sines = reinterpret_cast<const float*>(sines_);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float2 turned = rotate(a[i], b[i], cosines[i], sines[i]);
      a[i] = turned.x;
      b[i] = turned.y;
    }
    data_[0] = pack<T>(a);
    data_[1] = pack<T>(b);
  }

  const Decode& d_;
  int kv_head_, chunk_;
  bool has_key_, has_value_;
  int position_ = -1, block_ = 0;
  uint4 data_[kHasBoth ? 3 : 2] = {};  // two vectors of the key, and value()
  float4 cosines_[2] = {}, sines_[2] = {};
};

}  // namespace pyserve::gpu::decode
