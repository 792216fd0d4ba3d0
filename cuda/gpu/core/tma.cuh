// Copies of boxes of a tensor to shared memory by the copy engine (sm_90's TMA). One thread starts
// a copy; its bytes are counted by an mbarrier. What lies outside the tensor arrives as zeros, and
// is counted too.
//
// Boxes of 16-bit elements and of bytes have rows of 128 bytes and land with the 128-byte swizzle that
// wgmma.cuh reads: the 16-byte chunk c of row r lies at chunk c ^ (r % 8); rows count from a 1024-byte
// boundary.
// Boxes of 8-byte words land as they are, row behind row.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "gpu/core/dtype.h"
#include "gpu/core/ptx.cuh"

namespace pyserve::gpu {

// ---- host ---------------------------------------------------------------------------------------

// A tensor and the box that one copy takes of it, in elements; dimension 0 is contiguous. Kernels take
// the encoded map as `const __grid_constant__ CUtensorMap`.
template <int kRank>
struct TensorBox {
  const void* data;           // aligned to 16 bytes
  uint64_t sizes[kRank];
  int64_t strides[kRank];     // [0] is 1, the others are multiples of 16 bytes
  uint32_t box_sizes[kRank];  // at most 256; [0] is 128 bytes, of words a multiple of 16
};

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found once: so that nothing links against the driver.
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
    // Where there is but one, torch may give any stride.
    strides[i - 1] =
        box.sizes[i] == 1 ? 16 : static_cast<cuuint64_t>(box.strides[i]) * elements.num_bytes;
  }
  const CUresult result =
      encode(map, elements.type, kRank, const_cast<void*>(box.data), sizes, strides, boxes, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, elements.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Encodes `box`, of 16-bit elements, for tma_load; no device work. cudaErrorInvalidValue where TMA
// cannot address it.
template <int kRank>
cudaError_t encode_tensor_map(const TensorBox<kRank>& box, Dtype dtype, CUtensorMap* map) {
  const CUtensorMapDataType type = dtype == Dtype::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode_tensor_map<kRank>(box, TensorElements{type, 2, CU_TENSOR_MAP_SWIZZLE_128B}, map);
}

// The same of bytes.
template <int kRank>
cudaError_t encode_byte_map(const TensorBox<kRank>& box, CUtensorMap* map) {
  return encode_tensor_map<kRank>(
      box, TensorElements{CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_128B}, map);
}

// The same of 8-byte words.
template <int kRank>
cudaError_t encode_word_map(const TensorBox<kRank>& box, CUtensorMap* map) {
  return encode_tensor_map<kRank>(
      box, TensorElements{CU_TENSOR_MAP_DATA_TYPE_UINT64, 8, CU_TENSOR_MAP_SWIZZLE_NONE}, map);
}

// ---- device -------------------------------------------------------------------------------------

// Orders this thread's ordinary accesses of shared memory before what the copy engine and wgmma do
// there after the next barrier.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Starts the copy of the box at the given element coordinates (dimension 0 first) to `destination`,
// in shared memory and aligned to 128 bytes. `barrier` must expect its bytes.
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

// How long L2 is to keep what a copy reads: the words of createpolicy for all of it.
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

// The same to every CTA of the cluster whose bit is set in `ctas`: to the same place of each one's
// shared memory, counted by its barrier in the same place as `barrier`.
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

// Byte offset of 16-byte chunk `chunk` (0 .. 7) of row `row` in a tile as tma_load leaves it.
__device__ __forceinline__ uint32_t swizzled_128(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

}  // namespace pyserve::gpu
