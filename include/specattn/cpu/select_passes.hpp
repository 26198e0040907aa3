// The loops of the CPU's select(): each walks one array of items once. An item is a position's order key
// (32 bits, whose mass is weight_mass) or an integer score (64 bits, its own mass). Arrays are padded to whole
// words of 64 items, so that loops over words may read past the count; what they read there is masked.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../scalar.hpp"
#include "../select_math.hpp"
#include "select_words.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

// ---- reading a row ------------------------------------------------------------------------------------------

struct row_facts {
  std::uint32_t max_key;
  bool invalid;  ///< a NaN, infinite or negative weight was replaced by zero
};

/// Order keys of `count` weights, lifted where needs_lift says so.
template <storage T>
row_facts read_row(const T* weights, std::ptrdiff_t stride, std::int32_t count, std::uint32_t* keys) {
  // The bits first, the keys in place after: two loops that every compiler vectorises, over a row in cache.
  if (stride == 1) {
    for (std::int32_t i = 0; i < count; ++i) keys[i] = std::bit_cast<std::uint32_t>(to_float(weights[i]));
  } else {
    for (std::int32_t i = 0; i < count; ++i) keys[i] = std::bit_cast<std::uint32_t>(to_float(weights[i * stride]));
  }
  std::uint32_t max_key = 0;
  std::uint32_t faults = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    const std::uint32_t bits = keys[i];
    const std::uint32_t key = weight_key(bits);
    faults |= weight_fault(bits);
    max_key = key > max_key ? key : max_key;
    keys[i] = key;
  }
  if (needs_lift(max_key) && max_key != 0) {
    for (std::int32_t i = 0; i < count; ++i) keys[i] = lift_key(keys[i]);
    max_key = lift_key(max_key);
  }
  return {max_key, faults != 0};
}

/// sums[page] = mass of the page's items. `sums` may be `items`. Returns the largest.
template <class Key, class Mass>
std::uint64_t sum_pages(const Key* items, std::int32_t count, std::int32_t page_size, Mass mass,
                        std::uint64_t* sums) {
  std::uint64_t largest = 0;
  std::int32_t page = 0;
  for (std::int64_t begin = 0; begin < count; begin += page_size, ++page) {
    const std::int32_t end = static_cast<std::int32_t>((std::min<std::int64_t>)(begin + page_size, count));
    std::uint64_t sum = 0;
    for (std::int32_t i = static_cast<std::int32_t>(begin); i < end; ++i) sum += mass(items[i]);
    sums[page] = sum;
    largest = (std::max)(largest, sum);
  }
  return largest;
}

/// Adds a row's shares to the scores, or takes the larger of the two.
inline void combine_row(const std::uint32_t* keys, std::int32_t count, float scale_to_share, bool take_max,
                        std::uint64_t* scores) {
  if (take_max) {
    for (std::int32_t i = 0; i < count; ++i) {
      const std::uint64_t share = weight_share(keys[i], scale_to_share);
      scores[i] = scores[i] < share ? share : scores[i];
    }
  } else {
    for (std::int32_t i = 0; i < count; ++i) scores[i] += weight_share(keys[i], scale_to_share);
  }
}

template <class Key, class Mass>
std::uint64_t sum_mass(const Key* items, std::int32_t begin, std::int32_t end, Mass mass) {
  std::uint64_t sum = 0;
  for (std::int32_t i = begin; i < end; ++i) sum += mass(items[i]);
  return sum;
}

/// Mass of the items whose bits are set.
template <class Key, class Mass>
std::uint64_t sum_kept(const Key* items, const std::uint64_t* words, std::int32_t word_count, Mass mass) {
  std::uint64_t sum = 0;
  for_each_bit(words, word_count, [&](std::int32_t i) { sum += mass(items[i]); });
  return sum;
}

// ---- the histogram ------------------------------------------------------------------------------------------

/// Mass by distance from the largest item: 16 bins an octave over 42 octaves, below which no weight has mass.
struct mass_histogram {
  static constexpr int shift = 19;
  static constexpr std::uint32_t bins = 42 * 16;
  static constexpr std::size_t copies = 2;  // neighbours often share a bin: one need not wait for the other's sum
  std::uint64_t mass[copies][bins];

  static std::uint32_t bin_of(std::uint32_t coarse, std::uint32_t max_coarse) {
    const std::uint32_t bin = (max_coarse - coarse) >> shift;
    return bin < bins ? bin : bins - 1;
  }
};

/// Fills the histogram with items [begin, end) and returns their mass.
template <class Key, class Mass>
std::uint64_t fill_histogram(const Key* items, std::int32_t begin, std::int32_t end, std::uint32_t max_coarse,
                             Mass mass, mass_histogram& histogram) {
  constexpr std::int32_t block = 256;
  std::uint64_t masses[block];
  std::uint16_t bins[block];
  std::fill_n(&histogram.mass[0][0], histogram.copies * histogram.bins, std::uint64_t{0});
  std::uint64_t total = 0;
  for (std::int32_t first = begin; first < end; first += block) {
    const std::int32_t count = (std::min)(block, end - first);
    for (std::int32_t i = 0; i < count; ++i) {
      masses[i] = mass(items[first + i]);
      bins[i] = static_cast<std::uint16_t>(mass_histogram::bin_of(coarse_key(items[first + i]), max_coarse));
      total += masses[i];
    }
    std::int32_t i = 0;
    for (; i + 1 < count; i += 2) {
      histogram.mass[0][bins[i]] += masses[i];
      histogram.mass[1][bins[i + 1]] += masses[i + 1];
    }
    if (i < count) histogram.mass[0][bins[i]] += masses[i];
  }
  return total;
}

// ---- the threshold ------------------------------------------------------------------------------------------

/// Threshold of the least set of `items` (any order, overwritten) whose mass reaches `need`; 0 < need <= their
/// mass. Narrows the range of keys 256-fold a turn, so its cost is linear for any input.
template <class Key, class Mass>
threshold<Key> narrow(Key* items, std::int32_t count, std::uint64_t need, Mass mass) {
  std::uint64_t above = 0;  // mass of what is heavier than every item left
  for (;;) {
    Key low = items[0];
    Key high = items[0];
    for (std::int32_t i = 1; i < count; ++i) {
      low = (std::min)(low, items[i]);
      high = (std::max)(high, items[i]);
    }
    if (low == high) {
      const std::uint64_t each = mass(low);
      const std::uint64_t ties = each == 0 ? 0 : (need + each - 1) / each;
      return {low, ties, above + ties * each};
    }
    const int shift = (std::max)(0, static_cast<int>(std::bit_width(static_cast<Key>(high - low))) - 8);
    std::uint64_t masses[256] = {};
    for (std::int32_t i = 0; i < count; ++i) masses[(high - items[i]) >> shift] += mass(items[i]);
    Key bin = 0;
    for (; bin < 255 && masses[bin] < need; ++bin) {
      need -= masses[bin];
      above += masses[bin];
    }
    std::int32_t left = 0;
    for (std::int32_t i = 0; i < count; ++i) {
      const Key item = items[i];
      items[left] = item;
      left += ((high - item) >> shift) == bin ? 1 : 0;
    }
    count = left;
  }
}

/// Threshold of the least set of items [begin, end) whose mass reaches `need`, by a filled histogram.
/// `candidates` holds as many items.
template <class Key, class Mass>
threshold<Key> resolve(const Key* items, std::int32_t begin, std::int32_t end, std::uint32_t max_coarse, Mass mass,
                       const mass_histogram& histogram, std::uint64_t need, Key* candidates) {
  std::uint64_t above = 0;
  std::uint32_t bin = 0;
  for (; bin + 1 < mass_histogram::bins; ++bin) {
    const std::uint64_t here = histogram.mass[0][bin] + histogram.mass[1][bin];
    if (here >= need - above) break;
    above += here;
  }
  const std::uint32_t high = max_coarse - (bin << mass_histogram::shift);
  const std::uint32_t width = bin + 1 < mass_histogram::bins ? (1u << mass_histogram::shift) - 1 : high;
  const std::int32_t count = collect(items, begin, end, high < width ? 0 : high - width, high, candidates);
  threshold<Key> least = narrow(candidates, count, need - above, mass);
  least.mass += above;
  return least;
}

/// The paper's rule: ten halvings of [0, max]; keeps every item at or above the last step that held `need`.
template <class Key, class Mass>
threshold<Key> bisect(const Key* items, std::int32_t begin, std::int32_t end, Key max, std::uint64_t need,
                      Mass mass) {
  const auto held_at = [&](std::uint32_t step) {
    const Key least = bisection_step(max, step);
    std::uint64_t held = 0;
    for (std::int32_t i = begin; i < end; ++i) held += items[i] >= least ? mass(items[i]) : 0;
    return held;
  };
  std::uint32_t low = 0;
  std::uint32_t high = 1024;
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    (held_at(middle) >= need ? low : high) = middle;
  }
  return {bisection_step(max, low), ~std::uint64_t{0}, held_at(low)};
}

}  // namespace specattn::inline SPECATTN_CODE::detail
