// A lone row in the shared memory of a cluster, chosen from by a sample.
//
// While the row is read, every eighth weight is counted, which tells a narrow range of keys that should hold the
// threshold. One sweep then sums the row's mass and the mass above the range exactly and finds the keys inside it, a few
// in a hundred; the threshold is one of those. Three or four cluster barriers a row.
// A range that misses is noticed, since the masses are exact. Such rows, and those that are not plain (invalid weights,
// subnormals, a cap that bites), are left to select_group.
#pragma once

#include <cstddef>
#include <cstdint>

#include "select_part.cuh"
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

  /// Returns false, in all CTAs of the cluster, where it has not made the list.
  __device__ __forceinline__ bool run(std::ptrdiff_t group) {
    const asked wish = asked_by(top_p);
    if (wish == asked::forced_only) return false;
    const auto& weights = launch_.from.weights;
    row_facts facts = load(weights.data() + group * weights.stride(0), weights.stride(2));
    team_.meet();
    facts = exchange(facts);
    if (facts.max_key > largest_finite_bits || needs_lift(facts.max_key) || !(facts.sum <= 3e38f)) return false;
    mass_ = row_mass{mass_scale(facts.max_key)};
    std::uint64_t kept = forced_words();
    if (wish == asked::everything) {
      if (items > limit) return false;
      return emit_list(group, whole_words(), range.first, items);
    }
    key_range guess = guess_range((1.0f - top_p) * facts.sum, facts.max_key);
    select_row_threshold threshold(team_, memory_, mass_, facts.max_key);
    std::uint64_t inside = sweep(guess, facts.max_key, kept);
    const auto for_each = [&](auto visit) {
      for (std::uint64_t left = inside; left != 0; left &= left - 1) visit(key_at(left));
    };
    if (!threshold.find(guess, top_p, for_each)) {
      guess = whole_bins(guess, facts.max_key);
      kept = forced_words();
      inside = sweep(guess, facts.max_key, kept);
      if (!threshold.find(guess, top_p, for_each)) return false;
    }
    const row_verdict verdict = memory_.verdict;
    if (verdict.total > limit) return false;
    std::uint64_t equal = 0;
    for (; inside != 0; inside &= inside - 1) {
      const std::uint64_t bit = inside & (0 - inside);
      const std::uint32_t key = key_at(bit);
      if (key > verdict.key) kept |= bit;
      if (key == verdict.key) equal |= bit;
    }
    keep_ties(equal, verdict.ties, kept);
    return emit_list(group, kept, verdict.start, verdict.total);
  }

 private:
  static constexpr int sampled_bins = sample_bins / select_threads;  // of a thread
  static_assert(sampled_bins == 2);
  static constexpr std::uint32_t reach = (1u << 25) - 1;  // from a range's middle: doubt_bins hold eight octaves
  struct row_facts {
    std::uint32_t max_key;
    float sum;
  };

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
      team_.at_peer(memory_.members, team_.thread())[team_.rank()] = {block.max_key, __float_as_uint(block.sum)};
    }
    team_.sync();
    row_facts all{0, 0.0f};
#pragma unroll
    for (int peer = 0; peer < select_max_cluster; ++peer) {
      if (peer < team_.size()) all = join(all, memory_.members[peer]);
    }
    return all;
  }

  /// The keys that should hold the threshold: where the sampled mass of lighter ones is `tail`, to within three
  /// standard deviations. Takes the forced keys out of the row, too.
  __device__ __forceinline__ key_range guess_range(float tail, std::uint32_t max_key) {
    forced_mass_ = 0;
    take_out(range.first, forced.head < range.last ? forced.head : range.last);
    take_out(forced.tail > range.first ? forced.tail : range.first, range.last);
    float mass[sampled_bins];
    merge_sample(mass);
    float below;
    select_sample_scan(memory_.sample_scan).ExclusiveSum(mass[0] + mass[1], below);
    const float rate = static_cast<float>(items) / static_cast<float>(memory_.sampled);
    key_range guess{0, max_key + 1};
    std::uint32_t middle = max_key;
    below *= rate;
#pragma unroll
    for (std::uint32_t i = 0; i < sampled_bins; ++i) {
      const std::uint32_t edge = first_bin() + (i << sample_shift);
      const float here = mass[i] * rate;
      const float margin = 3.0f * sqrtf(rate * __uint_as_float(edge + (1u << sample_shift)) * tail);
      constexpr auto width = static_cast<float>(1u << sample_shift);
      if (below + margin < tail) {
        const float part = (tail - margin - below) / here;
        guess.low = edge + (part < 1.0f ? static_cast<std::uint32_t>(part * width) : 1u << sample_shift);
      }
      if (below + here > tail + margin) {
        const float part = (tail + margin - below) / here;
        const std::uint32_t end = edge + (part > 0.0f ? static_cast<std::uint32_t>(part * width) + 1 : 0);
        guess.high = guess.high < end ? guess.high : end;
      }
      if (below + here > tail && edge < middle) middle = edge;
      below += here;
    }
    guess.low = __reduce_max_sync(~0u, guess.low);
    guess.high = __reduce_min_sync(~0u, guess.high);
    middle = __reduce_min_sync(~0u, middle);
    if (team_.lane() == 0) {
      atomicMax(&memory_.guess.low, guess.low);
      atomicMin(&memory_.guess.high, guess.high);
      atomicMin(&memory_.middle, middle);
    }
    __syncthreads();
    guess = memory_.guess;
    middle = memory_.middle;
    if (guess.high - middle > reach) guess.high = middle + reach;
    if (guess.low > guess.high) guess.low = guess.high;  // nothing: a miss
    if (guess.width() > 2 * reach) guess.low = guess.high - 2 * reach;
    return guess;
  }

  /// The first of the thread's bins of the sample, as a key.
  __device__ std::uint32_t first_bin() const {
    return static_cast<std::uint32_t>(team_.thread()) * sampled_bins << sample_shift;
  }

  /// The cluster's sampled mass in the thread's bins; also counts what was sampled.
  __device__ __forceinline__ void merge_sample(float (&mass)[sampled_bins]) {
    std::uint32_t counts[sampled_bins] = {};
#pragma unroll
    for (int peer = 0; peer < select_max_cluster; ++peer) {
      if (peer >= team_.size()) continue;
      const uint2 part = reinterpret_cast<const uint2*>(team_.at_peer(memory_.sample, peer))[team_.thread()];
      counts[0] += part.x;
      counts[1] += part.y;
    }
    const std::uint32_t sampled = __reduce_add_sync(~0u, counts[0] + counts[1]);
    if (team_.lane() == 0) atomicAdd(&memory_.sampled, sampled);
#pragma unroll
    for (std::uint32_t i = 0; i < sampled_bins; ++i) {
      const float middle = __uint_as_float(first_bin() + (i << sample_shift) + (1u << (sample_shift - 1)));
      mass[i] = counts[i] > 0 ? static_cast<float>(counts[i]) * middle : 0.0f;
    }
  }

  /// For a second try: all of the sample's bins that a range touches. Keys that are tied leave gaps in them, where the
  /// guess took them to be evenly spread.
  __device__ __forceinline__ key_range whole_bins(key_range guess, std::uint32_t max_key) {
    team_.sync();  // peers have read this CTA's counts
    memory_.counts[0][team_.thread()] = {0, 0};
    if (team_.thread() == 0) memory_.mine = {0, 0};
    __syncthreads();
    const std::uint32_t low = guess.low >> sample_shift << sample_shift;
    const std::uint32_t end = ((guess.high >> sample_shift) + 1) << sample_shift;
    const std::uint32_t high = end < max_key + 1 ? end : max_key + 1;
    return {high - low > 2 * reach ? high - 2 * reach : low, high};
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
    const auto width = static_cast<std::int32_t>(guess.width());
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(keys_)[place(word * 32 + i * 4) / 4];
      const std::uint32_t key[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float weight = __uint_as_float(key[j]);
        const float high = fmaf(weight, mass_.scale, split_masses::upper);
        const float rest = fmaf(weight, mass_.scale, split_masses::upper - high) + split_masses::lower;
        all.parts[0] += __float_as_uint(high);
        all.parts[1] += __float_as_uint(rest);
        const auto distance = static_cast<std::int32_t>(key[j] - guess.low);
        if (distance >= width) {
          above.parts[0] += __float_as_uint(high);
          above.parts[1] += __float_as_uint(rest);
          heavy |= 1u << (i * 4 + j);
        }
        if (static_cast<std::uint32_t>(distance) < static_cast<std::uint32_t>(width)) inside |= 1u << (i * 4 + j);
      }
    }
  }

  /// Adds the keys above the range to `kept` and returns those inside it, counted; tells every CTA this one's masses.
  __device__ __forceinline__ std::uint64_t sweep(key_range guess, std::uint32_t max_key, std::uint64_t& kept) {
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
    kept |= heavy;
    const member_masses mine{forced_mass + all.of_warp(words * 32),
                             forced_mass + above.of_warp(__popcll(static_cast<long long>(heavy)))};
    const auto bins = doubt_bins::of(guess, mass_, max_key);
    doubt_bins::adder counted{bins, memory_.counts[0]};
    for (std::uint64_t left = inside; left != 0; left &= left - 1) counted.add(key_at(left));
    counted.flush();
    tell_masses(mine, __reduce_add_sync(~0u, static_cast<std::uint32_t>(__popcll(static_cast<long long>(kept)))));
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
  __device__ __forceinline__ void keep_ties(std::uint64_t equal, std::int32_t ties, std::uint64_t& kept) {
    if (ties == row_verdict::all_ties) {
      kept |= equal;
      return;
    }
    std::int32_t before;
    select_count_scan(memory_.count_scan).ExclusiveSum(__popcll(static_cast<long long>(equal)), before);
    __syncthreads();
    for (; before < ties && equal != 0; ++before, equal &= equal - 1) kept |= equal & (0 - equal);
  }

  /// Writes the CTA's part of the list; the first CTA writes what belongs to the whole.
  __device__ __forceinline__ bool emit_list(std::ptrdiff_t group, std::uint64_t kept, std::int32_t start,
                                            std::int32_t total) {
    std::int32_t at, count;
    select_count_scan(memory_.count_scan).ExclusiveSum(__popcll(static_cast<long long>(kept)), at, count);
    // Staged, so that memory is written in whole lines; permuted, so that dense words meet no bank conflicts.
    const auto staged = [&](std::int32_t i) -> std::uint32_t& { return keys_[i ^ (i / 256 % 32)]; };
    const std::int32_t before_first = range.first + first_word() * 32 - 1;
    const auto stage = [&](std::uint32_t bits, std::int32_t before) {
      for (; bits != 0; bits &= bits - 1, ++at)
        staged(at) = static_cast<std::uint32_t>(before + __ffs(static_cast<int>(bits)));
    };
    stage(static_cast<std::uint32_t>(kept), before_first);
    stage(static_cast<std::uint32_t>(kept >> 32), before_first + 32);
    __syncthreads();
    const auto& positions = launch_.out.positions;
    std::int32_t* to =
        positions.data() + group * positions.stride(0) + (start + team_.thread()) * positions.stride(1);
    const std::ptrdiff_t step = select_threads * positions.stride(1);
    static_assert(select_threads == 256);
    std::int32_t flip = 0;
    for (std::int32_t i = team_.thread(); i < count; i += select_threads, ++flip, to += step)
      *to = static_cast<std::int32_t>(keys_[i ^ (flip & 31)]);
    if (team_.rank() == 0) report(group, total);
    return true;
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
  row_mass mass_{};
  std::uint64_t forced_mass_ = 0;  // of the forced keys this thread took out
};

}  // namespace specattn::inline v0_1::detail
