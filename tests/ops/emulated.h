// A CUDA card on a CPU, for the sources of the kernels for few rows of linears: the threads of one
// block at a time are coroutines that take turns at barriers, and what a warp does together is done
// when all of its lanes are there. A copy lands when it is started, threads in any order, or only
// when it is waited for: a kernel must not see the difference.
//
// A program includes this, then in namespace pyserve::gpu the kernel's files without their first
// lines, as emulated.py prepares them. Of the names in them here is what these kernels use.
#pragma once

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
#define __global__
#define __forceinline__ inline
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

constexpr int kThreads = 256, kLanes = 32, kStackBytes = 1 << 16;

struct Copy {
  unsigned char* to;
  const void* from;
  bool is_valid;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool has_ended = false;
  std::vector<Copy> open;  // since the last commit
  std::deque<std::vector<Copy>> groups;
};

struct Barrier {
  int num_arrived = 0, generation = 0;
};

std::array<Thread, kThreads> threads;
int current = 0;
ucontext_t scheduler;
Barrier block_barrier;
std::array<Barrier, kThreads / kLanes> warp_barriers;
uint32_t exchanged[kThreads][6];  // what a lane shows to the others
bool lands_late = false;
size_t num_too_early = 0;  // groups of copies that a wait leaves under way beyond what it may
std::mt19937 random(1);
std::vector<unsigned char> memory;  // shared
unsigned char* shared = nullptr;
size_t num_shared = 0;
std::vector<std::pair<const unsigned char*, const unsigned char*>> readable;

// After an error has been printed: one that was asked for is enough.
void end_if_expected() {
  if (num_too_early != 0) std::exit(1);
}

[[noreturn]] void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

void yield() { swapcontext(&threads[current].context, &scheduler); }

void meet(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.num_arrived == count) {
    barrier.num_arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

void meet_warp() { meet(warp_barriers[current / kLanes], kLanes); }

uint32_t* lane(int index) { return exchanged[current / kLanes * kLanes + index]; }

void land(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  if (!copy.is_valid) return;
  const auto* from = static_cast<const unsigned char*>(copy.from);
  const bool is_inside = std::any_of(readable.begin(), readable.end(), [&](const auto& range) {
    return from >= range.first && from + 16 <= range.second;
  });
  if (!is_inside) fail("a copy from outside of x and weight");
  std::memcpy(copy.to, from, 16);
}

unsigned char* at(uint32_t address) {
  if (address % 16 != 0 || address + 16 > num_shared) fail("not an address of shared memory");
  return shared + address;
}

std::function<void()> body;

void begin() {
  body();
  threads[current].has_ended = true;
}

void run_block() {
  std::vector<int> order(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    Thread& thread = threads[i];
    order[i] = i;
    thread.has_ended = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, begin, 0);
  }
  for (int num_left = kThreads; num_left > 0;) {
    if (!lands_late) std::shuffle(order.begin(), order.end(), random);
    num_left = 0;
    for (const int i : order) {
      if (threads[i].has_ended) continue;
      current = i;
      swapcontext(&scheduler, &threads[i].context);
      num_left += !threads[i].has_ended;
    }
  }
  for (Thread& thread : threads) {
    const bool is_clean = thread.open.empty() && thread.groups.empty();
    if (!is_clean && num_too_early == 0) fail("copies that nobody waits for");
    thread.groups.clear();
  }
}

}  // namespace machine

struct {
  struct {
    operator int() const { return machine::current; }
  } x;
} threadIdx;
struct {
  unsigned x;
} blockIdx, gridDim;

void __syncthreads() { machine::meet(machine::block_barrier, machine::kThreads); }
void __syncwarp() { machine::meet_warp(); }
float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace pyserve::gpu {

enum class Epilogue : int32_t { kStore, kAdd, kSiluMul };
constexpr int64_t kSquaresColumns = 16;
constexpr int kWarpSize = 32, kVec = 8;

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
};

float to_float(__nv_bfloat16 x) {
  const uint32_t word = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

float to_float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return mantissa == 0 ? INFINITY : NAN;
  const float value = exponent == 0 ? std::ldexp(mantissa, -24)
                                    : std::ldexp(1024 + mantissa, exponent - 25);
  return x.bits >> 15 ? -value : value;
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

void cp_async_16(uint32_t to, const void* from, bool is_valid) {
  const machine::Copy copy{machine::at(to), from, is_valid};
  if (!machine::lands_late) land(copy);
  machine::threads[machine::current].open.push_back(copy);
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
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = sums[i];
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, high = k / 8;
      const float left = element<T>(machine::lane(row % 8 * 4 + holder)[row / 8 + 2 * high], k % 2);
      sum += double{left} * element<T>(machine::lane(column * 4 + holder)[4 + high], k % 2);
    }
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
  int sum = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    const int other = __shfl_sync(kFullMask, x, i);
    if (i <= machine::current % kWarpSize) sum += other;
  }
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

template <class Kernel, class... Args>
cudaError_t launch_chained(Kernel kernel, unsigned grid, int num_threads, int num_bytes,
                           cudaStream_t, const Args&... args) {
  if (num_threads != machine::kThreads) machine::fail("another number of threads");
  machine::memory.assign(num_bytes + 128, 0);
  machine::num_shared = num_bytes;
  const auto begin = reinterpret_cast<uintptr_t>(machine::memory.data());
  machine::shared = reinterpret_cast<unsigned char*>((begin + 127) / 128 * 128);
  machine::body = [&] { kernel(args...); };
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
    std::memset(machine::shared, 0xff, num_bytes);  // NaN
    machine::run_block();
  }
  return cudaSuccess;
}

}  // namespace pyserve::gpu
