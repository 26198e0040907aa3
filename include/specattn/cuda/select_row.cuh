// Rows in the shared memory of a cluster, one after the other, chosen from by a sample.
//
// While the row is read, every eighth weight is counted, which tells a narrow range of keys that should hold the
// threshold. One sweep then sums the row's mass and the mass above the range exactly and finds the keys inside it, a few
// in a hundred; the threshold is one of those. Three or four cluster barriers a row.
// A range that misses is noticed, since the masses are exact, and widened once. A cap is a threshold by count; the sample
// tells which of the two is the higher. Groups with a row that still misses, or that is not plain (invalid weights,
// subnormals), are left to select_group.
#pragma once

#include <cstddef>
#include <cstdint>

#include "select_part.cuh"
#include "select_row_sample.cuh"
#include "select_row_threshold.cuh"

namespace specattn::inline v0_1::detail {

template <storage T>
class select_row : group_part {
 public:
  /// `keys` holds the CTA's share of the row, and later its list.
  __device__ __forceinline__ select_row(const select_launch<T>& launch, select_team& team, std::ptrdiff_t group,
                                        select_row_memory& memory, std::uint32_t* keys)
      : group_part(launch, team, group, 1),
        launch_(launch),
        team_(team),
        memory_(memory),
        keys_(keys),
        each_words_((member_share(items, team.size()) / 32 + select_threads - 1) / select_threads) {}

  /// Returns false, in all CTAs of the cluster, where it has not made the list. Several rows are united.
  /// \pre with several rows no cap can bite, and no mass is asked for
  __device__ __forceinline__ bool run(std::ptrdiff_t group) {
    if (asked_by(top_p) == asked::forced_only) return false;
    const auto& weights = launch_.from.weights;
    const T* row = weights.data() + group * weights.stride(0);
    const std::ptrdiff_t rows = weights.extent(1);
    std::uint64_t united = 0;
    for (std::ptrdiff_t i = 0; i < rows; ++i, row += weights.stride(1)) {
      if (i > 0) __syncthreads();  // all have read what they keep of the last row
      if (!choose(row, weights.stride(2))) return false;
      united |= kept_;
    }
    if (rows > 1) place_union(united);
    return emit_list(group, united, start_, count_);
  }

 private:
  struct row_facts {
    std::uint32_t max_key;
    float sum;
  };

  /// Chooses from a row what the thread keeps of its words, and finds the CTA's place in the list. False where
  /// select_group has to.
  __device__ __forceinline__ bool choose(const T* row, std::ptrdiff_t stride) {
    const bool everything = asked_by(top_p) == asked::everything;
    row_facts facts = load(row, stride);
    team_.meet();
    facts = exchange(facts);
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
    take_out_forced();
    select_row_sample sample(team_, memory_, items);
    const float tails[2] = {(1.0f - top_p) * facts.sum, static_cast<float>(items - limit)};
#pragma unroll 1
    for (int i = everything ? 1 : 0; i <= (items > limit ? 1 : 0); ++i)
      sample.guess(i == 0 ? chosen_by::mass : chosen_by::count, tails[i], static_cast<float>(forced_count),
                   facts.max_key);
    return search(everything, facts.max_key);
  }

  /// Looks for the threshold of the mass or of the cap, whichever should be the higher, and then for the other where it
  /// is not; where a guess misses, in a wider range.
  __device__ __forceinline__ bool search(bool everything, std::uint32_t max_key) {
    chosen_by by = chosen_by::mass;
    key_range guess = everything ? key_range{0, 0} : select_row_sample::guessed(memory_, by);
    if (items > limit) {
      const key_range other = select_row_sample::guessed(memory_, chosen_by::count);
      if (everything || other.low > guess.low) {
        by = chosen_by::count;
        guess = other;
      }
    }
    select_row_threshold threshold(team_, memory_, mass_, max_key);
    bool wider = false;
    for (;;) {
      kept_ = forced_words();
      const std::uint64_t inside = sweep(guess, by, max_key);
      const auto for_each = [&](auto visit) { each_doubt(inside, visit); };
      if (threshold.find(guess, by, top_p, limit, for_each)) {
        if (resolve(inside, by, everything)) return true;
        by = by == chosen_by::mass ? chosen_by::count : chosen_by::mass;
        guess = select_row_sample::guessed(memory_, by);
        wider = false;
      } else {
        if (wider) return false;
        guess = select_row_sample::whole_bins(guess, max_key);
        wider = true;
      }
      team_.sync();  // peers have read what this CTA told
      memory_.clear_search(team_.thread());
      __syncthreads();
    }
  }

  /// Adds to the kept what the threshold keeps of the keys in doubt. False if the other threshold is the higher.
  __device__ __forceinline__ bool resolve(std::uint64_t inside, chosen_by by, bool everything) {
    const row_verdict verdict = memory_.verdict;
    if (verdict.total > limit) return false;
    start_ = verdict.start;
    count_ = verdict.total;
    std::uint64_t mine = 0;
    if (verdict.ties == row_verdict::all_ties && memory_.doubtful_count <= doubt_room) {
      mine = keep_listed(verdict.key);
    } else {
      const std::uint64_t sure = kept_;
      std::uint64_t equal = 0;
      for (std::uint64_t left = inside; left != 0; left &= left - 1) {
        const std::uint64_t bit = left & (0 - left);
        const std::uint32_t key = key_at(left);
        if (key > verdict.key) kept_ |= bit;
        if (key == verdict.key) equal |= bit;
      }
      keep_ties(equal, verdict.ties);
      for (std::uint64_t left = kept_ & ~sure; left != 0; left &= left - 1) mine += mass_(key_at(left));
    }
    if (by == chosen_by::mass || (everything && launch_.out.mass.empty())) {
      if (by == chosen_by::count) status |= selection_capped;
      return true;
    }
    const member_masses sums = sum_masses(mine);
    if (team_.thread() == 0) memory_.chosen_mass = sums.kept;
    if (!everything && sums.kept >= target_mass(top_p, sums.all)) return false;
    status |= selection_capped;
    return true;
  }

  /// visit(key) for the CTA's keys in doubt, `inside` of them this thread's; some thread visits each.
  template <class Visit>
  __device__ __forceinline__ void each_doubt(std::uint64_t inside, Visit visit) const {
    const std::uint32_t count = memory_.doubtful_count;
    if (count > doubt_room) {
      for (std::uint64_t left = inside; left != 0; left &= left - 1) visit(key_at(left));
      return;
    }
    for (std::uint32_t i = static_cast<std::uint32_t>(team_.thread()); i < count; i += select_threads)
      visit(keys_[place(memory_.doubtful[i])]);
  }

  /// Lists the CTA's keys in doubt, which lie unevenly with its threads.
  __device__ __forceinline__ void list_doubts(std::uint64_t inside) {
    const std::int32_t mine = __popcll(static_cast<long long>(inside));
    const std::int32_t end = warp_prefix(mine);
    std::uint32_t at = 0;
    if (team_.lane() == 31 && end > 0) at = atomicAdd(&memory_.doubtful_count, static_cast<std::uint32_t>(end));
    at = __shfl_sync(~0u, at, 31) + static_cast<std::uint32_t>(end - mine);
    const auto list = [&](std::uint32_t bits, std::int32_t before) {
      for (; bits != 0 && at < doubt_room; bits &= bits - 1, ++at)
        memory_.doubtful[at] = static_cast<std::uint16_t>(before + __ffs(static_cast<int>(bits)));
    };
    list(static_cast<std::uint32_t>(inside), first_word() * 32 - 1);
    list(static_cast<std::uint32_t>(inside >> 32), first_word() * 32 + 31);
    __syncthreads();
  }

  /// Keeps the listed keys from `least` on; returns the mass of those this thread has met.
  __device__ __forceinline__ std::uint64_t keep_listed(std::uint32_t least) {
    std::uint32_t* words = memory_.sample;  // peers have read it
    static_assert(sample_bins == 2 * select_threads);
    words[first_word()] = static_cast<std::uint32_t>(kept_);
    if (each_words_ > 1) words[first_word() + 1] = static_cast<std::uint32_t>(kept_ >> 32);
    __syncthreads();
    std::uint64_t mass = 0;
    for (std::uint32_t i = static_cast<std::uint32_t>(team_.thread()); i < memory_.doubtful_count;
         i += select_threads) {
      const std::uint32_t position = memory_.doubtful[i];
      const std::uint32_t key = keys_[place(static_cast<std::int32_t>(position))];
      if (key < least) continue;
      atomicOr(&words[position / 32], 1u << (position % 32));
      mass += mass_(key);
    }
    __syncthreads();
    kept_ = words[first_word()];
    if (each_words_ > 1) kept_ |= std::uint64_t{words[first_word() + 1]} << 32;
    return mass;
  }

  /// The masses of the row, and of what is kept where this thread keeps `mine` of the keys in doubt.
  __device__ __forceinline__ member_masses sum_masses(std::uint64_t mine) {
    mine = team_.warp_sum(mine);
    if (team_.lane() == 0) memory_.warp_masses[team_.warp()].kept = mine;
    __syncthreads();
    if (team_.thread() < team_.size()) {
      std::uint64_t block = 0;
#pragma unroll
      for (int warp = 0; warp < select_warps; ++warp) block += memory_.warp_masses[warp].kept;
      team_.at_peer(memory_.doubt_masses, team_.thread())[team_.rank()] = block;
    }
    team_.sync();
    member_masses sums{0, 0};
    for (int peer = 0; peer < team_.size(); ++peer) {
      sums.all += memory_.masses[peer].all;
      sums.kept += memory_.masses[peer].kept + memory_.doubt_masses[peer];
    }
    return sums;
  }

  /// Finds the CTA's place in a list of what its threads have united.
  __device__ __forceinline__ void place_union(std::uint64_t united) {
    team_.sync();  // peers have read what the last row told
    tell_masses({0, 0}, __reduce_add_sync(~0u, static_cast<std::uint32_t>(__popcll(static_cast<long long>(united)))));
    start_ = count_ = 0;
    for (int peer = 0; peer < team_.size(); ++peer) {
      const auto theirs = static_cast<std::int32_t>(memory_.kept[peer]);
      start_ += peer < team_.rank() ? theirs : 0;
      count_ += theirs;
    }
  }

  /// Where a position of this CTA lies: fours are permuted so that threads that read their words meet no bank conflict.
  __device__ std::int32_t place(std::int32_t i) const { return i ^ ((i >> (4 + each_words_) & 7) * 4); }
  __device__ std::int32_t first_word() const { return team_.thread() * each_words_; }
  __device__ std::uint32_t key_at(std::uint64_t bit) const {
    return keys_[place(first_word() * 32 + __ffsll(static_cast<long long>(bit)) - 1)];
  }

  /// The thread's words, of bits: the forced positions, and all.
  __device__ std::uint64_t forced_words() const {
    std::uint64_t words = forced_bits(first_word());
    if (each_words_ > 1) words |= std::uint64_t{forced_bits(first_word() + 1)} << 32;
    return words;
  }
  __device__ std::uint64_t whole_words() const {
    const std::int32_t left = range.last - range.first - first_word() * 32;
    std::uint64_t words = bits_below(left);
    if (each_words_ > 1) words |= std::uint64_t{bits_below(left - 32)} << 32;
    return words;
  }

  /// Reads the CTA's part of the row and counts the sample. Weights that are not valid have larger keys than any that
  /// are.
  __device__ __forceinline__ row_facts load(const T* row, std::ptrdiff_t stride) {
    struct alignas(4 * sizeof(T)) four_weights {
      T x[4];
    };
    memory_.clear(team_.thread());
    __syncthreads();
    row_facts facts{0, 0.0f};
    row += range.first * stride;
    const std::int32_t count = range.last - range.first;
    const bool vectors = stride == 1 && reinterpret_cast<std::uintptr_t>(row) % sizeof(four_weights) == 0;
    const auto take = [&](std::int32_t four, const T(&x)[4], int sample) {
      std::uint32_t key[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float weight = to_float(x[j]);
        key[j] = __float_as_uint(weight);
        facts.max_key = facts.max_key > key[j] ? facts.max_key : key[j];
        facts.sum += weight;
        if (j == sample) atomicAdd(&memory_.sample[key[j] >> sample_shift & (sample_bins - 1)], 1u);
      }
      *reinterpret_cast<uint4*>(keys_ + place(four * 4)) = {key[0], key[1], key[2], key[3]};
    };
    constexpr int ahead = 4;  // loads in flight
    std::int32_t four = team_.thread();
    if (vectors) {
      const auto* fours = reinterpret_cast<const four_weights*>(row);
      for (; (four + (ahead - 1) * select_threads) * 4 + 3 < count; four += ahead * select_threads) {
        four_weights part[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) part[i] = fours[four + i * select_threads];
#pragma unroll
        for (int i = 0; i < ahead; ++i) take(four + i * select_threads, part[i].x, i % 2 == 0 ? i : -1);
      }
    }
    for (; four < range.words * 8; four += select_threads) {
      T x[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (four * 4 + j < count) x[j] = row[(four * 4 + j) * stride];
      }
      take(four, x, four / select_threads % 2 == 0 && four * 4 < count ? 0 : -1);
    }
    return facts;
  }

  /// The largest key and the sum over the cluster, the same to the bit in every CTA.
  __device__ __forceinline__ row_facts exchange(row_facts mine) {
    const std::uint32_t most = __reduce_max_sync(~0u, mine.max_key);
    for (int distance = 16; distance > 0; distance /= 2) mine.sum += __shfl_xor_sync(~0u, mine.sum, distance);
    if (team_.lane() == 0) memory_.warps[team_.warp()] = {most, __float_as_uint(mine.sum)};
    __syncthreads();
    const auto join = [](row_facts all, uint2 part) {
      return row_facts{all.max_key > part.x ? all.max_key : part.x, all.sum + __uint_as_float(part.y)};
    };
    if (team_.thread() < team_.size()) {
      row_facts block{0, 0.0f};
#pragma unroll
      for (int warp = 0; warp < select_warps; ++warp) block = join(block, memory_.warps[warp]);
      team_.at_peer(memory_.members[turn_], team_.thread())[team_.rank()] = {block.max_key,
                                                                             __float_as_uint(block.sum)};
    }
    team_.sync();
    row_facts all{0, 0.0f};
    team_.each_peer([&](int peer) { all = join(all, memory_.members[turn_][peer]); });
    turn_ ^= 1;  // peers may be a row ahead
    return all;
  }

  /// Takes the forced keys out of the row.
  __device__ __forceinline__ void take_out_forced() {
    forced_mass_ = 0;
    take_out(range.first, forced.head < range.last ? forced.head : range.last);
    take_out(forced.tail > range.first ? forced.tail : range.first, range.last);
  }
  __device__ __forceinline__ void take_out(std::int32_t first, std::int32_t last) {
    for (std::int32_t item = first + team_.thread(); item < last; item += select_threads) {
      std::uint32_t& key = keys_[place(item - range.first)];
      forced_mass_ += mass_(key);
      key = 0;
    }
  }

  /// Splits a word of keys by the range, and adds their masses: all, and those above.
  __device__ __forceinline__ void split_word(std::int32_t word, key_range guess, split_masses& all,
                                             split_masses& above, std::uint32_t& heavy, std::uint32_t& inside) const {
    std::uint32_t not_below = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(keys_)[place(word * 32 + i * 4) / 4];
      const std::uint32_t key[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const split_mass mass(__uint_as_float(key[j]), mass_.scale);
        all.add(mass);
        above.add_if(key[j] >= guess.high, mass, heavy, 1u << (i * 4 + j));
        if (key[j] >= guess.low) not_below |= 1u << (i * 4 + j);
      }
    }
    inside = not_below & ~heavy;
  }

  /// Adds the keys above the range to the kept and returns those inside it, counted; tells every CTA this one's masses.
  __device__ __forceinline__ std::uint64_t sweep(key_range guess, chosen_by by, std::uint32_t max_key) {
    split_masses all, above;
    std::uint64_t inside = 0;
    std::uint64_t heavy = 0;
    std::int32_t words = range.words - first_word();
    words = words > each_words_ ? each_words_ : words > 0 ? words : 0;
    for (std::int32_t word = 0; word < words; ++word) {
      std::uint32_t heavy_bits = 0;
      std::uint32_t inside_bits = 0;
      split_word(first_word() + word, guess, all, above, heavy_bits, inside_bits);
      heavy |= std::uint64_t{heavy_bits} << (word * 32);
      inside |= std::uint64_t{inside_bits} << (word * 32);
    }
    const std::uint64_t forced_mass = team_.warp_sum(forced_mass_);
    inside &= whole_words() & ~kept_;  // by count a key of 0 is a key
    kept_ |= heavy;
    const member_masses mine{forced_mass + all.of_warp(words * 32),
                             forced_mass + above.of_warp(__popcll(static_cast<long long>(heavy)))};
    const auto bins = doubt_bins::of(guess, mass_, max_key, by);
    doubt_bins::adder counted{bins, memory_.counts[0]};
    list_doubts(inside);
    each_doubt(inside, [&](std::uint32_t key) { counted.add(key); });
    counted.flush();
    tell_masses(mine, __reduce_add_sync(~0u, static_cast<std::uint32_t>(__popcll(static_cast<long long>(kept_)))));
    return inside;
  }

  /// Tells every CTA the masses of this one and how many positions it keeps for sure, of which these are a warp's.
  __device__ __forceinline__ void tell_masses(member_masses mine, std::uint32_t kept) {
    if (team_.lane() == 0) {
      memory_.warp_masses[team_.warp()] = mine;
      memory_.warp_kept[team_.warp()] = kept;
    }
    __syncthreads();
    if (team_.thread() < team_.size()) {
      member_masses block{0, 0};
      std::uint32_t block_kept = 0;
#pragma unroll
      for (int warp = 0; warp < select_warps; ++warp) {
        block.all += memory_.warp_masses[warp].all;
        block.kept += memory_.warp_masses[warp].kept;
        block_kept += memory_.warp_kept[warp];
      }
      team_.at_peer(memory_.masses, team_.thread())[team_.rank()] = block;
      team_.at_peer(memory_.kept, team_.thread())[team_.rank()] = block_kept;
    }
    team_.sync();
  }

  /// Of the row's keys on the threshold this CTA keeps the first `ties`.
  __device__ __forceinline__ void keep_ties(std::uint64_t equal, std::int32_t ties) {
    if (ties == row_verdict::all_ties) {
      kept_ |= equal;
      return;
    }
    std::int32_t before;
    select_count_scan(memory_.count_scan).ExclusiveSum(__popcll(static_cast<long long>(equal)), before);
    __syncthreads();
    for (; before < ties && equal != 0; ++before, equal &= equal - 1) kept_ |= equal & (0 - equal);
  }

  /// Writes the CTA's part of the list; the first CTA writes what belongs to the whole.
  __device__ __forceinline__ bool emit_list(std::ptrdiff_t group, std::uint64_t kept, std::int32_t start,
                                            std::int32_t total) {
    std::int32_t at, count;
    select_count_scan(memory_.count_scan).ExclusiveSum(__popcll(static_cast<long long>(kept)), at, count);
    const auto& positions = launch_.out.positions;
    const std::ptrdiff_t step = select_threads * positions.stride(1);
    std::int32_t* to =
        positions.data() + group * positions.stride(0) + (start + team_.thread()) * positions.stride(1);
    if (count == range.last - range.first) {
      for (std::int32_t i = range.first + team_.thread(); i < range.last; i += select_threads, to += step) *to = i;
    } else {
      // Staged, so that memory is written in whole lines.
      const std::int32_t first = range.first + first_word() * 32;
      std::uint32_t* staged = keys_ + at;
      stage_word(static_cast<std::uint32_t>(kept), first, staged);
      stage_word(static_cast<std::uint32_t>(kept >> 32), first + 32, staged);
      __syncthreads();
#pragma unroll 4
      for (std::int32_t i = team_.thread(); i < count; i += select_threads, to += step)
        *to = static_cast<std::int32_t>(keys_[i]);
    }
    if (team_.rank() == 0) report(group, total);
    return true;
  }

  /// Stages the positions of a word's bits. No loop over the bits: lanes have different numbers.
  __device__ __forceinline__ static void stage_word(std::uint32_t bits, std::int32_t first, std::uint32_t*& staged) {
#pragma unroll
    for (std::int32_t i = 0; i < 32; ++i) {
      if ((bits & 1u << i) != 0) *staged++ = static_cast<std::uint32_t>(first + i);
    }
  }

  __device__ __forceinline__ void report(std::ptrdiff_t group, std::int32_t count) const {
    const auto& out = launch_.out;
    const std::ptrdiff_t stride = out.positions.stride(1);
    std::int32_t* list = out.positions.data() + group * out.positions.stride(0);
    const std::ptrdiff_t padded = padded_count(count, out.capacity());
    for (std::ptrdiff_t i = count + team_.thread(); i < padded; i += select_threads) list[i * stride] = -1;
    if (team_.thread() != 0) return;
    out.counts[group] = count;
    if (!out.status.empty()) out.status[group] = status;
    if (out.mass.empty()) return;
    out.mass[group] = count == items ? 1.0f : mass_share(memory_.chosen_mass, memory_.total_mass);
  }

  const select_launch<T>& launch_;
  select_team& team_;
  select_row_memory& memory_;
  std::uint32_t* keys_;
  int each_words_;  // of a thread: 1 or 2
  int turn_ = 0;
  row_mass mass_{};
  std::uint64_t forced_mass_ = 0;  // of the forced keys this thread took out
  std::uint64_t kept_ = 0;         // of the thread's words, and
  std::int32_t start_ = 0;         // where the CTA's part of the list starts, and
  std::int32_t count_ = 0;         // the whole list's length: of the last row
};

}  // namespace specattn::inline v0_1::detail
