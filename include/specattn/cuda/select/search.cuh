// The threshold of a selection on the device: where items come from, and the search that narrows a range of keys.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../scalar.hpp"
#include "../../select_math.hpp"
#include "../../view.hpp"
#include "team.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

// ---- items --------------------------------------------------------------------------------------------------
// An item is a position or a page; 32 neighbours make a word, and a warp works on one word at a time, a lane an item.
// A source calls visit(word, item, key, valid) for the words of this CTA, always with whole warps.

/// The items of one CTA: words [0, words) are items [first, last).
struct item_range {
  std::int32_t first = 0;
  std::int32_t last = 0;
  std::int32_t words = 0;
};

/// visit(word, item, key, valid) for the words of this CTA, with four loads in flight.
template <class Key, class Read, class Visit>
__device__ __forceinline__ void visit_items(item_range items, Read read, Visit visit) {
  constexpr int ahead = 4;
  for (std::int32_t begin = select_team::warp(); begin < items.words; begin += ahead * select_warps) {
    Key key[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const std::int32_t item = items.first + (begin + i * select_warps) * 32 + select_team::lane();
      key[i] = item < items.last ? read(item) : Key{0};
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const std::int32_t word = begin + i * select_warps;
      const std::int32_t item = items.first + word * 32 + select_team::lane();
      if (word < items.words) visit(word, item, key[i], item < items.last);
    }
  }
}

/// A row that is read from memory in every sweep.
template <storage T>
struct streamed_row {
  const T* weights = nullptr;
  std::ptrdiff_t stride = 1;
  bool lifted = false;

  __device__ __forceinline__ void load(const T* row, std::ptrdiff_t row_stride, item_range items,
                                       std::uint32_t (&facts)[2]) {
    weights = row;
    stride = row_stride;
    lifted = false;
    facts[0] = facts[1] = 0;
    for (std::int32_t item = items.first + select_team::thread(); item < items.last; item += select_threads) {
      const std::uint32_t bits = __float_as_uint(to_float(weights[item * stride]));
      const std::uint32_t key = weight_key(bits);
      if (weight_fault(bits) != 0) facts[1] = 1;
      if (key > facts[0]) facts[0] = key;
    }
  }
  __device__ __forceinline__ void lift(item_range) { lifted = true; }
  __device__ std::uint32_t key(std::int32_t item) const {
    const std::uint32_t key = weight_key(__float_as_uint(to_float(weights[item * stride])));
    return lifted ? lift_key(key) : key;
  }

  template <class Visit>
  __device__ __forceinline__ void for_each(item_range items, Visit visit) const {
    visit_items<std::uint32_t>(
        items, [&](std::int32_t item) { return key(item); }, visit);
  }
};

/// Integer scores of a CTA's items.
struct scored_items {
  const std::uint64_t* scores;

  template <class Visit>
  __device__ __forceinline__ void for_each(item_range items, Visit visit) const {
    visit_items<std::uint64_t>(
        items, [&](std::int32_t item) { return scores[item - items.first]; }, visit);
  }
};

// ---- histograms ---------------------------------------------------------------------------------------------
/// Aligned ranges of 2^shift keys, the heaviest first. Keys below the last bin count as in it.
template <class Key>
struct key_bins {
  Key top;  ///< keys of the first bin, shifted
  int shift;
  std::uint32_t last;
  Key lowest;  ///< of all

  /// From `low`, a multiple of 2^shift or 0, to `high`, with `shift` or as few bits more as give `most` bins.
  __device__ static key_bins between(Key low, Key high, int most, int shift = -1) {
    if (shift < 0) {
      shift =
          64 - __clzll(static_cast<long long>(static_cast<std::uint64_t>(high - low) / static_cast<unsigned>(most)));
    }
    const Key count = (high >> shift) - (low >> shift);
    return {high >> shift, shift, static_cast<std::uint32_t>(count < static_cast<Key>(most) ? count : most - 1), low};
  }
  __device__ int count() const { return static_cast<int>(last) + 1; }
  __device__ std::uint32_t of(Key key) const {
    const Key distance = top - (key >> shift);
    return distance < last ? static_cast<std::uint32_t>(distance) : last;
  }
  __device__ Key low(std::uint32_t bin) const { return bin == last ? lowest : (top - bin) << shift; }
  __device__ Key high(std::uint32_t bin) const { return ((top - bin) << shift) + ((Key{1} << shift) - 1); }
};

/// Thirty-two bins an octave, the heaviest first; 0 counts as 1. For scores, which lie as unevenly as weights do.
struct octave_bins {
  std::uint32_t last;  ///< and the heaviest key's, counted from 0

  __device__ static octave_bins up_to(std::uint64_t largest) { return {rank_of(largest)}; }
  __device__ int count() const { return static_cast<int>(last) + 1; }
  __device__ std::uint32_t of(std::uint64_t key) const { return last - rank_of(key); }
  __device__ std::uint64_t low(std::uint32_t bin) const {
    const std::uint32_t rank = last - bin;
    const std::uint32_t octave = rank / 32;
    const std::uint64_t steps = 32 + rank % 32;
    return rank == 0 ? 0 : octave < 5 ? steps >> (5 - octave) : steps << (octave - 5);
  }
  __device__ std::uint64_t high(std::uint32_t bin) const {
    const std::uint32_t octave = (last - bin) / 32;
    return bin == last ? 1 : low(bin) + (octave < 5 ? 0 : (std::uint64_t{1} << (octave - 5)) - 1);
  }

 private:
  __device__ static std::uint32_t rank_of(std::uint64_t key) {
    const int zeros = __clzll(static_cast<long long>(key | 1));
    return static_cast<std::uint32_t>((63 - zeros) * 32) + static_cast<std::uint32_t>((key | 1) << zeros >> 58 & 31);
  }
};

/// Any mass, in 64-bit sums.
template <class Mass>
struct whole_sums {
  using word = std::uint64_t;
  static constexpr int arrays = 1;
  Mass mass;
  template <class Key>
  __device__ void add(word* sums, std::uint32_t bin, Key key) const {
    // Shared memory adds words of 32 bits fast; those of 64 bits are a loop.
    const std::uint64_t one = mass(key);
    if (one == 0) return;
    auto* words = reinterpret_cast<std::uint32_t*>(&sums[bin]);
    const auto low = static_cast<std::uint32_t>(one);
    const std::uint32_t carry = atomicAdd(&words[0], low) > ~low ? 1 : 0;
    const std::uint32_t high = static_cast<std::uint32_t>(one >> 32) + carry;
    if (high > 0) atomicAdd(&words[1], high);
  }
  template <class Key>
  __device__ std::uint64_t of(const std::uint64_t (&sums)[arrays], Key) const {
    return sums[0];
  }
};

/// Every item has the mass one.
struct item_counts {
  using word = std::uint32_t;
  static constexpr int arrays = 1;
  unit_mass mass;
  template <class Key>
  __device__ void add(word* sums, std::uint32_t bin, Key) const {
    atomicAdd(&sums[bin], 1u);
  }
  template <class Key>
  __device__ std::uint64_t of(const std::uint64_t (&sums)[arrays], Key) const {
    return sums[0];
  }
};

// ---- the search ---------------------------------------------------------------------------------------------

/// A threshold, and how many items lie on it.
template <class Key>
struct found_threshold {
  threshold<Key> least;
  std::uint64_t equals;
};

/// Merges the members' histograms, and sums x over all threads.
template <class Bins, class Sums>
__device__ __forceinline__ void merge_bins(select_team& team, const Sums& sums, const Bins& bins,
                                           std::uint64_t (&x)[1]) {
  team.template merge<typename Sums::word, Sums::arrays>(
      bins.count(), [&](int bin, const auto& all) { return sums.of(all, bins.low(static_cast<std::uint32_t>(bin))); },
      x);
}

/// Finds the bin in which the merged mass reaches need_of(mass of all) and leaves it in the team's memory. Returns
/// what need_of gave; where that is 0 there is no such bin.
template <class Bins, class NeedOf>
__device__ __forceinline__ std::uint64_t find_bin(select_team& team, const Bins& bins, NeedOf need_of) {
  constexpr int most = select_bins / select_threads;
  select_team_memory& memory = team.memory();
  const int each = (bins.count() + select_threads - 1) / select_threads;
  std::uint64_t here[most];
  std::uint64_t mine = 0;
#pragma unroll
  for (int i = 0; i < most; ++i) {
    const int bin = team.thread() * each + i;
    here[i] = i < each && bin < bins.count() ? team.merged()[bin] : 0;
    mine += here[i];
  }
  std::uint64_t above, total;
  select_scan(memory.scan).ExclusiveSum(mine, above, total);
  const std::uint64_t need = need_of(total);
#pragma unroll
  for (int i = 0; i < most; ++i) {
    if (above < need && above + here[i] >= need) {
      memory.bin = static_cast<std::uint32_t>(team.thread() * each + i);
      memory.above = above;
      memory.here = here[i];
    }
    above += here[i];
  }
  __syncthreads();
  return need;
}

/// The least set of the allowed items whose mass reaches `need` > 0, where find_bin() has found its bin among `bins`.
/// Each further sweep looks at the items of one bin.
template <class Key, class Sums, class Source, class Bins, class Allowed>
__device__ __forceinline__ found_threshold<Key> search(select_team& team, const Source& source, item_range items,
                                                       const Bins& bins, std::uint64_t need, const Sums& sums,
                                                       Allowed allowed) {
  using word = typename Sums::word;
  const select_team_memory& memory = team.memory();
  std::uint64_t above = 0;
  Key low = bins.low(memory.bin);
  Key high = bins.high(memory.bin);
  for (;;) {
    above += memory.above;
    need -= memory.above;
    const std::uint64_t here = memory.here;
    const std::uint64_t lightest = sums.mass(low);
    if (low == high) {
      const std::uint64_t ties = (need + lightest - 1) / lightest;
      return {{low, ties, above + ties * lightest}, here / lightest};
    }
    // The bin is kept whole if it holds one item, or if without its lightest it would not do.
    if (here < 2 * lightest || here - lightest < need) return {{low, ~std::uint64_t{0}, above + here}, 0};
    const auto parts = key_bins<Key>::between(low, high, select_threads);
    team.template clear<word>(Sums::arrays, parts.count());
    word* counted = reinterpret_cast<word*>(team.memory().sums);
    source.for_each(items, [&](std::int32_t, std::int32_t item, Key key, bool valid) {
      if (valid && key >= low && key <= high && allowed(item)) sums.add(counted, parts.of(key), key);
    });
    std::uint64_t nothing[1] = {0};
    merge_bins(team, sums, parts, nothing);
    find_bin(team, parts, [&](std::uint64_t) { return need; });
    high = parts.high(memory.bin);
    low = parts.low(memory.bin);
  }
}

/// The paper's rule: ten halvings of [0, max]; keeps every item at or above the last step that held `need`.
template <class Key, class Mass, class Source, class Allowed>
__device__ __forceinline__ found_threshold<Key> bisect(select_team& team, const Source& source, item_range items,
                                                       Key max, std::uint64_t need, Mass mass, Allowed allowed) {
  const auto held_at = [&](std::uint32_t step) {
    const Key least = bisection_step(max, step);
    std::uint64_t held[1] = {0};
    source.for_each(items, [&](std::int32_t, std::int32_t item, Key key, bool valid) {
      if (valid && key >= least && allowed(item)) held[0] += mass(key);
    });
    team.reduce(held, plus{});
    return held[0];
  };
  std::uint32_t low = 0;
  std::uint32_t high = 1024;
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    (held_at(middle) >= need ? low : high) = middle;
  }
  return {{bisection_step(max, low), ~std::uint64_t{0}, held_at(low)}, 0};
}

}  // namespace specattn::inline SPECATTN_CODE::detail
