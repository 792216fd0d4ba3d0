// Matrix products of a warpgroup (sm_90a's wgmma). A warpgroup is four warps, the first of which
// has an index that is a multiple of four. It computes d[64][n] = a[64][16] b[16][n], or adds the
// product to d, in float32 from 16-bit a and b. b lies in shared memory, a in shared memory or in
// registers. All 128 threads execute each call together.
//
// The order of calls is wgmma_fence(); products; wgmma_commit(); wgmma_wait<pending>(). Between the
// first product and the wait nothing may touch d, nor the registers of a. keep_registers() before
// and behind the products keeps the compiler from moving accesses across.
//
// Fragments: the thread with lane l of warp w of the group holds, in d[4 * j + i] with i in 0 .. 3,
// the element of row 16 w + l / 4 + i / 2 * 8 and column 8 j + l % 4 * 2 + i % 2. An a in registers
// is the fragment of mma.sync m16n8k16. So a d can become the next product's a: pack_pair of the
// d[8 k + 0, 1], [2, 3], [4, 5], [6, 7] gives the a of columns 16 k .. 16 k + 15.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace pyserve::gpu {

// ---- operands in shared memory -----------------------------------------------------------------
// A tile consists of panels whose rows are 128 bytes (64 elements) with the swizzle of tma.cuh;
// each panel is aligned to 1024 bytes. The operand's major dimension is the one along which the
// rows run.

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;

__device__ __forceinline__ uint64_t make_descriptor(uint32_t address, uint32_t leading_bytes,
                                                    uint32_t stride_bytes) {
  return kSwizzle128 | static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32;
}

// An operand whose rows run along k, as do weights [n, k], activations [m, k] and keys [n, k]. One
// panel is [rows of m or n][64 of k]. The next 16 of k lie 32 bytes further on: see
// advance_descriptor.
__device__ __forceinline__ uint64_t k_major_descriptor(uint32_t address) {
  // leading_bytes is not read here, since all 64 of k are in one row
  return make_descriptor(address, 16, 1024);
}

// An operand whose rows run along m or n, as do values [k, n]. One panel is [rows of k][64 of n],
// and the next 64 of n lie `panel_bytes` further on. A product reads 16 rows of each panel.
__device__ __forceinline__ uint64_t mn_major_descriptor(uint32_t address, uint32_t panel_bytes) {
  return make_descriptor(address, panel_bytes, 1024);
}

__device__ __forceinline__ uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

enum class Major { kK, kMN };

// ---- order -------------------------------------------------------------------------------------

// Called before the first product of a group: orders earlier accesses to the registers of the
// products before them.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most the newest `kPending` groups of products are incomplete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

template <class Register, int kCount>
__device__ __forceinline__ void keep_registers(Register (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<Register, float>) {
      asm volatile("" : "+f"(r[i])::"memory");
    } else {
      asm volatile("" : "+r"(r[i])::"memory");
    }
  }
}

// setmaxnreg: sets how many registers each thread of this warpgroup has from now on, a multiple of
// 8. take_registers raises the number, give_registers lowers it. The kernel needs
// __launch_bounds__(threads, 1), and the sum over its warps must stay within what the launch gave
// it. The compiler uses the new number only where warpgroups with different numbers share no code.
// The code of a trap is always shared, so only one side of the branch may contain any. Otherwise
// the compiler spills registers and serialises the products (warning C7512).
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

// ---- products ----------------------------------------------------------------------------------

#define PYSERVE_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PYSERVE_NAMES_16 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
  "%28, %29, %30, %31"
#define PYSERVE_NAMES_32 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47"
#define PYSERVE_NAMES_48 \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
  "%60, %61, %62, %63"
#define PYSERVE_NAMES_64 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, " \
  "%76, %77, %78, %79"
#define PYSERVE_NAMES_80 \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, " \
  "%92, %93, %94, %95"
#define PYSERVE_NAMES_96 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
  "%108, %109, %110, %111"
#define PYSERVE_NAMES_112 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"
#define PYSERVE_DATA_8(d, i)                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PYSERVE_DATA_16(d, i) PYSERVE_DATA_8(d, i), PYSERVE_DATA_8(d, i + 8)

#define PYSERVE_NAMES_N32 PYSERVE_NAMES_0
#define PYSERVE_NAMES_N64 PYSERVE_NAMES_N32 ", " PYSERVE_NAMES_16
#define PYSERVE_NAMES_N96 PYSERVE_NAMES_N64 ", " PYSERVE_NAMES_32
#define PYSERVE_NAMES_N128 PYSERVE_NAMES_N96 ", " PYSERVE_NAMES_48
#define PYSERVE_NAMES_N160 PYSERVE_NAMES_N128 ", " PYSERVE_NAMES_64
#define PYSERVE_NAMES_N192 PYSERVE_NAMES_N160 ", " PYSERVE_NAMES_80
#define PYSERVE_NAMES_N224 PYSERVE_NAMES_N192 ", " PYSERVE_NAMES_96
#define PYSERVE_NAMES_N256 PYSERVE_NAMES_N224 ", " PYSERVE_NAMES_112
#define PYSERVE_DATA_N32(d) PYSERVE_DATA_16(d, 0)
#define PYSERVE_DATA_N64(d) PYSERVE_DATA_N32(d), PYSERVE_DATA_16(d, 16)
#define PYSERVE_DATA_N96(d) PYSERVE_DATA_N64(d), PYSERVE_DATA_16(d, 32)
#define PYSERVE_DATA_N128(d) PYSERVE_DATA_N96(d), PYSERVE_DATA_16(d, 48)
#define PYSERVE_DATA_N160(d) PYSERVE_DATA_N128(d), PYSERVE_DATA_16(d, 64)
#define PYSERVE_DATA_N192(d) PYSERVE_DATA_N160(d), PYSERVE_DATA_16(d, 80)
#define PYSERVE_DATA_N224(d) PYSERVE_DATA_N192(d), PYSERVE_DATA_16(d, 96)
#define PYSERVE_DATA_N256(d) PYSERVE_DATA_N224(d), PYSERVE_DATA_16(d, 112)

// The operands behind those of d. For SS (both operands in shared memory), A and B are the
// descriptors and C says whether d is added. For RS (a in registers), A .. D are the registers of
// a, E is the descriptor of b, and F says whether d is added. The last one, D or G, is the major
// dimension of b.
#define PYSERVE_WGMMA_SS(N, TYPE, A, B, C, D)                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #C ", 0;\n"                                 \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"             \
               PYSERVE_NAMES_N##N "}, %" #A ", %" #B ", p, 1, 1, 0, %" #D ";\n}\n"              \
               : PYSERVE_DATA_N##N(d)                                                           \
               : "l"(a), "l"(b), "r"(static_cast<int>(is_added)), "n"(kMajor == Major::kMN))
#define PYSERVE_WGMMA_RS(N, TYPE, A, B, C, D, E, F, G)                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #F ", 0;\n"                                 \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"             \
               PYSERVE_NAMES_N##N "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E               \
               ", p, 1, 1, %" #G ";\n}\n"                                                       \
               : PYSERVE_DATA_N##N(d)                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                            \
                 "r"(static_cast<int>(is_added)), "n"(kMajor == Major::kMN))
#define PYSERVE_WGMMA(TYPE)                                          \
  if constexpr (kCount == 32) {                                      \
    PYSERVE_WGMMA_SS(64, TYPE, 32, 33, 34, 35);                      \
  } else if constexpr (kCount == 64) {                               \
    PYSERVE_WGMMA_SS(128, TYPE, 64, 65, 66, 67);                     \
  } else if constexpr (kCount == 112) {                              \
    PYSERVE_WGMMA_SS(224, TYPE, 112, 113, 114, 115);                 \
  } else {                                                           \
    PYSERVE_WGMMA_SS(256, TYPE, 128, 129, 130, 131);                 \
  }

// d = a b, or d += a b where is_added, with both operands in shared memory. a is k-major, b as
// kMajor says. n is twice kCount, the number of accumulators per thread: 64, 128, 224 or 256.
template <class T, Major kMajor, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool is_added) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 112 || kCount == 128);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PYSERVE_WGMMA("bf16")
  } else {
    static_assert(std::is_same_v<T, __half>);
    PYSERVE_WGMMA("f16")
  }
}

#undef PYSERVE_WGMMA
#define PYSERVE_WGMMA(TYPE)                                          \
  if constexpr (kCount == 16) {                                      \
    PYSERVE_WGMMA_RS(32, TYPE, 16, 17, 18, 19, 20, 21, 22);          \
  } else if constexpr (kCount == 32) {                               \
    PYSERVE_WGMMA_RS(64, TYPE, 32, 33, 34, 35, 36, 37, 38);          \
  } else if constexpr (kCount == 64) {                               \
    PYSERVE_WGMMA_RS(128, TYPE, 64, 65, 66, 67, 68, 69, 70);         \
  } else {                                                           \
    PYSERVE_WGMMA_RS(256, TYPE, 128, 129, 130, 131, 132, 133, 134);  \
  }

// The same with a in registers; n is 32, 64, 128 or 256.
template <class T, Major kMajor, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b,
                                      bool is_added) {
  static_assert(kCount == 16 || kCount == 32 || kCount == 64 || kCount == 128);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PYSERVE_WGMMA("bf16")
  } else {
    static_assert(std::is_same_v<T, __half>);
    PYSERVE_WGMMA("f16")
  }
}

#define PYSERVE_WGMMA_E4M3(N, A, B, C)                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #C ", 0;\n"                       \
               "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {"           \
               PYSERVE_NAMES_N##N "}, %" #A ", %" #B ", p, 1, 1;\n}\n"                \
               : PYSERVE_DATA_N##N(d)                                                 \
               : "l"(a), "l"(b), "r"(static_cast<int>(is_added)))

// d = a[64][32] b[32][n], or d += it where is_added, in e4m3. Both operands are in shared memory
// and k-major; a row of a panel holds 128 elements. n is 64 or 128. The tensor core keeps only
// about 14 bits below the largest product of each step, not the 24 bits of float32. A caller that
// sums over more than a few hundred of k must therefore accumulate in registers of its own.
template <int kCount>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[kCount], uint64_t a, uint64_t b,
                                           bool is_added) {
  static_assert(kCount == 32 || kCount == 64);
  if constexpr (kCount == 32) {
    PYSERVE_WGMMA_E4M3(64, 32, 33, 34);
  } else {
    PYSERVE_WGMMA_E4M3(128, 64, 65, 66);
  }
}

#undef PYSERVE_WGMMA
#undef PYSERVE_WGMMA_E4M3
#undef PYSERVE_WGMMA_RS
#undef PYSERVE_WGMMA_SS
#undef PYSERVE_DATA_N256
#undef PYSERVE_DATA_N224
#undef PYSERVE_DATA_N192
#undef PYSERVE_DATA_N160
#undef PYSERVE_DATA_N128
#undef PYSERVE_DATA_N96
#undef PYSERVE_DATA_N64
#undef PYSERVE_DATA_N32
#undef PYSERVE_NAMES_N256
#undef PYSERVE_NAMES_N224
#undef PYSERVE_NAMES_N192
#undef PYSERVE_NAMES_N160
#undef PYSERVE_NAMES_N128
#undef PYSERVE_NAMES_N96
#undef PYSERVE_NAMES_N64
#undef PYSERVE_NAMES_N32
#undef PYSERVE_DATA_16
#undef PYSERVE_DATA_8
#undef PYSERVE_NAMES_112
#undef PYSERVE_NAMES_96
#undef PYSERVE_NAMES_80
#undef PYSERVE_NAMES_64
#undef PYSERVE_NAMES_48
#undef PYSERVE_NAMES_32
#undef PYSERVE_NAMES_16
#undef PYSERVE_NAMES_0

}  // namespace pyserve::gpu
