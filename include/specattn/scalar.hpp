// 16-bit and 8-bit storage types. They hold bits only: arithmetic is always in float.
#pragma once

#include <concepts>
#include <cstdint>

#include "config.hpp"

namespace specattn::inline SPECATTN_DATA {

/// bfloat16: the upper half of a float. Same bits as __nv_bfloat16.
struct bf16 {
  std::uint16_t bits = 0;
};
/// IEEE binary16. Same bits as __half.
struct fp16 {
  std::uint16_t bits = 0;
};

/// The 8-bit float of 4 exponent and 3 mantissa bits (Micikevicius et al., arXiv 2209.05433): no infinities, 448 is the
/// largest, 2^-9 the least. Same bits as __nv_fp8_e4m3.
struct fp8_e4m3 {
  std::uint8_t bits = 0;
};

/// What keys, values and weights may be stored as.
template <class T>
concept storage =
    std::same_as<T, float> || std::same_as<T, bf16> || std::same_as<T, fp16> || std::same_as<T, fp8_e4m3>;

/// Storage of so few exponents that its elements are multiples of a scale, which is kept apart.
template <class T>
concept scaled_storage = std::same_as<T, fp8_e4m3>;

}  // namespace specattn::inline SPECATTN_DATA

namespace specattn::inline SPECATTN_CODE {

SPECATTN_HD inline float to_float(float x) { return x; }

SPECATTN_HD inline float to_float(bf16 x) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16);
}

SPECATTN_HD inline float to_float(fp16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const std::uint32_t sign = (std::uint32_t{x.bits} & 0x8000u) << 16;
  const std::uint32_t rest = std::uint32_t{x.bits} & 0x7fffu;
  if (rest >= 0x7c00u) return __builtin_bit_cast(float, sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest < 0x0400u) {  // zero and subnormals: a count of 2^-24
    const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return __builtin_bit_cast(float, sign | __builtin_bit_cast(std::uint32_t, magnitude));
  }
  return __builtin_bit_cast(float, sign | ((rest << 13) + 0x38000000u));
#endif
}

SPECATTN_HD inline float to_float(fp8_e4m3 x) {
  const std::uint32_t sign = (std::uint32_t{x.bits} & 0x80u) << 24;
  const std::uint32_t rest = std::uint32_t{x.bits} & 0x7fu;
  if (rest == 0x7fu) return __builtin_bit_cast(float, sign | 0x7fc00000u);
  if (rest < 0x08u) {  // zero and subnormals: a count of 2^-9
    const float magnitude = static_cast<float>(rest) * 0.001953125f;
    return __builtin_bit_cast(float, sign | __builtin_bit_cast(std::uint32_t, magnitude));
  }
  return __builtin_bit_cast(float, sign | ((rest << 20) + 0x3c000000u));
}

/// Rounds to nearest, ties to even; NaN stays NaN. What is beyond fp8_e4m3's 448 becomes 448, infinities too.
template <storage T>
SPECATTN_HD inline T from_float(float x) {
  if constexpr (std::same_as<T, float>) {
    return x;
  } else if constexpr (std::same_as<T, bf16>) {
    const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else if constexpr (std::same_as<T, fp8_e4m3>) {
    const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
    const std::uint8_t sign = static_cast<std::uint8_t>((bits >> 24) & 0x80u);
    const std::uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return {0x7f};
    if (rest >= 0x43e00000u) return {static_cast<std::uint8_t>(sign | 0x7eu)};
    if (rest < 0x3c800000u) {  // subnormal: adding 2^14 aligns the mantissa so that the hardware rounds it
      const float shifted = __builtin_bit_cast(float, rest) + 16384.0f;
      return {static_cast<std::uint8_t>(sign | (__builtin_bit_cast(std::uint32_t, shifted) - 0x46800000u))};
    }
    const std::uint32_t rounded = rest + 0x7ffffu + ((rest >> 20) & 1u);
    return {static_cast<std::uint8_t>(sign | ((rounded - 0x3c000000u) >> 20))};
  } else {
    const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
    const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    const std::uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
    if (rest >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds past 65504
    if (rest < 0x38800000u) {  // subnormal: adding 0.5 aligns the mantissa so that the hardware rounds it
      const float shifted = __builtin_bit_cast(float, rest) + 0.5f;
      return {static_cast<std::uint16_t>(sign | (__builtin_bit_cast(std::uint32_t, shifted) - 0x3f000000u))};
    }
    const std::uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
    return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
  }
}

}  // namespace specattn::inline SPECATTN_CODE
