// One vector register of floats, for AVX-512, AVX2 and, in plain loops, anything else.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "../config.hpp"
#include "../scalar.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Products that feed a sum are always written as fmadd: left to the compiler, one instance of a template might fuse
// them and another not, and the bits of a result would depend on how many queries were worked on at once.

namespace specattn::inline SPECATTN_CODE::detail {

#if defined(__AVX2__)
/// 8-bit floats, each in a word of its own, as 16-bit ones of 2^-8 their value: an exponent's bits are in the same order,
/// and subnormals stay so.
[[gnu::always_inline]] inline __m256i halves_of_fp8(__m256i x) {
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7);
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  const __m256i nan = _mm256_cmpeq_epi16(rest, _mm256_set1_epi16(0x3f80));
  return _mm256_or_si256(_mm256_or_si256(rest, sign), _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
}

/// The sum of the lanes, by halves: one fixed order.
[[gnu::always_inline]] inline float sum_of_lanes(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
[[gnu::always_inline]] inline float max_of_lanes(__m256 x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

/// Intrinsics come in their zero-masked form with this mask: the same instructions, but g++ 12 warns of the undefined
/// operand of the plain form.
inline constexpr __mmask16 every_lane = 0xffff;
inline constexpr __mmask8 every_double = 0xff;

struct lanes {
  static constexpr int width = 16;
  static constexpr bool many_registers = true;
  __m512 v;

  [[gnu::always_inline]] static lanes zero() { return {_mm512_setzero_ps()}; }
  [[gnu::always_inline]] static lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
  [[gnu::always_inline]] static lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  [[gnu::always_inline]] static lanes load(const fp16* p) {
    return {_mm512_maskz_cvtph_ps(every_lane, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  [[gnu::always_inline]] static lanes load(const bf16* p) {
    const __m512i wide =
        _mm512_maskz_cvtepu16_epi32(every_lane, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(every_lane, wide, 16))};
  }
  [[gnu::always_inline]] static lanes load(const fp8_e4m3* p) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm512_mul_ps(_mm512_maskz_cvtph_ps(every_lane, halves_of_fp8(wide)), _mm512_set1_ps(256.0f))};
  }
  [[gnu::always_inline]] void store(float* p) const { _mm512_storeu_ps(p, v); }
  [[gnu::always_inline]] void store(fp16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(every_lane, v, _MM_FROUND_TO_NEAREST_INT));
  }
  [[gnu::always_inline]] void store(bf16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(every_lane, bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtepi32_epi16(every_lane, _mm512_maskz_srli_epi32(every_lane, rounded, 16)));
  }
  /// The first n lanes (0 … width), `other` in the rest.
  [[gnu::always_inline]] lanes first(int n, float other) const {
    return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1u), _mm512_set1_ps(other), v)};
  }
};
[[gnu::always_inline]] inline lanes add(lanes a, lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
[[gnu::always_inline]] inline lanes subtract(lanes a, lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
[[gnu::always_inline]] inline lanes multiply(lanes a, lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
[[gnu::always_inline]] inline lanes fmadd(lanes a, lanes b, lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
[[gnu::always_inline]] inline lanes larger_of(lanes a, lanes b) {
  return {_mm512_maskz_max_ps(every_lane, a.v, b.v)};
}
/// 2^n * x where `exponent` is n (whole), and 0 where `guard` is below `least`.
[[gnu::always_inline]] inline lanes scale_by_power(lanes x, lanes exponent, lanes guard, float least) {
  const __mmask16 live = _mm512_cmp_ps_mask(guard.v, _mm512_set1_ps(least), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(live, x.v, exponent.v)};
}
#pragma GCC diagnostic push  // without optimisation the intrinsic is a macro, which hands its mask over as a short
#pragma GCC diagnostic ignored "-Wsign-conversion"
[[gnu::always_inline]] inline lanes round_to_whole(lanes x) {
  return {_mm512_maskz_roundscale_ps(every_lane, x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
#pragma GCC diagnostic pop

template <int Which>
[[gnu::always_inline]] inline __m256 half(lanes x) {
  return _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(every_double, _mm512_castps_pd(x.v), Which));
}
[[gnu::always_inline]] inline float sum_of_lanes(lanes x) {
  return sum_of_lanes(_mm256_add_ps(half<0>(x), half<1>(x)));
}
[[gnu::always_inline]] inline float max_of_lanes(lanes x) {
  return max_of_lanes(_mm256_max_ps(half<0>(x), half<1>(x)));
}

/// Position whose partial sums are leaf k of fold() below, so that its total comes out in lane (that position). Leaf
/// 4 g + i is leaf 4 g's position plus leaf i's.
inline constexpr int leaf_position[16] = {0, 4, 1, 5, 8, 12, 9, 13, 2, 6, 3, 7, 10, 14, 11, 15};

/// Folds two vectors of partial sums into one of half as many partial sums each.
template <int Level>
[[gnu::always_inline]] inline lanes fold(lanes a, lanes b) {
  if constexpr (Level == 1) {  // halves: one shuffle, one blend
    const __m512 kept = _mm512_mask_blend_ps(0xff00, a.v, b.v);
    return {_mm512_add_ps(kept, _mm512_maskz_shuffle_f32x4(every_lane, a.v, b.v, 0x4e))};
  } else if constexpr (Level == 2) {  // pairs of lanes inside a quarter: one shuffle, one blend
    const __m512 kept = _mm512_mask_blend_ps(0xcccc, a.v, b.v);
    const __m512d moved = _mm512_maskz_shuffle_pd(every_double, _mm512_castps_pd(a.v), _mm512_castps_pd(b.v), 0x55);
    return {_mm512_add_ps(kept, _mm512_castpd_ps(moved))};
  } else if constexpr (Level == 3) {  // quarters
    return {_mm512_add_ps(_mm512_maskz_shuffle_f32x4(every_lane, a.v, b.v, 0x88),
                          _mm512_maskz_shuffle_f32x4(every_lane, a.v, b.v, 0xdd))};
  } else {
    return {_mm512_add_ps(_mm512_maskz_shuffle_ps(every_lane, a.v, b.v, 0x88),
                          _mm512_maskz_shuffle_ps(every_lane, a.v, b.v, 0xdd))};
  }
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct lanes {
  static constexpr int width = 8;
  static constexpr bool many_registers = false;
  __m256 v;

  [[gnu::always_inline]] static lanes zero() { return {_mm256_setzero_ps()}; }
  [[gnu::always_inline]] static lanes broadcast(float x) { return {_mm256_set1_ps(x)}; }
  [[gnu::always_inline]] static lanes load(const float* p) { return {_mm256_loadu_ps(p)}; }
  [[gnu::always_inline]] static lanes load(const fp16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  [[gnu::always_inline]] static lanes load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  [[gnu::always_inline]] static lanes load(const fp8_e4m3* p) {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i halves = _mm256_castsi256_si128(halves_of_fp8(_mm256_castsi128_si256(wide)));
    return {_mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0f))};
  }
  [[gnu::always_inline]] void store(float* p) const { _mm256_storeu_ps(p, v); }
  [[gnu::always_inline]] void store(fp16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  [[gnu::always_inline]] void store(bf16* p) const {
    alignas(32) float x[width];
    _mm256_store_ps(x, v);
    for (int i = 0; i < width; ++i) p[i] = from_float<bf16>(x[i]);
  }
  /// The first n lanes (0 … width), `other` in the rest.
  [[gnu::always_inline]] lanes first(int n, float other) const {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 live = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), index));
    return {_mm256_blendv_ps(_mm256_set1_ps(other), v, live)};
  }
};
[[gnu::always_inline]] inline lanes add(lanes a, lanes b) { return {_mm256_add_ps(a.v, b.v)}; }
[[gnu::always_inline]] inline lanes subtract(lanes a, lanes b) { return {_mm256_sub_ps(a.v, b.v)}; }
[[gnu::always_inline]] inline lanes multiply(lanes a, lanes b) { return {_mm256_mul_ps(a.v, b.v)}; }
[[gnu::always_inline]] inline lanes fmadd(lanes a, lanes b, lanes c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
[[gnu::always_inline]] inline lanes larger_of(lanes a, lanes b) { return {_mm256_max_ps(a.v, b.v)}; }
[[gnu::always_inline]] inline lanes scale_by_power(lanes x, lanes exponent, lanes guard, float least) {
  const __m256 live = _mm256_cmp_ps(guard.v, _mm256_set1_ps(least), _CMP_NLT_UQ);
  const __m256i n = _mm256_add_epi32(_mm256_cvtps_epi32(exponent.v), _mm256_set1_epi32(127));
  return {_mm256_and_ps(live, _mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(n, 23))))};
}
[[gnu::always_inline]] inline lanes round_to_whole(lanes x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
[[gnu::always_inline]] inline float sum_of_lanes(lanes x) { return sum_of_lanes(x.v); }
[[gnu::always_inline]] inline float max_of_lanes(lanes x) { return max_of_lanes(x.v); }

inline constexpr int leaf_position[8] = {0, 4, 1, 5, 2, 6, 3, 7};

template <int Level>
[[gnu::always_inline]] inline lanes fold(lanes a, lanes b) {
  if constexpr (Level == 1) {
    const __m256 kept = _mm256_blend_ps(a.v, b.v, 0xf0);
    return {_mm256_add_ps(kept, _mm256_permute2f128_ps(a.v, b.v, 0x21))};
  } else if constexpr (Level == 2) {
    const __m256 kept = _mm256_blend_ps(a.v, b.v, 0xcc);
    const __m256d moved = _mm256_shuffle_pd(_mm256_castps_pd(a.v), _mm256_castps_pd(b.v), 0x5);
    return {_mm256_add_ps(kept, _mm256_castpd_ps(moved))};
  } else {
    return {_mm256_add_ps(_mm256_shuffle_ps(a.v, b.v, 0x88), _mm256_shuffle_ps(a.v, b.v, 0xdd))};
  }
}

#else

struct lanes {
  static constexpr int width = 8;
  static constexpr bool many_registers = false;
  float v[width];

  static lanes zero() { return broadcast(0.0f); }
  static lanes broadcast(float x) {
    lanes r;
    for (float& each : r.v) each = x;
    return r;
  }
  template <class T>
  static lanes load(const T* p) {
    lanes r;
    for (int i = 0; i < width; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < width; ++i) p[i] = from_float<T>(v[i]);
  }
  /// The first n lanes (0 … width), `other` in the rest.
  lanes first(int n, float other) const {
    lanes r = *this;
    for (int i = n; i < width; ++i) r.v[i] = other;
    return r;
  }
  template <class F>
  static lanes each(F f) {
    lanes r;
    for (int i = 0; i < width; ++i) r.v[i] = f(i);
    return r;
  }
};
inline lanes add(const lanes& a, const lanes& b) {
  return lanes::each([&](int i) { return a.v[i] + b.v[i]; });
}
inline lanes subtract(const lanes& a, const lanes& b) {
  return lanes::each([&](int i) { return a.v[i] - b.v[i]; });
}
inline lanes multiply(const lanes& a, const lanes& b) {
  return lanes::each([&](int i) { return a.v[i] * b.v[i]; });
}
inline lanes fmadd(const lanes& a, const lanes& b, const lanes& c) {
#if defined(__FP_FAST_FMAF)
  return lanes::each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
#else
  return lanes::each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });  // nothing to fuse it with
#endif
}
inline lanes larger_of(const lanes& a, const lanes& b) {
  return lanes::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline lanes scale_by_power(const lanes& x, const lanes& exponent, const lanes& guard, float least) {
  return lanes::each([&](int i) {
    if (guard.v[i] < least) return 0.0f;
    if (guard.v[i] != guard.v[i]) return guard.v[i];
    return x.v[i] * std::bit_cast<float>((static_cast<std::int32_t>(exponent.v[i]) + 127) << 23);
  });
}
inline lanes round_to_whole(const lanes& x) {
  return lanes::each([&](int i) { return (x.v[i] + 12582912.0f) - 12582912.0f; });  // 1.5 * 2^23
}

inline constexpr int leaf_position[8] = {0, 4, 1, 5, 2, 6, 3, 7};

template <int Level>
inline lanes fold(const lanes& a, const lanes& b) {
  constexpr int distance = Level == 1 ? 4 : Level == 2 ? 2 : 1;
  if constexpr (Level < 3) {  // the lanes of a where bit `distance` of the index is clear, of b where it is set
    return lanes::each([&](int i) {
      const lanes& source = (i & distance) != 0 ? b : a;
      return source.v[i] + source.v[i ^ distance];
    });
  } else {
    return lanes::each([&](int i) {
      const lanes& source = (i & 2) != 0 ? b : a;
      const int pair = (i & 4) + (i & 1) * 2;
      return source.v[pair] + source.v[pair + 1];
    });
  }
}

/// The sum of the lanes, by halves: one fixed order.
inline float sum_of_lanes(const lanes& x) {
  lanes v = x;
  for (int half = lanes::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v.v[i] += v.v[i + half];
  return v.v[0];
}
inline float max_of_lanes(const lanes& x) {
  lanes v = x;
  for (int half = lanes::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v.v[i] = v.v[i] > v.v[i + half] ? v.v[i] : v.v[i + half];
  return v.v[0];
}

#endif

/// The first n elements (fewer than a register), then zeros; reads no further.
template <storage T>
inline lanes load_first(const T* p, int n) {
  alignas(64) float v[lanes::width] = {};
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return lanes::load(v);
}

/// exp(x - n ln 2) where n is x / ln 2 to the nearest whole number. Cephes' polynomial on |r| <= ln(2) / 2.
[[gnu::always_inline]] inline lanes exp_remainder(lanes x, lanes n) {
  lanes r = fmadd(n, lanes::broadcast(-0.693359375f), x);
  r = fmadd(n, lanes::broadcast(2.12194440e-4f), r);
  lanes y = lanes::broadcast(1.9875691500e-4f);
  y = fmadd(y, r, lanes::broadcast(1.3981999507e-3f));
  y = fmadd(y, r, lanes::broadcast(8.3334519073e-3f));
  y = fmadd(y, r, lanes::broadcast(4.1665795894e-2f));
  y = fmadd(y, r, lanes::broadcast(1.6666665459e-1f));
  y = fmadd(y, r, lanes::broadcast(5.0000001201e-1f));
  y = fmadd(y, multiply(r, r), r);
  return add(y, lanes::broadcast(1.0f));
}
/// exp(x) for x <= 0 within 1.5 units in the last place; exactly 0 below -87.3 (and for -inf), NaN for NaN.
[[gnu::always_inline]] inline lanes exp_nonpositive(lanes x) {
  const lanes n = round_to_whole(multiply(x, lanes::broadcast(1.44269504088896341f)));
  return scale_by_power(exp_remainder(x, n), n, x, -87.3f);
}
/// The same for any x: infinity above 88.72, where floats end.
[[gnu::always_inline]] inline lanes exp_any(lanes x) {
  x = subtract(lanes::zero(),
               larger_of(lanes::broadcast(-89.0f), subtract(lanes::zero(), x)));  // at most 89; NaN stays
  const lanes n = round_to_whole(multiply(x, lanes::broadcast(1.44269504088896341f)));
  const lanes over = larger_of(subtract(n, lanes::broadcast(127.0f)), lanes::zero());  // 0 or 1: 2^128 is no float
  const lanes y = scale_by_power(exp_remainder(x, n), subtract(n, over), x, -87.3f);
  return multiply(y, add(over, lanes::broadcast(1.0f)));
}
/// The same for one number, so that vector and scalar code agree to the bit.
inline float exp_nonpositive(float x) {
  alignas(64) float v[lanes::width];
  exp_nonpositive(lanes::broadcast(x)).store(v);
  return v[0];
}
inline float exp_any(float x) {
  alignas(64) float v[lanes::width];
  exp_any(lanes::broadcast(x)).store(v);
  return v[0];
}

}  // namespace specattn::inline SPECATTN_CODE::detail
