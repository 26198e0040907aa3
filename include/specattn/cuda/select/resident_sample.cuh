// What a sample tells of a lone row: a narrow range of keys that should hold the threshold.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../select_math.hpp"
#include "resident_memory.cuh"
#include "search.cuh"
#include "team.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// The sample's bins, the lightest first: one for all lighter weights, then ranges of 2^shift keys from `low` on. Weights
/// below (1 - p) of the mean cannot hold the mass that is left out, so three octaves below that are enough, whatever the
/// row; a threshold by count may lie anywhere.
struct sample_edges {
  std::uint32_t low;
  int shift;

  __device__ static sample_edges of(key_facts facts, float items, float left_out, bool counts) {
    const float mean = __fdividef(facts.sum, items);
    const float least = counts ? mean * 0x1p-24f : mean * left_out * 0.125f;
    std::uint32_t low = __float_as_uint(least);
    if (!(least > 0.0f) || low > facts.max_key) low = 0;
    return {low, 32 - __clz(static_cast<int>((facts.max_key - low) / (sample_bins - 1)))};
  }
  __device__ std::uint32_t bin_of(std::uint32_t key) const { return key < low ? 0 : 1 + ((key - low) >> shift); }
  __device__ std::uint32_t low_of(std::uint32_t bin) const { return bin == 0 ? 0 : low + ((bin - 1) << shift); }
  /// The bins that a range touches, and `more` on either side.
  __device__ key_range around(key_range range, std::uint32_t more) const {
    const std::uint32_t first = bin_of(range.low);
    return {low_of(first > more ? first - more : 0), low_of(bin_of(range.high) + 1 + more)};
  }
};

/// Counts the CTA's sample: one of every 2^log_rate positions that are not forced.
template <storage T>
__device__ __forceinline__ void count_sample(sample_edges edges, item_range range, forced_items forced, int log_rate,
                                             row_keys<T> keys, std::uint32_t* counts) {
  constexpr std::uint32_t each = 8;  // in flight
  const int thread = select_team::thread();
  // Not every n-th position, which lie in few of the banks.
  const std::int32_t first = (thread << log_rate) + (thread / 4 & ((1 << log_rate) - 1));
  const std::int32_t begin = forced.head > range.first ? forced.head : range.first;
  const std::int32_t end = forced.tail < range.last ? forced.tail : range.last;
  const auto free = static_cast<std::uint32_t>(end > begin ? end - begin : 0);
  auto from_begin = static_cast<std::uint32_t>(range.first + first - begin);
  const std::uint32_t step = static_cast<std::uint32_t>(select_threads) << log_rate;
  const T* from = keys.base + keys.place_of(first);  // steps of 256, 512 or 1024 and more: see place_of()
#pragma unroll 1
  for (std::int32_t left = range.last - range.first; left > 0; left -= static_cast<std::int32_t>(each * step)) {
    std::uint32_t bin[each];
#pragma unroll
    for (std::uint32_t i = 0; i < each; ++i) {
      const bool counts_too = from_begin + i * step < free;
      bin[i] = counts_too ? edges.bin_of(row_keys<T>::key_of(from[i * step])) : sample_bins;
    }
#pragma unroll
    for (std::uint32_t i = 0; i < each; ++i) atomicAdd(&counts[bin[i]], 1u);
    from += each * step;
    from_begin += each * step;
  }
}

/// The cluster's sample, eight bins a lane; for one warp. The same in every CTA, to the bit.
class select_row_sample {
 public:
  __device__ __forceinline__ select_row_sample(const std::uint32_t* counts, sample_edges edges, int log_rate)
      : edges_(edges), rate_(static_cast<float>(1 << log_rate)) {
#pragma unroll
    for (std::uint32_t i = 0; i < bins; ++i) counts_[i] = static_cast<float>(counts[first_bin() + i]);
  }

  /// Guesses the keys that should hold the threshold: where the mass of lighter ones (by count, their number) is `tail`,
  /// to within three standard deviations; no wider than doubt_bins can hold.
  __device__ __forceinline__ key_range guess(chosen_by by, float tail, float items, std::uint32_t max_key) {
    const bool counting = by == chosen_by::count;
    float sum = 0.0f;
#pragma unroll
    for (std::uint32_t i = 0; i < bins; ++i) {
      const std::uint32_t bin = first_bin() + i;
      const float middle = __uint_as_float((edges_.low_of(bin) >> 1) + (edges_.low_of(bin + 1) >> 1));
      sum += counts_[i] > 0.0f ? counts_[i] * rate_ * (counting ? 1.0f : middle) : 0.0f;
      ends_[i] = sum;
    }
    float end = sum;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float other = __shfl_up_sync(~0u, end, distance);
      if (select_team::lane() >= distance) end += other;
    }
    before_ = end - sum;
    const std::uint32_t middle = key_at(tail);
    const float each = counting ? 1.0f - tail / items : __uint_as_float(middle);
    const float variance = (rate_ - 1.0f) * each * tail;
    const float margin =
        (variance > 0.0f ? 3.0f * variance * rsqrtf(variance) : 0.0f) + tail * 0x1p-8f + (counting ? 1.0f : 0.0f);
    key_range range{key_at(tail - margin), key_at(tail + margin)};
    if (rate_ == 1.0f) range = edges_.around(range, 2);  // the bins are known, but not how keys lie in them
    ++range.high;
    if (range.high > max_key + 1) range.high = max_key + 1;
    if (range.high > middle + reach) range.high = middle + reach;
    if (range.low + reach < middle) range.low = middle - reach;
    return range;
  }

  /// For a second try, in all of the sample's bins that a range touches and some more. Keys that are tied leave gaps in
  /// them, where the guess took them to be evenly spread.
  __device__ static key_range wider(key_range range, sample_edges edges, int log_rate, std::uint32_t max_key) {
    const key_range bins = edges.around(range, log_rate == 0 ? 8 : 2);
    const std::uint32_t high = bins.high < max_key + 1 ? bins.high : max_key + 1;
    return {high - bins.low > 2 * reach ? high - 2 * reach : bins.low, high};
  }

 private:
  static constexpr std::uint32_t bins = sample_bins / 32;  // of a lane
  static constexpr std::uint32_t reach = (1u << 25) - 1;   // from a range's middle: doubt_bins hold eight octaves

  __device__ static std::uint32_t first_bin() { return bins * static_cast<std::uint32_t>(select_team::lane()); }

  /// The key below which the sample has `target`, where a bin's keys are evenly spread.
  __device__ __forceinline__ std::uint32_t key_at(float target) const {
    const std::uint32_t holders = __ballot_sync(~0u, before_ + ends_[bins - 1] > target);
    std::uint32_t bin = bins - 1;
    float low = before_ + ends_[bins - 2];
    float high = before_ + ends_[bins - 1];
#pragma unroll
    for (int i = bins - 2; i >= 0; --i) {
      if (before_ + ends_[i] > target) {
        bin = static_cast<std::uint32_t>(i);
        high = before_ + ends_[i];
        low = i > 0 ? before_ + ends_[i > 0 ? i - 1 : 0] : before_;
      }
    }
    bin += first_bin();
    const float part = target > low ? __fdividef(target - low, high - low) : 0.0f;
    const std::uint32_t from = edges_.low_of(bin);
    const auto width = static_cast<float>(edges_.low_of(bin + 1) - from);
    const std::uint32_t key = from + static_cast<std::uint32_t>((part < 1.0f ? part : 1.0f) * width);
    return __shfl_sync(~0u, key, holders != 0 ? __ffs(static_cast<int>(holders)) - 1 : 31);
  }

  sample_edges edges_;
  float rate_;
  float counts_[bins];
  float ends_[bins] = {};  // of the bins, from the lane's first
  float before_ = 0.0f;    // the lane's first bin
};

}  // namespace specattn::inline SPECATTN_CODE::detail
