// One group's list, made by one cluster: what cpu/select.hpp does with one thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "held_row.cuh"
#include "list.cuh"
#include "problem.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

template <storage T>
class select_group : group_part {
 public:
  __device__ __forceinline__ select_group(const select_launch<T>& launch, select_team& team, std::ptrdiff_t group,
                                          select_scratch_view scratch)
      : group_part(launch, team, group, launch.rule.page_size),
        from_(launch.from),
        rule_(launch.rule),
        out_(launch.out),
        team_(team),
        scratch_(scratch) {}

  __device__ __forceinline__ void run(std::ptrdiff_t group) {
    start();
    team_.meet();
    const std::ptrdiff_t rows = from_.weights.extent(1);
    const bool one_choice = rows == 1 || rule_.rows == combine::unite;
    const bool combined = scratch_.scores != nullptr;
    std::int32_t scores = last_position_ - first_position_;
    if (scratch_.own) scores = (scores + 3) / 4 * 4;  // a held row has whole fours
    for (std::int32_t i = team_.thread(); combined && i < scores; i += select_threads) scores_here()[i] = 0;
    __syncthreads();
    for (std::ptrdiff_t row = 0; row < rows; ++row) {
      if (scratch_.own && combined && !one_choice) {
        take_held_row(group, row);
      } else {
        take_row(group, row, one_choice, combined);
      }
    }
    if (combined) finish_rows(one_choice);
    std::uint64_t before, count;
    count_kept(before, count);
    if (count > static_cast<std::uint64_t>(limit)) {
      status |= selection_capped;
      cut(rows);
      count_kept(before, count);
    }
    report(group, rows, static_cast<std::int32_t>(count));
    emit_list(group, before, static_cast<std::int32_t>(count));
  }

 private:
  __device__ __forceinline__ std::int32_t page_size() const { return rule_.page_size; }
  __device__ __forceinline__ bool paged() const { return page_size() > 1; }

  __device__ __forceinline__ void start() {
    first_position_ = position_of(range.first);
    last_position_ = position_of(range.last);
    for (std::int32_t word = team_.thread(); word < range.words; word += select_threads)
      scratch_.kept[word_at(word)] = forced_bits(word);
    __syncthreads();
  }

  __device__ std::int32_t position_of(std::int32_t item) const {
    const std::int64_t position = std::int64_t{item} * page_size();
    return static_cast<std::int32_t>(position < length ? position : length);
  }
  /// Where a word of this CTA lies.
  __device__ std::int32_t word_at(std::int32_t word) const { return (scratch_.own ? 0 : range.first / 32) + word; }
  __device__ __forceinline__ bool is_kept(std::int32_t item) const {
    return (scratch_.kept[word_at((item - range.first) / 32)] >> (item % 32) & 1u) != 0;
  }

  __device__ __forceinline__ void take_row(std::ptrdiff_t group, std::ptrdiff_t row, bool choose_now, bool combined) {
    const T* weights = from_.weights.data() + group * from_.weights.stride(0) + row * from_.weights.stride(1);
    const item_range positions{first_position_, last_position_, (last_position_ - first_position_ + 31) / 32};
    std::uint32_t facts[2];
    row_.load(weights, from_.weights.stride(2), positions, facts);
    std::uint32_t max_key = facts[0];
    if (team_.largest_and_any(max_key, facts[1] != 0)) status |= selection_invalid_weight;
    if (needs_lift(max_key) && max_key != 0) {
      row_.lift(positions);
      max_key = lift_key(max_key);
    }
    mass_ = row_mass{mass_scale(max_key)};
    if (!choose_now) {
      std::uint64_t sum[1] = {0};
      row_.for_each(positions, [&](std::int32_t, std::int32_t, std::uint32_t key, bool) { sum[0] += mass_(key); });
      team_.reduce(sum, plus{});
      total_ = sum[0];
    } else if (!paged()) {
      choose(row_, max_key, whole_sums<row_mass>{mass_});
    } else {
      sum_pages([&](std::int32_t position) { return mass_(row_.key(position)); });
      choose(scored_items{scratch_.pages + range.first}, largest(scratch_.pages + range.first),
             whole_sums<score_mass>{});
    }
    if (combined) combine_row(positions);
  }

  /// As take_row(), of a row that is only to be combined, read once.
  __device__ __forceinline__ void take_held_row(std::ptrdiff_t group, std::ptrdiff_t row) {
    const T* weights = from_.weights.data() + group * from_.weights.stride(0) + row * from_.weights.stride(1);
    const std::ptrdiff_t stride = from_.weights.stride(2);
    const std::int32_t count = last_position_ - first_position_;
    held_row<T> held;
    std::uint32_t facts[2];
    held.load(weights + first_position_ * stride, stride, count, facts);
    std::uint32_t max_key = facts[0];
    if (team_.largest_and_any(max_key, facts[1] != 0)) status |= selection_invalid_weight;
    if (needs_lift(max_key) && max_key != 0) {
      held.lift();
      max_key = lift_key(max_key);
    }
    mass_ = row_mass{mass_scale(max_key)};
    std::uint64_t sum[1] = {0};
    held.for_each(count, [&](std::int32_t, std::uint32_t key) { sum[0] += mass_(key); });
    team_.reduce(sum, plus{});
    const float scale = share_scale(mass_.scale, sum[0]);
    const bool larger = rule_.rows == combine::max;
    held.for_each(count, [&](std::int32_t i, std::uint32_t key) {
      const std::uint64_t share = weight_share(key, scale);
      std::uint64_t& score = scores_here()[i];  // the same thread's in every row
      score = larger ? (score < share ? share : score) : score + share;
    });
  }

  __device__ __forceinline__ void combine_row(item_range positions) {
    const float scale = share_scale(mass_.scale, total_);
    row_.for_each(positions, [&](std::int32_t, std::int32_t position, std::uint32_t key, bool valid) {
      if (!valid) return;
      const std::uint64_t share = weight_share(key, scale);
      std::uint64_t& score = scores_here()[position - first_position_];
      score = rule_.rows == combine::max ? (score < share ? share : score) : score + share;
    });
    __syncthreads();
  }

  /// The scores of this CTA's positions.
  __device__ std::uint64_t* scores_here() const { return scratch_.scores + (scratch_.own ? 0 : first_position_); }

  /// pages[item] = the sum of its positions' masses; a warp a page.
  template <class Mass>
  __device__ __forceinline__ void sum_pages(Mass mass) {
    for (std::int32_t page = range.first + team_.warp(); page < range.last; page += select_warps) {
      std::uint64_t sum = 0;
      for (std::int32_t i = position_of(page) + team_.lane(); i < position_of(page + 1); i += 32) sum += mass(i);
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (team_.lane() == 0) scratch_.pages[page] = sum;
    }
    __syncthreads();
  }
  /// The largest score; `scores` are those of this CTA's items.
  __device__ std::uint64_t largest(const std::uint64_t* scores) {
    std::uint64_t most[1] = {0};
    for (std::int32_t i = team_.thread(); i < range.last - range.first; i += select_threads)
      most[0] = most[0] < scores[i] ? scores[i] : most[0];
    team_.reduce(most, greater{});
    return most[0];
  }

  /// Folds the combined rows into items, and selects from them unless the rows did.
  __device__ __forceinline__ void finish_rows(bool chosen) {
    __syncthreads();
    if (paged()) sum_pages([&](std::int32_t position) { return scores_here()[position - first_position_]; });
    if (!chosen) {
      choose(scored_items{final_scores()}, largest(final_scores()), whole_sums<score_mass>{});
      return;
    }
    std::uint64_t sum[1] = {0};
    for (std::int32_t i = team_.thread(); i < range.last - range.first; i += select_threads)
      sum[0] += final_scores()[i];
    team_.reduce(sum, plus{});
    total_ = sum[0];
  }
  /// What this CTA's items are chosen by.
  __device__ const std::uint64_t* final_scores() const {
    return paged() ? scratch_.pages + range.first : scores_here();
  }

  /// Counts the items that counts(item) names into the first histogram; returns the mass of the others.
  template <class Key, class Source, class Bins, class Sums, class Counts>
  __device__ __forceinline__ std::uint64_t count_items(const Source& source, const Bins& bins, const Sums& sums,
                                                       Counts counts) {
    using word = typename Sums::word;
    team_.template clear<word>(Sums::arrays, bins.count());
    word* counted = reinterpret_cast<word*>(team_.memory().sums);
    std::uint64_t others[1] = {0};
    source.for_each(range, [&](std::int32_t, std::int32_t item, Key key, bool valid) {
      if (!valid) return;
      if (counts(item)) {
        sums.add(counted, bins.of(key), key);
      } else {
        others[0] += sums.mass(key);
      }
    });
    merge_bins(team_, sums, bins, others);
    return others[0];
  }

  /// Adds the items that one row (or the combined rows) keeps, and sets its mass.
  template <class Source, class Key, class Sums>
  __device__ __forceinline__ void choose(const Source& source, Key largest, const Sums& sums) {
    const asked wish = asked_by(top_p);
    const auto bins = first_bins(largest);
    const auto allowed = [&](std::int32_t item) { return !forced.holds(item); };
    const std::uint64_t forced_mass = count_items<Key>(source, bins, sums, allowed);
    chosen_mass_ = forced_mass;
    const std::uint64_t need = find_bin(team_, bins, [&](std::uint64_t others) {
      total_ = forced_mass + others;
      if (wish != asked::target) return std::uint64_t{0};
      const std::uint64_t target = target_mass(top_p, total_);
      return target > forced_mass ? target - forced_mass : 0;
    });
    if (wish == asked::everything) {
      mark(source, found_threshold<Key>{{0, ~std::uint64_t{0}, 0}, 0}, [](std::int32_t) { return true; });
      chosen_mass_ = total_;
    }
    if (need == 0) return;
    const found_threshold<Key> found = rule_.method == threshold_method::bisection
                                           ? bisect(team_, source, range, largest, need, sums.mass, allowed)
                                           : search<Key>(team_, source, range, bins, need, sums, allowed);
    mark(source, found, allowed);
    chosen_mass_ += found.least.mass;
  }
  /// Of keys 2048 bins cover 32 octaves, 64 bins each; of scores all 64.
  __device__ static key_bins<std::uint32_t> first_bins(std::uint32_t largest) {
    return key_bins<std::uint32_t>::between(0, largest, select_bins, 17);
  }
  __device__ static octave_bins first_bins(std::uint64_t largest) { return octave_bins::up_to(largest); }

  /// Keeps what the threshold keeps among the allowed items.
  template <class Source, class Key, class Allowed>
  __device__ __forceinline__ void mark(const Source& source, found_threshold<Key> found, Allowed allowed) {
    const Key least = found.least.key;
    if (found.least.ties >= found.equals) {  // no ties to break; what is not allowed is kept anyway
      source.for_each(range, [&](std::int32_t word, std::int32_t, Key key, bool valid) {
        const std::uint32_t above = __ballot_sync(~0u, valid && key >= least);
        if (team_.lane() == 0) scratch_.kept[word_at(word)] |= above;
      });
      __syncthreads();
      return;
    }
    source.for_each(range, [&](std::int32_t word, std::int32_t item, Key key, bool valid) {
      const std::uint32_t above = __ballot_sync(~0u, valid && key > least);
      const std::uint32_t equal = __ballot_sync(~0u, valid && key == least && allowed(item));
      if (team_.lane() > 0) return;
      scratch_.kept[word_at(word)] |= above;
      scratch_.equal[word_at(word)] = equal;
    });
    __syncthreads();
    keep_ties(found.least.ties);
  }

  /// Keeps the first `ties` of the items that `equal` marks.
  __device__ __forceinline__ void keep_ties(std::uint64_t ties) {
    std::uint64_t before, total;
    count_bits(scratch_.equal, before, total);
    in_order(scratch_.equal, before, [&](std::int32_t word, std::uint32_t bits, std::uint64_t rank) {
      if (word >= range.words || rank >= ties) return;
      std::uint32_t rest = bits;
      for (std::uint64_t room = ties - rank; room > 0 && rest != 0; --room) rest &= rest - 1;
      scratch_.kept[word_at(word)] |= bits ^ rest;
    });
  }

  /// Where the kept items exceed the limit, keeps the first of them: forced before others, heavier before lighter,
  /// smaller before larger.
  __device__ __forceinline__ void cut(std::ptrdiff_t rows) {
    if (rows > 1 || paged()) {
      cut_items(scored_items{final_scores()}, largest(final_scores()));
    } else {
      std::uint64_t most[1] = {0};
      row_.for_each(range, [&](std::int32_t, std::int32_t, std::uint32_t key, bool) {
        if (key > most[0]) most[0] = key;
      });
      team_.reduce(most, greater{});
      cut_items(row_, static_cast<std::uint32_t>(most[0]));
    }
  }

  template <class Source, class Key>
  __device__ __forceinline__ void cut_items(const Source& source, Key largest) {
    const std::int32_t forced_count = forced.head + (items - forced.tail);
    const bool among_forced = forced_count > limit;
    const auto allowed = [&](std::int32_t item) { return is_kept(item) && forced.holds(item) == among_forced; };
    const std::int32_t room = among_forced ? limit : limit - forced_count;
    found_threshold<Key> found{{static_cast<Key>(~Key{0}), 0, 0}, 1};
    if (room > 0) {
      const auto bins = first_bins(largest);
      const item_counts sums;
      count_items<Key>(source, bins, sums, allowed);
      const std::uint64_t need =
          find_bin(team_, bins, [&](std::uint64_t) { return static_cast<std::uint64_t>(room); });
      found = search<Key>(team_, source, range, bins, need, sums, allowed);
    }
    // The bits that say who is allowed become the result: an item that is neither chosen nor forced loses its own.
    const bool all_ties = found.least.ties >= found.equals;
    source.for_each(range, [&](std::int32_t word, std::int32_t item, Key key, bool valid) {
      const bool candidate = valid && key >= found.least.key && allowed(item);
      const bool stays = valid && !among_forced && forced.holds(item);
      const std::uint32_t above = __ballot_sync(~0u, stays || (candidate && (all_ties || key > found.least.key)));
      const std::uint32_t equal = __ballot_sync(~0u, candidate && !all_ties && key == found.least.key);
      __syncwarp();  // all lanes have read the word that the first now writes
      if (team_.lane() > 0) return;
      scratch_.kept[word_at(word)] = above;
      scratch_.equal[word_at(word)] = equal;
    });
    __syncthreads();
    if (!all_ties) keep_ties(found.least.ties);
  }

  /// Bits of this CTA's words: how many lie in CTAs of lower rank, and how many in all.
  __device__ __forceinline__ void count_bits(const std::uint32_t* words, std::uint64_t& before,
                                             std::uint64_t& total) {
    std::uint64_t mine = 0;
    for (std::int32_t word = team_.thread(); word < range.words; word += select_threads)
      mine += static_cast<std::uint64_t>(__popc(words[word_at(word)]));
    team_.sum_before(mine, before, total);
  }
  __device__ __forceinline__ void count_kept(std::uint64_t& before, std::uint64_t& total) {
    __syncthreads();
    count_bits(scratch_.kept, before, total);
  }

  /// visit(word, bits, rank of its first bit) for every word of this CTA and, so that whole CTAs call, some after them.
  template <class Visit>
  __device__ __forceinline__ void in_order(const std::uint32_t* words, std::uint64_t before, Visit visit) {
    std::uint64_t rank = before;
    for (std::int32_t begin = 0; begin < range.words; begin += select_threads) {
      const std::int32_t word = begin + team_.thread();
      const std::uint32_t bits = word < range.words ? words[word_at(word)] : 0;
      std::uint32_t offset, sum;
      select_word_scan(team_.memory().word_scan).ExclusiveSum(static_cast<std::uint32_t>(__popc(bits)), offset, sum);
      visit(word, bits, rank + offset);
      rank += sum;
      __syncthreads();
    }
  }

  __device__ __forceinline__ void report(std::ptrdiff_t group, std::ptrdiff_t rows, std::int32_t count) {
    const bool first = team_.rank() == 0 && team_.thread() == 0;
    if (first && !out_.status.empty()) out_.status[group] = status;
    if (out_.mass.empty()) return;
    if (count == items) {
      if (first) out_.mass[group] = 1.0f;
      return;
    }
    std::uint64_t kept[1] = {chosen_mass_};
    if ((rows > 1 && rule_.rows == combine::unite) || (status & selection_capped) != 0) {
      kept[0] = 0;
      const auto add = [&](const auto& source, auto mass) {
        source.for_each(range, [&](std::int32_t, std::int32_t item, auto key, bool valid) {
          if (valid && is_kept(item)) kept[0] += mass(key);
        });
      };
      if (rows > 1 || paged()) {
        add(scored_items{final_scores()}, score_mass{});
      } else {
        add(row_, mass_);
      }
      team_.reduce(kept, plus{});
    }
    if (first) out_.mass[group] = mass_share(kept[0], total_);
  }

  /// Writes the list, its count and the padding after it.
  __device__ __forceinline__ void emit_list(std::ptrdiff_t group, std::uint64_t before, std::int32_t count) {
    std::int32_t* list = out_.positions.data() + group * out_.positions.stride(0);
    const std::ptrdiff_t stride = out_.positions.stride(1);
    const bool expand = paged() && rule_.output == emit::positions;
    auto* prefixes = reinterpret_cast<std::uint32_t*>(team_.memory().sums);
    in_order(scratch_.kept, before, [&](std::int32_t word, std::uint32_t, std::uint64_t rank) {
      prefixes[team_.thread()] = static_cast<std::uint32_t>(rank);
      __syncthreads();
      const std::int32_t begin = word - team_.thread();
      const std::int32_t words = range.words - begin < select_threads ? range.words - begin : select_threads;
      const std::uint32_t* kept = scratch_.kept + word_at(begin);
      const std::uint32_t below = (1u << team_.lane()) - 1u;
      std::int32_t item = range.first + (begin + team_.warp()) * 32 + team_.lane();
      for (std::int32_t i = team_.warp(); i < words; i += select_warps, item += 32 * select_warps) {
        const std::uint32_t bits = kept[i];
        const std::uint32_t at = prefixes[i] + __popc(bits & below);
        if ((bits >> team_.lane() & 1u) == 0) continue;
        if (!expand) {
          list[at * stride] = item;
        } else {
          std::ptrdiff_t to = std::ptrdiff_t{at} * page_size();
          for (std::int32_t p = position_of(item); p < position_of(item + 1); ++p) list[to++ * stride] = p;
        }
      }
    });
    const std::ptrdiff_t written = entries(count, expand);
    if (team_.rank() != 0) return;
    pad_list(out_, group, static_cast<std::int32_t>(written));
    if (team_.thread() == 0) out_.counts[group] = static_cast<std::int32_t>(written);
  }

  /// Entries of the list: pages are written out as their positions, of which a partial last page has fewer.
  __device__ std::ptrdiff_t entries(std::int32_t count, bool expand) {
    if (!expand) return count;
    const std::ptrdiff_t missing = std::ptrdiff_t{items} * page_size() - length;
    std::uint64_t last_kept[1] = {0};
    if (range.last == items && range.words > 0 && is_kept(items - 1)) last_kept[0] = 1;
    team_.reduce(last_kept, greater{});
    return std::ptrdiff_t{count} * page_size() - (last_kept[0] != 0 ? missing : 0);
  }

  const weight_rows<T, cuda>& from_;
  const selection_rule& rule_;
  const selection_view<cuda>& out_;
  select_team& team_;
  select_scratch_view scratch_;
  streamed_row<T> row_;
  std::int32_t first_position_ = 0;  // of this CTA's items
  std::int32_t last_position_ = 0;
  row_mass mass_{};                // of the last row read
  std::uint64_t chosen_mass_ = 0;  // what the last choice kept, forced items included
  std::uint64_t total_ = 0;        // mass of the last row, in the end of all that the list is made from
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
