// bf16, fp16 and fp8_e4m3: every bit pattern, and rounding against an independent method.
#include "specattn/scalar.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <random>

using specattn::bf16;
using specattn::fp16;
using specattn::fp8_e4m3;

namespace {

/// The number a pattern of 1 sign, `exponent_bits`, `mantissa_bits` stands for, by the definition of the formats.
double meaning(std::uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const auto mantissa = static_cast<double>(bits & ((1u << mantissa_bits) - 1));
  const int exponent = static_cast<int>((bits >> mantissa_bits) & ((1u << exponent_bits) - 1));
  const double sign = (bits >> (exponent_bits + mantissa_bits)) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0.0 ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + std::ldexp(1.0, mantissa_bits), exponent - bias - mantissa_bits);
}

double meaning(fp16 x) { return meaning(x.bits, 5, 10); }
double meaning(bf16 x) { return meaning(x.bits, 8, 7); }
/// The highest exponent counts like the others, but for the one pattern that is not a number.
double meaning(fp8_e4m3 x) {
  if ((x.bits & 0x7f) == 0x7f) return std::nan("");
  if ((x.bits & 0x78) == 0x78) return ((x.bits & 0x80) != 0 ? -256.0 : 256.0) * (1.0 + (x.bits & 7) / 8.0);
  return meaning(x.bits, 4, 3);
}

template <class T>
using bits_of = decltype(T::bits);
template <class T>
constexpr std::uint32_t patterns = 1u << (8 * sizeof(T));

/// Whether `got` is the nearest number of its type to x, the even one of two: looks at the neighbours only.
template <class T>
bool is_nearest_even(float x, T got) {
  const double here = meaning(got);
  if (std::isnan(x)) return std::isnan(here);
  if (std::isinf(x)) return here == (std::same_as<T, fp8_e4m3> ? std::copysign(448.0, x) : static_cast<double>(x));
  if (std::signbit(here) != std::signbit(x)) return false;
  const std::uint32_t magnitude = got.bits & (patterns<T> / 2 - 1);
  const double distance = std::abs(here - static_cast<double>(x));
  if (std::isinf(here)) {  // past the largest number by half a step or more
    const double limit = meaning(T{static_cast<bits_of<T>>(magnitude - 1)});
    const double below = meaning(T{static_cast<bits_of<T>>(magnitude - 2)});
    return std::abs(static_cast<double>(x)) >= limit + (limit - below) / 2;
  }
  for (int step : {-1, 1}) {
    if (magnitude == 0 && step < 0) continue;
    double other = meaning(T{static_cast<bits_of<T>>(got.bits + step)});
    if (std::isnan(other)) continue;  // behind the largest, which everything beyond becomes
    if (std::isinf(other))            // stands where the next number would be
      other = here + (here - meaning(T{static_cast<bits_of<T>>(got.bits - 1)}));
    const double away = std::abs(other - static_cast<double>(x));
    if (away < distance || (away == distance && (got.bits & 1) != 0)) return false;
  }
  return true;
}

template <class T>
int wrong_patterns() {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < patterns<T>; ++bits) {
    const T x{static_cast<bits_of<T>>(bits)};
    const double want = meaning(x);
    const float wide = specattn::to_float(x);
    if (std::isnan(want)) {
      wrong += std::isnan(wide) && std::isnan(specattn::to_float(specattn::from_float<T>(wide))) ? 0 : 1;
    } else {
      const bool same = static_cast<double>(wide) == want && std::signbit(wide) == std::signbit(want);
      wrong += same && specattn::from_float<T>(wide).bits == bits ? 0 : 1;
    }
  }
  return wrong;
}

/// Floats that round wrongly: random ones of every magnitude, and the neighbourhood of every midpoint between two
/// numbers of the type, which is where ties and double rounding show.
template <class T>
int wrong_roundings() {
  int wrong = 0;
  const auto check = [&](std::uint32_t bits) {
    const float x = std::bit_cast<float>(bits);
    wrong += is_nearest_even(x, specattn::from_float<T>(x)) ? 0 : 1;
  };
  std::mt19937 engine(17);
  for (int i = 0; i < 1000000; ++i) check(static_cast<std::uint32_t>(engine()));
  for (std::uint32_t bits = 0; bits < patterns<T> - 1; ++bits) {
    const double low = meaning(T{static_cast<bits_of<T>>(bits)});
    const double high = meaning(T{static_cast<bits_of<T>>(bits + 1)});
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    const auto middle = std::bit_cast<std::uint32_t>(static_cast<float>((low + high) / 2));
    for (int step = -2; step <= 2; ++step)
      if (middle > 2) check(middle + static_cast<std::uint32_t>(step));
  }
  for (float x : {65504.0f, 65519.99f, 65520.0f, 65536.0f, 3.3895314e38f, 3.4028235e38f, 0.0f, -0.0f})
    check(std::bit_cast<std::uint32_t>(x));
  return wrong;
}

}  // namespace

TEST_CASE("scalar: all 65536 fp16 patterns mean what IEEE 754 says and come back from float unchanged") {
  CHECK(wrong_patterns<fp16>() == 0);
}

TEST_CASE("scalar: all 65536 bf16 patterns mean what IEEE 754 says and come back from float unchanged") {
  CHECK(wrong_patterns<bf16>() == 0);
}

TEST_CASE("scalar: fp16 rounds to nearest, ties to even, over every magnitude and at every midpoint") {
  CHECK(wrong_roundings<fp16>() == 0);
}

TEST_CASE("scalar: bf16 rounds to nearest, ties to even, over every magnitude and at every midpoint") {
  CHECK(wrong_roundings<bf16>() == 0);
}

TEST_CASE("scalar: all 256 fp8_e4m3 patterns mean what the format says and come back from float unchanged") {
  CHECK(wrong_patterns<fp8_e4m3>() == 0);
}

TEST_CASE(
    "scalar: fp8_e4m3 rounds to nearest, ties to even, over every magnitude and at every midpoint, and saturates") {
  CHECK(wrong_roundings<fp8_e4m3>() == 0);
  for (const float x : {447.9f, 448.0f, 463.9f, 464.0f, 465.0f, 1e30f, INFINITY}) {
    CHECK(specattn::from_float<fp8_e4m3>(x).bits == 0x7e);
    CHECK(specattn::from_float<fp8_e4m3>(-x).bits == 0xfe);
  }
}

TEST_CASE("scalar: the rounding check itself refuses a neighbour and the odd one of a tie") {
  CHECK(is_nearest_even(1.0f, specattn::from_float<fp16>(1.0f)));
  CHECK_FALSE(is_nearest_even(1.0f, fp16{0x3c01}));
  CHECK_FALSE(is_nearest_even(1.0f + 1.0f / 2048, fp16{0x3c01}));
  CHECK(is_nearest_even(1.0f + 1.0f / 2048, fp16{0x3c00}));
  CHECK_FALSE(is_nearest_even(65519.0f, fp16{0x7c00}));
  CHECK_FALSE(is_nearest_even(INFINITY, fp8_e4m3{0x7f}));
  CHECK_FALSE(is_nearest_even(17.0f, fp8_e4m3{0x59}));
  CHECK(is_nearest_even(17.0f, fp8_e4m3{0x58}));
}
