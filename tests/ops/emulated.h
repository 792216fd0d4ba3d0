// A CUDA card on a CPU, for the sources of some kernels: the threads of one block, or of one
// cluster of blocks, at a time are coroutines that take turns at barriers, and what a warp does
// together is done when all of its lanes are there. A copy lands when it is started, threads in any
// order, or only when it is waited for: a kernel must not see the difference.
//
// A program includes this, then in namespace pyserve::gpu the kernel's files without their first
// lines, as emulated.py prepares them. Of the names in them here is what these kernels use.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

struct __nv_bfloat16 {
  uint16_t bits = 0;
};
struct __half {
  uint16_t bits = 0;
};
struct uint4 {
  uint32_t x, y, z, w;
};
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;

namespace machine {

constexpr int kMaxThreads = 1280, kLanes = 32, kStackBytes = 1 << 16;

struct Copy {
  unsigned char* to;
  const void* from;
  int num_bytes;  // and zeros up to 16
};

struct Barrier {
  int num_arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on: left without a call of the system, unlike a context
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool has_begun = false, has_ended = false;
  std::vector<Copy> open;  // since the last commit
  std::deque<std::vector<Copy>> groups;
  const Barrier* awaited = nullptr;  // a turn does nothing while it has this generation
  int generation = 0;
};

std::array<Thread, kMaxThreads> threads;
int current = 0, num_blocks = 1, block_threads = 256;  // that run at a time; of each
unsigned first_block = 0;
jmp_buf scheduler;
std::array<Barrier, kMaxThreads / kLanes> block_barriers;
std::array<Barrier, kMaxThreads / kLanes> warp_barriers;
uint32_t exchanged[kMaxThreads][6];  // what a lane shows to the others
bool lands_late = false;
size_t num_too_early = 0;  // groups of copies that a wait leaves under way beyond what it may
std::mt19937 random(1);
std::vector<unsigned char> memory;  // shared
unsigned char* shared = nullptr;     // of the first block, the others' behind it
size_t num_shared = 0, shared_step = 0;
std::vector<std::pair<const unsigned char*, const unsigned char*>> readable;

// After an error has been printed: one that was asked for is enough.
void end_if_expected() {
  if (num_too_early != 0) std::exit(1);
}

[[noreturn]] void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

int block() { return current / block_threads; }
unsigned char* block_shared() { return shared + block() * shared_step; }

void yield() {
  if (_setjmp(threads[current].place) == 0) _longjmp(scheduler, 1);
}

// The current thread's turn, until it yields or ends.
__attribute__((noinline)) void take_turn() {
  Thread& thread = threads[current];
  if (_setjmp(scheduler) != 0) return;
  if (thread.has_begun) _longjmp(thread.place, 1);
  thread.has_begun = true;
  setcontext(&thread.context);
}

void meet(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.num_arrived == count) {
    barrier.num_arrived = 0;
    ++barrier.generation;
  }
  Thread& thread = threads[current];
  thread.awaited = &barrier, thread.generation = generation;
  while (barrier.generation == generation) yield();
  thread.awaited = nullptr;
}

void meet_warp() { meet(warp_barriers[current / kLanes], kLanes); }

uint32_t* lane(int index) { return exchanged[current / kLanes * kLanes + index]; }

void land(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  if (copy.num_bytes == 0) return;
  const auto* from = static_cast<const unsigned char*>(copy.from);
  const bool is_inside = std::any_of(readable.begin(), readable.end(), [&](const auto& range) {
    return from >= range.first && from + copy.num_bytes <= range.second;
  });
  if (!is_inside) fail("a copy from outside of x and weight");
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a copy that is not aligned");
  std::memcpy(copy.to, from, copy.num_bytes);
}

unsigned char* at(uint32_t address, uint32_t size = 16) {
  if (address % size != 0 || address % shared_step + size > num_shared ||
      address / shared_step >= static_cast<size_t>(num_blocks)) {
    fail("not an address of shared memory");
  }
  return shared + address;
}

std::function<void()> body;
std::function<void()> between = [] {};  // what goes on while threads take turns, once a round

void begin() {
  body();
  threads[current].has_ended = true;
  _longjmp(scheduler, 1);
}

// Those from first_block on, num_blocks of them.
void run_blocks() {
  const int num_threads = num_blocks * block_threads;
  std::vector<int> order(num_threads);
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = threads[i];
    order[i] = i;
    thread.has_begun = thread.has_ended = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, begin, 0);
  }
  for (int num_left = num_threads; num_left > 0; between()) {
    if (!lands_late) std::shuffle(order.begin(), order.end(), random);
    num_left = 0;
    for (const int i : order) {
      const Thread& thread = threads[i];
      if (thread.has_ended) continue;
      if (thread.awaited != nullptr && thread.awaited->generation == thread.generation) {
        ++num_left;
        continue;
      }
      current = i;
      take_turn();
      num_left += !threads[i].has_ended;
    }
  }
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = threads[i];
    const bool is_clean =
        thread.open.empty() && std::all_of(thread.groups.begin(), thread.groups.end(),
                                           [](const auto& group) { return group.empty(); });
    if (!is_clean && num_too_early == 0) fail("copies that nobody waits for");
    thread.groups.clear();
  }
}

// Blocks of a kernel, `cluster` at a time and in any order, each with so many bytes of shared
// memory.
void run_grid(unsigned grid, int cluster, int num_threads, int num_bytes) {
  num_blocks = cluster, block_threads = num_threads;
  num_shared = num_bytes, shared_step = (num_bytes + 1023) / 1024 * 1024;
  memory.assign(cluster * shared_step + 1024, 0);
  const auto begin = reinterpret_cast<uintptr_t>(memory.data());
  shared = reinterpret_cast<unsigned char*>((begin + 1023) / 1024 * 1024);
  std::vector<unsigned> order;
  for (unsigned block = 0; block < grid; block += cluster) order.push_back(block);
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned block : order) {
    first_block = block;
    std::memset(shared, 0xff, cluster * shared_step);  // NaN
    run_blocks();
  }
}

}  // namespace machine

struct {
  struct {
    operator int() const { return machine::current % machine::block_threads; }
  } x;
} threadIdx;
struct {
  struct {
    operator unsigned() const { return machine::first_block + machine::block(); }
  } x;
} blockIdx;
struct {
  unsigned x;
} gridDim;

void __syncthreads() {
  machine::meet(machine::block_barriers[machine::block()], machine::block_threads);
}
void __syncwarp() { machine::meet_warp(); }
float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace pyserve::gpu {

enum class Epilogue : int32_t { kStore, kAdd, kSiluMul };
constexpr int64_t kSquaresColumns = 16;
constexpr int kWarpSize = 32, kVec = 8;

constexpr int64_t rows_per_column(Epilogue epilogue) {
  return epilogue == Epilogue::kSiluMul ? 2 : 1;
}

enum class Dtype { kBfloat16, kFloat16 };

struct LinearParams {
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const void* bias;
  void* out;
  int64_t out_stride;
  int64_t m, n, k;
  const float* x_squares = nullptr;
  int64_t x_squares_stride = 0;
  float eps = 0.0f;
  const void* norm_weight = nullptr;
  void* scaled = nullptr;
  int64_t scaled_stride = 0;
  float* squares = nullptr;
  int64_t squares_stride = 0;
  Epilogue epilogue = Epilogue::kStore;
  Dtype dtype = Dtype::kBfloat16;

  bool has_norm() const { return x_squares != nullptr || norm_weight != nullptr; }
  int64_t weight_rows() const { return rows_per_column(epilogue) * n; }
  LinearParams from_row(int64_t row) const {
    LinearParams p = *this;
    p.x = static_cast<const uint16_t*>(x) + row * x_stride;
    p.out = static_cast<uint16_t*>(out) + row * out_stride;
    return p;
  }
};

float to_float(__nv_bfloat16 x) {
  const uint32_t word = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// A float of the exponent and mantissa that stand in the top bits but one, the smallest ones too.
float small_float(uint32_t bits, float scale, bool is_negative) {
  float value;
  std::memcpy(&value, &bits, 4);
  return (is_negative ? -value : value) * scale;
}

float to_float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return mantissa == 0 ? INFINITY : NAN;
  return small_float((x.bits & 0x7fffu) << 13, 0x1p112f, x.bits >> 15);
}

// To nearest, ties to even; of __half finite values only.
template <class T>
T from_float(float x) {
  if (std::isnan(x)) return T{0x7fff};
  uint32_t word;
  std::memcpy(&word, &x, 4);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return T{static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
  } else {
    const int exponent = std::max(-14, x == 0 ? -14 : std::ilogb(x));
    const double mantissa = std::nearbyint(std::ldexp(std::abs(double{x}), 10 - exponent));
    const uint32_t bits = static_cast<uint32_t>(mantissa) + ((exponent + 14) << 10);
    return T{static_cast<uint16_t>(bits | word >> 31 << 15)};
  }
}

uint32_t smem_address(const unsigned char* pointer) {
  return static_cast<uint32_t>(pointer - machine::shared);
}

void cp_async_some(uint32_t to, const void* from, int num_bytes) {
  if (num_bytes < 0 || num_bytes > 16) machine::fail("a copy of no such size");
  const machine::Copy copy{machine::at(to), from, num_bytes};
  if (!machine::lands_late) land(copy);
  machine::threads[machine::current].open.push_back(copy);
}
void cp_async_16(uint32_t to, const void* from, bool is_valid) {
  cp_async_some(to, from, is_valid ? 16 : 0);
}

void cp_async_commit() {
  machine::Thread& thread = machine::threads[machine::current];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <size_t kPending>
void cp_async_wait() {
  auto& groups = machine::threads[machine::current].groups;
  for (; groups.size() > kPending + machine::num_too_early; groups.pop_front()) {
    if (!machine::lands_late) continue;
    std::for_each(groups.front().begin(), groups.front().end(), machine::land);
  }
  if (!machine::lands_late && machine::random() % 4 == 0) machine::yield();
}

void forget_origin(int&) {}
void pdl_wait() {}
void pdl_launch_dependents() {}

void ldmatrix_x4(uint32_t (&words)[4], uint32_t address) {
  const int lane = machine::current % kWarpSize;
  machine::lane(lane)[0] = address;
  machine::meet_warp();
  for (int i = 0; i < 4; ++i) {
    const unsigned char* row = machine::at(machine::lane(8 * i + lane / 4)[0]);
    std::memcpy(&words[i], row + lane % 4 * 4, 4);
  }
  machine::meet_warp();
}

template <class T>
float element(uint32_t word, int index) {
  return to_float(T{static_cast<uint16_t>(word >> 16 * index)});
}

template <class T>
uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    const float sum = element<T>(a, i) * element<T>(b, i) + element<T>(c, i);
    result |= uint32_t{from_float<T>(sum).bits} << 16 * i;
  }
  return result;
}

uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }

uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t places) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (places >> 4 * i & 7) & 255) << 8 * i;
  }
  return result;
}

float __uint_as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

template <class T>
void mma_16816(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = machine::current % kWarpSize;
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(machine::lane(lane), words, sizeof(words));
  machine::meet_warp();
  float left[2][16], right[2][16];  // of rows 8 apart, of columns beside each other
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, high = k / 8;
      const uint32_t* of_row = machine::lane(lane / 4 * 4 + holder);
      const uint32_t* of_column = machine::lane((lane % 4 * 2 + i) * 4 + holder);
      left[i][k] = element<T>(of_row[i + 2 * high], k % 2);
      right[i][k] = element<T>(of_column[4 + high], k % 2);
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = sums[i];
    for (int k = 0; k < 16; ++k) sum += double{left[i / 2][k]} * right[i % 2][k];
    sums[i] = static_cast<float>(sum);
  }
  machine::meet_warp();
}

template <int kWidth = kWarpSize>
float lane_sum(float x) {
  for (int distance = kWidth / 2; distance > 0; distance /= 2) {
    std::memcpy(machine::lane(machine::current % kWarpSize), &x, 4);
    machine::meet_warp();
    float other;
    std::memcpy(&other, machine::lane(machine::current % kWarpSize ^ distance), 4);
    machine::meet_warp();
    x += other;
  }
  return x;
}

constexpr unsigned kFullMask = 0xffffffffu;

int __shfl_sync(unsigned, int x, int from) {
  machine::lane(machine::current % kWarpSize)[0] = static_cast<uint32_t>(x);
  machine::meet_warp();
  const int value = static_cast<int>(machine::lane(from)[0]);
  machine::meet_warp();
  return value;
}

int warp_inclusive_sum(int x) {
  const int lane = machine::current % kWarpSize;
  machine::lane(lane)[0] = static_cast<uint32_t>(x);
  machine::meet_warp();
  int sum = 0;
  for (int i = 0; i <= lane; ++i) sum += static_cast<int>(machine::lane(i)[0]);
  machine::meet_warp();
  return sum;
}

template <Epilogue kEpilogue>
float finish(float sum, float other) {
  if (kEpilogue == Epilogue::kAdd) return other + sum;
  return kEpilogue == Epilogue::kSiluMul ? sum / (1 + std::exp(-sum)) * other : sum;
}

template <Epilogue kEpilogue, int kRows>
struct RowTile {
  static constexpr bool kIsPaired = kEpilogue == Epilogue::kSiluMul;
  static constexpr int kColumns = kIsPaired ? kRows / 2 : kRows;
};

template <auto kKernel, int kBytes>
cudaError_t allow_smem() {
  return cudaSuccess;
}

template <class Fn>
cudaError_t dispatch_half(Dtype dtype, Fn&& fn) {
  return dtype == Dtype::kBfloat16 ? fn(__nv_bfloat16{}) : fn(__half{});
}

template <class Fn>
cudaError_t dispatch_epilogue(Epilogue epilogue, Fn&& fn) {
  switch (epilogue) {
    case Epilogue::kStore: return fn(std::integral_constant<Epilogue, Epilogue::kStore>{});
    case Epilogue::kAdd: return fn(std::integral_constant<Epilogue, Epilogue::kAdd>{});
    default: return fn(std::integral_constant<Epilogue, Epilogue::kSiluMul>{});
  }
}

template <class Kernel, class... Args>
cudaError_t launch_chained(Kernel kernel, unsigned grid, int num_threads, int num_bytes,
                           cudaStream_t, const Args&... args) {
  machine::body = [&] { kernel(args...); };
  gridDim.x = grid;
  machine::run_grid(grid, 1, num_threads, num_bytes);
  return cudaSuccess;
}

}  // namespace pyserve::gpu
