// What Hopper has beside emulated.h: barriers in shared memory, copies and stores that they count,
// products of warpgroups, clusters of blocks.
//
// Copies land and products read their operands at once, or as late as they may: copies some rounds
// later, products when they are waited for. So a register or a stage that is written too early shows
// as a wrong result, and a barrier that nobody ends as a wait without end.
#pragma once

#include "emulated.h"
#include "emulated_vec.h"

#include <limits>
#include <list>
#include <map>
#include <utility>

namespace machine {

// A barrier of shared memory, by its address.
struct CountingBarrier {
  int num_expected = 0, num_missing = 0, num_bytes = 0, num_ended = 0;

  void arrive() {
    if (--num_missing < 0) fail("more arrive at a barrier than it was made for");
    end_phase();
  }
  void count(int bytes) {
    num_bytes += bytes;
    end_phase();
  }

 private:
  void end_phase() {
    if (num_missing != 0 || num_bytes != 0) return;
    num_missing = num_expected;
    ++num_ended;
  }
};

std::map<uint32_t, CountingBarrier> barriers;

CountingBarrier& barrier_at(uint32_t address) {
  at(address, 8);
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("not a barrier");
  return found->second;
}

struct Landing {
  int num_rounds;  // until then
  std::function<void()> land;
};

std::list<Landing> landings;
int num_idle = 0;  // rounds in which nothing landed and no barrier was passed

void start(std::function<void()> land) {
  if (!lands_late) return land();
  landings.push_back({static_cast<int>(random() % 4), std::move(land)});
}

void land_some() {
  if (++num_idle > 1000) fail("a wait without end");
  for (auto one = landings.begin(); one != landings.end();) {
    if (one->num_rounds-- > 0) {
      ++one;
      continue;
    }
    one->land();
    one = landings.erase(one);
    num_idle = 0;
  }
}

enum class Elements { kBfloat16, kHalf, kE4m3 };

// A product of a warpgroup, as one thread sees it: a is in registers, or where it lies.
struct Product {
  float* sums;
  const uint32_t* registers;
  uint64_t a, b;
  int num_sums;
  bool is_added;
  Elements elements;
};

struct Products {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};

std::array<Products, kMaxThreads> products;
Barrier cluster_barrier;
std::map<std::pair<int, int>, Barrier> named_barriers;  // by block and id

constexpr int kMaxDepth = 32;  // of a product: rows of 32 bytes

void read_operand(uint64_t descriptor, int row, Elements elements, float (&values)[kMaxDepth]);
float register_element(uint32_t word, int index, Elements elements);

// Of the thread that runs; its quad's registers hold its rows. Reading takes most of the time, so
// each operand is read once.
void compute(const Product& product, size_t index) {
  const int lane = current % kLanes, quad = current - lane % 4, warp_row = current / kLanes % 4 * 16;
  const int depth = product.elements == Elements::kE4m3 ? kMaxDepth : 16;
  float left[2][kMaxDepth], right[kMaxDepth];  // of rows 8 apart, of a column
  for (int half = 0; half < 2; ++half) {
    if (product.registers == nullptr) {
      read_operand(product.a, warp_row + lane / 4 + half * 8, product.elements, left[half]);
      continue;
    }
    for (int k = 0; k < depth; ++k) {
      const Products& other = products[quad + k % 8 / 2];
      const Product& same = other.groups.empty() ? other.open[index] : other.groups[0][index];
      const uint32_t word = same.registers[half + k / 8 * 2];
      left[half][k] = register_element(word, k % 2, product.elements);
    }
  }
  for (int pair = 0; pair < product.num_sums / 2; ++pair) {
    read_operand(product.b, pair / 2 * 8 + lane % 4 * 2 + pair % 2, product.elements, right);
    for (int half = 0; half < 2; ++half) {
      float& result = product.sums[pair / 2 * 4 + pair % 2 + half * 2];
      double sum = product.is_added ? result : 0.0f;
      for (int k = 0; k < depth; ++k) sum += double{left[half][k]} * right[k];
      result = static_cast<float>(sum);
    }
  }
}

}  // namespace machine

uint32_t __float_as_uint(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return word;
}
template <class Word>
Word __shfl_xor_sync(unsigned, Word value, int distance) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const int lane = machine::current % machine::kLanes;
  machine::lane(lane)[0] = word;
  machine::meet_warp();
  Word other;
  std::memcpy(&other, machine::lane(lane ^ distance), 4);
  machine::meet_warp();
  return other;
}

namespace pyserve::gpu {

// ---- clusters and barriers ---------------------------------------------------------------------

uint32_t cluster_rank() { return machine::block(); }
uint32_t cluster_address(uint32_t address, uint32_t rank) {
  const auto step = static_cast<uint32_t>(machine::shared_step);
  return address % step + rank * step;
}
void cluster_sync() {
  machine::meet(machine::cluster_barrier, machine::num_blocks * machine::block_threads);
}

void named_barrier_sync(int id, int num_threads) {
  machine::meet(machine::named_barriers[{machine::block(), id}], num_threads);
}

void mbarrier_init(uint32_t barrier, uint32_t num_arrivals) {
  machine::at(barrier, 8);
  const int count = static_cast<int>(num_arrivals);
  machine::barriers[barrier] = {count, count, 0, 0};
}
void barriers_ready() {}
void mbarrier_arrive(uint32_t barrier) { machine::barrier_at(barrier).arrive(); }
void mbarrier_arrive_cluster(uint32_t barrier) { machine::barrier_at(barrier).arrive(); }
void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  machine::CountingBarrier& here = machine::barrier_at(barrier);
  here.num_bytes += static_cast<int>(bytes);
  here.arrive();
}
void mbarrier_wait(uint32_t barrier, uint32_t phase) {
  const machine::CountingBarrier& here = machine::barrier_at(barrier);
  while (here.num_ended % 2 == static_cast<int>(phase)) machine::yield();
  machine::num_idle = 0;
}
void mbarrier_wait_cluster(uint32_t barrier, uint32_t phase) { mbarrier_wait(barrier, phase); }

void store_cluster(uint32_t address, const float4& value, uint32_t barrier) {
  unsigned char* to = machine::at(address);
  machine::start([=] {
    std::memcpy(to, &value, 16);
    machine::barrier_at(barrier).count(-16);
  });
}

template <int kNumStages>
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;

  void advance(int steps = 1) {
    phase ^= stage + steps >= kNumStages;
    stage = (stage + steps) % kNumStages;
  }
};

// ---- copies -------------------------------------------------------------------------------------

enum class L2Hint { kNormal, kEvictFirst, kEvictLast };

struct CUtensorMap {
  const unsigned char* data;
  int64_t sizes[4], strides[4], box[4];  // strides in bytes
  bool is_swizzled;
};

template <int kRank>
struct TensorBox {
  const void* data;
  uint64_t sizes[kRank];
  int64_t strides[kRank];
  uint32_t box_sizes[kRank];
};

template <int kRank>
cudaError_t encode(const TensorBox<kRank>& box, int num_bytes, CUtensorMap* map) {
  bool is_legal = reinterpret_cast<uintptr_t>(box.data) % 16 == 0 &&
                  box.box_sizes[0] * num_bytes % 16 == 0;
  *map = {static_cast<const unsigned char*>(box.data), {1, 1, 1, 1}, {}, {1, 1, 1, 1},
          num_bytes <= 2};
  for (int i = 0; i < kRank; ++i) {
    map->sizes[i] = static_cast<int64_t>(box.sizes[i]);
    map->strides[i] = box.strides[i] * num_bytes;
    map->box[i] = box.box_sizes[i];
    is_legal = is_legal && box.box_sizes[i] <= 256 &&
               (i == 0 || box.sizes[i] == 1 || map->strides[i] % 16 == 0);
  }
  return is_legal ? cudaSuccess : cudaErrorInvalidValue;
}
template <int kRank>
cudaError_t encode_tensor_map(const TensorBox<kRank>& box, Dtype, CUtensorMap* map) {
  return encode(box, 2, map);
}
template <int kRank>
cudaError_t encode_byte_map(const TensorBox<kRank>& box, CUtensorMap* map) {
  return encode(box, 1, map);
}
template <int kRank>
cudaError_t encode_word_map(const TensorBox<kRank>& box, CUtensorMap* map) {
  return encode(box, 8, map);
}

void prefetch_tensor_map(const CUtensorMap*) {}

using Corner = std::array<int, 4>;

void copy_box(uint32_t destination, const CUtensorMap& map, uint32_t barrier,
              const Corner& corner) {
  if (destination % 128 != 0) machine::fail("a box that is not aligned");
  const int64_t element_bytes = map.strides[0];
  const int64_t count = map.box[0] * map.box[1] * map.box[2] * map.box[3];
  for (int64_t element = 0; element < count; ++element) {
    auto address = static_cast<uint32_t>(destination + element * element_bytes);
    if (map.is_swizzled) address ^= (address >> 7 & 7) << 4;
    unsigned char* to = machine::at(address / 16 * 16) + address % 16;
    const unsigned char* from = map.data;
    bool is_inside = true;
    int64_t rest = element;
    for (int i = 0; i < 4; rest /= map.box[i++]) {
      const int64_t place = corner[i] + rest % map.box[i];
      is_inside = is_inside && place >= 0 && place < map.sizes[i];
      from += place * map.strides[i];
    }
    if (is_inside) {
      std::memcpy(to, from, element_bytes);
    } else {
      std::memset(to, 0, element_bytes);
    }
  }
  machine::barrier_at(barrier).count(-static_cast<int>(count * element_bytes));
}

// The map is a thread's argument, which a card keeps beyond the thread's end, and a copy may land
// after it: so each has the map's value.
void tma_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int c0, int c1,
              int c2, int c3, L2Hint) {
  machine::start([=, from = *map] { copy_box(destination, from, barrier, {c0, c1, c2, c3}); });
}

void tma_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int c0, int c1,
              L2Hint) {
  machine::start([=, from = *map] { copy_box(destination, from, barrier, {c0, c1, 0, 0}); });
}

void tma_load_multicast(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int c0,
                        int c1, uint16_t ctas, L2Hint) {
  for (int rank = 0; rank < machine::num_blocks; ++rank) {
    if ((ctas >> rank & 1) == 0) continue;
    const uint32_t to = cluster_address(destination, rank), at = cluster_address(barrier, rank);
    machine::start([=, from = *map] { copy_box(to, from, at, {c0, c1, 0, 0}); });
  }
}

// ---- products -----------------------------------------------------------------------------------

enum class Major { kK, kMN };

uint64_t k_major_descriptor(uint32_t address) {
  if (address % 1024 != 0) machine::fail("an operand that is not aligned");
  return address;
}
uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) { return descriptor + bytes; }

void wgmma_fence() {}

template <int kCount>
void take_registers() {}
template <int kCount>
void give_registers() {}

template <class Register, int kCount>
void keep_registers(Register (&)[kCount]) {}

void push(const machine::Product& product) {
  auto& open = machine::products[machine::current].open;
  open.push_back(product);
  if (machine::lands_late) return;
  machine::meet_warp();
  machine::compute(product, open.size() - 1);
  machine::meet_warp();
}

template <class T>
constexpr machine::Elements kElements =
    std::is_same_v<T, __half> ? machine::Elements::kHalf : machine::Elements::kBfloat16;

template <class T, Major kMajor, int kCount>
void wgmma(float (&sums)[kCount], uint64_t a, uint64_t b, bool is_added) {
  push({sums, nullptr, a, b, kCount, is_added, kElements<T>});
}

template <int kCount>
void wgmma_e4m3(float (&sums)[kCount], uint64_t a, uint64_t b, bool is_added) {
  push({sums, nullptr, a, b, kCount, is_added, machine::Elements::kE4m3});
}

template <class T, Major kMajor, int kCount>
void wgmma(float (&sums)[kCount], const uint32_t (&a)[4], uint64_t b, bool is_added) {
  push({sums, a, 0, b, kCount, is_added, kElements<T>});
}

void wgmma_commit() {
  machine::Products& mine = machine::products[machine::current];
  if (machine::lands_late) {
    mine.groups.push_back(std::move(mine.open));
  }
  mine.open.clear();
}

template <int kPending>
void wgmma_wait() {
  auto& groups = machine::products[machine::current].groups;
  while (groups.size() > kPending + machine::num_too_early) {
    machine::meet_warp();
    for (size_t i = 0; i < groups[0].size(); ++i) machine::compute(groups[0][i], i);
    machine::meet_warp();
    groups.pop_front();
  }
}

// ---- the rest -----------------------------------------------------------------------------------

uint32_t transpose_8x8(uint32_t pair) {
  const int lane = machine::current % kWarpSize, row = lane / 4, column = lane % 4 * 2;
  machine::lane(lane)[0] = pair;
  machine::meet_warp();
  uint32_t transposed = 0;
  for (int i = 0; i < 2; ++i) {  // element [column + i][row]
    const uint32_t word = machine::lane((column + i) * 4 + row / 2)[0];
    transposed |= (word >> row % 2 * 16 & 0xffff) << i * 16;
  }
  machine::meet_warp();
  return transposed;
}

uint4 load_shared(uint32_t address) {
  uint4 value;
  std::memcpy(&value, machine::at(address), 16);
  return value;
}
void store_shared(uint32_t address, const uint4& value) {
  std::memcpy(machine::at(address), &value, 16);
}
uint32_t load_shared_word(uint32_t address) {
  uint32_t word;
  std::memcpy(&word, machine::at(address, 4), 4);
  return word;
}

inline bool is_vec_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kVec == 0;
}

float4 __ldcg(const float4* from) { return *from; }
float __ldcg(const float* from) { return *from; }

float to_float_e4m3(uint32_t byte) {
  if ((byte & 127) == 127) return NAN;
  return small_float((byte & 127) << 20, 0x1p120f, byte >> 7);
}

// To nearest, ties to even, 448 at most.
uint32_t from_float_e4m3(float x) {
  if (std::isnan(x)) return 127;
  const float size = std::min(std::abs(x), 448.0f);
  const int exponent = std::max(-6, size == 0 ? -6 : std::ilogb(size));
  const auto mantissa = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  return (mantissa + ((exponent + 6) << 3)) | (std::signbit(x) ? 128 : 0);
}
uint32_t pack_e4m3(float low, float high) {
  return from_float_e4m3(low) | from_float_e4m3(high) << 8;
}

// As of block.cuh, of groups of threads that end one after another.
template <class Sync>
bool arrives_last(int* arrivals, int count, int32_t* flag, bool is_first, Sync&& sync) {
  sync();
  if (is_first) {
    *flag = ++*arrivals == count;
    if (*flag) *arrivals = 0;
  }
  sync();
  return *flag != 0;
}

struct Device {
  int num_sms;
  int smem_per_block = 227 * 1024;
};

template <class Kernel, class Args>
cudaError_t launch_chained_clusters(Kernel kernel, unsigned grid, unsigned cluster, int num_threads,
                                    int num_bytes, cudaStream_t, const Args& args) {
  machine::body = [&] { kernel(args); };
  machine::between = machine::land_some;
  machine::num_idle = 0;
  gridDim.x = grid;
  machine::run_grid(grid, static_cast<int>(cluster), num_threads, num_bytes);
  machine::between = [] {};
  machine::barriers.clear();
  if (!machine::landings.empty()) machine::fail("copies that nobody waits for");
  for (machine::Products& each : machine::products) each.groups.clear();
  return cudaSuccess;
}

// As in dispatch.h.
struct LinearTrial {
  int w4a16_tiling, w8a8_tiling;
};
inline LinearTrial& linear_trial() {
  static LinearTrial trial{};
  return trial;
}

}  // namespace pyserve::gpu

namespace machine {

float number(uint16_t bits, Elements elements) {
  using namespace pyserve::gpu;
  if (elements == Elements::kE4m3) return to_float_e4m3(bits);
  return elements == Elements::kHalf ? to_float(__half{bits}) : to_float(__nv_bfloat16{bits});
}

void read_operand(uint64_t descriptor, int row, Elements elements, float (&values)[kMaxDepth]) {
  for (int i = 0; i < 2; ++i) {
    uint32_t address = static_cast<uint32_t>(descriptor) + row * 128 + i * 16;
    address ^= (address >> 7 & 7) << 4;
    const unsigned char* from = at(address);
    if (elements == Elements::kE4m3) {
      for (int j = 0; j < 16; ++j) values[16 * i + j] = number(from[j], elements);
      continue;
    }
    for (int j = 0; j < 8; ++j) {
      uint16_t bits;
      std::memcpy(&bits, from + 2 * j, 2);
      values[8 * i + j] = number(bits, elements);
    }
  }
}

float register_element(uint32_t word, int index, Elements elements) {
  return number(static_cast<uint16_t>(word >> 16 * index), elements);
}

}  // namespace machine
