// The product of importance on tensor cores: a warpgroup's 128 groups × 128 positions, signals in steps of 16.
//
// Both factors come from shared memory, where a stage holds a block of coefficients (256 groups × 64 signals) and one of
// signals (64 × 128 positions), laid out so that they are copied there as they are. wgmma on Hopper (compiled for
// sm_90a), mma elsewhere: both leave sums in the same registers, so that only multiply() differs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../config.hpp"
#include "../device/mma.cuh"
#include "plan.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int importance_cluster = 1;
inline constexpr int importance_copiers = 0;
#else
inline constexpr int importance_cluster = 2;   // CTAs that fetch their coefficients together
inline constexpr int importance_copiers = 32;  // threads after those that multiply
#endif

/// Byte offset of eight signals (`octet` of 8) of a group in its block: matrices of 8 × 8, eight groups' rows side by
/// side, all of an octet's before the next octet's.
SPECATTN_HD inline std::ptrdiff_t packed_coefficients(int group, int octet) {
  return (octet * std::ptrdiff_t{importance_slab / 8} + group / 8) * 128 + group % 8 * 16;
}

/// Byte offset of eight positions (`octet` of 16) of a signal in its block: two halves of 64 positions, rows of 128
/// bytes whose 16-byte parts are exchanged so that eight rows' parts lie in different banks (wgmma's 128-byte swizzle).
SPECATTN_HD inline std::uint32_t packed_signals(int signal, int octet) {
  const int half = octet / 8;
  return static_cast<std::uint32_t>(half * (importance_chunk * 128) + signal * 128 + (octet % 8 ^ signal % 8) * 16);
}

inline constexpr int packed_eight_bytes = 8 * 128;  ///< from one eight of signals to the next, in either half

/// Signals are the draft's heads in eights, of which none spans two layers.
SPECATTN_HD inline std::int32_t head_eights(std::int32_t q_heads) { return (q_heads + 7) / 8; }

/// A thread's sums: at[i][4 j + 2 h + c] is group row(…, i, h) of the slab at position 8 j + 2 (lane % 4) + c.
struct importance_sums {
  float at[2][importance_tile / 2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (float& x : at[i]) x = 0.0f;
    }
  }
  __device__ static int row(int warp, int lane, int i, int h) {
    return warp / 4 * 128 + i * 64 + warp % 4 * 16 + h * 8 + lane / 4;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

inline constexpr int products_in_flight = 1;  ///< besides the newest that multiply() has started

/// Keeps the compiler from moving what an instruction in flight still writes.
__device__ __forceinline__ void pin(importance_sums& sums) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (float& x : sums.at[i]) asm volatile("" : "+f"(x)::"memory");
  }
}

/// d += coefficients (64 groups × 16) × signals (16 × 128 positions), both by descriptor. Asynchronous.
__device__ __forceinline__ void wgmma(float (&d)[64], std::uint64_t coefficients, std::uint64_t signals) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, accumulate, 1, 1, 0, 1;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "l"(coefficients), "l"(signals));
}

/// A descriptor of shared memory: two distances between its parts, in bytes.
__device__ __forceinline__ std::uint64_t describe(std::uint32_t address, std::uint64_t leading,
                                                  std::uint64_t stride) {
  return address % (1u << 18) / 16 | leading / 16 << 16 | stride / 16 << 32;
}

/// Starts sums += the product of the stage at shared address `stage`, which stays as it is until settle() says so.
__device__ __forceinline__ void multiply(importance_sums& sums, std::uint32_t stage) {
  constexpr std::uint64_t swizzle_128 = std::uint64_t{1} << 62;
  constexpr std::uint32_t octet_bytes = importance_slab / 8 * 128;
  const std::uint32_t groups = stage + threadIdx.x / 128 * (128 / 8 * 128);
  pin(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int depth = 0; depth < importance_chunk / importance_depth; ++depth) {
    const std::uint32_t coefficients = groups + depth * 2 * octet_bytes;
    const std::uint32_t rows = stage + coefficient_block_bytes + depth * importance_depth * 128;
    const std::uint64_t signals = describe(rows, importance_chunk * 128, 1024) | swizzle_128;
    wgmma(sums.at[0], describe(coefficients, octet_bytes, 128), signals);
    wgmma(sums.at[1], describe(coefficients + 64 / 8 * 128, octet_bytes, 128), signals);
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most `Open` products are under way; sums are valid when none is.
template <int Open>
__device__ __forceinline__ void settle(importance_sums& sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Open) : "memory");
  pin(sums);
}

#else

inline constexpr int products_in_flight = 0;

__device__ __forceinline__ void multiply(importance_sums& sums, std::uint32_t stage) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int depth = 0; depth < importance_chunk / importance_depth; ++depth) {
    std::uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int group = importance_sums::row(warp, 0, i, 0) + lane % 16;
      load_matrices(a[i], stage + static_cast<std::uint32_t>(packed_coefficients(group, depth * 2 + lane / 16)));
    }
#pragma unroll
    for (int pair = 0; pair < importance_tile / 16; ++pair) {
      std::uint32_t b[4];
      load_transposed(b, stage + coefficient_block_bytes +
                             packed_signals(depth * importance_depth + lane % 16, pair * 2 + lane / 16));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float(&sum)[4] = *reinterpret_cast<float(*)[4]>(sums.at[i] + pair * 8 + j * 4);
          multiply_add<bf16>(sum, a[i], b[j * 2], b[j * 2 + 1]);
        }
      }
    }
  }
}

template <int Open>
__device__ __forceinline__ void settle(importance_sums&) {}

#endif

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
