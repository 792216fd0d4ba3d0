// linear for 33 to 128 rows on Hopper (sm_90a): the work is to stream the weight once, beside which
// wgmma's products take 30 % of the time at 64 rows and 60 % at 128. See skinny_sm90a.cuh.
//
// What bounds it beside the weight's bytes is L2, of which an H200 gives some 9.5 TB/s: each tile
// of 128 weight rows reads all of x. At 64 rows that is half of the weight's bytes, 6.7 TB/s
// together at 4.47 of the weight; at 128 rows as much as the weight, 8.9 TB/s. Parts of tiles are
// 32 or 64 KB a CTA and piece, at most 9 MB of a [4096, 4096] matrix at 64 rows, whose bytes are
// 34. Runs of a Llama-3.1-8B layer are 23 or 24 stages of 16 KB (qkv), 15 or 16 (o), 108 or 109
// (gate_up) and 54 or 55 (down), so that the longest is at most 3 % above the mean. The ring is 144
// or 112 KB of weight, all of it asked for before the wait: 4.2 us of what an SM gets of memory,
// behind which the end of the kernel in front hides, where the last parts are added up.
//
// Numerics: float32 sums over k in blocks of 16; of a tile of several parts, the sums of these in
// the order of k; then the factor of a norm, the bias, the epilogue, one rounding. Nothing of it
// depends on m or on the data: what else is in a batch never changes a row's result.
// Floor: n * k * 2 bytes.
#include "gpu/linear/skinny_sm90a.cuh"

#include "gpu/core/device.h"
#include "gpu/core/launch.cuh"
#include "gpu/linear/skinny_sm90a.h"

namespace pyserve::gpu {
namespace skinny {
namespace {

// A shorter run's parts would cost more than its products.
constexpr int kMinRun = 4;

int64_t pieces(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

template <class Tile>
cudaError_t launch_tile(const LinearParams& p, const Device& device, cudaStream_t stream) {
  constexpr auto kKernel = skinny_kernel<Tile>;
  cudaError_t error = allow_smem<kKernel, Tile::kSmem>();
  if (error != cudaSuccess) return error;
  const StreamK division(static_cast<int>(pieces(p.n, Tile::kColumns)),
                         static_cast<int>(pieces(p.k, Tile::kDepth)),
                         std::min(device.num_sms, PartRoom::kMaxCtas), kMinRun);
  SkinnyArgs a{.p = p, .division = division};
  error = part_room(&a.room);
  if (error != cudaSuccess) return error;
  error = encode_tensor_map<2>({.data = p.x,
                                .sizes = {static_cast<uint64_t>(p.k), static_cast<uint64_t>(p.m)},
                                .strides = {1, p.x_stride},
                                .box_sizes = {Tile::kDepth, Tile::kTokens}},
                               p.dtype, &a.x);
  if (error != cudaSuccess) return error;
  constexpr int kParts = Tile::kIsPaired ? 2 : 1;
  error = encode_tensor_map<4>(
      {.data = p.weight,
       .sizes = {static_cast<uint64_t>(p.k), 8, kParts, static_cast<uint64_t>(p.n / 8)},
       .strides = {1, p.weight_stride, p.weight_stride * p.n, p.weight_stride * 8},
       .box_sizes = {Tile::kDepth, 8, kParts, Tile::kColumns / 8}},
      p.dtype, &a.weight);
  if (error != cudaSuccess) return error;
  return launch_chained(kKernel, static_cast<unsigned>(division.num_ctas), Tile::kThreads,
                        Tile::kSmem, stream, a);
}

template <class T, Epilogue kEpilogue>
cudaError_t launch_as(const LinearParams& p, const Device& device, cudaStream_t stream) {
  if (linear_trial().skinny_tile_rows == 64) {
    if (p.m > 64) return launch_tile<SkinnyTile<T, kEpilogue, 128, 1>>(p, device, stream);
    return launch_tile<SkinnyTile<T, kEpilogue, 64, 1>>(p, device, stream);
  }
  if (p.m > 64) return launch_tile<SkinnyTile<T, kEpilogue, 128, 2>>(p, device, stream);
  return launch_tile<SkinnyTile<T, kEpilogue, 64, 2>>(p, device, stream);
}

}  // namespace
}  // namespace skinny

cudaError_t launch_skinny_sm90a(const LinearParams& params, cudaStream_t stream) {
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  return dispatch_half(params.dtype, [&]<class T>(T) {
    return dispatch_epilogue(params.epilogue, [&](auto epilogue) {
      return skinny::launch_as<T, decltype(epilogue)::value>(params, *device, stream);
    });
  });
}

}  // namespace pyserve::gpu
