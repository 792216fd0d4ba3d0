// Rows in shared memory whose 16-byte chunks are XORed with the row's number, so that ldmatrix
// meets no bank conflict: chunk c of row r lies where chunk c ^ (r % 8) would.
#pragma once

#include <cstdint>

namespace pyserve::gpu {

// Address of chunk `first + chunk` of a row, a multiple of 128 bytes from where rows begin, given
// that of chunk `first`. `chunk` is even, and a multiple of 4 where `first` is 2 or 3.
__device__ __forceinline__ uint32_t at_chunk(uint32_t row_address, int chunk) {
  return (row_address ^ ((chunk & 6) * 16)) + (chunk & ~7) * 16;
}

}  // namespace pyserve::gpu
