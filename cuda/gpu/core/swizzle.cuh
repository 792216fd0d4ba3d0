// A swizzle of rows in shared memory, so that ldmatrix meets no bank conflicts: chunk c (of 16
// bytes) of row r is stored where chunk c ^ (r % 8) would be without the swizzle.
#pragma once

#include <cstdint>

namespace pyserve::gpu {

// The address of chunk `first + chunk` of a row, given `row_address`, the swizzled address of chunk
// `first` of that row. Each row begins a multiple of 128 bytes behind a 128-byte boundary. An XOR
// takes the place of the addition, so no bit may carry: `chunk` is even, and where `first` is 2 or
// 3 it is a multiple of 4.
__device__ __forceinline__ uint32_t at_chunk(uint32_t row_address, int chunk) {
  return (row_address ^ ((chunk & 6) * 16)) + (chunk & ~7) * 16;
}

}  // namespace pyserve::gpu
