// What a CTA keeps in shared memory of a lone row, its keys aside, and the integers that rows are summed in.
#pragma once

#include <cstdint>

#include "../../scalar.hpp"
#include "../../select_math.hpp"
#include "team.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int sample_bins = 256;
/// Capacity of a CTA for keys in doubt: a few percent of its share of a row, 8 % of a full share (2^15) of a flat row.
inline constexpr std::uint32_t doubt_room = 2688;

inline constexpr int row_most_words = 4;                                              ///< of a thread
inline constexpr std::int32_t row_most_share = row_most_words * 32 * select_threads;  ///< positions of a CTA

/// What a choice goes by: a share of the mass, or, where a cap bites, the number of positions.
enum class chosen_by { mass, count };

/// Keys [low, high).
struct key_range {
  std::uint32_t low;
  std::uint32_t high;
  __device__ std::uint32_t width() const { return high - low; }
  __device__ bool holds(std::uint32_t key) const { return key - low < width(); }
};

struct alignas(8) key_facts {
  std::uint32_t max_key;
  float sum;
};

/// How a row lies in a CTA's shared memory: as it came, 16 bytes of neighbours (a group) after the other, but permuted
/// so that threads that read their words meet no bank conflict. A thread has 2^log_words of the words.
template <storage T>
struct row_keys {
  static constexpr int group = 16 / static_cast<int>(sizeof(T));
  static constexpr int most_words = sizeof(T) == 2 ? 4 : 2;  ///< of a thread
  struct alignas(16) weights {
    T x[group];
  };

  T* base;
  int log_words;

  /// i + 1024 n lies 1024 n after i: where a thread has few words, even shorter steps keep their length.
  __device__ std::int32_t place_of(std::int32_t i) const { return i ^ ((i >> (5 + log_words) & 7) * group); }
  __device__ static std::uint32_t key_of(T weight) { return __float_as_uint(to_float(weight)); }
  __device__ std::uint32_t key(std::int32_t i) const { return key_of(base[place_of(i)]); }
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

  /// The warp's mass, where this thread has added `count` weights, 128 at most.
  __device__ std::uint64_t of_warp(int count) const {
    const auto n = static_cast<std::uint32_t>(count);
    const std::uint32_t mine =
        parts[0] - n * __float_as_uint(split_mass::upper);  // below 2^28; a warp's sum may be 2^33
    const std::uint64_t high =
        (std::uint64_t{__reduce_add_sync(~0u, mine >> 16)} << 16) + __reduce_add_sync(~0u, mine & 0xffffu);
    const std::uint32_t rests =
        parts[1] - n * __float_as_uint(split_mass::lower) + (1u << 26);  // up to 2^26 either way
    const std::uint64_t rest = (std::uint64_t{__reduce_add_sync(~0u, rests >> 16)} << 16) +
                               __reduce_add_sync(~0u, rests & 0xffffu) - (std::uint64_t{32} << 26);
    return (high << 20) + rest;
  }
};

/// What a CTA tells the others of its part of the row.
struct alignas(16) member_masses {
  std::uint64_t all;   ///< mass of its keys
  std::uint64_t kept;  ///< of the forced ones and those above the range
};
/// What it tells of the keys in doubt, when their range has narrowed: how many lie above it and inside, and the least
/// and the largest of those inside.
struct alignas(16) member_doubts {
  std::uint32_t above;
  std::uint32_t inside;
  std::uint32_t least;
  std::uint32_t largest;
};

/// Where the threshold lies: among these keys, with that much mass (or so many keys) of theirs.
struct found_range {
  key_range keys;
  std::uint64_t need;
  std::uint64_t total;
  std::uint64_t target;
  bool hit;
};

/// Keys above `key` are kept and, of those at it, this CTA's first `ties`.
struct row_verdict {
  static constexpr std::int32_t all_ties = INT32_MAX;
  std::uint32_t key;
  std::int32_t ties;
  std::int32_t start;  ///< of this CTA's part of the list
  std::int32_t total;  ///< length of the list
};

/// What the bins of the keys in doubt hold: see doubt_bins.
struct doubt_sums {
  uint2 counts[select_threads];  ///< this CTA's
  union {
    std::uint32_t all_sampled[sample_bins];   ///< before, the cluster's sample,
    std::uint64_t masses_of[select_threads];  ///< then the masses of its keys in doubt
  };
};

/// The shared memory of one CTA, keys aside. A CTA writes its own alone; what others need of it they read.
struct select_row_memory {
  std::uint32_t sample[sample_bins + 1];  ///< sampled weights in each bin; the last bin: those that do not count
  union {
    doubt_sums bins;
    std::uint32_t words[row_most_words * select_threads];  ///< in the end the kept positions of this CTA
  };
  std::uint16_t doubtful[doubt_room];  ///< the CTA's positions of the keys in doubt, if there is room
  std::uint32_t doubtful_count;
  std::uint32_t overfull;  ///< not 0: a bin of the keys in doubt has more than it can count
  key_range guess[2];      ///< by mass, and by count
  uint2 warps[select_warps];
  key_facts facts[2];  ///< of two rows
  member_masses warp_masses[select_warps], masses;
  std::uint64_t doubt_mass;                     ///< kept of the keys in doubt
  std::uint32_t warp_kept[select_warps], kept;  ///< how many are kept without doubt
  member_doubts doubts;
  std::uint32_t nearest[32];
  found_range found;
  std::uint64_t chosen_mass, total_mass;
  row_verdict verdict;
  std::int32_t warp_counts[2][select_warps];

  /// For another row.
  __device__ void clear(int thread) {
    static_assert(sample_bins == select_threads);
    sample[thread] = 0;
    clear_search(thread);
  }
  /// For another search of the same row.
  __device__ void clear_search(int thread) {
    bins.counts[thread] = {0, 0};
    if (thread == 0) doubtful_count = overfull = 0;
  }
};

/// A thread's words of bits.
template <int Words>
struct own_bits {
  std::uint32_t words[Words] = {};

  /// words[word] = bits, of words that stay in registers.
  __device__ __forceinline__ void set(std::int32_t word, std::uint32_t bits) {
#pragma unroll
    for (int i = 0; i < Words; ++i) words[i] = i == word ? bits : words[i];
  }
  __device__ __forceinline__ std::int32_t count() const {
    std::int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < Words; ++i) sum += __popc(words[i]);
    return sum;
  }
  __device__ __forceinline__ void operator|=(const own_bits& other) {
#pragma unroll
    for (int i = 0; i < Words; ++i) words[i] |= other.words[i];
  }
  /// visit(number), from the lowest.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < Words; ++i) {
#pragma unroll 1
      for (std::uint32_t left = words[i]; left != 0; left &= left - 1)
        visit(i * 32 + __ffs(static_cast<int>(left)) - 1);
    }
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

/// The sum of x over the threads before this one, and over all. `totals` is of no other use between two barriers.
__device__ __forceinline__ std::int32_t block_prefix(std::int32_t x, std::int32_t (&totals)[select_warps],
                                                     std::int32_t& all) {
  const std::int32_t end = warp_prefix(x);
  if (select_team::lane() == 31) totals[select_team::warp()] = end;
  __syncthreads();
  std::int32_t before = end - x;
  all = 0;
#pragma unroll
  for (int warp = 0; warp < select_warps; ++warp) {
    const std::int32_t theirs = totals[warp];
    before += warp < select_team::warp() ? theirs : 0;
    all += theirs;
  }
  return before;
}

}  // namespace specattn::inline SPECATTN_CODE::detail
