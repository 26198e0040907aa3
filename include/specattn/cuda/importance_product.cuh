// The product of importance on tensor cores: a warpgroup's 128 groups × 128 positions, signals in steps of 16.
//
// Coefficients are read from memory in the order in which tensor cores want them, straight into registers; signals lie
// in shared memory, in blocks of 64 signals × 128 positions. wgmma on Hopper (compiled for sm_90a), mma elsewhere: both have the same
// registers, so that only multiply() differs.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>

#include "../config.hpp"

namespace specattn::inline v0_1::detail {

inline constexpr int importance_slab = 256;  // groups of a CTA
inline constexpr int importance_tile = 128;  // positions of a CTA
inline constexpr int importance_chunk = 64;  // signals of a block
inline constexpr int importance_depth = 16;  // signals of one instruction
inline constexpr int importance_chunk_depths = importance_chunk / importance_depth;

/// Where coefficient (group of a slab, signal of 16) lies among a slab's 16 × 32 × 8 of these 16 signals: a 16 × 16
/// block for each 16 groups, a lane's eight elements side by side.
SPECATTN_HD inline std::ptrdiff_t packed_coefficient(int group, int signal) {
  const int lane = group % 8 * 4 + signal % 8 / 2;
  const int element = (group % 16 / 8 + signal / 8 * 2) * 2 + signal % 2;
  return (std::ptrdiff_t{group / 16} * 32 + lane) * 8 + element;
}
inline constexpr std::ptrdiff_t packed_depth = importance_slab * importance_depth;  // elements

/// Byte offset of eight positions (`octet` of 16) of a signal in a block: two halves of 64 positions, rows of 128
/// bytes whose 16-byte parts are exchanged so that eight rows' parts lie in different banks (wgmma's 128-byte swizzle).
SPECATTN_HD inline std::uint32_t staged_octet(int signal, int octet) {
  const int half = octet / 8;
  return static_cast<std::uint32_t>(half * (importance_chunk * 128) + signal * 128 + (octet % 8 ^ signal % 8) * 16);
}
inline constexpr int importance_block_bytes = importance_chunk * importance_tile * 2;  // bf16; 1024-byte aligned

__device__ __forceinline__ std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

/// A warp's coefficients for one chunk: rows of its two 16-group blocks.
struct coefficient_fragments {
  uint4 at[importance_chunk_depths][2] = {};

  /// Replaces them where `wanted`. `from`: the slab's coefficients at the chunk's first signal.
  ///
  /// wgmma reads its registers after it was issued, which nvcc forgets: it would give them to other values, or elide
  /// a copy made to keep them. As a load that may not happen this is a use of the old values, behind the wait.
  __device__ __forceinline__ void load(bool wanted, const uint4* from, int warp, int lane) {
#pragma unroll
    for (int depth = 0; depth < importance_chunk_depths; ++depth) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int block = warp / 4 * 8 + i * 4 + warp % 4;
        uint4& to = at[depth][i];
        asm volatile(
            "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %5, 0;\n"
            "@wanted ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
            : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
            : "l"(from + depth * (packed_depth / 8) + block * 32 + lane), "r"(static_cast<int>(wanted)));
      }
    }
  }
};

/// A thread's sums: at[i][4 j + 2 h + c] is group `row(i, h)` of the slab at position 8 j + 2 (lane % 4) + c.
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

/// Keeps the compiler from moving what an instruction in flight still reads or writes.
__device__ __forceinline__ void pin(importance_sums& sums) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (float& x : sums.at[i]) asm volatile("" : "+f"(x)::"memory");
  }
}

/// d += a × (16 signals × 128 positions at `signals`). Asynchronous.
__device__ __forceinline__ void wgmma(float (&d)[64], uint4 a, std::uint64_t signals) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, accumulate, 1, 1, 1;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(signals));
}

/// Starts sums += coefficients × the chunk at shared address `stage`; neither may change before finish_multiply().
__device__ __forceinline__ void multiply(importance_sums& sums, const coefficient_fragments& a, std::uint32_t stage) {
  constexpr std::uint64_t halves_apart = importance_chunk * 128, octets_apart = 1024, swizzle_128 = 1;
  // A shared address may have the CTA's rank in a cluster above these 18 bits.
  constexpr std::uint64_t layout = halves_apart / 16 << 16 | octets_apart / 16 << 32 | swizzle_128 << 62;
  pin(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int depth = 0; depth < importance_chunk_depths; ++depth) {
    const std::uint64_t signals = layout | (stage + depth * (importance_depth * 128)) % (1u << 18) / 16;
    wgmma(sums.at[0], a.at[depth][0], signals);
    wgmma(sums.at[1], a.at[depth][1], signals);
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void finish_multiply(importance_sums& sums) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(sums);
}

#else

__device__ __forceinline__ void mma(float* d, uint4 a, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(importance_sums& sums, const coefficient_fragments& a, std::uint32_t stage) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int depth = 0; depth < importance_chunk_depths; ++depth) {
#pragma unroll
    for (int pair = 0; pair < importance_tile / 16; ++pair) {
      const std::uint32_t from = stage + staged_octet(depth * importance_depth + lane % 16, pair * 2 + lane / 16);
      uint4 b;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w)
                   : "r"(from)
                   : "memory");
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma(sums.at[i] + pair * 8, a.at[depth][i], b.x, b.y);
        mma(sums.at[i] + pair * 8 + 4, a.at[depth][i], b.z, b.w);
      }
    }
  }
}

__device__ __forceinline__ void finish_multiply(importance_sums&) {}

#endif

}  // namespace specattn::inline v0_1::detail
