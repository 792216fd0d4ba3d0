// lora_expand and lora_expand_silu_mul (expand.cuh) for up to kManyTokens tokens. With so few, time
// is lost in chains of loads that wait for each other, so the addends are loaded one group of 16
// tokens ahead, into registers.
#include "gpu/lora/expand.cuh"

namespace pyserve::gpu {
namespace {

// Splits four neighbouring elements of `shrunk` into two 16-bit numbers each: x and y of the result
// have the rounded values, z and w what rounding left over.
template <class T>
__device__ __forceinline__ uint4 halves_of(const float4& x) {
  const uint2 value{pack_pair<T>(x.x, x.y), pack_pair<T>(x.z, x.w)};
  const float2 low = unpack_pair<T>(value.x), high = unpack_pair<T>(value.y);
  return {value.x, value.y, pack_pair<T>(x.x - low.x, x.y - low.y),
          pack_pair<T>(x.z - high.x, x.w - high.y)};
}

// Elements r .. r + 3 of a row of `shrunk` (one token, one part), summed over the splits; zeros
// from the rank on.
template <bool kIsAligned>
__device__ __forceinline__ float4 load_shrunk(const LoraShrunk& shrunk, int num_splits,
                                              const float* row, int r, int rank) {
  float x[4] = {};
#pragma unroll kIsAligned ? 8 : 1
  for (int split = 0; split < num_splits; ++split) {
    const float* own = row + split * shrunk.split_stride + r;
    if constexpr (kIsAligned) {
      const float4 four = *reinterpret_cast<const float4*>(own);
      x[0] += four.x;
      x[1] += four.y;
      x[2] += four.z;
      x[3] += four.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (r + j < rank) x[j] += own[j];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (r + j >= rank) x[j] = 0.0f;
  }
  return {x[0], x[1], x[2], x[3]};
}

// Shared memory for one piece (16 of r) of 16 tokens.
template <bool kIsGated>
constexpr int kPieceBytes = (kIsGated ? 2 : 1) * kMmaTokens * 4 * static_cast<int>(sizeof(uint4));

// Where the split elements of `shrunk` lie in shared memory: one uint4 for each four of r, for some
// tokens, and for the parts of both strips (only one where these have the same part).
struct Staging : Room {
  using Room::Room;

  // The place of the four elements with index `place` within a piece; `token` counts from the first
  // staged token.
  __device__ __forceinline__ int index(int part, int piece, int token, int place) const {
    return ((part * num_pieces + piece) * num_tokens + token) * 4 + place;
  }

  // Fills the shared memory. All threads of the CTA call this, and each loads kAtOnce groups of
  // four elements at a time. `row` is that of the first token.
  template <bool kIsAligned, int kAtOnce, class T>
  __device__ __forceinline__ void fill(uint4* staged, const LoraShrunk& shrunk, int num_splits,
                                       const float* row, int count, const Strip (&strips)[2],
                                       int num_parts) const {
    const int padded = (count + kMmaTokens - 1) / kMmaTokens * kMmaTokens;
    const int most = num_parts * padded * 4;
#pragma unroll 1
    for (int piece = 0; piece < num_pieces; ++piece) {
#pragma unroll 1
      for (int first = threadIdx.x; first < most; first += kAtOnce * kThreads) {
        float4 sums[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int four = first + i * kThreads, r = kPiece * piece + 4 * (four % 4);
          const bool is_second = four / 4 >= padded;
          const int token = is_second ? four / 4 - padded : four / 4;
          const int rank = is_second ? strips[1].rank : strips[0].rank;
          const int part = is_second ? strips[1].part : strips[0].part;
          sums[i] = float4{};
          if (four < most && token < count && r < rank) {
            const float* own = row + token * shrunk.stride + part * shrunk.part_stride;
            sums[i] = load_shrunk<kIsAligned>(shrunk, num_splits, own, r, rank);
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int four = first + i * kThreads, part = four / 4 >= padded;
          const int token = four / 4 - part * padded;
          if (four < most) staged[index(part, piece, token, four % 4)] = halves_of<T>(sums[i]);
        }
      }
    }
  }

  // The same, with as many loads in flight as the layout allows.
  template <bool kIsAligned, class T>
  __device__ __forceinline__ void fill(uint4* staged, const LoraShrunk& shrunk, const float* row,
                                       int count, const Strip (&strips)[2], int num_parts) const {
    if (kIsAligned && shrunk.num_splits == 1) {
      fill<kIsAligned, 4, T>(staged, shrunk, 1, row, count, strips, num_parts);
    } else {
      fill<kIsAligned, 1, T>(staged, shrunk, shrunk.num_splits, row, count, strips, num_parts);
    }
  }
};

// The addends of a lane: the 8 neighbouring columns in each strip, of the token with the lane's
// index `group` and of token group + 8.
struct Old {
  uint4 of[2][2];
};

// The accumulators by strip and by mma: in each the first two are of token `group`, the other two
// of token group + 8.
struct Sums {
  float of[2][kTiles][4];

  // Begins the sums with the addends.
  template <class T>
  __device__ __forceinline__ void take(const Old& old) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kVec];
        unpack<T>(old.of[s][half], x);
#pragma unroll
        for (int i = 0; i < kVec; ++i) of[s][i / 2][2 * half + i % 2] = x[i];
      }
    }
  }
};

// The tokens of a CTA by the columns of a warp's two strips. Where `is_whole`, a lane's 8 columns
// exist and are aligned, and are read and written as 16 bytes. Otherwise the addends are read one
// by one when the result is written.
template <class T, bool kIsGated>
struct Tile {
  const LoraExpandParams& p;
  int begin, count;  // tokens
  int column[2], end[2];
  bool is_whole;

  __device__ __forceinline__ Tile(const LoraExpandParams& params, const TokenTile& tokens,
                                  const Strip (&strips)[2], bool is_aligned)
      : p(params), begin(tokens.begin), count(tokens.count), is_whole(is_aligned) {
    const int place = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      column[s] = strips[s].first + place * kVec;
      end[s] = strips[s].end;
      is_whole &= column[s] % kVec == 0 && column[s] + kVec <= end[s];
    }
  }

  __device__ __forceinline__ const T* from(int token) const {
    return kIsGated ? static_cast<const T*>(p.gate_up) + (begin + token) * p.gate_up_stride
                    : static_cast<const T*>(p.out) + (begin + token) * p.out_stride;
  }

  // Loads the addends of the 16 tokens from `first` on.
  __device__ __forceinline__ void load(int first, Old& old) const {
    if (!is_whole) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + threadIdx.x % kWarpSize / 4 + 8 * half;
      if (token >= count) continue;
      const T* row = from(token);
#pragma unroll
      for (int s = 0; s < 2; ++s) old.of[s][half] = load_vec(row + column[s]);
    }
  }

  __device__ __forceinline__ void store(int first, const Sums& sums) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + threadIdx.x % kWarpSize / 4 + 8 * half;
      if (token >= count) continue;
      float x[2][kVec];
#pragma unroll
      for (int i = 0; i < 2 * kVec; ++i) {
        x[i / kVec][i % kVec] = sums.of[i / kVec][i % kVec / 2][2 * half + i % 2];
      }
      T* out = static_cast<T*>(p.out) + (begin + token) * p.out_stride;
      if (!is_whole) {
        store_each(from(token), out, x);
      } else if constexpr (kIsGated) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) x[0][i] = silu_mul(x[0][i], x[1][i]);
        store_vec(out + column[0], pack<T>(x[0]));
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) store_vec(out + column[s], pack<T>(x[s]));
      }
    }
  }

  __device__ __forceinline__ void store_each(const T* row, T* out,
                                             const float (&x)[2][kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if constexpr (kIsGated) {
        if (column[0] + i >= end[0]) continue;
        const float gate = to_float(row[column[0] + i]) + x[0][i];
        const float up = to_float(row[column[1] + i]) + x[1][i];
        out[column[0] + i] = from_float<T>(silu_mul(gate, up));
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          if (column[s] + i >= end[s]) continue;
          out[column[s] + i] = from_float<T>(to_float(row[column[s] + i]) + x[s][i]);
        }
      }
    }
  }
};

// sums += 16 tokens of `shrunk` times a piece of B. low and high are the lane's four elements of
// token `group` and of token group + 8.
template <class T>
__device__ __forceinline__ void add_product(float (&sums)[kTiles][4], const uint4& low,
                                            const uint4& high, const uint2 (&weights)[kTiles]) {
  const uint32_t value[4] = {low.x, high.x, low.y, high.y};
  const uint32_t rest[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    mma_16816<T>(sums[n], value, weights[n].x, weights[n].y);
    mma_16816<T>(sums[n], rest, weights[n].x, weights[n].y);
  }
}

// kIsAligned: four neighbouring elements of a row of b and of shrunk may be read at once.
template <class T, bool kIsGated, bool kIsAligned>
__global__ void __launch_bounds__(kThreads, kIsAligned ? 4 : 3)
    expand_kernel(LoraExpandParams p, int column_blocks, int log2_tile_tokens,
                  int staged_bytes, bool is_aligned) {
  constexpr int kParts = kIsGated ? 2 : 1;
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  auto* staged = reinterpret_cast<uint4*>(dynamic_smem);
  const int lane = threadIdx.x % kWarpSize, group = lane / 4, place = lane % 4;
  pdl_launch_dependents();
  Work<T, kIsGated, kIsAligned> work(p, column_blocks, log2_tile_tokens);
  pdl_wait();
  if (work.is_empty()) return;
  const TokenTile& tokens = work.tokens;
  const Strip(&strips)[2] = work.strips;
  const Tile<T, kIsGated> tile(p, tokens, strips, is_aligned);
  const Staging staging(work.rank, kPieceBytes<kIsGated>, staged_bytes);
  Old old{};
  tile.load(0, old);
#pragma unroll 1
  for (int first = 0; first < tokens.count; first += kMmaTokens) {
    const int token = first % staging.num_tokens;
    if (work.rank > 0 && token == 0) {
      if (first > 0) __syncthreads();
      const int64_t begin = tokens.begin + first;
      staging.template fill<kIsAligned, T>(
          staged, p.shrunk, p.shrunk.data + begin * p.shrunk.stride,
          min(tokens.count - first, staging.num_tokens), strips, kParts);
      __syncthreads();
    }
    Sums sums;
    sums.take<T>(old);
    tile.load(first + kMmaTokens, old);
#pragma unroll 1
    for (int piece = 0; piece < staging.num_pieces; ++piece) {
      work.take_piece(piece, staging.num_pieces, first);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint4* fours = staged + staging.index(s % kParts, piece, token + group, place);
        add_product<T>(sums.of[s], fours[0], fours[8 * 4], work.weights.of[s]);
      }
    }
    tile.store(first, sums);
  }
}

template <class T, bool kIsGated, bool kIsAligned>
cudaError_t launch_tiles(const LoraExpandParams& p, cudaStream_t stream) {
  const int log2_tile_tokens = log2_tile_tokens_of<kIsGated>(p.rows.num_tokens);
  const Grid grid(p, kIsGated, log2_tile_tokens);
  constexpr auto kKernel = expand_kernel<T, kIsGated, kIsAligned>;
  const cudaError_t error = allow_smem<kKernel, kMaxStagedBytes>();
  if (error != cudaSuccess) return error;
  const int num_pieces = (p.rows.max_rank + kPiece - 1) / kPiece;
  const int staged_bytes = std::max(kStagedBytes, num_pieces * kPieceBytes<kIsGated>);
  return launch_chained(kKernel, grid.num_ctas(), kThreads, staged_bytes, stream, p,
                        grid.column_blocks, log2_tile_tokens, staged_bytes, has_aligned_rows(p));
}

}  // namespace

cudaError_t launch_lora_expand(const LoraExpandParams& params, cudaStream_t stream) {
  if (params.rows.num_tokens == 0 || params.n == 0) return cudaSuccess;
  if (params.rows.max_rank > kMaxRank) return cudaErrorInvalidValue;
  if (params.rows.num_tokens > kManyTokens) return launch_lora_expand_many(params, stream);
  return dispatch_expand(params, [&]<class T, bool kIsGated, bool kIsAligned>() {
    return launch_tiles<T, kIsGated, kIsAligned>(params, stream);
  });
}

}  // namespace pyserve::gpu
