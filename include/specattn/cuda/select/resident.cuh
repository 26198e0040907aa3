// A cluster selects from rows that it holds in shared memory, one row after the other:
//
//   1. read_row() copies the row and finds its largest key and sum.
//   2. select_row_sample counts one in eight of the weights, or more, and names a narrow range of keys that should hold the
//      threshold.
//   3. sweep() sums the row's mass and the mass above the range exactly, and collects the keys inside it, a few percent.
//   4. select_row_threshold finds the threshold among those keys.
//   5. list.cuh writes the positions.
//
// Four or five cluster barriers a row. Work that is not per key runs on one warp: a thousand instructions on all warps cost as
// much as the sweep. The masses are exact, so a range that misses the threshold is noticed; it is widened once. A cap is a
// threshold by count; the sample tells which of the two is higher. select_group handles groups with a row whose range misses
// twice, or that holds invalid weights or subnormals.
#pragma once

#include <cstddef>
#include <cstdint>

#include "list.cuh"
#include "problem.cuh"
#include "resident_read.cuh"
#include "resident_sample.cuh"
#include "resident_threshold.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// `United`: of several rows. A lone one needs no loop, whose invariants would fill the registers.
template <storage T, bool United>
class select_row : group_part {
  static constexpr int most_words = row_keys<T>::most_words;
  using bits = own_bits<most_words>;

 public:
  /// `keys` holds the CTA's share of the row, and later its list.
  __device__ __forceinline__ select_row(const select_launch<T>& launch, select_team& team, std::ptrdiff_t group,
                                        select_row_memory* memory, T* keys)
      : group_part(launch, team, group, 1),
        launch_(launch),
        team_(team),
        memory_(memory),
        keys_{keys, log_words_of(member_share(items, team))} {}

  /// Returns false, in all CTAs of the cluster, where it has not made the list. Several rows are united.
  /// \pre with several rows no cap can bite, and no mass is asked for
  __device__ __forceinline__ bool run(std::ptrdiff_t group) {
    if (asked_by(top_p) == asked::forced_only) return false;
    const auto& weights = launch_.from.weights;
    const T* row = weights.data() + group * weights.stride(0);
    if constexpr (!United) {
      if (!choose(row, weights.stride(2))) return false;
      return emit_list(group, kept_, start_, count_);
    }
    bits united;
#pragma unroll 1
    for (std::ptrdiff_t i = 0; i < weights.extent(1); ++i, row += weights.stride(1)) {
      if (i > 0) __syncthreads();  // all have read what they keep of the last row
      if (!choose(row, weights.stride(2))) return false;
      united |= kept_;
    }
    place_union(united);
    return emit_list(group, united, start_, count_);
  }

 private:
  __device__ static int log_words_of(std::int32_t share) {
    return share <= 32 * select_threads ? 0 : share <= 64 * select_threads ? 1 : 2;
  }

  /// Chooses from a row what the thread keeps of its words, and finds the CTA's place in the list. False where
  /// select_group has to.
  __device__ __forceinline__ bool choose(const T* row, std::ptrdiff_t stride) {
    const bool everything = asked_by(top_p) == asked::everything;
    memory_->clear(team_.thread());
    key_facts facts = read_row(row + range.first * stride, stride, range, keys_);
    team_.meet();
    facts = exchange_facts(team_, *memory_, turn_, facts);
    turn_ ^= 1;  // peers may be a row ahead
    if (facts.max_key > largest_finite_bits || needs_lift(facts.max_key) || !(facts.sum <= 3e38f)) return false;
    const std::int32_t forced_count = forced.head + (items - forced.tail);
    if (items > limit && forced_count >= limit) return false;
    if (everything && items <= limit) {
      kept_ = whole_words();
      start_ = range.first;
      count_ = items;
      return true;
    }
    mass_ = row_mass{mass_scale(facts.max_key)};
    const auto edges = sample_edges::of(facts, static_cast<float>(items), 1.0f - top_p, items > limit);
    guess_ranges(facts, edges, everything);
    return search(everything, facts.max_key, edges);
  }

  /// 2048 positions of the CTA are sampled, or all, or one in eight.
  __device__ int log_rate_of() const {
    const int log_rate = 32 - __clz((member_share(items, team_) - 1) >> 11);
    return log_rate < 3 ? log_rate : 3;
  }

  /// Leaves in memory where the sample takes the thresholds to be.
  __device__ __forceinline__ void guess_ranges(key_facts facts, sample_edges edges, bool everything) {
    const int log_rate = log_rate_of();
    count_sample(edges, range, forced, log_rate, keys_, memory_->sample);
    team_.sync_own();
    if (team_.size() > 1) {
      std::uint32_t count = 0;
      team_.each_peer([&](int peer) { count += team_.at_peer(memory_->sample, peer)[team_.thread()]; });
      memory_->bins.all_sampled[team_.thread()] = count;
      __syncthreads();
    }
    if (team_.warp() == 0) {
      select_row_sample sample(team_.size() > 1 ? memory_->bins.all_sampled : memory_->sample, edges, log_rate);
      const auto all = static_cast<float>(items);
      key_range by_mass{0, 0}, by_count{0, 0};
      if (!everything) by_mass = sample.guess(chosen_by::mass, (1.0f - top_p) * facts.sum, all, facts.max_key);
      if (items > limit)
        by_count = sample.guess(chosen_by::count, static_cast<float>(items - limit), all, facts.max_key);
      if (team_.lane() == 0) {
        memory_->guess[0] = by_mass;
        memory_->guess[1] = by_count;
      }
    }
    __syncthreads();
  }

  /// Looks for the threshold of the mass or of the cap, whichever should be the higher, and then for the other where it
  /// is not; where a guess misses, in a wider range.
  __device__ __forceinline__ bool search(bool everything, std::uint32_t max_key, sample_edges edges) {
    chosen_by by = chosen_by::mass;
    key_range guess = memory_->guess[0];
    if (items > limit) {
      const key_range other = memory_->guess[1];
      if (everything || other.low > guess.low) {
        by = chosen_by::count;
        guess = other;
      }
    }
    bool wider = false;
#pragma unroll 1
    for (;;) {
      memory_ = settled(memory_);
      keys_.base = settled(keys_.base);
      kept_ = forced_words();
      select_row_threshold threshold(team_, memory_, mass_, max_key, by);
      const bits inside = sweep(guess, threshold.bins_of(guess));
      const auto for_each = [&](auto visit) { each_doubt(inside, visit); };
      if (threshold.find(guess, top_p, limit, forced.head + (items - forced.tail), for_each, [&] { store_kept(); })) {
        if (resolve(inside, by, everything)) return true;
        by = by == chosen_by::mass ? chosen_by::count : chosen_by::mass;
        guess = memory_->guess[by == chosen_by::mass ? 0 : 1];
        wider = false;
      } else {
        if (wider) return false;
        guess = select_row_sample::wider(guess, edges, log_rate_of(), max_key);
        wider = true;
      }
      team_.sync_own();  // peers have read what this CTA told
      memory_->clear_search(team_.thread());
      __syncthreads();
    }
  }

  /// Adds to the kept what the threshold keeps of the keys in doubt. False if the other threshold is the higher.
  __device__ __forceinline__ bool resolve(const bits& inside, chosen_by by, bool everything) {
    const row_verdict verdict = memory_->verdict;
    if (verdict.total > limit) return false;
    start_ = verdict.start;
    count_ = verdict.total;
    const bool listed = verdict.ties == row_verdict::all_ties && memory_->doubtful_count <= doubt_room;
    const std::uint64_t mine = listed ? keep_listed(verdict.key) : keep_inside(inside, verdict);
    if (by == chosen_by::mass || (everything && launch_.out.mass.empty())) {
      if (by == chosen_by::count) status |= selection_capped;
      return true;
    }
    const member_masses sums = sum_masses(mine);
    if (team_.thread() == 0) memory_->chosen_mass = sums.kept;
    if (!everything && sums.kept >= target_mass(top_p, sums.all)) return false;
    status |= selection_capped;
    return true;
  }

  /// visit(key) for the CTA's keys in doubt, `inside` of them this thread's; some thread visits each.
  template <class Visit>
  __device__ __forceinline__ void each_doubt(const bits& inside, Visit visit) const {
    const std::uint32_t count = memory_->doubtful_count;
    if (count > doubt_room) {
      inside.each([&](std::int32_t bit) { visit(own_key(bit)); });
      return;
    }
#pragma unroll 1
    for (std::uint32_t i = static_cast<std::uint32_t>(team_.thread()); i < count; i += select_threads)
      visit(keys_.key(memory_->doubtful[i]));
  }

  /// Lists the CTA's keys in doubt, which lie unevenly with its threads.
  __device__ __forceinline__ void list_doubts(const bits& inside) {
    const std::int32_t mine = inside.count();
    const std::int32_t end = warp_prefix(mine);
    std::uint32_t at = 0;
    if (team_.lane() == 31 && end > 0) at = atomicAdd(&memory_->doubtful_count, static_cast<std::uint32_t>(end));
    at = __shfl_sync(~0u, at, 31) + static_cast<std::uint32_t>(end - mine);
    inside.each([&](std::int32_t bit) {
      if (at < doubt_room) memory_->doubtful[at] = static_cast<std::uint16_t>(first_word() * 32 + bit);
      ++at;
    });
    __syncthreads();
  }

  /// Stores what the thread keeps without doubt, for keep_listed().
  __device__ __forceinline__ void store_kept() {
#pragma unroll
    for (int i = 0; i < most_words; ++i) {
      if (i < each_words()) memory_->words[first_word() + i] = kept_.words[i];
    }
  }

  /// Keeps the listed keys from `least` on; returns the mass of those this thread has met.
  __device__ __forceinline__ std::uint64_t keep_listed(std::uint32_t least) {
    std::uint32_t* words = memory_->words;
    std::uint64_t mass = 0;
#pragma unroll 1
    for (std::uint32_t i = static_cast<std::uint32_t>(team_.thread()); i < memory_->doubtful_count;
         i += select_threads) {
      const std::uint32_t position = memory_->doubtful[i];
      const std::uint32_t key = keys_.key(static_cast<std::int32_t>(position));
      if (key < least) continue;
      atomicOr(&words[position / 32], 1u << (position % 32));
      mass += mass_(key);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < most_words; ++i) kept_.words[i] = i < each_words() ? words[first_word() + i] : 0;
    return mass;
  }

  /// Keeps of this thread's keys in doubt those above the threshold and its share of those on it; returns their mass.
  __device__ __forceinline__ std::uint64_t keep_inside(const bits& inside, row_verdict verdict) {
    bits equal;
    std::uint64_t mass = 0;
#pragma unroll
    for (int i = 0; i < most_words; ++i) {
#pragma unroll 1
      for (std::uint32_t left = inside.words[i]; left != 0; left &= left - 1) {
        const std::uint32_t key = own_key(i * 32 + __ffs(static_cast<int>(left)) - 1);
        if (key == verdict.key) equal.words[i] |= left & (0 - left);
        if (key <= verdict.key) continue;
        kept_.words[i] |= left & (0 - left);
        mass += mass_(key);
      }
    }
    std::int32_t ties = verdict.ties;
    if (ties != row_verdict::all_ties) {
      std::int32_t all;
      ties -= block_prefix(equal.count(), memory_->warp_counts[0], all);
    }
#pragma unroll
    for (int i = 0; i < most_words; ++i) {
#pragma unroll 1
      for (std::uint32_t left = equal.words[i]; ties > 0 && left != 0; left &= left - 1, --ties) {
        kept_.words[i] |= left & (0 - left);
        mass += mass_(verdict.key);
      }
    }
    return mass;
  }

  /// The masses of the row, and of what is kept where this thread keeps `mine` of the keys in doubt.
  __device__ __forceinline__ member_masses sum_masses(std::uint64_t mine) {
    mine = team_.warp_sum(mine);
    if (team_.lane() == 0) memory_->warp_masses[team_.warp()].kept = mine;
    __syncthreads();
    if (team_.thread() == 0) {
      memory_->doubt_mass = 0;
#pragma unroll
      for (int warp = 0; warp < select_warps; ++warp) memory_->doubt_mass += memory_->warp_masses[warp].kept;
    }
    team_.sync_own();
    member_masses sums{0, 0};
#pragma unroll 1
    for (int peer = 0; peer < team_.size(); ++peer) {
      const member_masses theirs = *team_.at_peer(&memory_->masses, peer);
      sums.all += theirs.all;
      sums.kept += theirs.kept + *team_.at_peer(&memory_->doubt_mass, peer);
    }
    return sums;
  }

  /// Finds the CTA's place in a list of what its threads have united.
  __device__ __forceinline__ void place_union(const bits& united) {
    team_.sync_own();  // peers have read what the last row told
    const std::uint32_t kept = __reduce_add_sync(~0u, static_cast<std::uint32_t>(united.count()));
    if (team_.lane() == 0) memory_->warp_kept[team_.warp()] = kept;
    __syncthreads();
    tell_masses();
    start_ = count_ = 0;
#pragma unroll 1
    for (int peer = 0; peer < team_.size(); ++peer) {
      const auto theirs = static_cast<std::int32_t>(*team_.at_peer(&memory_->kept, peer));
      start_ += peer < team_.rank() ? theirs : 0;
      count_ += theirs;
    }
  }

  __device__ int each_words() const { return 1 << keys_.log_words; }
  __device__ std::int32_t first_word() const { return team_.thread() << keys_.log_words; }
  __device__ std::uint32_t own_key(std::int32_t bit) const { return keys_.key(first_word() * 32 + bit); }

  /// The thread's words, of bits: the forced positions, and all. Few threads have any that are not plain.
  __device__ bits forced_words() const {
    bits words;
    const std::int32_t first = range.first + first_word() * 32;
    if (first >= forced.head && first + each_words() * 32 <= forced.tail) return words;
#pragma unroll
    for (int i = 0; i < most_words; ++i) words.words[i] = i < each_words() ? forced_bits(first_word() + i) : 0;
    return words;
  }
  __device__ bits whole_words() const {
    bits words;
#pragma unroll
    for (int i = 0; i < most_words; ++i)
      words.words[i] = i < each_words() ? bits_below(range.last - range.first - (first_word() + i) * 32) : 0;
    return words;
  }

  /// Of this thread's share of the forced keys, the mass of those that do not lie above the range.
  __device__ __forceinline__ std::uint64_t forced_mass(std::uint32_t high) const {
    std::uint64_t mass = 0;
    const auto add = [&](std::int32_t first, std::int32_t last) {
#pragma unroll 1
      for (std::int32_t item = first + team_.thread(); item < last; item += select_threads) {
        const std::uint32_t key = keys_.key(item - range.first);
        if (key < high) mass += mass_(key);
      }
    };
    add(range.first, forced.head < range.last ? forced.head : range.last);
    add(forced.tail > range.first ? forced.tail : range.first, range.last);
    return mass;
  }

  /// Splits a word of keys by the range, and adds their masses: all, and those above.
  __device__ __forceinline__ void split_word(std::int32_t word, key_range guess, split_masses& all,
                                             split_masses& above, std::uint32_t& heavy, std::uint32_t& inside) const {
    using weights = typename row_keys<T>::weights;
    constexpr int group = row_keys<T>::group;
    std::uint32_t not_below = 0;
    const std::int32_t first = keys_.place_of(word * 32);
#pragma unroll
    for (int i = 0; i < 32; i += group) {
      const weights part = *reinterpret_cast<const weights*>(keys_.base + (first ^ i));
#pragma unroll
      for (int j = 0; j < group; ++j) {
        const std::uint32_t key = row_keys<T>::key_of(part.x[j]);
        const split_mass mass(__uint_as_float(key), mass_.scale);
        all.add(mass);
        above.add_if(key >= guess.high, mass, heavy, 1u << (i + j));
        if (key >= guess.low) not_below |= 1u << (i + j);
      }
    }
    inside = not_below & ~heavy;
  }

  /// Adds the keys above the range to the kept and returns those inside it, counted; tells every CTA this one's masses.
  __device__ __forceinline__ bits sweep(key_range guess, const doubt_bins& bins) {
    split_masses all, above;
    bits inside, heavy;
    std::int32_t words = range.words - first_word();
    words = words > each_words() ? each_words() : words > 0 ? words : 0;
#pragma unroll 1
    for (std::int32_t word = 0; word < words; ++word) {
      std::uint32_t heavy_bits = 0;
      std::uint32_t inside_bits = 0;
      split_word(first_word() + word, guess, all, above, heavy_bits, inside_bits);
      heavy.set(word, heavy_bits);
      inside.set(word, inside_bits);
    }
    const std::uint64_t forced_too = team_.warp_sum(forced_mass(guess.high));
    const bits whole = whole_words();
#pragma unroll
    for (int i = 0; i < most_words; ++i) inside.words[i] &= whole.words[i] & ~kept_.words[i];  // 0 is a key, by count
    kept_ |= heavy;
    const member_masses mine{all.of_warp(words * 32), forced_too + above.of_warp(heavy.count())};
    const std::uint32_t kept = __reduce_add_sync(~0u, static_cast<std::uint32_t>(kept_.count()));
    if (team_.lane() == 0) {
      memory_->warp_masses[team_.warp()] = mine;
      memory_->warp_kept[team_.warp()] = kept;
    }
    list_doubts(inside);
    doubt_bins::adder counted{bins, memory_->bins.counts};
    each_doubt(inside, [&](std::uint32_t key) { counted.add(key); });
    counted.flush();
    tell_masses();
    return inside;
  }

  /// Tells every CTA the masses of this one and how many positions it keeps for sure, which its warps have left.
  __device__ __forceinline__ void tell_masses() {
    if (team_.warp() == 0) {
      const int from = team_.lane() % select_warps;
      member_masses block = memory_->warp_masses[from];
      std::uint32_t kept = memory_->warp_kept[from];
#pragma unroll
      for (int distance = 1; distance < select_warps; distance *= 2) {
        block.all += __shfl_xor_sync(~0u, block.all, distance);
        block.kept += __shfl_xor_sync(~0u, block.kept, distance);
        kept += __shfl_xor_sync(~0u, kept, distance);
      }
      if (team_.lane() == 0) {
        memory_->masses = block;
        memory_->kept = kept;
      }
    }
    team_.sync_own();
  }

  /// Writes the CTA's part of the list; the first CTA writes what belongs to the whole.
  __device__ __forceinline__ bool emit_list(std::ptrdiff_t group, const bits& kept, std::int32_t start,
                                            std::int32_t total) {
    team_.part();
    std::int32_t count;
    const std::int32_t at = block_prefix(kept.count(), memory_->warp_counts[1], count);
    const auto& positions = launch_.out.positions;
    std::int32_t* to = positions.data() + group * positions.stride(0) + start * positions.stride(1);
    write_list(kept, first_word() * 32, at, count, range, reinterpret_cast<std::uint16_t*>(keys_.base), to,
               positions.stride(1));
    if (team_.rank() == 0) report(group, total);
    team_.await_peers();
    return true;
  }

  __device__ __forceinline__ void report(std::ptrdiff_t group, std::int32_t count) const {
    const auto& out = launch_.out;
    pad_list(out, group, count);
    if (team_.thread() != 0) return;
    out.counts[group] = count;
    if (!out.status.empty()) out.status[group] = status;
    if (out.mass.empty()) return;
    out.mass[group] = count == items ? 1.0f : mass_share(memory_->chosen_mass, memory_->total_mass);
  }

  const select_launch<T>& launch_;
  select_team& team_;
  select_row_memory* memory_;
  row_keys<T> keys_;
  int turn_ = 0;
  row_mass mass_{};
  bits kept_;               // of the thread's words, and
  std::int32_t start_ = 0;  // where the CTA's part of the list starts, and
  std::int32_t count_ = 0;  // the whole list's length: of the last row
};

}  // namespace specattn::inline SPECATTN_CODE::detail
