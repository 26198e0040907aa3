// The threshold of a lone row, among the few keys that a sample left in doubt. All CTAs of the cluster look for it
// together, each among its own keys; what they tell each other is enough for each to know its place in the list.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "../select_math.hpp"
#include "select_team.cuh"

namespace specattn::inline v0_1::detail {

inline constexpr int sample_bins = 512;  // quarter octaves: 128 octaves, of which the largest key lies in the last
inline constexpr int sample_shift = 21;
using select_sample_scan = cub::BlockScan<float, select_threads, cub::BLOCK_SCAN_WARP_SCANS>;
using select_count_scan = cub::BlockScan<std::int32_t, select_threads, cub::BLOCK_SCAN_WARP_SCANS>;

inline constexpr std::uint32_t doubt_room =
    1408;  // keys in doubt of a CTA: a few in a hundred of 2^14, eight of flat rows

/// What a choice goes by: a share of the mass, or, where a cap bites, the number of positions.
enum class chosen_by { mass, count };

/// Keys [low, high).
struct key_range {
  std::uint32_t low;
  std::uint32_t high;
  __device__ std::uint32_t width() const { return high - low; }
  __device__ bool holds(std::uint32_t key) const { return key - low < width(); }
};

/// The mass of a weight in two parts, of which only sums of integers are taken: rounded to a multiple of 2^20 by one
/// addition, and the rest to an integer by another. The constants' own bits are subtracted in the end.
struct split_mass {
  static constexpr float upper = 0x1.8p43f;
  static constexpr float lower = 0x1.8p23f;
  std::uint32_t parts[2];

  __device__ __forceinline__ split_mass(float weight, float scale) {
    const float high = fmaf(weight, scale, upper);
    parts[0] = __float_as_uint(high);
    parts[1] = __float_as_uint(fmaf(weight, scale, (upper + lower) - high));  // both sums of constants are exact
  }
};

/// A thread's masses.
struct split_masses {
  std::uint32_t parts[2] = {0, 0};

  __device__ __forceinline__ void add(const split_mass& mass) {
    parts[0] += mass.parts[0];
    parts[1] += mass.parts[1];
  }
  /// Adds a mass and sets a bit, if so. Three predicated instructions: the compiler would select and add.
  __device__ __forceinline__ void add_if(bool so, const split_mass& mass, std::uint32_t& bits, std::uint32_t bit) {
#if defined(__CUDA_ARCH__)
    asm("{\n.reg .pred so;\nsetp.ne.u32 so, %3, 0;\n@so add.u32 %0, %0, %4;\n@so add.u32 %1, %1, %5;\n"
        "@so or.b32 %2, %2, %6;\n}"
        : "+r"(parts[0]), "+r"(parts[1]), "+r"(bits)
        : "r"(static_cast<std::uint32_t>(so)), "r"(mass.parts[0]), "r"(mass.parts[1]), "r"(bit));
#else
    if (!so) return;
    add(mass);
    bits |= bit;
#endif
  }

  /// The warp's mass, where this thread has added `count` weights, 64 at most.
  __device__ std::uint64_t of_warp(int count) const {
    const auto n = static_cast<std::uint32_t>(count);
    const std::uint32_t mine =
        parts[0] - n * __float_as_uint(split_mass::upper);  // below 2^27; a warp's sum may be 2^32
    const std::uint64_t high =
        (std::uint64_t{__reduce_add_sync(~0u, mine >> 16)} << 16) + __reduce_add_sync(~0u, mine & 0xffffu);
    const auto rest =
        static_cast<std::int32_t>(__reduce_add_sync(~0u, parts[1] - n * __float_as_uint(split_mass::lower)));
    return (high << 20) + static_cast<std::uint64_t>(std::int64_t{rest});
  }
};

/// What a CTA tells the others of its part of the row.
struct alignas(16) member_masses {
  std::uint64_t all;   ///< mass of its keys
  std::uint64_t kept;  ///< of the forced ones and those above the range
};
/// What it tells of the keys in doubt, when their range has narrowed: how many lie above it, and inside.
struct alignas(8) member_counts {
  std::uint32_t above;
  std::uint32_t inside;
};

/// Keys above `key` are kept and, of those at it, this CTA's first `ties`.
struct row_verdict {
  static constexpr std::int32_t all_ties = INT32_MAX;
  std::uint32_t key;
  std::int32_t ties;
  std::int32_t start;  ///< of this CTA's part of the list
  std::int32_t total;  ///< length of the list
};

/// The shared memory of one CTA, keys aside.
struct select_row_memory {
  std::uint32_t sample[sample_bins];   ///< how many sampled weights lie in a bin
  uint2 counts[2][select_threads];     ///< of the keys in doubt, of two rounds: see doubt_bins
  std::uint16_t doubtful[doubt_room];  ///< the CTA's positions of the keys in doubt, if there is room
  std::uint32_t doubtful_count;
  std::uint32_t sampled;
  key_range guess[2];  ///< by mass, and by count
  std::uint32_t middle[2];
  uint2 warps[select_warps], members[2][select_max_cluster];  ///< of two rows
  member_masses warp_masses[select_warps], masses[select_max_cluster];
  std::uint64_t doubt_masses[select_max_cluster];                   ///< kept of the keys in doubt
  std::uint32_t warp_kept[select_warps], kept[select_max_cluster];  ///< how many are kept without doubt
  member_counts mine, doubts[2][select_max_cluster];                ///< of two rounds
  std::uint32_t nearest_mine[32], nearest[select_max_cluster][32];
  std::uint32_t above[select_max_cluster], equal[select_max_cluster];  ///< nearest keys, by the threshold
  std::uint32_t bin;
  std::uint64_t above_mass;
  std::uint64_t chosen_mass, total_mass;
  row_verdict verdict;
  select_sample_scan::TempStorage sample_scan;
  select_count_scan::TempStorage count_scan;
  select_scan::TempStorage mass_scan;

  /// For another row.
  __device__ void clear(int thread) {
#pragma unroll 1
    for (int i = thread; i < sample_bins; i += select_threads) sample[i] = 0;
    clear_search(thread);
    if (thread == 0) sampled = 0;
    if (thread >= 2) return;
    guess[thread] = {0, ~0u};
    middle[thread] = ~0u;
  }
  /// For another search of the same row.
  __device__ void clear_search(int thread) {
    counts[0][thread] = {0, 0};
    if (thread < select_max_cluster) above[thread] = equal[thread] = 0;
    if (thread > 0) return;
    mine = {0, 0};
    doubtful_count = 0;
  }
};

/// Aligned bins, one a thread, the heaviest first. A bin's mass is exact: shared memory adds 32-bit words fast and
/// 64-bit ones slowly, so it is kept as two words: how many keys, and the sum of their low bits, from which the mass
/// follows where it is linear in the key; or, where keys are so light that their mass is rounded, its upper and lower
/// bits.
struct doubt_bins {
  std::uint32_t top;
  int shift;
  float scale;
  std::uint32_t linear_exponent;  ///< keys of this exponent and more have exact masses
  chosen_by by;

  /// \pre the range is less than 2^26 wide: the sums over a CTA's 2^14 keys then fit 32 bits; the row is not lifted
  __device__ static doubt_bins of(key_range range, row_mass mass, std::uint32_t max_key, chosen_by by) {
    const int shift = 32 - __clz(static_cast<int>(range.width() / (select_threads - 1)));
    const std::uint32_t linear_exponent = by == chosen_by::mass ? (max_key >> 23) - 17 : 0;
    return {(range.high - 1) >> shift, shift, mass.scale, linear_exponent, by};
  }
  __device__ key_range keys(std::uint32_t bin) const { return {(top - bin) << shift, (top - bin + 1) << shift}; }

  /// Adds keys one after the other; neighbours in one bin, as ties are, cost one addition in shared memory.
  struct adder {
    const doubt_bins& bins;
    uint2* counts;
    std::uint32_t bin = 0;
    uint2 sum{0, 0};

    __device__ __forceinline__ void add(std::uint32_t key) {
      // Below 2^23 a float's last bit is worth one at most: adding 2^23 rounds as fixed_point() does.
      const std::uint32_t one = __float_as_uint(fmaf(__uint_as_float(key), bins.scale, 0x1p23f)) - 0x4b000000u;
      const bool linear = key >> 23 >= bins.linear_exponent;
      const std::uint32_t next = bins.top - (key >> bins.shift);
      if (next != bin) flush();
      bin = next;
      sum.x += linear ? 1 : one >> 12;
      sum.y += linear ? key & ((1u << bins.shift) - 1) : one & 4095;
    }
    __device__ __forceinline__ void flush() {
      if (sum.x > 0) atomicAdd(&counts[bin].x, sum.x);
      if (sum.y > 0) atomicAdd(&counts[bin].y, sum.y);
      sum = {0, 0};
    }
  };
  /// The bin's mass; by count, how many keys it has.
  __device__ std::uint64_t mass_of(std::uint32_t bin, std::uint64_t first, std::uint64_t second) const {
    if (by == chosen_by::count) return first;
    const std::uint32_t lowest = keys(bin).low;
    const std::uint32_t exponent = lowest >> 23;
    if (exponent < linear_exponent) return (first << 12) + second;
    return (first * ((lowest & 0x7fffffu) | 0x800000u) + second) << (exponent - linear_exponent);
  }
};

/// The sum of x over the lanes up to this one.
__device__ __forceinline__ std::int32_t warp_prefix(std::int32_t x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const std::int32_t other = __shfl_up_sync(~0u, x, distance);
    if (select_team::lane() >= distance) x += other;
  }
  return x;
}

class select_row_threshold {
 public:
  __device__ __forceinline__ select_row_threshold(select_team& team, select_row_memory& memory, row_mass mass,
                                                  std::uint32_t max_key)
      : team_(team), memory_(memory), mass_(mass), max_key_(max_key) {}

  /// Finds, in `range`, the threshold of a share top_p of the mass, or of `limit` positions. Every CTA has told its
  /// masses and counted its keys; for_each(visit) visits the thread's keys there. False, in all CTAs, if the threshold
  /// lies elsewhere.
  template <class ForEach>
  __device__ __forceinline__ bool find(key_range range, chosen_by by, float top_p, std::int32_t limit,
                                       ForEach for_each) {
    by_ = by;
    std::uint64_t total = 0;
    std::uint64_t chosen = 0;
    std::uint64_t count = 0;
    team_.each_peer([&](int peer) {
      total += memory_.masses[peer].all;
      chosen += memory_.masses[peer].kept;
      count += memory_.kept[peer];
    });
    if (by == chosen_by::count) chosen = count;
    const std::uint64_t target =
        by == chosen_by::count ? static_cast<std::uint64_t>(limit) : target_mass(top_p, total);
    if (target <= chosen) return false;
    need_ = target - chosen;
#pragma unroll 1
    for (int round = 0;; round ^= 1) {
      if (!narrow(range, round)) return false;
      tell(range, round, for_each);
      std::uint32_t doubts = 0;
      team_.each_peer([&](int peer) { doubts += memory_.doubts[round][peer].inside; });
      if (doubts > 32 && range.width() > 1) continue;
      if (team_.warp() == 0) {
        const auto found = doubts > 32 ? all_equal(range.low, round) : find_nearest(round);
        if (team_.lane() == 0) {
          memory_.total_mass = total;
          memory_.chosen_mass = target - need_ + found.mass;  // by count: not yet the mass
        }
        give_verdict(found, round);
      }
      __syncthreads();
      return true;
    }
  }

 private:
  /// Narrows the range to the bin that holds the threshold; false if none does.
  __device__ __forceinline__ bool narrow(key_range& range, int round) {
    const auto bins = doubt_bins::of(range, mass_, max_key_, by_);
    std::uint64_t first = 0;
    std::uint64_t second = 0;
    team_.each_peer([&](int peer) {
      const uint2 part = team_.at_peer(memory_.counts[round], peer)[team_.thread()];
      first += part.x;
      second += part.y;
    });
    const std::uint64_t here = bins.mass_of(static_cast<std::uint32_t>(team_.thread()), first, second);
    std::uint64_t above, inside;
    select_scan(memory_.mass_scan).ExclusiveSum(here, above, inside);
    if (inside < need_) return false;
    if (above < need_ && above + here >= need_) {
      memory_.bin = static_cast<std::uint32_t>(team_.thread());
      memory_.above_mass = above;
      memory_.mine = {0, 0};
    }
    memory_.counts[round ^ 1][team_.thread()] = {0, 0};
    __syncthreads();
    need_ -= memory_.above_mass;
    const key_range bin = bins.keys(memory_.bin);
    range = {bin.low > range.low ? bin.low : range.low, bin.high < range.high ? bin.high : range.high};
    return true;
  }

  /// Tells every CTA how this one's keys lie to the range, and up to 32 of them; counts them for another round.
  template <class ForEach>
  __device__ __forceinline__ void tell(key_range range, int round, ForEach for_each) {
    const auto bins = doubt_bins::of(range, mass_, max_key_, by_);
    doubt_bins::adder counted{bins, memory_.counts[round ^ 1]};
    std::uint32_t above = 0;
    std::uint32_t inside = 0;
    for_each([&](std::uint32_t key) {
      above += key >= range.high ? 1 : 0;
      if (!range.holds(key)) return;
      counted.add(key);
      ++inside;
    });
    counted.flush();
    above = __reduce_add_sync(~0u, above);
    const auto end = static_cast<std::uint32_t>(warp_prefix(static_cast<std::int32_t>(inside)));
    std::uint32_t at = 0;
    if (team_.lane() == 31) {
      if (above > 0) atomicAdd(&memory_.mine.above, above);
      if (end > 0) at = atomicAdd(&memory_.mine.inside, end);
    }
    at = __shfl_sync(~0u, at, 31) + end - inside;
    if (inside > 0 && at < 32) {
      for_each([&](std::uint32_t key) {
        if (!range.holds(key)) return;
        if (at < 32) memory_.nearest_mine[at] = key;
        ++at;
      });
    }
    __syncthreads();
    const member_counts mine = memory_.mine;
    const int peer = team_.warp();
    static_assert(select_warps == select_max_cluster);
    if (peer < team_.size()) {
      if (static_cast<std::uint32_t>(team_.lane()) < mine.inside)
        team_.at_peer(memory_.nearest[team_.rank()], peer)[team_.lane()] = memory_.nearest_mine[team_.lane()];
      if (team_.lane() == 0) *team_.at_peer(&memory_.doubts[round][team_.rank()], peer) = mine;
    }
    team_.sync();
  }

  __device__ std::uint64_t mass_of(std::uint32_t key) const { return by_ == chosen_by::count ? 1 : mass_(key); }

  /// The threshold where every key left is `key`; by one warp.
  __device__ __forceinline__ threshold<std::uint32_t> all_equal(std::uint32_t key, int round) {
    if (team_.lane() < team_.size()) memory_.equal[team_.lane()] = memory_.doubts[round][team_.lane()].inside;
    __syncwarp();
    const std::uint64_t one = mass_of(key);
    const std::uint64_t ties = (need_ + one - 1) / one;
    return {key, ties, ties * one};
  }

  /// The threshold among at most 32 nearest keys, and how many of each CTA's lie above and on it; by one warp.
  __device__ __forceinline__ threshold<std::uint32_t> find_nearest(int round) {
    const auto rank = static_cast<std::uint32_t>(team_.lane());
    int owner = 0;
    std::uint32_t place = 0;
    std::uint32_t count = 0;
    team_.each_peer([&](int peer) {
      const std::uint32_t theirs = memory_.doubts[round][peer].inside;
      if (rank - count < theirs) {
        owner = peer;
        place = rank - count;
      }
      count += theirs;
    });
    const bool real = rank < count;
    const std::uint32_t key = real ? memory_.nearest[owner][place] : 0;
    const std::uint64_t one = mass_of(key);
    std::uint64_t above = 0;
    std::uint32_t equal = 0;
#pragma unroll 1
    for (int i = 0; i < static_cast<int>(count); ++i) {
      const std::uint32_t other = __shfl_sync(~0u, key, i);
      const std::uint64_t other_mass = __shfl_sync(~0u, one, i);
      above += other > key ? other_mass : 0;
      equal += other == key ? 1 : 0;
    }
    const bool hit = real && above < need_ && above + equal * one >= need_;
    const int first = __ffs(static_cast<int>(__ballot_sync(~0u, hit))) - 1;
    threshold<std::uint32_t> found{key, hit ? (need_ - above + one - 1) / one : 0, 0};
    found.mass = above + found.ties * one;
    found = {__shfl_sync(~0u, found.key, first), __shfl_sync(~0u, found.ties, first),
             __shfl_sync(~0u, found.mass, first)};
    if (real && key > found.key) atomicAdd(&memory_.above[owner], 1u);
    if (real && key == found.key) atomicAdd(&memory_.equal[owner], 1u);
    __syncwarp();
    return found;
  }

  /// A lane a CTA: where its part of the list starts, and how many ties it keeps.
  __device__ __forceinline__ void give_verdict(const threshold<std::uint32_t>& found, int round) {
    const int peer = team_.lane();
    const bool real = peer < team_.size();
    const auto ties = static_cast<std::int32_t>(found.ties);
    const std::int32_t equal = real ? static_cast<std::int32_t>(memory_.equal[peer]) : 0;
    const std::int32_t equal_end = warp_prefix(equal);
    const std::int32_t before = equal_end - equal < ties ? equal_end - equal : ties;
    const std::int32_t mine = (equal_end < ties ? equal_end : ties) - before;
    const std::int32_t count =
        real ? static_cast<std::int32_t>(memory_.kept[peer] + memory_.doubts[round][peer].above +
                                         memory_.above[peer]) +
                   mine
             : 0;
    const std::int32_t end = warp_prefix(count);
    const std::int32_t total = __shfl_sync(~0u, end, 31);
    if (peer == team_.rank())
      memory_.verdict = {found.key, mine == equal ? row_verdict::all_ties : mine, end - count, total};
  }

  const select_team& team_;
  select_row_memory& memory_;
  row_mass mass_;
  std::uint32_t max_key_;
  chosen_by by_ = chosen_by::mass;
  std::uint64_t need_ = 0;
};

}  // namespace specattn::inline v0_1::detail
