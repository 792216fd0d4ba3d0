// lora_shrink of one token on Hopper: shrink_tiles.cuh, with A and x brought by the copy engine.
//
// Its CTAs start beside those of the product in front, and wait on while those of the next product
// start. Both have some 160 KB of weight on their way to each SM, behind which an SM's loads wait,
// as far as we know; what the copy engine brings need not.
#include "gpu/core/mbarrier.cuh"
#include "gpu/core/tma.cuh"
#include "gpu/lora/shrink_tiles.cuh"

namespace pyserve::gpu {
namespace {

constexpr int kBarrierBytes = 128;
constexpr int kMaxSmem = 40 * 1024;  // what a product with adapters leaves of an SM, and more

// From one row to the next: 8 lanes, which read 64 bytes of each of two rows, meet no bank twice.
__host__ __device__ constexpr int row_bytes(int split_columns) {
  return 2 * split_columns + (split_columns % 64 == 0 ? 64 : 0);
}

// Rows of A, then of x, of a split, in shared memory.
template <class T>
class Staged {
 public:
  static constexpr bool kIsStaged = true;

  // All threads.
  __device__ __forceinline__ void begin(int split_columns) {
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    smem_ = dynamic_smem;
    row_bytes_ = row_bytes(split_columns);
    if (threadIdx.x == 0) {
      mbarrier_init(smem_address(smem_), 2 * kWarpSize);  // a warp for A, and for x
      barriers_ready();
    }
    __syncthreads();
  }

  __device__ __forceinline__ void copy_a(const LoraShrinkParams& p, int slot, int first_row,
                                         int num_rows, int begin, int end) const {
    const int lane = threadIdx.x;
    if (lane >= kWarpSize) return;
    const Row row = row_of(p.rows, slot, first_row + lane);
    const T* from = static_cast<const T*>(p.a) + slot * p.a_slot_stride +
                    row.part * p.a_part_stride + row.index * p.a_stride + begin;
    copy(lane, from, lane < num_rows && row.is_there ? end - begin : 0);
  }

  // To behind the rows of A.
  __device__ __forceinline__ void copy_x(const LoraShrinkParams& p, const TokenTile& tile,
                                         int num_rows, int begin, int end) const {
    const int lane = threadIdx.x;
    if (lane >= kWarpSize) return;
    const T* from = static_cast<const T*>(p.x) + (tile.begin + lane) * p.x_stride + begin;
    copy(num_rows + lane, from, lane < tile.count ? end - begin : 0);
  }

  __device__ __forceinline__ void wait() const { mbarrier_wait(smem_address(smem_), 0); }

  __device__ __forceinline__ const T* row(int index) const {
    return reinterpret_cast<const T*>(smem_ + kBarrierBytes + index * row_bytes_);
  }

 private:
  __device__ __forceinline__ void copy(int index, const T* from, int num_columns) const {
    const uint32_t barrier = smem_address(smem_), num_bytes = 2 * max(num_columns, 0);
    mbarrier_arrive_expect(barrier, num_bytes);
    if (num_bytes == 0) return;
    bulk_load(barrier + kBarrierBytes + index * row_bytes_, from, num_bytes, barrier);
  }

  unsigned char* smem_;
  int row_bytes_;
};

// Tiles of 8 rows of A, of a CTA.
int row_tiles(const LoraShrinkParams& p) {
  return p.rows.num_parts * p.rows.max_rank <= 16 ? 1 : 2;
}

int smem_bytes(const LoraShrinkParams& p) {
  return kBarrierBytes + (8 * row_tiles(p) + 1) * row_bytes(split_columns_of(p));
}

template <class T, int kRowTiles>
cudaError_t launch_rows(const LoraShrinkParams& p, cudaStream_t stream) {
  constexpr auto kKernel = shrink_kernel<T, kHalfTokens, kRowTiles, 2, true, Staged<T>>;
  const cudaError_t error = allow_smem<kKernel, kMaxSmem>();
  if (error != cudaSuccess) return error;
  constexpr int kRows = 8 * kRowTiles;
  const int row_blocks = (p.rows.num_parts * p.rows.max_rank + kRows - 1) / kRows;
  return launch_chained(kKernel, static_cast<unsigned>(p.out.num_splits * row_blocks), kThreads,
                        smem_bytes(p), stream, p, row_blocks, split_columns_of(p));
}

}  // namespace

bool can_lora_shrink_sm90a(const LoraShrinkParams& p) {
  return p.rows.num_tokens == 1 && smem_bytes(p) <= kMaxSmem;
}

cudaError_t launch_lora_shrink_sm90a(const LoraShrinkParams& p, cudaStream_t stream) {
  return dispatch_half(p.dtype, [&]<class T>(T) {
    return row_tiles(p) == 1 ? launch_rows<T, 1>(p, stream) : launch_rows<T, 2>(p, stream);
  });
}

}  // namespace pyserve::gpu
