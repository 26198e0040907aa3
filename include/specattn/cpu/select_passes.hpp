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

namespace specattn::inline v0_1::detail {

inline constexpr std::int32_t items_per_word = 64;
inline std::int32_t words_for(std::int32_t items) { return (items + items_per_word - 1) / items_per_word; }

/// Mass of an order key in a row.
struct row_mass {
  float scale;
  std::uint64_t operator()(std::uint32_t key) const { return weight_mass(key, scale); }
};
/// Mass of a score: itself.
struct score_mass {
  std::uint64_t operator()(std::uint64_t score) const { return score; }
};
/// Mass one each: selects by count.
struct unit_mass {
  template <class Key>
  std::uint64_t operator()(Key) const {
    return 1;
  }
};

// ---- reading a row ------------------------------------------------------------------------------------------

struct row_facts {
  std::uint32_t max_key;
  bool invalid;  ///< a NaN, infinite or negative weight was replaced by zero
};

/// Order keys of `count` weights, lifted where needs_lift says so.
template <storage T>
row_facts read_row(const T* weights, std::ptrdiff_t stride, std::int32_t count, std::uint32_t* keys) {
  std::uint32_t max_key = 0;
  std::uint32_t invalid = 0;
  const auto read = [&](T weight, std::int32_t i) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(to_float(weight));
    const std::uint32_t key = weight_key(bits);
    invalid |= weight_is_invalid(bits) ? 1u : 0u;
    max_key = key > max_key ? key : max_key;
    keys[i] = key;
  };
  if (stride == 1) {
    for (std::int32_t i = 0; i < count; ++i) read(weights[i], i);
  } else {
    for (std::int32_t i = 0; i < count; ++i) read(weights[i * stride], i);
  }
  if (needs_lift(max_key) && max_key != 0) {
    for (std::int32_t i = 0; i < count; ++i) keys[i] = lift_key(keys[i]);
    max_key = lift_key(max_key);
  }
  return {max_key, invalid != 0};
}

/// sums[page] = mass of the page's items. `sums` may be `items`. Returns the largest.
template <class Key, class Mass>
std::uint64_t sum_pages(const Key* items, std::int32_t count, std::int32_t page_size, Mass mass,
                        std::uint64_t* sums) {
  std::uint64_t largest = 0;
  std::int32_t page = 0;
  for (std::int64_t begin = 0; begin < count; begin += page_size, ++page) {
    const std::int32_t end = static_cast<std::int32_t>(std::min<std::int64_t>(begin + page_size, count));
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

// ---- the histogram ------------------------------------------------------------------------------------------

/// A monotone 32-bit image of an item, for binning only: which one is used does not change the result.
inline std::uint32_t coarse_key(std::uint32_t key) { return key; }
inline std::uint32_t coarse_key(std::uint64_t score) {
  return std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<std::int64_t>(score)));
}

/// Mass by distance from the largest item: 16 bins an octave over 42 octaves, below which no weight has mass.
struct mass_histogram {
  static constexpr int shift = 19;
  static constexpr std::uint32_t bins = 42 * 16;
  static constexpr std::size_t copies = 4;  // consecutive items often share a bin; separate copies do not wait
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
    for (; i + 4 <= count; i += 4) {
      histogram.mass[0][bins[i]] += masses[i];
      histogram.mass[1][bins[i + 1]] += masses[i + 1];
      histogram.mass[2][bins[i + 2]] += masses[i + 2];
      histogram.mass[3][bins[i + 3]] += masses[i + 3];
    }
    for (; i < count; ++i) histogram.mass[0][bins[i]] += masses[i];
  }
  return total;
}

// ---- the threshold ------------------------------------------------------------------------------------------

/// Threshold of the least set of `items` (any order, overwritten) whose mass reaches `need`; 0 < need <= their
/// mass. Narrows the range of keys 256-fold a turn, so its cost is linear for any input.
template <class Key, class Mass>
threshold<Key> narrow(Key* items, std::int32_t count, std::uint64_t need, Mass mass) {
  for (;;) {
    Key low = items[0];
    Key high = items[0];
    for (std::int32_t i = 1; i < count; ++i) {
      low = (std::min)(low, items[i]);
      high = (std::max)(high, items[i]);
    }
    if (low == high) {
      const std::uint64_t each = mass(low);
      return {low, each == 0 ? 0 : (need + each - 1) / each};
    }
    const int shift = (std::max)(0, static_cast<int>(std::bit_width(static_cast<Key>(high - low))) - 8);
    std::uint64_t masses[256] = {};
    for (std::int32_t i = 0; i < count; ++i) masses[(high - items[i]) >> shift] += mass(items[i]);
    Key bin = 0;
    while (bin < 255 && masses[bin] < need) need -= masses[bin++];
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
  std::uint32_t bin = 0;
  for (; bin + 1 < mass_histogram::bins; ++bin) {
    const std::uint64_t here =
        histogram.mass[0][bin] + histogram.mass[1][bin] + histogram.mass[2][bin] + histogram.mass[3][bin];
    if (here >= need) break;
    need -= here;
  }
  std::int32_t count = 0;
  for (std::int32_t i = begin; i < end; ++i) {
    candidates[count] = items[i];
    count += mass_histogram::bin_of(coarse_key(items[i]), max_coarse) == bin ? 1 : 0;
  }
  return narrow(candidates, count, need, mass);
}

/// The paper's rule: ten halvings of [0, max]; keeps every item at or above the last step that held `need`.
template <class Key, class Mass>
threshold<Key> bisect(const Key* items, std::int32_t begin, std::int32_t end, Key max, std::uint64_t need,
                      Mass mass) {
  std::uint32_t low = 0;
  std::uint32_t high = 1024;
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    const Key step = bisection_step(max, middle);
    std::uint64_t held = 0;
    for (std::int32_t i = begin; i < end; ++i) held += items[i] >= step ? mass(items[i]) : 0;
    (held >= need ? low : high) = middle;
  }
  return {bisection_step(max, low), ~std::uint64_t{0}};
}

// ---- sets as words of 64 bits -------------------------------------------------------------------------------

/// Bit i: items[i] > key, and items[i] == key.
template <class Key>
void compare_word(const Key* items, Key key, std::uint64_t& above, std::uint64_t& equal) {
  above = 0;
  equal = 0;
  for (int i = 0; i < items_per_word; ++i) {
    above |= std::uint64_t{items[i] > key} << i;
    equal |= std::uint64_t{items[i] == key} << i;
  }
}

/// Sets the bits of `kept` that the threshold keeps among the `allowed` items.
template <class Key>
void mark(const Key* items, std::int32_t count, threshold<Key> least, const std::uint64_t* allowed,
          std::uint64_t* kept) {
  std::uint64_t ties = least.ties;
  for (std::int32_t w = 0; w < words_for(count); ++w) {
    std::uint64_t above = 0;
    std::uint64_t equal = 0;
    compare_word(items + std::ptrdiff_t{w} * items_per_word, least.key, above, equal);
    equal &= allowed[w];
    const auto tied = static_cast<std::uint64_t>(std::popcount(equal));
    if (tied > ties) {
      std::uint64_t surplus = equal;
      for (; ties > 0; --ties) surplus &= surplus - 1;
      equal ^= surplus;
    } else {
      ties -= tied;
    }
    kept[w] |= (above & allowed[w]) | equal;
  }
}

/// Sets bits [begin, end).
inline void set_bits(std::uint64_t* words, std::int32_t begin, std::int32_t end) {
  while (begin < end) {
    const std::int32_t bit = begin % items_per_word;
    const std::int32_t run = (std::min)(items_per_word - bit, end - begin);
    const std::uint64_t ones = run == items_per_word ? ~std::uint64_t{0} : (std::uint64_t{1} << run) - 1;
    words[begin / items_per_word] |= ones << bit;
    begin += run;
  }
}

inline std::int32_t count_bits(const std::uint64_t* words, std::int32_t word_count) {
  std::int32_t count = 0;
  for (std::int32_t w = 0; w < word_count; ++w) count += std::popcount(words[w]);
  return count;
}

/// Calls visit(i) for every set bit, ascending.
template <class Visit>
void for_each_bit(const std::uint64_t* words, std::int32_t word_count, Visit visit) {
  for (std::int32_t w = 0; w < word_count; ++w) {
    for (std::uint64_t bits = words[w]; bits != 0; bits &= bits - 1)
      visit(w * items_per_word + std::countr_zero(bits));
  }
}

}  // namespace specattn::inline v0_1::detail
