// The threshold of a lone row, among the few keys that a sample left in doubt. All CTAs of the cluster look for it
// together, each among its own keys; what they tell each other is enough for each to know its place in the list.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../select_math.hpp"
#include "resident_memory.cuh"
#include "team.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

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

  /// \pre the range is less than 2^26 wide; the row is not lifted
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
  /// Whether so many keys may be more than a bin of one CTA can sum, as they may where many tie in a wide range.
  __device__ bool is_overfull(std::uint32_t bin, std::uint32_t first) const {
    return first > 1u << (32 - shift) && shift > 0 && keys(bin).low >> 23 >= linear_exponent;
  }
  /// The bin's mass; by count, how many keys it has.
  __device__ std::uint64_t mass_of(std::uint32_t bin, std::uint64_t first, std::uint64_t second) const {
    if (by == chosen_by::count) return first;
    const std::uint32_t lowest = keys(bin).low;
    const std::uint32_t exponent = lowest >> 23;
    if (exponent < linear_exponent) return (first << 12) + second;
    return (first * ((lowest & 0x7fffffu) | 0x800000u) + second) << (exponent - linear_exponent);
  }
};

/// Every thread of the cluster calls find(), which one warp of each CTA decides.
class select_row_threshold {
  static constexpr member_doubts no_doubts{0, 0, ~0u, 0};

 public:
  __device__ __forceinline__ select_row_threshold(select_team& team, select_row_memory* memory, row_mass mass,
                                                  std::uint32_t max_key, chosen_by by)
      : team_(team), memory_(memory), mass_(mass), max_key_(max_key), by_(by) {}

  __device__ doubt_bins bins_of(key_range range) const { return doubt_bins::of(range, mass_, max_key_, by_); }

  /// Finds, in `range`, the threshold of a share top_p of the mass, or of `limit` positions. Every CTA has told its
  /// masses and counted its keys; for_each(visit) visits the thread's keys there. False, in all CTAs, if the threshold
  /// lies elsewhere. `last()` is called before the verdict is given.
  template <class ForEach, class Last>
  __device__ __forceinline__ bool find(key_range range, float top_p, std::int32_t limit, std::int32_t forced_count,
                                       ForEach for_each, Last last) {
#pragma unroll 1
    for (bool first = true;; first = false) {
      memory_ = settled(memory_);
      gather_masses(bins_of(range));
      __syncthreads();
      if (team_.warp() == 0) {
        if (first) set_target(top_p, limit);
        __syncwarp();  // one lane has written what another now writes
        if (first && need_ == 0) {
          settle_for(forced_count);
        } else {
          pick_bin(range);
        }
      }
      __syncthreads();
      if (!memory_->found.hit) return false;
      range = memory_->found.keys;
      tell_doubts(range, for_each);
      theirs_ = team_.lane() < team_.size() ? *team_.at_peer(&memory_->doubts, team_.lane()) : no_doubts;
      const std::uint32_t doubts = __reduce_add_sync(~0u, theirs_.inside);
      const std::uint32_t least = __reduce_min_sync(~0u, theirs_.least);
      const std::uint32_t largest = __reduce_max_sync(~0u, theirs_.largest);
      if (doubts > 32 && least < largest) {
        count_again(range, for_each);
        continue;
      }
      last();
      if (team_.warp() == 0) {
        threshold<std::uint32_t> found{~0u, 0, 0};  // where no key is needed
        if (doubts > 0) found = least == largest ? all_equal(least) : find_nearest();
        if (team_.lane() == 0) {
          memory_->total_mass = memory_->found.total;
          memory_->chosen_mass =
              memory_->found.target - memory_->found.need + found.mass;  // by count: not yet the mass
        }
        give_verdict(found);
      }
      __syncthreads();
      return true;
    }
  }

 private:
  /// Every CTA learns the masses of the bins, over the cluster.
  __device__ __forceinline__ void gather_masses(const doubt_bins& bins) {
    std::uint64_t first = 0;
    std::uint64_t second = 0;
    team_.each_peer([&](int peer) {
      const uint2 part = team_.at_peer(memory_->bins.counts, peer)[team_.thread()];
      if (bins.is_overfull(static_cast<std::uint32_t>(team_.thread()), part.x)) atomicOr(&memory_->overfull, 1u);
      first += part.x;
      second += part.y;
    });
    memory_->bins.masses_of[team_.thread()] = bins.mass_of(static_cast<std::uint32_t>(team_.thread()), first, second);
  }

  __device__ __forceinline__ void set_target(float top_p, std::int32_t limit) {
    member_masses sums{0, 0};
    kept_ = 0;
    if (team_.lane() < team_.size()) {
      sums = *team_.at_peer(&memory_->masses, team_.lane());
      kept_ = *team_.at_peer(&memory_->kept, team_.lane());
    }
#pragma unroll
    for (int distance = 1; distance < select_max_cluster; distance *= 2) {
      sums.all += __shfl_xor_sync(~0u, sums.all, distance);
      sums.kept += __shfl_xor_sync(~0u, sums.kept, distance);
    }
    const std::uint64_t total = __shfl_sync(~0u, sums.all, 0);
    const std::uint64_t count = __reduce_add_sync(~0u, kept_);
    const std::uint64_t chosen = by_ == chosen_by::count ? count : __shfl_sync(~0u, sums.kept, 0);
    const std::uint64_t target =
        by_ == chosen_by::count ? static_cast<std::uint64_t>(limit) : target_mass(top_p, total);
    need_ = target > chosen ? target - chosen : 0;
    count_ = static_cast<std::int32_t>(count);
    if (team_.lane() > 0) return;
    memory_->found.total = total;
    memory_->found.target = target;
    memory_->found.need = target - chosen;
  }

  /// Where what is kept without doubt is enough: it is the answer if it is the forced positions, as where they hold most
  /// of the mass. No key is then in range.
  __device__ __forceinline__ void settle_for(std::int32_t forced_count) {
    if (team_.lane() > 0) return;
    memory_->found.keys = {~0u, ~0u};
    memory_->found.hit = count_ == forced_count;
    memory_->doubts = no_doubts;
  }

  /// Narrows the range to the bin that holds the threshold, if one does; by one warp, eight bins a lane.
  __device__ __forceinline__ void pick_bin(key_range range) {
    constexpr int each = select_threads / 32;
    std::uint64_t ends[each];
    std::uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      sum += memory_->bins.masses_of[team_.lane() * each + i];
      ends[i] = sum;
    }
    std::uint64_t above = 0;
    std::uint64_t end = sum;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const std::uint64_t other = __shfl_up_sync(~0u, end, distance);
      if (team_.lane() >= distance) end += other;
    }
    above = end - sum;
    const std::uint32_t holders = __ballot_sync(~0u, end >= need_ && need_ > 0);
    const int holder = holders != 0 ? __ffs(static_cast<int>(holders)) - 1 : 0;
    if (team_.lane() == holder) {
      std::uint32_t bin = each - 1;
      std::uint64_t before = ends[each - 2];
#pragma unroll
      for (int i = each - 2; i >= 0; --i) {
        if (above + ends[i] < need_) continue;
        bin = static_cast<std::uint32_t>(i);
        before = i > 0 ? ends[i > 0 ? i - 1 : 0] : 0;
      }
      const key_range keys = bins_of(range).keys(static_cast<std::uint32_t>(holder * each) + bin);
      memory_->found.keys = {keys.low > range.low ? keys.low : range.low,
                             keys.high < range.high ? keys.high : range.high};
      memory_->found.need = need_ - (above + before);
      memory_->found.hit = holders != 0 && memory_->overfull == 0;
      memory_->doubts = no_doubts;
    }
    __syncwarp();
    need_ = memory_->found.need;
  }

  /// Leaves for every CTA how this one's keys lie to the range, and up to 32 of them.
  template <class ForEach>
  __device__ __forceinline__ void tell_doubts(key_range range, ForEach for_each) {
    std::uint32_t above = 0;
    std::uint32_t least = ~0u;
    std::uint32_t largest = 0;
    for_each([&](std::uint32_t key) {
      above += key >= range.high ? 1 : 0;
      if (!range.holds(key)) return;
      least = least < key ? least : key;
      largest = largest > key ? largest : key;
      const std::uint32_t at = atomicAdd(&memory_->doubts.inside, 1u);
      if (at < 32) memory_->nearest[at] = key;
    });
    above = __reduce_add_sync(~0u, above);
    least = __reduce_min_sync(~0u, least);
    largest = __reduce_max_sync(~0u, largest);
    if (team_.lane() == 0) {
      if (above > 0) atomicAdd(&memory_->doubts.above, above);
      if (least <= largest) {
        atomicMin(&memory_->doubts.least, least);
        atomicMax(&memory_->doubts.largest, largest);
      }
    }
    team_.sync_own();
  }

  /// Counts the CTA's keys in a range too dense to be told.
  template <class ForEach>
  __device__ __forceinline__ void count_again(key_range range, ForEach for_each) {
    const auto bins = bins_of(range);
    memory_->bins.counts[team_.thread()] = {0, 0};
    __syncthreads();
    doubt_bins::adder counted{bins, memory_->bins.counts};
    for_each([&](std::uint32_t key) {
      if (range.holds(key)) counted.add(key);
    });
    counted.flush();
    team_.sync_own();
  }

  __device__ std::uint64_t mass_of(std::uint32_t key) const { return by_ == chosen_by::count ? 1 : mass_(key); }

  /// The threshold where every key left is `key`; by one warp.
  __device__ __forceinline__ threshold<std::uint32_t> all_equal(std::uint32_t key) {
    above_ = 0;
    equal_ = theirs_.inside;
    const std::uint64_t one = mass_of(key);
    const std::uint64_t ties = (need_ + one - 1) / one;
    return {key, ties, ties * one};
  }

  /// The threshold among at most 32 nearest keys, and how many of each CTA's lie above and on it; by one warp.
  __device__ __forceinline__ threshold<std::uint32_t> find_nearest() {
    const auto rank = static_cast<std::uint32_t>(team_.lane());
    int owner = 0;
    std::uint32_t place = 0;
    std::uint32_t count = 0;
#pragma unroll 1
    for (int peer = 0; peer < team_.size(); ++peer) {
      const std::uint32_t inside = __shfl_sync(~0u, theirs_.inside, peer);
      if (rank - count < inside) {
        owner = peer;
        place = rank - count;
      }
      count += inside;
    }
    const bool real = rank < count;
    const std::uint32_t key = real ? team_.at_peer(memory_->nearest, owner)[place] : 0;
    const std::uint64_t one = mass_of(key);
    std::uint64_t above = 0;
    std::uint32_t equal = 0;
#pragma unroll 4
    for (int i = 0; i < static_cast<int>(count); ++i) {
      const std::uint32_t other = __shfl_sync(~0u, key, i);
      const std::uint64_t other_mass = __shfl_sync(~0u, one, i);
      above += other > key ? other_mass : 0;
      equal += other == key ? 1 : 0;
    }
    const bool hit = real && above < need_ && above + equal * one >= need_;
    const int first = __ffs(static_cast<int>(__ballot_sync(~0u, hit))) - 1;
    threshold<std::uint32_t> found{key, 1, 0};
    if (hit && equal > 1) found.ties = (need_ - above + one - 1) / one;
    found.mass = above + found.ties * one;
    found = {__shfl_sync(~0u, found.key, first), __shfl_sync(~0u, found.ties, first),
             __shfl_sync(~0u, found.mass, first)};
    above_ = equal_ = 0;
#pragma unroll 1
    for (int peer = 0; peer < team_.size(); ++peer) {
      const int above_there = __popc(__ballot_sync(~0u, real && owner == peer && key > found.key));
      const int equal_there = __popc(__ballot_sync(~0u, real && owner == peer && key == found.key));
      if (team_.lane() == peer) {
        above_ = static_cast<std::uint32_t>(above_there);
        equal_ = static_cast<std::uint32_t>(equal_there);
      }
    }
    return found;
  }

  /// A lane a CTA: where its part of the list starts, and how many ties it keeps.
  __device__ __forceinline__ void give_verdict(const threshold<std::uint32_t>& found) {
    const int peer = team_.lane();
    const bool real = peer < team_.size();
    const auto ties = static_cast<std::int32_t>(found.ties);
    const std::int32_t equal = real ? static_cast<std::int32_t>(equal_) : 0;
    const std::int32_t equal_end = warp_prefix(equal);
    const std::int32_t before = equal_end - equal < ties ? equal_end - equal : ties;
    const std::int32_t mine = (equal_end < ties ? equal_end : ties) - before;
    const std::int32_t count = real ? static_cast<std::int32_t>(kept_ + theirs_.above + above_) + mine : 0;
    const std::int32_t end = warp_prefix(count);
    const std::int32_t total = __shfl_sync(~0u, end, 31);
    if (peer == team_.rank())
      memory_->verdict = {found.key, mine == equal ? row_verdict::all_ties : mine, end - count, total};
  }

  const select_team& team_;
  select_row_memory* memory_;
  row_mass mass_;
  std::uint32_t max_key_;
  chosen_by by_;
  // of the first warp
  std::uint64_t need_ = 0;
  std::int32_t count_ = 0;  // kept without doubt
  // of the peer CTA whose rank is the lane:
  member_doubts theirs_{};
  std::uint32_t kept_ = 0;               // kept without doubt
  std::uint32_t above_ = 0, equal_ = 0;  // nearest keys, by the threshold
};

}  // namespace specattn::inline SPECATTN_CODE::detail
