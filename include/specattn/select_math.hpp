// The mathematics of a selection, once for host and device. Integers decide everything: a set depends on neither
// the order of summation, nor the number of threads, nor a flush-to-zero mode, nor fused multiply-adds.
#pragma once

#include <cstdint>

#include "config.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// A row's maximum has a mass in [2^40, 2^41).
inline constexpr int mass_bits = 40;
/// A row scaled to unit mass sums to 2^48, to rounding.
inline constexpr int share_bits = 48;
/// With these limits every sum of masses stays below 2^63.
inline constexpr std::int64_t select_max_kv_len = std::int64_t{1} << 22;
inline constexpr std::int64_t select_max_rows = std::int64_t{1} << 14;

// ---- weights ------------------------------------------------------------------------------------------------

inline constexpr std::uint32_t largest_finite_bits = 0x7f7fffffu;
/// Order key of a weight: its bits, which ascend with it; 0 for NaN, infinite and negative weights.
SPECATTN_HD inline std::uint32_t weight_key(std::uint32_t bits) {
  return bits &
         (0u - static_cast<std::uint32_t>(bits <= largest_finite_bits));  // a mask: g++ vectorises no branch here
}

/// Not 0 where weight_key hides a weight that is not one. Shifting the sign out leaves nothing of -0, which is 0 and
/// valid; faults can be or-ed.
SPECATTN_HD inline std::uint32_t weight_fault(std::uint32_t bits) { return (bits ^ weight_key(bits)) << 1; }

/// Rows whose maximum lies below 2^-64 are lifted: every key is multiplied by 2^90, which is exact for all of
/// them. After that no row's arithmetic meets a subnormal that matters, whatever the flush-to-zero mode.
SPECATTN_HD inline bool needs_lift(std::uint32_t max_key) { return max_key < (std::uint32_t{127 - 64} << 23); }

SPECATTN_HD inline std::uint32_t lift_key(std::uint32_t key) {
  if (key >= 0x00800000u) return key + (std::uint32_t{90} << 23);
  // A subnormal is key * 2^-149; 24-bit integers are exact in float.
  return __builtin_bit_cast(std::uint32_t, static_cast<float>(static_cast<std::int32_t>(key)) * 0x1p-59f);
}

/// 2^(40 - e) for a row whose (lifted) maximum lies in [2^e, 2^(e+1)); any finite number for a row of zeros.
SPECATTN_HD inline float mass_scale(std::uint32_t max_key) {
  const std::uint32_t exponent = max_key >> 23;
  return __builtin_bit_cast(float, (exponent < 63u ? 231u : 294u - exponent) << 23);
}

// ---- mass ---------------------------------------------------------------------------------------------------

/// x rounded to the nearest integer, ties to even; 0 <= x < 2^52.
SPECATTN_HD inline std::uint64_t fixed_point(float x) {
  // Above 2^52 a double's last bit is worth one, so the addition rounds and the mantissa is the result.
  return __builtin_bit_cast(std::uint64_t, static_cast<double>(x) + 0x1p52) - 0x4330000000000000u;
}

/// Mass of a weight with this key in a row of this scale. The product is exact: the scale is a power of two.
SPECATTN_HD inline std::uint64_t weight_mass(std::uint32_t key, float scale) {
  return fixed_point(__builtin_bit_cast(float, key) * scale);
}

/// Mass of an order key in a row.
struct row_mass {
  float scale;
  SPECATTN_HD std::uint64_t operator()(std::uint32_t key) const { return weight_mass(key, scale); }
};
/// Mass of a score: itself.
struct score_mass {
  SPECATTN_HD std::uint64_t operator()(std::uint64_t score) const { return score; }
};
/// Mass one each: selects by count.
struct unit_mass {
  template <class Key>
  SPECATTN_HD std::uint64_t operator()(Key) const {
    return 1;
  }
};

/// What turns a row's weights into shares of its mass, in units of 2^-48: share = fixed_point(weight * scale).
/// 0 for a row without mass.
SPECATTN_HD inline float share_scale(float scale, std::uint64_t row_mass) {
  if (row_mass == 0) return 0.0f;
  return static_cast<float>(static_cast<double>(scale) * 0x1p48 / static_cast<double>(row_mass));
}

SPECATTN_HD inline std::uint64_t weight_share(std::uint32_t key, float share_scale_of_row) {
  return fixed_point(__builtin_bit_cast(float, key) * share_scale_of_row);
}

/// What a top_p asks for. By its bits, so that no compiler mode loses the NaN.
enum class asked { forced_only, target, everything };

SPECATTN_HD inline bool is_nan(float p) { return (__builtin_bit_cast(std::uint32_t, p) & 0x7fffffffu) > 0x7f800000u; }

SPECATTN_HD inline asked asked_by(float p) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, p);
  if (is_nan(p) || bits == 0 || bits >= 0x80000000u) return asked::forced_only;
  return bits >= 0x3f800000u ? asked::everything : asked::target;
}

/// ceil(p * mass), exactly, for 0 < p < 1 and mass < 2^63.
SPECATTN_HD inline std::uint64_t target_mass(float p, std::uint64_t mass) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, p);
  const std::uint32_t exponent = bits >> 23;
  const std::uint64_t mantissa = exponent == 0 ? bits : (bits & 0x7fffffu) | 0x800000u;
  const int shift = exponent == 0 ? 149 : 150 - static_cast<int>(exponent);  // p = mantissa / 2^shift, shift >= 24
  // mantissa * mass = high * 2^32 + low, with low < 2^32
  const std::uint64_t low_product = mantissa * (mass & 0xffffffffu);
  const std::uint64_t low = low_product & 0xffffffffu;
  const std::uint64_t high = mantissa * (mass >> 32) + (low_product >> 32);
  if (shift < 32) {
    const bool rest = (low & ((std::uint64_t{1} << shift) - 1)) != 0;
    return (high << (32 - shift)) + (low >> shift) + (rest ? 1 : 0);
  }
  if (shift >= 96) return high != 0 || low != 0 ? 1 : 0;
  const int drop = shift - 32;
  const bool rest = low != 0 || (high & ((std::uint64_t{1} << drop) - 1)) != 0;
  return (high >> drop) + (rest ? 1 : 0);
}

/// kept / total as it is reported; 1 where there is no mass to lose.
SPECATTN_HD inline float mass_share(std::uint64_t kept, std::uint64_t total) {
  return total == 0 ? 1.0f : static_cast<float>(static_cast<double>(kept) / static_cast<double>(total));
}

// ---- the kept set -------------------------------------------------------------------------------------------

/// The least set that reaches a target: every item above `key`, and of the items at `key` the first `ties`.
template <class Key>
struct threshold {
  Key key;
  std::uint64_t ties;
  std::uint64_t mass;  ///< of the set
};

/// The k-th of 1024 steps from 0 to `max`, rounded up: an item is at or above it when item * 1024 >= k * max.
SPECATTN_HD inline std::uint64_t bisection_step(std::uint64_t max, std::uint32_t k) {
  return (max >> 10) * k + (((max & 1023u) * k + 1023u) >> 10);
}

SPECATTN_HD inline std::uint32_t bisection_step(std::uint32_t max_key, std::uint32_t k) {
  const double step = static_cast<double>(__builtin_bit_cast(float, max_key)) * k * 0x1p-10;  // 34 bits: exact
  const float nearest = static_cast<float>(step);
  return __builtin_bit_cast(std::uint32_t, nearest) + (static_cast<double>(nearest) < step ? 1u : 0u);
}

// ---- pages and forced items ---------------------------------------------------------------------------------

/// Positions of a group that are looked at: a length outside the weights' extent is clamped.
SPECATTN_HD inline std::int32_t clamped_length(std::int32_t length, std::int64_t extent) {
  if (length < 0) return 0;
  return length > extent ? static_cast<std::int32_t>(extent) : length;
}

/// What is kept or left as a whole: a position, or a page of them; the last page may be partial.
SPECATTN_HD inline std::int32_t item_count(std::int32_t length, std::int32_t page_size) {
  return static_cast<std::int32_t>((std::int64_t{length} + page_size - 1) / page_size);
}

/// How many items fit where `tokens` positions do. A partial page takes a whole page's room, unless all fit.
SPECATTN_HD inline std::int32_t item_limit(std::int64_t tokens, std::int32_t length, std::int32_t page_size) {
  if (tokens >= length) return item_count(length, page_size);
  return static_cast<std::int32_t>(tokens / page_size);
}

/// Items before `head` and from `tail` on are kept whatever they weigh. head <= tail <= items.
struct forced_items {
  std::int32_t head;
  std::int32_t tail;
  SPECATTN_HD bool holds(std::int32_t item) const { return item < head || item >= tail; }
};

SPECATTN_HD inline forced_items forced_by(std::int32_t sinks, std::int32_t recent, std::int32_t length,
                                          std::int32_t page_size) {
  const std::int32_t items = item_count(length, page_size);
  const std::int32_t head = item_count(sinks < length ? sinks : length, page_size);
  const std::int32_t oldest_recent = recent < length ? length - recent : 0;
  const std::int32_t tail = recent == 0 ? items : oldest_recent / page_size;
  return {head, tail < head ? head : tail};
}

}  // namespace specattn::inline SPECATTN_CODE::detail
