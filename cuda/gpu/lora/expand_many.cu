// lora_expand and lora_expand_silu_mul (expand.cuh) for more than kManyTokens tokens. With so many,
// the number of bytes in flight decides, so the addends are loaded 48 tokens ahead by cp.async into
// shared memory: 24 KB per CTA, loaded from the start of the kernel on. Each thread reads back only
// what it has copied itself. `shrunk` lies in shared memory in the order of an mma's registers: see
// staging.cuh.
#include "gpu/lora/expand.cuh"
#include "gpu/lora/staging.cuh"

namespace pyserve::gpu {
namespace {

// Bytes of the addends of 16 tokens by a CTA's columns, and how many such groups of tokens are in
// flight.
constexpr int kOldBytes = kMmaTokens * kColumns * 2, kAhead = 3;

// Shared memory for one piece of 16 tokens, of the one or two parts that a CTA has.
template <bool kIsGated>
constexpr int kPieceBytes = (kIsGated ? 2 : 1) * kHalvesBytes;

// The accumulators by strip and by mma: in each the first two are of token `group`, the other two
// of token group + 8.
struct Sums {
  float of[2][kTiles][4];

  // Begins the sums of token `group` (half 0) or group + 8 (half 1) with the addends.
  template <class T>
  __device__ __forceinline__ void take(int s, int half, const uint4& old) {
    float x[kVec];
    unpack<T>(old, x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) of[s][i / 2][2 * half + i % 2] = x[i];
  }
};

// The tokens of a CTA, 16 at a time, by the columns of a warp's two strips. Where `is_whole`, a
// lane's 8 columns exist and are aligned, and are read and written as 16 bytes. Otherwise the
// addends are read one by one when the result is written.
template <class T, bool kIsGated>
struct Tile {
  const LoraExpandParams& p;
  int begin, count;  // tokens
  int column, apart;  // the lane's first column in strip 0, and its distance to the one in strip 1
  int room[2];        // columns left to the end of each strip's part
  bool is_whole;
  uint32_t places;  // address of the thread's first place for addends
  const T* asked;   // the row of the lane's token among the next 16 to load
  T* out;           // the row of the lane's token among the next 16 to store

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

  // The thread's place for the addends of strip s and of token group or group + 8, in buffer `turn`
  // of the kAhead ones.
  __device__ __forceinline__ uint32_t place_of(int turn, int s, int half) const {
    return places + turn * kOldBytes + (2 * s + half) * kThreads * 16;
  }

  // Starts to copy the addends of the 16 tokens from `first` on. It always commits a group of
  // copies, behind the last token an empty one, so that take() can count groups.
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

  // Waits for the oldest of the kAhead groups and begins the sums with it.
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

  // Stores the 16 tokens from `first` on. Calls come in the order of the tokens.
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

// sums += 16 tokens of `shrunk` times a piece of B.
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

// CTAs per SM. With four, ptxas spills registers for sm_120, whose shared memory has room for two
// CTAs anyway.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kResident = 3;
#else
constexpr int kResident = 4;
#endif

// kIsAligned: four neighbouring elements of a row of b and of shrunk may be read at once.
template <class T, bool kIsGated, bool kIsAligned>
__global__ void __launch_bounds__(kThreads, kResident)
    expand_many_kernel(LoraExpandParams p, int column_blocks, int log2_tile_tokens,
                       int staged_bytes, bool is_aligned) {
  constexpr int kParts = kIsGated ? 2 : 1;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  auto* staged = reinterpret_cast<uint4*>(dynamic_smem);  // the addends lie behind it
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
    // Into the buffer whose addends are now in the sums.
    tile.load(first + kAhead * kMmaTokens, turn);
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
