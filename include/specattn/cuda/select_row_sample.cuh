// What a sample tells of a lone row: a narrow range of keys that should hold the threshold.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../select_math.hpp"
#include "select_row_threshold.cuh"
#include "select_team.cuh"

namespace specattn::inline v0_1::detail {

/// The cluster's sample, two bins a thread. The same in every CTA, to the bit.
class select_row_sample {
 public:
  /// Merges what the members have counted of `items` weights.
  __device__ __forceinline__ select_row_sample(const select_team& team, select_row_memory& memory, std::int32_t items,
                                               std::uint32_t max_key)
      : memory_(memory),
        items_(static_cast<float>(items)),
        first_bin_(static_cast<int>(max_key >> sample_shift) + 1 - sample_bins + bins * select_team::thread()) {
    team.each_peer([&](int peer) {
      const std::uint32_t* theirs = team.at_peer(memory_.sample, peer);
#pragma unroll
      for (int i = 0; i < bins; ++i) counts_[i] += theirs[(first_bin_ + i) & (sample_bins - 1)];
    });
    const std::uint32_t sampled = __reduce_add_sync(~0u, counts_[0] + counts_[1]);
    if (team.lane() == 0) atomicAdd(&memory_.sampled, sampled);
  }

  /// Guesses the keys that should hold the threshold: where the mass of lighter ones (by count, their number) is `tail`,
  /// to within three standard deviations. By count, up to `forced` of the sampled weights are not to be counted.
  __device__ __forceinline__ void guess(chosen_by by, float tail, float forced, std::uint32_t max_key) {
    const bool counting = by == chosen_by::count;
    float here[bins];
#pragma unroll
    for (std::uint32_t i = 0; i < bins; ++i) {
      const float middle = __uint_as_float(edge(i) + (1u << (sample_shift - 1)));
      here[i] = counts_[i] > 0 ? static_cast<float>(counts_[i]) * (counting ? 1.0f : middle) : 0.0f;
    }
    float below;
    select_sample_scan(memory_.sample_scan).ExclusiveSum(here[0] + here[1], below);
    const float rate = items_ / static_cast<float>(memory_.sampled);
    key_range range{0, max_key + 1};
    std::uint32_t middle = max_key;
    below *= rate;
#pragma unroll
    for (std::uint32_t i = 0; i < bins; ++i) {
      here[i] *= rate;
      const float each = counting ? 1.0f - tail / items_ : __uint_as_float(edge(i + 1));
      const float margin = 3.0f * sqrtf(rate * each * tail);
      const float most = tail + margin + (counting ? forced : 0.0f);
      constexpr auto width = static_cast<float>(1u << sample_shift);
      if (below + margin < tail) {
        const float part = (tail - margin - below) / here[i];
        range.low = edge(i) + (part < 1.0f ? static_cast<std::uint32_t>(part * width) : 1u << sample_shift);
      }
      if (below + here[i] > most) {
        const float part = (most - below) / here[i];
        const std::uint32_t end = edge(i) + (part > 0.0f ? static_cast<std::uint32_t>(part * width) + 1 : 0);
        range.high = range.high < end ? range.high : end;
      }
      if (below + here[i] > tail && edge(i) < middle) middle = edge(i);
      below += here[i];
    }
    range.low = __reduce_max_sync(~0u, range.low);
    range.high = __reduce_min_sync(~0u, range.high);
    middle = __reduce_min_sync(~0u, middle);
    if (select_team::lane() == 0) {
      atomicMax(&memory_.guess[index(by)].low, range.low);
      atomicMin(&memory_.guess[index(by)].high, range.high);
      atomicMin(&memory_.middle[index(by)], middle);
    }
    __syncthreads();
  }

  /// What guess() found, no wider than doubt_bins can hold.
  __device__ static key_range guessed(const select_row_memory& memory, chosen_by by) {
    key_range range = memory.guess[index(by)];
    const std::uint32_t middle = memory.middle[index(by)];
    if (range.high - middle > reach) range.high = middle + reach;
    if (range.low > range.high) range.low = range.high;  // nothing: a miss
    if (range.width() > 2 * reach) range.low = range.high - 2 * reach;
    return range;
  }

  /// For a second try: all of the sample's bins that a range touches. Keys that are tied leave gaps in them, where the
  /// guess took them to be evenly spread.
  __device__ static key_range whole_bins(key_range range, std::uint32_t max_key) {
    const std::uint32_t low = range.low >> sample_shift << sample_shift;
    const std::uint32_t end = ((range.high >> sample_shift) + 1) << sample_shift;
    const std::uint32_t high = end < max_key + 1 ? end : max_key + 1;
    return {high - low > 2 * reach ? high - 2 * reach : low, high};
  }

 private:
  static constexpr int bins = sample_bins / select_threads;  // of a thread
  static_assert(bins == 2);
  static constexpr std::uint32_t reach = (1u << 25) - 1;  // from a range's middle: doubt_bins hold eight octaves

  __device__ static int index(chosen_by by) { return by == chosen_by::count ? 1 : 0; }
  /// The first key of the thread's i-th bin. Lighter keys than those of 128 octaves count with heavier ones.
  __device__ std::uint32_t edge(std::uint32_t i) const {
    const int bin = first_bin_ + static_cast<int>(i);
    return bin < 0 ? 0 : static_cast<std::uint32_t>(bin) << sample_shift;
  }

  select_row_memory& memory_;
  float items_;
  int first_bin_;
  std::uint32_t counts_[bins] = {};
};

}  // namespace specattn::inline v0_1::detail
