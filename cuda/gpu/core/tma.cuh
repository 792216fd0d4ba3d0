// Copies of boxes of a tensor from global to shared memory by the copy engine (TMA, sm_90). One
// thread starts a copy, and an mbarrier counts its bytes. Elements outside the tensor arrive as
// zeros and are counted too.
// is counted too.
//
// Boxes of 16-bit elements and of bytes have rows of 128 bytes and are stored with the 128-byte
// swizzle that wgmma.cuh reads: 16-byte chunk c of row r lies at chunk c ^ (r % 8), with rows
// counted from a 1024-byte boundary. Boxes of 8-byte words are stored without a swizzle, row behind
// row.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "gpu/core/dtype.h"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// ---- host ---------------------------------------------------------------------------------------

// A tensor and the box that one copy takes of it. All sizes and strides are in elements, and
// dimension 0 is the contiguous one. Kernels take the encoded map as `const __grid_constant__
// CUtensorMap`.
template <int kRank>
struct TensorBox {
  const void* data;           // aligned to 16 bytes
  uint64_t sizes[kRank];
  int64_t strides[kRank];  // [0] is 1; the others are multiples of 16 bytes
  // each at most 256; [0] covers 128 bytes, or of 8-byte words a multiple of 16 bytes
  uint32_t box_sizes[kRank];
};

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// Looks up cuTensorMapEncodeTiled of the driver once per process, so that the package need not link
// against the driver.
inline cudaError_t find_encode_tensor_map(EncodeTensorMap* function) {
  static std::atomic<EncodeTensorMap> known{nullptr};
  *function = known.load(std::memory_order_relaxed);
  if (*function != nullptr) return cudaSuccess;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess || found == nullptr) return cudaErrorNotSupported;
  *function = reinterpret_cast<EncodeTensorMap>(found);
  known.store(*function, std::memory_order_relaxed);
  return cudaSuccess;
}

// What the elements of a tensor map are, and how a box lies in shared memory.
struct TensorElements {
  CUtensorMapDataType type;
  int num_bytes;
  CUtensorMapSwizzle swizzle;
};

template <int kRank>
cudaError_t encode_tensor_map(const TensorBox<kRank>& box, const TensorElements& elements,
                              CUtensorMap* map) {
  EncodeTensorMap encode = nullptr;
  if (const cudaError_t error = find_encode_tensor_map(&encode); error != cudaSuccess) return error;
  cuuint64_t sizes[kRank], strides[kRank];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    sizes[i] = box.sizes[i];
    boxes[i] = box.box_sizes[i];
    steps[i] = 1;
    if (i == 0) continue;
    // torch may give any stride to a dimension of size 1, also one that the driver refuses.
    strides[i - 1] =
        box.sizes[i] == 1 ? 16 : static_cast<cuuint64_t>(box.strides[i]) * elements.num_bytes;
  }
  const CUresult result =
      encode(map, elements.type, kRank, const_cast<void*>(box.data), sizes, strides, boxes, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, elements.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Encodes a box of 16-bit elements for tma_load; this is host work only. Returns
// cudaErrorInvalidValue where TMA cannot address the tensor.
template <int kRank>
cudaError_t encode_tensor_map(const TensorBox<kRank>& box, Dtype dtype, CUtensorMap* map) {
  const CUtensorMapDataType type = dtype == Dtype::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode_tensor_map<kRank>(box, TensorElements{type, 2, CU_TENSOR_MAP_SWIZZLE_128B}, map);
}

// The same for a tensor of bytes.
template <int kRank>
cudaError_t encode_byte_map(const TensorBox<kRank>& box, CUtensorMap* map) {
  return encode_tensor_map<kRank>(
      box, TensorElements{CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_128B}, map);
}

// The same for a tensor of 8-byte words.
template <int kRank>
cudaError_t encode_word_map(const TensorBox<kRank>& box, CUtensorMap* map) {
  return encode_tensor_map<kRank>(
      box, TensorElements{CU_TENSOR_MAP_DATA_TYPE_UINT64, 8, CU_TENSOR_MAP_SWIZZLE_NONE}, map);
}

// ---- device -------------------------------------------------------------------------------------

// Orders this thread's ordinary accesses to shared memory before the accesses that the copy engine
// and wgmma make there after the next barrier.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Starts the copy of the box at the given element coordinates (dimension 0 first) to `destination`
// in shared memory, which is aligned to 128 bytes. `barrier` must have been told to expect the
// bytes.
__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap* map,
                                         uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap* map,
                                         uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap* map,
                                         uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// How long L2 should keep what a copy reads. The values are the 64-bit policies that the
// createpolicy instruction makes for a fraction of 1.
enum class L2Hint : uint64_t {
  kNormal = 0x1000000000000000,
  kEvictFirst = 0x12f0000000000000,
  kEvictLast = 0x14f0000000000000,
};

__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap* map,
                                         uint32_t barrier, int c0, int c1, L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;\n" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap* map,
                                         uint32_t barrier, int c0, int c1, int c2, int c3,
                                         L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;\n" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// The same, to every CTA of the cluster whose bit is set in `ctas`. The box lands at the same
// offset in each CTA's shared memory as `destination` here, and is counted by the mbarrier at the
// same offset as `barrier`.
__device__ __forceinline__ void tma_load_multicast(uint32_t destination, const CUtensorMap* map,
                                                   uint32_t barrier, int c0, int c1, uint16_t ctas,
                                                   L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;\n" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "h"(ctas), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap* map,
                                         uint32_t barrier, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];\n" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// The byte offset of 16-byte chunk `chunk` (0 .. 7) of row `row` in a tile that tma_load has stored
// with the swizzle.
__device__ __forceinline__ uint32_t swizzled_128(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

}  // namespace pyserve::gpu
