// Tensor cores, one function for an instruction: matrix fragments from shared memory (ldmatrix, movmatrix), m16n8k16
// products with float sums (mma.sync), conversions of pairs. PTX ISA 9, "Warp Level Matrix Instructions".
#pragma once

#include "requirements.cuh"  // first

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../../scalar.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// A 16-bit type that tensor cores multiply.
template <class T>
concept tensor_storage = std::same_as<T, bf16> || std::same_as<T, fp16>;

/// What a stored element is multiplied as: fp16 holds every fp8_e4m3.
template <storage T>
using multiplied = std::conditional_t<std::same_as<T, fp8_e4m3>, fp16, T>;

/// Four 8 × 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(std::uint32_t (&m)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_transposed(std::uint32_t (&m)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
/// The transpose of one 8 × 8 matrix that the warp holds.
__device__ __forceinline__ std::uint32_t transposed(std::uint32_t m) {
  std::uint32_t t;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(m));
  return t;
}

/// Four adjacent fp8_e4m3 as fp16, exactly.
struct fp16_quad {
  std::uint32_t first, second;  ///< the lower two, the upper two
};
__device__ __forceinline__ fp16_quad widened(std::uint32_t quad) {
  fp16_quad wide;
#if __CUDA_ARCH__ >= 890
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
      : "=r"(wide.first), "=r"(wide.second)
      : "r"(quad));
#else
  const auto pair = [](std::uint32_t upper_bytes) {             // of each 16 bits
    const std::uint32_t rest = upper_bytes >> 1 & 0x3f803f80u;  // as fp16, whose exponents reach further: 2^-8 of it
    const std::uint32_t nan = (rest + 0x00800080u) >> 14 & 0x00010001u;
    std::uint32_t magnitude;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(magnitude) : "r"(rest), "r"(0x5c005c00u));
    return (upper_bytes & 0x80008000u) | magnitude | nan * 0x7e00u;
  };
  wide.first = pair(__byte_perm(quad, 0, 0x1404));
  wide.second = pair(__byte_perm(quad, 0, 0x3424));
#endif
  return wide;
}

/// sum += a · b: a is 16 × 16, b 16 × 8, the sum 16 × 8 in float.
template <tensor_storage T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
  if constexpr (std::same_as<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Two floats as two elements; x in the lower half.
template <tensor_storage T>
__device__ __forceinline__ std::uint32_t rounded_pair(float x, float y) {
  std::uint32_t pair;
  if constexpr (std::same_as<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  }
  return pair;
}

/// Two floats as sums of two elements each: what rounding leaves is rounded once more, which keeps 16 (bf16) or 22
/// (fp16) bits of a product with stored elements.
struct split_pair {
  std::uint32_t high, low;
};
template <tensor_storage T>
__device__ __forceinline__ split_pair split(float x, float y) {
  const std::uint32_t high = rounded_pair<T>(x, y);
  float high_x, high_y;
  if constexpr (std::same_as<T, bf16>) {
    high_x = __uint_as_float(high << 16);
    high_y = __uint_as_float(high & 0xffff0000u);
  } else {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(high_x), "=f"(high_y)
        : "r"(high));
  }
  return {high, rounded_pair<T>(x - high_x, y - high_y)};
}

/// 2^x to two units of the last place; 0 for minus infinity.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace specattn::inline SPECATTN_CODE::detail
