// Paged prefill attention on Hopper, in bfloat16 or float16, for head_dim 64 and 128 and blocks of
// 16 keys: the items of prefill_kernel.cuh by wgmma and TMA.
//
// Work: a block has one warpgroup that loads and two that compute, with 64 packed rows each. There
// is one block per SM. The works (an item for one KV head) are listed longest first, and a block
// takes every gridDim.x-th of them, going through the list in alternating direction so that the
// load is even. In the loading warpgroup, two warps (one at head_dim 64) start TMA copies of K and
// one of V, a block of keys at a time, into rings of kStages tiles of kKeys keys; they run ahead,
// also into the next work. The fourth warp copies the next work's queries. Scores
// are Q K^T from shared memory. The weights stay in registers as the A operand of the product with
// V, which is read as it lies (MN-major). The scores of the next tile, also of the next work's
// first tile, are started before the product with V of the current tile, and the softmax runs
// beside that product. Letting the two warpgroups alternate their products, as FlashAttention-3
// does, was 6 % slower at head_dim 128. Keys run from high to low and the running maximum lags: see
// prefill_kernel.cuh.
//
// Bound by compute: 4 * num_heads * head_dim * sum(query_len * (context + query_len / 2)) FLOP at
// the rate of wgmma; the exponentials take half as long.
// Sources: FlashAttention-3 (Shah et al. 2024) for the roles and their order; FlashInfer for
// copying blocks by TMA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "gpu/attention/attention.h"
#include "gpu/attention/prefill_item.cuh"
#include "gpu/attention/prefill_sm90a.cuh"
#include "gpu/core/block.cuh"
#include "gpu/core/launch.cuh"
#include "gpu/core/mbarrier.cuh"
#include "gpu/core/pdl.cuh"
#include "gpu/core/ptx.cuh"
#include "gpu/core/tma.cuh"
#include "gpu/core/wgmma.cuh"

namespace pyserve::gpu {
namespace prefill::sm90a {
namespace {

struct Maps {
  CUtensorMap keys, values;
};

// Calls fn(item, geometry) for this block's works, longest first. All threads of a role call this.
// Only the role that loads keys and values checks and traps: see take_registers.
template <bool kIsChecked = false, class Fn>
__device__ __forceinline__ void for_each_work(const AttentionParams& p, Fn&& fn) {
  const int total = p.work[kWorkNumPrefillItems] * p.num_kv_heads;
  const int last = gridDim.x - 1;
  bool is_back = false;
  for (int first = 0; first < total; first += gridDim.x, is_back = !is_back) {
    const int index = first + static_cast<int>(is_back ? last - blockIdx.x : blockIdx.x);
    if (index >= total) continue;
    const AttentionItem item = load_item(p, index / p.num_kv_heads);
    const Geometry g = make_geometry<kIsChecked>(p, item, index % p.num_kv_heads);
    if (!g.is_empty()) fn(item, g);
  }
}

// ---- loading ------------------------------------------------------------------------------------

// Whether any query of the tile sees any key of the block of keys that begins at `key`.
__device__ __forceinline__ bool is_seen(const AttentionItem& item, const Geometry& g, int key) {
  return key >= item.kv_begin && key < item.kv_end && key + kBlockSize > g.first_key;
}

// The id of the block of keys at `key`. Where none of its keys is seen it is an id past the cache,
// for which TMA brings zeros. The caller checks it later, so that nothing waits for this load here.
__device__ __forceinline__ int find_block(const AttentionParams& p, const AttentionItem& item,
                                          const Geometry& g, int key) {
  if (!is_seen(item, g, key)) return p.num_blocks;
  return p.block_table[g.slot * p.block_table_stride + key / kBlockSize];
}

// Copies tiles of K or of V: each lane copies one block of keys, kBoxPanels panels of it. A single
// warp can start the copies only just fast enough, so the two panels of K are copied by two warps.
template <class C, int kBoxPanels>
__device__ __forceinline__ void load_tiles(const AttentionParams& p, const CUtensorMap* map,
                                           uint32_t tiles, uint32_t full, uint32_t empty,
                                           int panel) {
  const int lane = threadIdx.x % kWarpSize;
  const int offset = lane % C::kBlocks * kBlockSize;  // offset of the lane's block in the tile
  constexpr uint32_t kBoxBytes = kBoxPanels * kBlockBytes;
  const uint32_t destination = tiles + panel * C::kPanelBytes + offset / kBlockSize * kBoxBytes;
  Place place;
  for_each_work<true>(p, [&](const AttentionItem& item, const Geometry& g) {
    int begin = item.kv_begin + (num_tiles<C>(item) - 1) * C::kKeys;
    int block = find_block(p, item, g, begin + offset);
    for (; begin >= item.kv_begin; begin -= C::kKeys) {
      const int next = find_block(p, item, g, begin - C::kKeys + offset);
      if (is_seen(item, g, begin + offset) &&
          static_cast<uint32_t>(block) >= static_cast<uint32_t>(p.num_blocks)) {
        __trap();
      }
      const uint32_t stage_full = full + place.stage * 8;
      mbarrier_wait(empty + place.stage * 8, place.phase ^ 1);
      if (lane == 0) mbarrier_arrive_expect(stage_full, C::kBlocks * kBoxBytes);
      __syncwarp();
      if (lane < C::kBlocks) {
        tma_load(destination + place.stage * C::kTileBytes, map, stage_full, 0, 0, panel, g.kv_head,
                 block);
      }
      __syncwarp();
      place.advance();
      block = next;
    }
  });
}

// Copies the queries of each work, with zeros in rows behind the last. One warp does this.
template <class C>
__device__ __forceinline__ void load_queries(const AttentionParams& p, const Smem& smem,
                                             Work* works) {
  const int lane = threadIdx.x % kWarpSize;
  constexpr int kChunks = C::kHeadDim / 8, kRows = kWarpSize / kChunks;
  const int chunk = lane % kChunks;
  const auto* q = static_cast<const typename C::T*>(p.q) + chunk * 8;
  Place place;
  const auto hand_over = [&](const AttentionItem& item, const Geometry& g) {
    __syncwarp();
    if (lane == 0) {
      works[place.stage] = {item, g};
      mbarrier_arrive(smem.barrier<C>(kQueryFull, place.stage));
    }
    place.advance();
  };
  for_each_work(p, [&](const AttentionItem& item, const Geometry& g) {
    mbarrier_wait(smem.barrier<C>(kQueryEmpty, place.stage), place.phase ^ 1);
    const uint32_t panel = smem.queries<C>(place.stage) + chunk / 8 * C::kQueryPanelBytes;
    RowWalk walk(g, lane / kChunks, kRows, p.q_token_stride, p.q_head_stride);
#pragma unroll 4
    for (int row = lane / kChunks; row < kPrefillRows; row += kRows, walk.advance()) {
      cp_async_16(panel + swizzled_128(row, chunk % 8), q + walk.offset, row < g.num_packed);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    hand_over(item, g);
  });
  mbarrier_wait(smem.barrier<C>(kQueryEmpty, place.stage), place.phase ^ 1);
  hand_over({}, {});
}

// The roles of the four warps of the loading warpgroup.
template <class C>
__device__ __forceinline__ void load(const AttentionParams& p, const Maps& maps, const Smem& smem,
                                     Work* works) {
  const int warp = threadIdx.x / kWarpSize;
  if (warp < C::kPanels) {
    load_tiles<C, 1>(p, &maps.keys, smem.keys<C>(0), smem.barrier<C>(kKeyFull, 0),
                     smem.barrier<C>(kKeyEmpty, 0), warp);
  } else if (warp == 2) {
    load_tiles<C, C::kPanels>(p, &maps.values, smem.values<C>(0), smem.barrier<C>(kValueFull, 0),
                              smem.barrier<C>(kValueEmpty, 0), 0);
  } else if (warp == 3) {
    load_queries<C>(p, smem, works);
  }
}

// ---- computing ----------------------------------------------------------------------------------

// The position of a computing warpgroup in its works and rings, and its products.
template <class C>
struct Products {
  const AttentionParams& p;
  const AttentionPartials& partials;
  Smem smem;
  unsigned char* memory;  // the same memory as a pointer
  int group;              // computing warpgroup, 0 or 1
  int thread;             // index within the warpgroup
  float scale_log2;
  Place query, key, value;

  static constexpr int kScores = C::kKeys / 2;
  static constexpr int kSteps = C::kKeys / 16;  // steps of the product with V

  __device__ __forceinline__ int lane() const { return thread % kWarpSize; }
  __device__ __forceinline__ int warp_row() const {  // first row of this thread's warp in the tile
    return group * kGroupRows + thread / kWarpSize * 16;
  }
  __device__ __forceinline__ const Work* works() const {
    return reinterpret_cast<const Work*>(memory + C::kWorkOffset);
  }
  __device__ __forceinline__ void sync_group() const {
    named_barrier_sync(kGroupBarrier + group, kGroupThreads);
  }

  __device__ __forceinline__ void wait_for(Ring ring, const Place& place) const {
    mbarrier_wait(smem.barrier<C>(ring, place.stage), place.phase);
  }
  __device__ __forceinline__ void release(Ring ring, const Place& place) const {
    if (lane() == 0) mbarrier_arrive(smem.barrier<C>(ring, place.stage));
  }

  // Starts s = Q K^T of the next tile of keys, for the queries in stage `place`.
  __device__ __forceinline__ void start_scores(float (&s)[kScores], const Place& place) const {
    const uint64_t q =
        k_major_descriptor(smem.queries<C>(place.stage) + group * kGroupRows * 128);
    const uint64_t k = k_major_descriptor(smem.keys<C>(key.stage));
    keep_registers(s);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      wgmma<typename C::T, Major::kK>(
          s, advance_descriptor(q, i / 4 * C::kQueryPanelBytes + i % 4 * 32),
          advance_descriptor(k, i / 4 * C::kPanelBytes + i % 4 * 32), i > 0);
    }
    wgmma_commit();
  }

  // Starts out += weights V.
  __device__ __forceinline__ void start_values(Accumulator<C>& acc,
                                               uint32_t (&weights)[kSteps][4]) const {
    const uint64_t v = mn_major_descriptor(smem.values<C>(value.stage), kBlockBytes);
    keep_registers(acc.out);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) keep_registers(weights[i]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      wgmma<typename C::T, Major::kMN>(
          acc.out, weights[i], advance_descriptor(v, i * C::kPanels * kBlockBytes), true);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void pack_weights(const float (&s)[kScores],
                                               uint32_t (&weights)[kSteps][4]) const {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      weights[i / 4][i % 4] = pack_pair<typename C::T>(s[2 * i], s[2 * i + 1]);
    }
  }

  // Waits for the next tile of V. Its rows before `first` and from `end` on are seen by no query of
  // the work. Where such rows lie in a block that has been copied, they are set to zero: a weight
  // of 0 would not hide a NaN in a value.
  __device__ __forceinline__ void wait_values(int first, int end) const {
    wait_for(kValueFull, value);
    if (first <= 0 && end >= C::kKeys) return;
    const uint32_t tile = smem.values<C>(value.stage);
    const auto clear = [&](int from, int to) {
      constexpr int kChunks = C::kHeadDim / 8;
      for (int i = from * kChunks + thread; i < to * kChunks; i += kGroupThreads) {
        const int row = i / kChunks;
        const int panel = row / kBlockSize * C::kPanels + i % kChunks / 8;
        store_shared(tile + panel * kBlockBytes + row % kBlockSize * 128 + i % 8 * 16, uint4{});
      }
    };
    if (first > 0) clear(first / kBlockSize * kBlockSize, first);
    if (end < C::kKeys) clear(end, (end + kBlockSize - 1) / kBlockSize * kBlockSize);
    fence_proxy_async();
    sync_group();
  }
};

// The work of a computing warpgroup.
template <class C>
struct Consumer : Products<C> {
  using Base = Products<C>;
  using Base::kScores, Base::kSteps, Base::p, Base::partials, Base::smem, Base::memory, Base::group,
      Base::thread, Base::scale_log2, Base::query, Base::key, Base::value, Base::works,
      Base::warp_row, Base::sync_group, Base::wait_for,
      Base::release, Base::start_scores, Base::start_values, Base::pack_weights, Base::wait_values;

  // Waits for the next work's queries. Returns whether there is such a work, and sets it.
  __device__ __forceinline__ bool next_work(const Place& place, const Work** work) const {
    wait_for(kQueryFull, place);
    *work = works() + place.stage;
    return (*work)->item.num_splits > 0;
  }

  // Softmax of a work's first tile, which makes its weights.
  __device__ __forceinline__ void begin_work(Accumulator<C>& acc, float (&s)[kScores],
                                             const Visible& visible, int begin,
                                             uint32_t (&weights)[kSteps][4]) const {
    float factor[2];
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; ++i) acc.out[i] = 0.0f;
    acc.max[0] = acc.max[1] = kNoMax;
    acc.sum[0] = acc.sum[1] = 0.0f;
    if (!visible.all_see(begin, begin + C::kKeys)) mask_scores(s, visible, begin);
    update_max(acc, s, scale_log2, factor);
    make_weights(acc, s, scale_log2);
    pack_weights(s, weights);
  }

  // One more tile of a work: starts its scores and then the product with V of the tile before it,
  // which is at `begin`. The softmax of the new tile runs beside that product.
  __device__ __forceinline__ void next_tile(Accumulator<C>& acc, float (&s)[kScores],
                                            const Visible& visible, int begin, int first_key,
                                            uint32_t (&weights)[kSteps][4]) {
    float factor[2];
    wait_for(kKeyFull, key);
    start_scores(s, query);
    wait_values(first_key - begin, visible.kv_end - begin);
    start_values(acc, weights);
    wgmma_wait<1>();
    keep_registers(s);
    release(kKeyEmpty, key);
    key.advance();
    begin -= C::kKeys;
    if (!visible.all_see(begin, begin + C::kKeys)) mask_scores(s, visible, begin);
    const bool is_raised = update_max(acc, s, scale_log2, factor);
    make_weights(acc, s, scale_log2);
    wgmma_wait<0>();
    keep_registers(acc.out);
    release(kValueEmpty, value);
    value.advance();
    if (is_raised) rescale(acc, factor);
    pack_weights(s, weights);
  }

  // Writes the partial results of an item that is a split of its query tile, and merges all splits
  // if this one arrives last. Each warpgroup counts its own arrivals; a tile with splits has at
  // least two counters.
  __device__ __forceinline__ void finish_split(const AttentionItem& item, const Geometry& g,
                                               const Accumulator<C>& acc) const {
    const auto sync = [&] { sync_group(); };
    const int64_t buffer = static_cast<int64_t>(item.partial) * p.num_kv_heads + g.kv_head;
    const int64_t first_buffer = buffer - static_cast<int64_t>(item.split) * p.num_kv_heads;
    write_partial(partials, acc, buffer * kPrefillRows + warp_row());
    int32_t* arrivals = partials.arrivals + first_buffer + group * p.num_kv_heads;
    auto* flag = reinterpret_cast<int32_t*>(memory + C::kFlagOffset) + group;
    if (!arrives_last(arrivals, item.num_splits, flag, thread == 0, sync)) return;
    const int first_row = group * kGroupRows;
    merge_rows<typename C::T, C::kHeadDim, kGroupThreads>(
        p, g, partials, first_buffer * kPrefillRows, item.num_splits, first_row,
        min(first_row + kGroupRows, g.num_packed), thread,
        reinterpret_cast<float2*>(memory + C::kScaleOffset), sync);
  }

  // Divides the rows by their sums, writes the result of the work in stage `query`, and releases
  // that stage.
  __device__ __forceinline__ void finish_work(Accumulator<C>& acc) {
    const AttentionItem item = works()[query.stage].item;
    const Geometry g = works()[query.stage].geometry;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      acc.sum[half] += __shfl_xor_sync(kFullMask, acc.sum[half], 1);
      acc.sum[half] += __shfl_xor_sync(kFullMask, acc.sum[half], 2);
    }
    if (item.num_splits == 1) {
      sync_group();  // no product of the group reads the queries any more
      write_rows(p, g, acc, warp_row(), smem.template queries<C>(query.stage));
    } else {
      finish_split(item, g, acc);
    }
    __syncwarp();
    release(kQueryEmpty, query);
    query.advance();
  }

  // All works of the block. The scores of a work's first tile are started beside the last products
  // of the work before.
  __device__ __forceinline__ void run() {
    Accumulator<C> acc;
    float s[kScores];
    uint32_t weights[kSteps][4];
    const Work* work;
    bool has_work = next_work(query, &work);
    if (has_work) {
      wait_for(kKeyFull, key);
      start_scores(s, query);
      wgmma_wait<0>();
      keep_registers(s);
      release(kKeyEmpty, key);
      key.advance();
    }
    while (has_work) {
      const Visible visible = make_visible(p, work->item, work->geometry, warp_row());
      const int first_key = work->geometry.first_key, kv_begin = work->item.kv_begin;
      int begin = kv_begin + (num_tiles<C>(work->item) - 1) * C::kKeys;
      begin_work(acc, s, visible, begin, weights);
      for (; begin > kv_begin; begin -= C::kKeys) {
        next_tile(acc, s, visible, begin, first_key, weights);
      }
      Place next = query;
      next.advance();
      has_work = next_work(next, &work);
      if (has_work) {
        wait_for(kKeyFull, key);
        start_scores(s, next);
        wait_values(first_key - begin, visible.kv_end - begin);
        start_values(acc, weights);
        wgmma_wait<0>();
        keep_registers(s);
        release(kKeyEmpty, key);
        key.advance();
      } else {
        wait_values(first_key - begin, visible.kv_end - begin);
        start_values(acc, weights);
        wgmma_wait<0>();
      }
      keep_registers(acc.out);
      release(kValueEmpty, value);
      value.advance();
      finish_work(acc);
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    prefill_sm90a_kernel(const AttentionParams p, const AttentionPartials partials,
                         const __grid_constant__ Maps maps) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];
  unsigned char* memory = dynamic_smem + (-smem_address(dynamic_smem) & 1023);
  const Smem smem{smem_address(memory)};
  if (threadIdx.x == 0) {
    init_barriers<C>(smem);
    prefetch_tensor_map(&maps.keys);
    prefetch_tensor_map(&maps.values);
  }
  __syncthreads();
  pdl_wait();
  pdl_launch_dependents();
  // A shuffle, because the compiler then knows that the group is the same in all lanes.
  const int group = __shfl_sync(kFullMask, threadIdx.x / kGroupThreads, 0) - 1;
  if (group < 0) {
    give_registers<56>();
    load<C>(p, maps, smem, reinterpret_cast<Work*>(memory + C::kWorkOffset));
  } else {
    take_registers<224>();
    const int thread = threadIdx.x % kGroupThreads;
    const float scale_log2 = p.softmax_scale * 1.4426950408889634f;
    Consumer<C> consumer{{p, partials, smem, memory, group, thread, scale_log2}};
    consumer.run();
  }
}

// Encodes a cache as a tensor (column of a panel, key of a block, panel, head, block), which is
// copied one block and box_panels panels at a time.
template <class C>
cudaError_t encode_cache(const AttentionParams& p, const void* cache, int64_t block_stride,
                         int64_t token_stride, int64_t head_stride, uint32_t box_panels,
                         Dtype dtype, CUtensorMap* map) {
  const TensorBox<5> box{
      .data = cache,
      .sizes = {64, kBlockSize, C::kPanels, static_cast<uint64_t>(p.num_kv_heads),
                static_cast<uint64_t>(p.num_blocks)},
      .strides = {1, token_stride, 64, head_stride, block_stride},
      .box_sizes = {64, kBlockSize, box_panels, 1, 1},
  };
  return encode_tensor_map(box, dtype, map);
}

template <class C>
cudaError_t launch_config(const AttentionParams& p, Dtype dtype, cudaStream_t stream) {
  constexpr auto kKernel = &prefill_sm90a_kernel<C>;
  cudaError_t error = allow_smem<kKernel, C::kSmemBytes>();
  if (error != cudaSuccess) return error;
  Maps maps;
  error = encode_cache<C>(p, p.key_cache, p.key_block_stride, p.key_token_stride,
                          p.key_head_stride, 1, dtype, &maps.keys);
  if (error != cudaSuccess) return error;
  error = encode_cache<C>(p, p.value_cache, p.value_block_stride, p.value_token_stride,
                          p.value_head_stride, C::kPanels, dtype, &maps.values);
  if (error != cudaSuccess) return error;
  const int64_t works =
      max_prefill_items(p.device, p.num_tokens, p.num_rows, p.num_heads, p.num_kv_heads) *
      p.num_kv_heads;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(works, p.device.num_sms)));
  return launch_chained(kKernel, grid, dim3(C::kThreads), C::kSmemBytes, stream, p,
                        prefill_partials(p), maps);
}

}  // namespace
}  // namespace prefill::sm90a

bool prefill_sm90a_serves(const AttentionParams& p) {
  return p.block_size_log2 == 4 && (p.head_dim == 64 || p.head_dim == 128) && p.softcap == 0.0f;
}

cudaError_t launch_prefill_attention_sm90a(const AttentionParams& p, Dtype dtype,
                                           cudaStream_t stream) {
  return dispatch_half(dtype, [&]<class T>(T) {
    if (p.head_dim == 64) {
      return prefill::sm90a::launch_config<prefill::sm90a::Config<T, 64>>(p, dtype, stream);
    }
    return prefill::sm90a::launch_config<prefill::sm90a::Config<T, 128>>(p, dtype, stream);
  });
}

}  // namespace pyserve::gpu
