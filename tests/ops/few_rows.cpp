// few_rows.cuh on a CPU: the threads of one block at a time are coroutines that take turns at
// barriers, and what a warp does together is done when all of its lanes are there. A copy lands
// when it is started, threads in any order, or only when it is waited for: the kernel must not see
// the difference. Results are held against float64 sums. "few_rows.inc" is the kernel's file, as
// test_few_rows.py prepares it. Prints what is wrong; its exit code is 1 then. Its second argument
// is how many groups of copies too few the kernel waits for in its loop.
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
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

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
size_t num_early = 0;  // groups that the kernel's loop does not wait for
std::mt19937 random(1);
std::vector<unsigned char> memory;  // shared
unsigned char* shared = nullptr;
size_t num_shared = 0;
std::vector<std::pair<const unsigned char*, const unsigned char*>> readable;

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
  for (const Thread& thread : threads) {
    if (!thread.open.empty() || !thread.groups.empty()) fail("copies that nobody waits for");
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

template <class T>
T from_float(float x) {
  if (std::isnan(x)) return T{0x7fff};
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return T{static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
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
void cp_async_wait(size_t num_early = 0) {
  auto& groups = machine::threads[machine::current].groups;
  for (; groups.size() > kPending + num_early; groups.pop_front()) {
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

float element(uint32_t word, int index) {
  return to_float({static_cast<uint16_t>(word >> 16 * index)});
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
      const float left = element(machine::lane(row % 8 * 4 + holder)[row / 8 + 2 * high], k % 2);
      sum += double{left} * element(machine::lane(column * 4 + holder)[4 + high], k % 2);
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

#include "few_rows.inc"

}  // namespace pyserve::gpu

using namespace pyserve::gpu;

namespace {

constexpr uint16_t kPoison = 0x7fc1;

std::vector<__nv_bfloat16> randoms(size_t count, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<__nv_bfloat16> values(count);
  for (auto& value : values) value = from_float<__nv_bfloat16>(normal(machine::random));
  return values;
}

struct Shape {
  int m, n, k, num_sms;
  bool has_bias, has_norm;
};

// The number of results that are wrong.
template <Epilogue kEpilogue, class Tile>
int check(const Shape& s) {
  const int rows = kEpilogue == Epilogue::kSiluMul ? 2 * s.n : s.n;
  const int stride = s.k + 8, out_stride = s.n + 3;
  const int k_squares = (s.k + 15) / 16, n_squares = (s.n + 15) / 16;
  const auto x = randoms(s.m * stride, 1.0f), weight = randoms(rows * stride, 0.06f);
  const auto bias = randoms(rows, 1.0f), norm_weight = randoms(s.n, 1.0f);
  std::vector<__nv_bfloat16> out(s.m * out_stride, {kPoison}), scaled = out;
  const auto residual = randoms(s.m * out_stride, 1.0f);
  if (kEpilogue == Epilogue::kAdd) {
    for (int i = 0; i < s.m * s.n; ++i) {
      const int at = i / s.n * out_stride + i % s.n;
      out[at] = residual[at];
    }
  }
  std::vector<float> x_squares(s.m * k_squares, 7.0f), squares(s.m * n_squares, NAN);
  LinearParams p{x.data(), stride, weight.data(), stride, s.has_bias ? bias.data() : nullptr,
                 out.data(), out_stride, s.m, s.n, s.k};
  const bool is_factor = s.has_norm && kEpilogue != Epilogue::kAdd;
  const bool leaves_norm = s.has_norm && kEpilogue == Epilogue::kAdd;
  if (is_factor) p.x_squares = x_squares.data(), p.x_squares_stride = k_squares, p.eps = 1e-5f;
  if (leaves_norm) {
    p.norm_weight = norm_weight.data(), p.scaled = scaled.data(), p.scaled_stride = out_stride;
    p.squares = squares.data(), p.squares_stride = n_squares;
  }
  const auto range = [](const auto& values, int last) {
    const auto* first = reinterpret_cast<const unsigned char*>(values.data());
    return std::pair(first, first + 2 * last);
  };
  machine::readable = {range(x, (s.m - 1) * stride + s.k),
                       range(weight, (rows - 1) * stride + s.k)};
  launch_tiled<__nv_bfloat16, kEpilogue, Tile>(p, s.num_sms, nullptr);

  const double factor = is_factor ? 1 / std::sqrt(7.0 * k_squares / s.k + 1e-5) : 1.0;
  int num_wrong = 0;
  for (int t = 0; t < s.m; ++t) {
    auto sum_of = [&](int row) {
      double sum = 0;
      for (int i = 0; i < s.k; ++i) {
        sum += double{to_float(x[t * stride + i])} * to_float(weight[row * stride + i]);
      }
      return sum * factor + (s.has_bias ? to_float(bias[row]) : 0.0f);
    };
    std::vector<double> sums(n_squares);
    for (int j = 0; j < out_stride; ++j) {
      const int at = t * out_stride + j;
      if (j >= s.n) {
        num_wrong += out[at].bits != kPoison || scaled[at].bits != kPoison;
        continue;
      }
      double wanted = sum_of(j);
      if (kEpilogue == Epilogue::kAdd) wanted += to_float(residual[at]);
      if (kEpilogue == Epilogue::kSiluMul) wanted *= sum_of(s.n + j) / (1 + std::exp(-wanted));
      const double result = to_float(out[at]);
      num_wrong += !(std::abs(result - wanted) <= 0.004 * std::abs(wanted) + 1e-4);
      sums[j / 16] += result * result;
      const float product = to_float(out[at]) * to_float(norm_weight[j]);
      const uint16_t bits = leaves_norm ? from_float<__nv_bfloat16>(product).bits : kPoison;
      num_wrong += scaled[at].bits != bits;
    }
    for (int i = 0; leaves_norm && i < n_squares; ++i) {
      num_wrong += !(std::abs(squares[t * n_squares + i] - sums[i]) <= 1e-5 * sums[i]);
    }
  }
  return num_wrong;
}

template <class Tile>
int check_all(int num_rounds) {
  constexpr int kColumns[] = {1, 8, 16, 33, 130, 200, 48, 72};
  constexpr int kDepths[] = {8, 72, 512, 520, 1032, 2056};
  int num_bad = 0;
  for (int round = 0; round < num_rounds; ++round) {
    auto pick = [](const auto& values) { return values[machine::random() % std::size(values)]; };
    machine::lands_late = round % 2 == 0;
    auto up_to = [](int most) { return 1 + static_cast<int>(machine::random() % most); };
    const int m = round == 0 ? Tile::kTokens : up_to(Tile::kTokens);
    const Shape shape{m, pick(kColumns), pick(kDepths), up_to(5), up_to(2) == 1, up_to(2) == 1};
    const int wrong[] = {check<Epilogue::kStore, Tile>(shape), check<Epilogue::kAdd, Tile>(shape),
                         check<Epilogue::kSiluMul, Tile>(shape)};
    for (int epilogue = 0; epilogue < 3; ++epilogue) {
      if (wrong[epilogue] == 0) continue;
      ++num_bad;
      std::printf("%d weight rows, %d tokens, epilogue %d, m %d, n %d, k %d, %d SMs: %d wrong\n",
                  Tile::kRows, Tile::kTokens, epilogue, shape.m, shape.n, shape.k, shape.num_sms,
                  wrong[epilogue]);
    }
  }
  return num_bad;
}

}  // namespace

int main(int, char** argv) {
  const int n = std::atoi(argv[1]);
  machine::num_early = std::atoi(argv[2]);
  const int num_bad = check_all<Tiling<2, 4, 16>>(n) + check_all<Tiling<1, 6, 16>>(n) +
                      check_all<Tiling<2, 3, 32>>(n) + check_all<Tiling<1, 10, 1>>(n) +
                      check_all<Tiling<1, 9, 4>>(n) + check_all<Tiling<1, 8, 8>>(n) +
                      check_all<Tiling<1, 3, 8>>(n);
  return num_bad == 0 ? 0 : 1;
}
