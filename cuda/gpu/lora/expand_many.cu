// lora_expand and lora_expand_silu_mul (expand.cuh) of many tokens, for which bytes on their way
// are what counts: what is added to is asked for 48 tokens ahead, by cp.async into shared memory,
// where each thread has places of its own, 24 KB of a CTA from its start on. What was shrunk lies in
// shared memory as an mma's registers have it: staging.cuh.
#include "gpu/lora/expand.cuh"
#include "gpu/lora/staging.cuh"

namespace pyserve::gpu {
namespace {

// What is added to: 16 tokens of a CTA's columns, and how many of those there is room for.
constexpr int kOldBytes = kMmaTokens * kColumns * 2, kAhead = 3;

// Of a piece of 16 tokens, of the parts that a CTA has.
template <bool kIsGated>
constexpr int kPieceBytes = (kIsGated ? 2 : 1) * kHalvesBytes;

// Of a strip and an mma: of token group the first two, of group + 8 the others.
struct Sums {
  float of[2][kTiles][4];

  // Begin with what is added to, of token group or of group + 8.
  template <class T>
  __device__ __forceinline__ void take(int s, int half, const uint4& old) {
    float x[kVec];
    unpack<T>(old, x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) of[s][i / 2][2 * half + i % 2] = x[i];
  }
};

// Tokens of a warp's strips, 16 by 16, read and written by 16 bytes where `is_whole`: a lane's 8
// columns are there and aligned. Where not, one by one, when they are written.
template <class T, bool kIsGated>
struct Tile {
  const LoraExpandParams& p;
  int begin, count;  // tokens
  int column, apart;  // lane's first of a strip, and from there to the other's
  int room[2];        // and to the ends of both strips' parts
  bool is_whole;
  uint32_t places;  // of what is added to: the thread's first one
  const T* asked;   // of lane's token among the next 16 that are asked for
  T* out;           // and that are written

  __device__ __forceinline__ Tile(const LoraExpandParams& params, const TokenTile& tokens,
                                  const Strip (&strips)[2], bool is_aligned, uint32_t smem)
      : p(params), begin(tokens.begin), count(tokens.count),
        places(smem + threadIdx.x * 16) {
    column = strips[0].first + threadIdx.x % 4 * kVec;
    apart = kIsGated ? strips[1].first - strips[0].first : kStrip;
    room[0] = strips[0].end - column;
    room[1] = strips[1].end - column - apart;
    is_whole = is_aligned && column % kVec == 0 && apart % kVec == 0 && room[0] >= kVec &&
               room[1] >= kVec;
    const int group = threadIdx.x % kWarpSize / 4;
    asked = from(group);
    out = static_cast<T*>(p.out) + (begin + group) * p.out_stride + column;
  }

  __device__ __forceinline__ int64_t stride() const {
    return kIsGated ? p.gate_up_stride : p.out_stride;
  }

  __device__ __forceinline__ const T* from(int token) const {
    return static_cast<const T*>(kIsGated ? p.gate_up : p.out) + (begin + token) * stride() +
           column;
  }

  // Of a strip, and of token group or group + 8, in the turn-th of kAhead places.
  __device__ __forceinline__ uint32_t place_of(int turn, int s, int half) const {
    return places + turn * kOldBytes + (2 * s + half) * kThreads * 16;
  }

  // Ask for what the 16 tokens from `first` on add to: a group of copies, empty behind the last.
  __device__ __forceinline__ void load(int first, int turn) {
    if (is_whole && first < count) {
      const int token = first + threadIdx.x % kWarpSize / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* row = asked + 8 * half * stride();
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          cp_async_16(place_of(turn, s, half), row + s * apart, token + 8 * half < count);
        }
      }
      asked += kMmaTokens * stride();
    }
    cp_async_commit();
  }

  // What the oldest of kAhead groups was asked for.
  __device__ __forceinline__ void take(int turn, Sums& sums) const {
    cp_async_wait<kAhead - 1>();
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 old = is_whole ? load_shared(place_of(turn, s, half)) : uint4{};
        sums.take<T>(s, half, old);
      }
    }
  }

  // The 16 tokens from `first` on, the next ones.
  __device__ __forceinline__ void store(int first, const Sums& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + threadIdx.x % kWarpSize / 4 + 8 * half;
      if (token >= count) continue;
      float x[2][kVec];
#pragma unroll
      for (int i = 0; i < 2 * kVec; ++i) {
        x[i / kVec][i % kVec] = sums.of[i / kVec][i % kVec / 2][2 * half + i % 2];
      }
      T* row = out + 8 * half * p.out_stride;
      if (!is_whole) {
        store_each(from(token), row, x);
      } else if constexpr (kIsGated) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) x[0][i] = silu_mul(x[0][i], x[1][i]);
        store_vec(row, pack<T>(x[0]));
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) store_vec(row + s * apart, pack<T>(x[s]));
      }
    }
    out += kMmaTokens * p.out_stride;
  }

  __device__ __forceinline__ void store_each(const T* row, T* to, const float (&x)[2][kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if constexpr (kIsGated) {
        if (i >= room[0]) continue;
        const float gate = to_float(row[i]) + x[0][i];
        const float up = to_float(row[apart + i]) + x[1][i];
        to[i] = from_float<T>(silu_mul(gate, up));
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          if (i >= room[s]) continue;
          to[s * apart + i] = from_float<T>(to_float(row[s * apart + i]) + x[s][i]);
        }
      }
    }
  }
};

// sums += 16 tokens of what was shrunk times a piece of B.
template <class T>
__device__ __forceinline__ void add_product(float (&sums)[kTiles][4], const uint4& value,
                                            const uint4& rest, const uint2 (&weights)[kTiles]) {
  const uint32_t values[4] = {value.x, value.y, value.z, value.w};
  const uint32_t rests[4] = {rest.x, rest.y, rest.z, rest.w};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    mma_16816<T>(sums[n], values, weights[n].x, weights[n].y);
    mma_16816<T>(sums[n], rests, weights[n].x, weights[n].y);
  }
}

// CTAs an SM; of four, ptxas spills for sm_120, which has shared memory for two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kResident = 3;
#else
constexpr int kResident = 4;
#endif

// kIsAligned: four elements of b's rows, and of what was shrunk, may be read at once.
template <class T, bool kIsGated, bool kIsAligned>
__global__ void __launch_bounds__(kThreads, kResident)
    expand_many_kernel(LoraExpandParams p, int column_blocks, int log2_tile_tokens,
                       int staged_bytes, bool is_aligned) {
  constexpr int kParts = kIsGated ? 2 : 1;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  auto* staged = reinterpret_cast<uint4*>(dynamic_smem);  // behind it, what is added to
  const int lane = threadIdx.x % kWarpSize;
  pdl_launch_dependents();
  Work<T, kIsGated, kIsAligned> work(p, column_blocks, log2_tile_tokens);
  pdl_wait();
  if (work.is_empty()) return;
  const TokenTile& tokens = work.tokens;
  const Strip(&strips)[2] = work.strips;
  Tile<T, kIsGated> tile(p, tokens, strips, is_aligned,
                         smem_address(dynamic_smem) + staged_bytes);
  const Staging<kWarps> staging(work.rank, kPieceBytes<kIsGated>, staged_bytes);
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) tile.load(ahead * kMmaTokens, ahead);
  int token = 0, turn = 0;
#pragma unroll 1
  for (int first = 0; first < tokens.count; first += kMmaTokens) {
    if (token == staging.num_tokens) token = 0;
    if (work.rank > 0 && token == 0) {
      if (first > 0) __syncthreads();
      const int64_t begin = tokens.begin + first;
      const float* row = p.shrunk.data + begin * p.shrunk.stride;
      const int count = min(tokens.count - first, staging.num_tokens);
#pragma unroll 1
      for (int i = 0; i < kParts; ++i) {
        const int part = i == 0 ? strips[0].part : strips[1].part;
        staging.template fill<kIsAligned, T>(staged, p.shrunk, row + part * p.shrunk.part_stride,
                                             count, i == 0 ? strips[0].rank : strips[1].rank, i);
      }
      __syncthreads();
    }
    Sums sums;
    tile.take(turn, sums);
#pragma unroll 1
    for (int piece = 0; piece < staging.num_pieces; ++piece) {
      work.take_piece(piece, staging.num_pieces, first);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint4* halves = staged + staging.index(s % kParts, piece, token, lane);
        add_product<T>(sums.of[s], halves[0], halves[kWarpSize], work.weights.of[s]);
      }
    }
    tile.load(first + kAhead * kMmaTokens, turn);  // what lay there is in the sums
    turn = turn + 1 == kAhead ? 0 : turn + 1;
    tile.store(first, sums);
    token += kMmaTokens;
  }
}

template <class T, bool kIsGated, bool kIsAligned>
cudaError_t launch_tiles(const LoraExpandParams& p, cudaStream_t stream) {
  const int log2_tile_tokens = log2_tile_tokens_of<kIsGated>(p.rows.num_tokens);
  const Grid grid(p, kIsGated, log2_tile_tokens);
  constexpr auto kKernel = expand_many_kernel<T, kIsGated, kIsAligned>;
  const cudaError_t error = allow_smem<kKernel, kMaxStagedBytes + kAhead * kOldBytes>();
  if (error != cudaSuccess) return error;
  const int num_old = (1 << log2_tile_tokens) / kMmaTokens;
  const int piece_bytes = (p.rows.max_rank + kPiece - 1) / kPiece * kPieceBytes<kIsGated>;
  const int staged_bytes = std::max(std::min(kStagedBytes, num_old * piece_bytes), piece_bytes);
  const int num_bytes = staged_bytes + std::min(num_old, kAhead) * kOldBytes;
  return launch_chained(kKernel, grid.num_ctas(), kThreads, num_bytes, stream, p,
                        grid.column_blocks, log2_tile_tokens, staged_bytes, has_aligned_rows(p));
}

}  // namespace

cudaError_t launch_lora_expand_many(const LoraExpandParams& params, cudaStream_t stream) {
  return dispatch_expand(params, [&]<class T, bool kIsGated, bool kIsAligned>() {
    return launch_tiles<T, kIsGated, kIsAligned>(params, stream);
  });
}

}  // namespace pyserve::gpu
