// select() on the CPU: one member of the team makes one group's list.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../select.hpp"
#include "context.hpp"
#include "select_passes.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// One member's part of the workspace. Arrays that a rule does not need are null.
struct select_scratch {
  std::uint32_t* keys = nullptr;         ///< a row's order keys
  std::uint64_t* scores = nullptr;       ///< rows combined, then folded into pages
  std::uint64_t* page_masses = nullptr;  ///< a row's pages
  std::byte* candidates = nullptr;       ///< items that may be the threshold: keys or scores
  std::uint64_t* forced = nullptr;       ///< sets of items, one bit each
  std::uint64_t* allowed = nullptr;
  std::uint64_t* kept = nullptr;
  mass_histogram* histogram = nullptr;

  /// Lays the arrays out from `base`, which may be null, and returns the bytes they take.
  std::size_t lay_out(std::byte* base, std::ptrdiff_t rows, std::ptrdiff_t kv_len, const selection_rule& rule) {
    const std::size_t words = static_cast<std::size_t>(words_for(static_cast<std::int32_t>(kv_len)));
    const std::size_t items = words * items_per_word;
    const bool combined = rows > 1;
    const bool paged = rule.page_size > 1;
    std::size_t bytes = 0;
    const auto take = [&](auto*& array, std::size_t count) {
      using element = std::remove_reference_t<decltype(*array)>;
      if (count > 0 && base != nullptr) array = reinterpret_cast<element*>(base + bytes);
      bytes += (count * sizeof(element) + 63) / 64 * 64;
    };
    take(keys, items);
    take(scores, combined ? items : 0);
    take(page_masses, paged ? items : 0);
    take(candidates, items * (combined || paged ? sizeof(std::uint64_t) : sizeof(std::uint32_t)));
    take(forced, words);
    take(allowed, words);
    take(kept, words);
    take(histogram, 1);
    return bytes;
  }
};

template <storage T>
class group_selector {
 public:
  group_selector(const weight_rows<T, cpu>& from, const selection_rule& rule, const selection_view<cpu>& out,
                 const select_scratch& scratch)
      : from_(from), rule_(rule), out_(out), scratch_(scratch) {}

  void run(std::ptrdiff_t group) {
    start(group);
    const std::ptrdiff_t rows = from_.weights.extent(1);
    const bool one_choice = rows == 1 || rule_.rows == combine::unite;
    const bool combined = rows > 1 && (!one_choice || limit_ < items_ || !out_.mass.empty());
    if (combined) std::fill_n(scratch_.scores, length_, std::uint64_t{0});
    for (std::ptrdiff_t row = 0; row < rows; ++row) take_row(group, row, one_choice, combined);
    if (combined) finish_rows(one_choice);
    const std::int32_t count = cut(rows);
    report(group, rows, count);
    emit_list(group, count);
  }

 private:
  bool paged() const { return rule_.page_size > 1; }

  void start(std::ptrdiff_t group) {
    const std::ptrdiff_t extent = from_.weights.extent(2);
    const std::int32_t asked = from_.kv_lens.empty() ? static_cast<std::int32_t>(extent) : from_.kv_lens[group];
    length_ = clamped_length(asked, extent);
    status_ = asked == length_ ? selection_ok : selection_invalid_length;
    top_p_ = from_.top_p.empty() ? rule_.top_p : from_.top_p[group];
    if (is_nan(top_p_)) status_ |= selection_invalid_rule;
    items_ = item_count(length_, rule_.page_size);
    words_ = words_for(items_);
    const std::ptrdiff_t capacity = out_.capacity();
    limit_ = item_limit(rule_.max_tokens, length_, rule_.page_size);
    limit_ = static_cast<std::int32_t>(
        (std::min<std::ptrdiff_t>)(limit_, rule_.output == emit::pages
                                               ? capacity
                                               : item_limit(capacity, length_, rule_.page_size)));
    forced_ = forced_by(rule_.sinks, rule_.recent, length_, rule_.page_size);
    std::fill_n(scratch_.forced, words_, std::uint64_t{0});
    set_bits(scratch_.forced, 0, forced_.head);
    set_bits(scratch_.forced, forced_.tail, items_);
    std::fill_n(scratch_.allowed, words_, std::uint64_t{0});
    set_bits(scratch_.allowed, forced_.head, forced_.tail);
    std::copy_n(scratch_.forced, words_, scratch_.kept);
    total_ = 0;
  }

  void take_row(std::ptrdiff_t group, std::ptrdiff_t row, bool choose_now, bool combined) {
    const T* weights = from_.weights.data() + group * from_.weights.stride(0) + row * from_.weights.stride(1);
    const row_facts facts = read_row(weights, from_.weights.stride(2), length_, scratch_.keys);
    if (facts.invalid) status_ |= selection_invalid_weight;
    mass_ = row_mass{mass_scale(facts.max_key)};
    if (!choose_now) {
      total_ = sum_mass(scratch_.keys, 0, length_, mass_);
    } else if (paged()) {
      const std::uint64_t largest = sum_pages(scratch_.keys, length_, rule_.page_size, mass_, scratch_.page_masses);
      total_ = choose(scratch_.page_masses, largest, score_mass{});
    } else {
      total_ = choose(scratch_.keys, facts.max_key, mass_);
    }
    if (combined)
      combine_row(scratch_.keys, length_, share_scale(mass_.scale, total_), rule_.rows == combine::max,
                  scratch_.scores);
  }

  /// Folds the combined rows into items, and selects from them unless the rows did.
  void finish_rows(bool chosen) {
    std::uint64_t largest = 0;
    if (paged()) {
      largest = sum_pages(scratch_.scores, length_, rule_.page_size, score_mass{}, scratch_.scores);
    } else {
      for (std::int32_t i = 0; i < items_; ++i) largest = (std::max)(largest, scratch_.scores[i]);
    }
    total_ =
        chosen ? sum_mass(scratch_.scores, 0, items_, score_mass{}) : choose(scratch_.scores, largest, score_mass{});
  }

  /// Adds the items that one row (or the combined rows) keeps; returns its mass.
  template <class Key, class Mass>
  std::uint64_t choose(const Key* items, Key largest, Mass mass) {
    const std::uint64_t forced_mass =
        sum_mass(items, 0, forced_.head, mass) + sum_mass(items, forced_.tail, items_, mass);
    chosen_mass_ = forced_mass;
    const asked wish = asked_by(top_p_);
    if (wish != asked::target) {
      const std::uint64_t total = forced_mass + sum_mass(items, forced_.head, forced_.tail, mass);
      if (wish == asked::everything) {
        set_bits(scratch_.kept, 0, items_);
        chosen_mass_ = total;
      }
      return total;
    }
    const std::uint32_t max_coarse = coarse_key(largest);
    const std::uint64_t total =
        forced_mass + fill_histogram(items, forced_.head, forced_.tail, max_coarse, mass, *scratch_.histogram);
    const std::uint64_t target = target_mass(top_p_, total);
    if (forced_mass >= target) return total;
    const std::uint64_t need = target - forced_mass;
    const threshold<Key> least =
        rule_.method == threshold_method::bisection
            ? bisect(items, forced_.head, forced_.tail, largest, need, mass)
            : resolve(items, forced_.head, forced_.tail, max_coarse, mass, *scratch_.histogram, need,
                      reinterpret_cast<Key*>(scratch_.candidates));
    mark(items, words_, least, scratch_.allowed, scratch_.kept);
    chosen_mass_ += least.mass;
    return total;
  }

  /// Where the kept items exceed the limit, keeps the first of them: forced before others, heavier before
  /// lighter, smaller before larger. Returns how many are kept.
  std::int32_t cut(std::ptrdiff_t rows) {
    const std::int32_t count = count_bits(scratch_.kept, words_);
    if (count <= limit_) return count;
    status_ |= selection_capped;
    if (rows > 1) {
      cut_items(scratch_.scores, limit_);
    } else if (paged()) {
      cut_items(scratch_.page_masses, limit_);
    } else {
      cut_items(scratch_.keys, limit_);
    }
    return limit_;
  }

  template <class Key>
  void cut_items(const Key* items, std::int32_t limit) {
    const std::int32_t forced_count = forced_.head + (items_ - forced_.tail);
    const bool among_forced = forced_count > limit;
    for (std::int32_t w = 0; w < words_; ++w) {
      scratch_.allowed[w] = among_forced ? scratch_.forced[w] : scratch_.kept[w] & ~scratch_.forced[w];
      scratch_.kept[w] = among_forced ? 0 : scratch_.forced[w];
    }
    const std::int32_t room = among_forced ? limit : limit - forced_count;
    if (room == 0) return;
    Key* candidates = reinterpret_cast<Key*>(scratch_.candidates);
    std::int32_t count = 0;
    for_each_bit(scratch_.allowed, words_, [&](std::int32_t i) { candidates[count++] = items[i]; });
    mark(items, words_, narrow(candidates, count, static_cast<std::uint64_t>(room), unit_mass{}), scratch_.allowed,
         scratch_.kept);
  }

  void report(std::ptrdiff_t group, std::ptrdiff_t rows, std::int32_t count) {
    if (!out_.status.empty()) out_.status[group] = status_;
    if (out_.mass.empty()) return;
    if (count == items_) {
      out_.mass[group] = 1.0f;
      return;
    }
    const bool known = (rows == 1 || rule_.rows != combine::unite) && (status_ & selection_capped) == 0;
    const std::uint64_t kept = known      ? chosen_mass_
                               : rows > 1 ? sum_kept(scratch_.scores, scratch_.kept, words_, score_mass{})
                               : paged()  ? sum_kept(scratch_.page_masses, scratch_.kept, words_, score_mass{})
                                          : sum_kept(scratch_.keys, scratch_.kept, words_, mass_);
    out_.mass[group] = mass_share(kept, total_);
  }

  /// Writes the list, its count and the padding after it.
  void emit_list(std::ptrdiff_t group, std::int32_t count) {
    const auto list = out_.positions[group];
    std::ptrdiff_t written = 0;
    if (paged() && rule_.output == emit::positions) {
      for_each_bit(scratch_.kept, words_, [&](std::int32_t page) {
        const std::int64_t begin = std::int64_t{page} * rule_.page_size;
        const std::int64_t end = (std::min<std::int64_t>)(begin + rule_.page_size, length_);
        for (std::int64_t i = begin; i < end; ++i) list[written++] = static_cast<std::int32_t>(i);
      });
    } else if (list.stride(0) == 1) {
      unpack(scratch_.kept, count, list.data());
      written = count;
    } else {
      for_each_bit(scratch_.kept, words_, [&](std::int32_t item) { list[written++] = item; });
    }
    out_.counts[group] = static_cast<std::int32_t>(written);
    const std::ptrdiff_t padded = padded_count(written, out_.capacity());
    for (; written < padded; ++written) list[written] = -1;
  }

  const weight_rows<T, cpu>& from_;
  const selection_rule& rule_;
  const selection_view<cpu>& out_;
  select_scratch scratch_;
  std::int32_t length_ = 0;  // positions
  std::int32_t items_ = 0;   // positions or pages
  std::int32_t words_ = 0;
  std::int32_t limit_ = 0;  // items that the cap and the capacity allow
  forced_items forced_{};
  float top_p_ = 0.0f;
  std::uint32_t status_ = 0;
  row_mass mass_{};                // of the last row read
  std::uint64_t chosen_mass_ = 0;  // what the last choice kept, forced items included
  std::uint64_t total_ = 0;        // mass of the last row, in the end of all that the list is made from
};

template <>
struct select_impl<cpu> {
  static std::size_t workspace_bytes(const context<cpu>& ctx, std::ptrdiff_t, std::ptrdiff_t rows,
                                     std::ptrdiff_t kv_len, const selection_rule& rule) {
    return static_cast<std::size_t>(ctx.threads()) * select_scratch{}.lay_out(nullptr, rows, kv_len, rule);
  }

  template <storage T>
  static void run(context<cpu>& ctx, const weight_rows<T, cpu>& from, const selection_rule& rule,
                  const selection_view<cpu>& out) {
    const std::ptrdiff_t rows = from.weights.extent(1);
    const std::ptrdiff_t kv_len = from.weights.extent(2);
    const std::size_t member_bytes = select_scratch{}.lay_out(nullptr, rows, kv_len, rule);
    std::byte* workspace = ctx.workspace(static_cast<std::size_t>(ctx.threads()) * member_bytes, "select");
    ctx.parallel_for(out.groups(), [&](std::ptrdiff_t group, int member) {
      select_scratch scratch;
      scratch.lay_out(workspace + static_cast<std::size_t>(member) * member_bytes, rows, kv_len, rule);
      group_selector<T>(from, rule, out, scratch).run(group);
    });
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
