// The table that chooses a kernel of linear for a shape, and the calls of these kernels.
#include "gpu/linear/dispatch.h"

#include <cstdint>

#include "gpu/linear/few_rows_sm90a.h"
#include "gpu/linear/gemm_sm90a.h"
#include "gpu/linear/w4a16.h"
#include "gpu/linear/w8a8.h"

namespace pyserve::gpu {
namespace {

constexpr int kAnyCard = 1000;

// A kernel, and the devices and shapes for which it is used because it is faster than cuBLAS and
// than the kernels further down. Devices are given by compute capability, [first_card, last_card],
// as 10 x major + minor.
struct Choice {
  LinearKernel kernel;
  int first_card, last_card;
  int64_t first_m, last_m;
  int64_t first_n, first_k;  // lower limits of n and k
};

// The first row that fits is used. The figures come from bench.gpu_ops.
constexpr Choice kChoices[] = {
    // On an H200, in us, with the norms and activations between the linears included, this kernel /
    // cuBLAS at 1 row of x: 11.6 / 16.4 for [6144, 4096], 8.0 / 14.5 for [4096, 4096], 52.4 / 63.0
    // for [28672, 4096], 26.8 / 33.1 for [4096, 14336]; at 8 rows 12.5 / 15.7, 8.2 / 14.2, 54.4 /
    // 64.1, 27.4 / 33.7.
    {LinearKernel::kFewRows, 80, kAnyCard, 1, 8, 0, 0},
    // For the same matrices at 16 rows: 14.9 / 16.1, 9.2 / 14.4, 55.8 / 59.7, 28.2 / 34.5; at 32
    // rows: 18.1 / 16.3, 10.4 / 14.9, 60.1 / 65.0, 30.2 / 35.5, all four together 118.5 / 131.4.
    {LinearKernel::kFewRows, 90, 90, 9, kMaxRowsSm90a, 0, 0},
    // On an H200, in us, this kernel / cuBLAS alone, for linear_silu_mul with [28672, 4096]: 60 /
    // 64 at 96 rows, 60 / 67 at 128, 76 / 77 at 192, 86-93 / 90-95 at 256, 131 / 127 at 384, 173 /
    // 162 at 512, 316 / 317 at 1,024, 660-689 / 636-688 at 2,048. cuBLAS must be followed by
    // silu_mul, which takes 4 to 50 us more. More rows are computed in groups of 2,048 one after
    // another (Schedule in gemm_frame.cuh), so the comparison stays the same for them.
    {LinearKernel::kGemmSm90a, 90, 90, 65, 16384, 2048, 1024},
};

bool fits(const Choice& choice, const LinearParams& p, int card) {
  return card >= choice.first_card && card <= choice.last_card && p.m >= choice.first_m &&
         p.m <= choice.last_m && p.n >= choice.first_n && p.k >= choice.first_k;
}

// Whether the kernel can serve this: its needs of alignment and of tails are met, and its tiles fit
// the shape.
bool can_serve(LinearKernel kernel, const LinearParams& p, const Device& device) {
  switch (kernel) {
    case LinearKernel::kNone:
      return false;
    case LinearKernel::kFewRows:
      return true;
    case LinearKernel::kGemmSm90a:
      if constexpr (kHasSm90a) return can_gemm_sm90a(p) && is_gemm_sm90a_faster(p, device);
      return false;
  }
  return false;
}

}  // namespace

LinearTrial& linear_trial() {
  static LinearTrial trial;
  return trial;
}

cudaError_t serves_linear_w4a16(int64_t m, int64_t k, bool* serves) {
  // On an H200, in us for one layer of an 8B model, gemm_w4a16_sm90a.cu / dequantised weights and
  // cuBLAS: at 512 rows 345 / 781, without silu_mul, which cuBLAS still needs; at 8,192 rows 4,900
  // (counted, not measured yet) / 5,280 with silu_mul (bench/notes.md). On other devices 16 rows
  // are one pass of few_rows_w4a16.cuh, which reads a quarter of the bytes that 16-bit weights
  // have.
  constexpr int64_t kHopperRows = 16384, kRows = 16;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const int64_t asked = linear_trial().max_w4a16_rows;
  const bool has_gemm = kHasSm90a && device->is_hopper() && k >= kMinW4GemmColumns;
  *serves = m <= (asked >= 0 ? asked : has_gemm ? kHopperRows : kRows);
  return cudaSuccess;
}

cudaError_t can_linear_w8a8(const LinearParams& params, const Fp8Scale& scale, bool* can) {
  *can = false;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  if constexpr (kHasSm90a) *can = device->is_hopper() && can_gemm_w8a8_sm90a(params, scale);
  return cudaSuccess;
}

cudaError_t serves_linear_w8a8(const LinearParams& params, const Fp8Scale& scale, bool* serves) {
  const int64_t asked = linear_trial().min_w8a8_rows;
  const cudaError_t error = can_linear_w8a8(params, scale, serves);
  *serves = *serves && params.m >= (asked >= 0 ? asked : kMinW8Rows);
  return error;
}

cudaError_t launch_linear_w8a8(const LinearParams& params, const Fp8Scale& scale, void* scratch,
                               int64_t scratch_bytes, cudaStream_t stream) {
  bool can = false;
  if (const cudaError_t error = can_linear_w8a8(params, scale, &can); error != cudaSuccess) {
    return error;
  }
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  if constexpr (kHasSm90a) {
    if (can) return launch_gemm_w8a8_sm90a(params, scale, scratch, scratch_bytes, *device, stream);
  }
  return cudaErrorNotSupported;
}

LinearKernel choose_linear(const LinearParams& params, const Device& device) {
  if (params.has_norm()) return LinearKernel::kFewRows;
  for (const Choice& choice : kChoices) {
    if (fits(choice, params, 10 * device.major + device.minor) &&
        can_serve(choice.kernel, params, device)) {
      return choice.kernel;
    }
  }
  return LinearKernel::kNone;
}

cudaError_t serves_linear(const LinearParams& params, bool* serves) {
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  *serves = choose_linear(params, *device) != LinearKernel::kNone;
  return cudaSuccess;
}

cudaError_t launch_linear(const LinearParams& params, cudaStream_t stream) {
  if (params.m == 0 || params.n == 0) return cudaSuccess;
  const Device* device = nullptr;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  switch (choose_linear(params, *device)) {
    case LinearKernel::kGemmSm90a:
      if constexpr (kHasSm90a) return launch_gemm_sm90a(params, stream);
      break;
    case LinearKernel::kNone:  // not the fastest here, but right
    case LinearKernel::kFewRows:
      return launch_few_rows(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyserve::gpu
