// One row of logits as the sampler sees it. It is read in octets of eight tokens, and on each pass
// the bias, the ban and the penalties are applied anew. A warp takes a chunk of 32 octets at once.
// This file also computes a token's weight. The order of float operations is part of the
// specification (pyserve/ops/reference.py), so every operation is spelled out and the compiler may
// fuse none.
#pragma once

#include "common/step.h"
#include "gpu/core/vec.cuh"
#include "gpu/sample/sample.h"

namespace pyserve::gpu {

constexpr int kSampleThreads = 512;
constexpr int kSampleWarps = kSampleThreads / kWarpSize;
constexpr int kOctet = 8;
constexpr int kChunkTokens = kWarpSize * kOctet;  // a chunk: the tokens that a warp takes at once
constexpr float kInfinity = __builtin_huge_valf();
constexpr int kBiasBuckets = 1024;
constexpr int kMaxBiases = kMaxLogitBias + kMaxStopTokenIds;

// What changes a row's logits. The biases and then the banned ids form linked lists by octet, each
// in the order given.
struct Adjustments {
  const int16_t* counts;  // null without penalties
  bool counts_aligned;    // whether counts is aligned to 16 bytes
  bool has_biases;        // has biases or bans
  float repetition, frequency, presence;
  int32_t num_biases;           // these entries come first; the entries behind them are bans
  int32_t first[kBiasBuckets];  // octet % kBiasBuckets -> the list's first entry, or kNone
  int16_t next[kMaxBiases];
  int32_t id[kMaxBiases];
  float value[kMaxBiases];
};
constexpr int kNone = 0x7fff;

// The key of a float: unsigned integers in the order of the floats' values. Both zeros have the
// same key.
__device__ __forceinline__ uint32_t to_key(float x) {
  const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float from_key(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

// The weight of a token: round(exp(x) * 2^34) for x <= 0, with Cephes' expf (Moshier 1989).
__device__ __forceinline__ float quantized_exp(float x) {
  constexpr float kRoundShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = fmaxf(x, -30.0f);
  const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896341f), kRoundShift);
  const float n = __fsub_rn(shifted, kRoundShift);
  // n times the first constant is exact, so fusing it with the addition changes nothing.
  const float r =
      __fsub_rn(__fmaf_rn(n, -0.693359375f, x), __fmul_rn(n, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
  const float y = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
  // The low bits of `shifted` are n, which gives the scale 2^(n + 34).
  const float scale = __uint_as_float((__float_as_uint(shifted) + (127u + 34u)) << 23);
  const float scaled = __fmul_rn(y, scale);
  return scaled < 0x1p23f ? __fsub_rn(__fadd_rn(scaled, 0x1p23f), 0x1p23f) : scaled;
}

// A sum of weights in two floats, which is exact for up to 128 weights.
struct WeightSum {
  float high = 0.0f, low = 0.0f;

  __device__ __forceinline__ void add(float weight) {
    constexpr float kRoundShift = 12582912.0f;
    const float h = __fsub_rn(__fmaf_rn(weight, 0x1p-17f, kRoundShift), kRoundShift);
    high = __fadd_rn(high, h);
    low = __fadd_rn(low, __fmaf_rn(h, -0x1p17f, weight));
  }

  // As add, and also adds the weight times `share`, which is 0 or 1, to `other`.
  __device__ __forceinline__ void add(float weight, float share, WeightSum& other) {
    constexpr float kRoundShift = 12582912.0f;
    const float h = __fsub_rn(__fmaf_rn(weight, 0x1p-17f, kRoundShift), kRoundShift);
    const float l = __fmaf_rn(h, -0x1p17f, weight);
    high = __fadd_rn(high, h);
    low = __fadd_rn(low, l);
    other.high = __fmaf_rn(h, share, other.high);
    other.low = __fmaf_rn(l, share, other.low);
  }

  __device__ __forceinline__ uint64_t value() const {
    return static_cast<uint64_t>((int64_t{__float2int_rn(high)} << 17) + __float2int_rn(low));
  }

  // The sum over the lanes of the warp, in every lane.
  __device__ __forceinline__ uint64_t warp_total() const {
    const int h = __reduce_add_sync(kFullMask, __float2int_rn(high));
    const int l = __reduce_add_sync(kFullMask, __float2int_rn(low));
    return static_cast<uint64_t>((int64_t{h} << 17) + l);
  }
};

template <class T>
struct RawOctet {
  uint4 words;

  __device__ __forceinline__ void unpack(float (&x)[kOctet]) const {
    gpu::unpack<T>(words, x);
  }
};

template <class T>
struct SampleRow {
  const T* logits;
  const Adjustments* adjustments;  // in shared memory
  int vocab_size;
  bool is_aligned;  // logits are aligned to 16 bytes
  bool is_plain;    // there are no adjustments

  __device__ __forceinline__ int num_chunks() const {
    return (vocab_size + kChunkTokens - 1) / kChunkTokens;
  }

  // Tokens behind the end of the vocabulary read as -inf.
  __device__ __forceinline__ RawOctet<T> load(int octet) const {
    const int begin = octet * kOctet;
    if (is_aligned && begin + kOctet <= vocab_size) return {load_streaming(logits + begin)};
    return load_slowly(begin);
  }

  __device__ __forceinline__ RawOctet<T> load_slowly(int begin) const {
    const auto* bits = reinterpret_cast<const uint16_t*>(logits);
    auto at = [&](int i) -> uint32_t { return i < vocab_size ? bits[i] : kMinusInfBits<T>; };
    auto two = [&](int i) { return at(i) | at(i + 1) << 16; };
    return {{two(begin), two(begin + 2), two(begin + 4), two(begin + 6)}};
  }

  // Applies bias, ban and penalties to the logits of an octet.
  __device__ __forceinline__ void adjust(int octet, float (&x)[kOctet]) const {
    if (is_plain) return;
    if (adjustments->has_biases) apply_biases(octet, x);
    if (adjustments->counts != nullptr && octet * kOctet < vocab_size) apply_penalties(octet, x);
  }

  __device__ __forceinline__ void apply_biases(int octet, float (&x)[kOctet]) const {
#pragma unroll 1
    for (int j = adjustments->first[octet % kBiasBuckets]; j != kNone; j = adjustments->next[j]) {
      const int id = adjustments->id[j];
      if (id / kOctet != octet) continue;
#pragma unroll
      for (int e = 0; e < kOctet; ++e) {
        const float y =
            j < adjustments->num_biases ? __fadd_rn(x[e], adjustments->value[j]) : -kInfinity;
        x[e] = id % kOctet == e ? y : x[e];
      }
    }
  }

  __device__ __forceinline__ void apply_penalties(int octet, float (&x)[kOctet]) const {
    const int begin = octet * kOctet;
    const int16_t* counts = adjustments->counts;
    uint32_t pairs[4];
    if (adjustments->counts_aligned && begin + kOctet <= vocab_size) {
      const uint4 words = *reinterpret_cast<const uint4*>(counts + begin);
      pairs[0] = words.x, pairs[1] = words.y, pairs[2] = words.z, pairs[3] = words.w;
    } else {
      auto at = [&](int i) -> uint32_t {
        return i < vocab_size ? static_cast<uint16_t>(counts[i]) : 0;
      };
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = at(begin + 2 * j) | at(begin + 2 * j + 1) << 16;
    }
    if ((pairs[0] | pairs[1] | pairs[2] | pairs[3]) == 0) return;
    const float repetition = adjustments->repetition, frequency = adjustments->frequency;
    const float presence = adjustments->presence;
    // Not unrolled, so that the code has only one division. x and the counts are rotated by one
    // element per iteration, because registers cannot be indexed.
#pragma unroll 1
    for (int e = 0; e < kOctet; ++e) {
      const uint32_t count = pairs[0] & 0xffffu, num_output = count & kMaxTokenCount;
      float y = x[0];
      if (count != 0) {
        y = y > 0.0f ? __fdiv_rn(y, repetition) : __fmul_rn(y, repetition);
        y = __fsub_rn(y, __fmul_rn(frequency, static_cast<float>(num_output)));
        if (num_output > 0) y = __fsub_rn(y, presence);
      }
#pragma unroll
      for (int i = 0; i + 1 < kOctet; ++i) x[i] = x[i + 1];
      x[kOctet - 1] = y;
#pragma unroll
      for (int i = 0; i < 3; ++i) pairs[i] = pairs[i] >> 16 | pairs[i + 1] << 16;
      pairs[3] >>= 16;
    }
  }

  // Calls fn(chunk, octet, raw) for the chunks [first, last). A whole warp takes a chunk, and each
  // lane one octet. The lane's next two octets (32 bytes) are being loaded meanwhile.
  template <class Fn>
  __device__ __forceinline__ void visit_raw(int first, int last, const Fn& fn) const {
    constexpr int num_warps = kSampleWarps;
    const int lane = threadIdx.x % kWarpSize;
    int chunk = first + threadIdx.x / kWarpSize;
    auto load_of = [&](int c) { return load((c < last ? c : last - 1) * kWarpSize + lane); };
    if (chunk >= last) return;
    RawOctet<T> next[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) next[i] = load_of(chunk + i * num_warps);
#pragma unroll 1
    for (; chunk < last; chunk += num_warps) {
      const RawOctet<T> raw = next[0];
      next[0] = next[1];
      next[1] = load_of(chunk + 2 * num_warps);
      fn(chunk, chunk * kWarpSize + lane, raw);
    }
  }

  // The same with adjusted logits: fn(chunk, octet, x).
  template <class Fn>
  __device__ __forceinline__ void visit(int first, int last, const Fn& fn) const {
    visit_raw(first, last, [&](int chunk, int octet, const RawOctet<T>& raw) {
      float x[kOctet];
      raw.unpack(x);
      adjust(octet, x);
      fn(chunk, octet, x);
    });
  }

  __device__ __forceinline__ void adjusted_octet(int octet, float (&x)[kOctet]) const {
    load(octet).unpack(x);
    adjust(octet, x);
  }
};

}  // namespace pyserve::gpu
