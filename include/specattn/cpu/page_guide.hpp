// The target's own queries guide it, page by page: Quest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "../buffer.hpp"
#include "../guide.hpp"
#include "context.hpp"

namespace specattn::inline SPECATTN_CODE {

template <backend B>
class page_guide;

/// What a decoder keeps for a page_guide: the boxes of its cached pages, and scratch.
struct page_memory {
  /// Boxes of the first pages, of keys as they were at a generation of the cache's row.
  struct made_boxes {
    std::int32_t pages = 0;
    std::uint64_t generation = 0;
  };

  model_shape shape;
  std::int32_t max_pages = 0;
  buffer<float, cpu> boxes;      ///< [rows, layers, kv_heads, pages, low | high, head_dim]
  std::vector<made_boxes> made;  ///< [rows, layers, kv_heads]
  buffer<float, cpu> scores;     ///< [sequences, kv_heads, pages]
  buffer<std::int32_t, cpu> order;
};

/// Quest (Tang et al., arXiv 2406.10774): each page of cached keys keeps its smallest and largest value of every
/// dimension; a page's score is the largest product a query could reach inside that box, and the best pages are
/// kept. Here for each kv head, over the largest score of the round's slots and the group's heads. The first page, the
/// newest full one and a page that is not yet full are always kept, whatever the share. Boxes follow the cache: where it
/// dropped positions (a roll-back, a refresh), those of their pages are made anew.
template <>
class page_guide<cpu> : public remembering_guide<page_guide<cpu>, page_memory> {
  using base = remembering_guide<page_guide<cpu>, page_memory>;

 public:
  using base::before_layer;
  using base::forget;
  using base::prepare;

  page_guide() = default;
  /// \param kept_share share of the prefix's pages to keep, in (0, 1]; those that are always kept count
  /// \param page_size  positions of a page
  explicit page_guide(float kept_share, std::int32_t page_size = 16) : share_(kept_share), page_size_(page_size) {
    detail::expects(kept_share > 0.0f && kept_share <= 1.0f, "page_guide: kept_share ", kept_share,
                    " is outside (0, 1]");
    detail::expects(page_size >= 1, "page_guide: page_size ", page_size, " must be at least 1");
  }

  void prepare(const guide_setup& setup, page_memory& m) const {
    m.shape = setup.target;
    m.max_pages = (setup.max_positions + page_size_ - 1) / page_size_;
    const auto groups = static_cast<std::size_t>(setup.max_sequences) * static_cast<std::size_t>(m.shape.layers) *
                        static_cast<std::size_t>(m.shape.kv_heads);
    m.boxes = buffer<float, cpu>(groups * static_cast<std::size_t>(m.max_pages) * 2 *
                                 static_cast<std::size_t>(m.shape.head_dim));
    m.made.assign(groups, {});
    const auto work = static_cast<std::size_t>(setup.max_sequences) * static_cast<std::size_t>(m.shape.kv_heads) *
                      static_cast<std::size_t>(m.max_pages);
    m.scores = buffer<float, cpu>(work);
    m.order = buffer<std::int32_t, cpu>(work);
  }

  void forget(std::int32_t cache_row, page_memory& m) const {
    const std::ptrdiff_t groups = std::ptrdiff_t{m.shape.layers} * m.shape.kv_heads;
    std::fill_n(m.made.begin() + cache_row * groups, groups, page_memory::made_boxes{});
  }

  /// A page's box is two vectors: as many bytes as one position's key and value.
  std::int64_t metadata_rows(std::int32_t kv_len) const { return kv_len / page_size_; }

  template <storage T>
  void before_layer(context<cpu>& ctx, round_state<T, cpu>& round, std::int32_t layer, view<const float, 3> q,
                    page_memory& m) const {
    ctx.parallel_for(std::ptrdiff_t{round.sequences()} * round.kv_heads, [&](std::ptrdiff_t i, int) {
      const auto s = static_cast<std::int32_t>(i / round.kv_heads);
      const auto h = static_cast<std::int32_t>(i % round.kv_heads);
      update_boxes(round, layer, s, h, m);
      const std::ptrdiff_t group = round.group(layer, s, h);
      if (round.dense[static_cast<std::size_t>(s)] == 0 && round.kept.counts[group] != keep_all) {
        score_pages(round, layer, s, h, q, m);
        keep_best(round, s, group, i * m.max_pages, m);
      }
    });
  }

 private:
  static float* box(std::ptrdiff_t slot, std::int32_t page, const page_memory& m) {
    return m.boxes.data() + (slot * m.max_pages + page) * 2 * m.shape.head_dim;
  }
  template <class Round>
  static std::ptrdiff_t slot_of(const Round& round, std::int32_t layer, std::int32_t s, std::int32_t h,
                                const page_memory& m) {
    return (std::ptrdiff_t{round.cache_rows[static_cast<std::size_t>(s)]} * m.shape.layers + layer) *
               m.shape.kv_heads +
           h;
  }

  /// Boxes of the pages that became full since the last round, or were dropped from the cache and filled anew.
  template <storage T>
  void update_boxes(const round_state<T, cpu>& round, std::int32_t layer, std::int32_t s, std::int32_t h,
                    page_memory& m) const {
    const std::int32_t full = round.kv_lens[static_cast<std::size_t>(s)] / page_size_;
    const std::ptrdiff_t slot = slot_of(round, layer, s, h, m);
    const std::int32_t row = round.cache_rows[static_cast<std::size_t>(s)];
    page_memory::made_boxes& made = m.made[static_cast<std::size_t>(slot)];
    std::int32_t done = made.pages;
    done = (std::min)(done, round.target_cache->unchanged_since(row, made.generation) / page_size_);
    made.generation = round.target_cache->generation(row);
    made.pages = (std::max)(done, full);
    const kv_view<T, cpu> kv = round.target_cache->layer(layer);
    for (; done < full; ++done) {
      float* low = box(slot, done, m);
      float* high = low + m.shape.head_dim;
      std::fill_n(low, m.shape.head_dim, std::numeric_limits<float>::infinity());
      std::fill_n(high, m.shape.head_dim, -std::numeric_limits<float>::infinity());
      for (std::int32_t i = done * page_size_; i < (done + 1) * page_size_; ++i) {
        const T* key = kv.key(row, i, h);
        for (std::int32_t d = 0; d < m.shape.head_dim; ++d) {
          low[d] = (std::min)(low[d], to_float(key[d]));
          high[d] = (std::max)(high[d], to_float(key[d]));
        }
      }
    }
  }

  template <storage T>
  void score_pages(const round_state<T, cpu>& round, std::int32_t layer, std::int32_t s, std::int32_t h,
                   view<const float, 3> q, page_memory& m) const {
    const std::int32_t pages = round.kv_lens[static_cast<std::size_t>(s)] / page_size_;
    const auto heads_a_group = static_cast<std::int32_t>(q.extent(1)) / round.kv_heads;
    float* scores = m.scores.data() + (std::ptrdiff_t{s} * round.kv_heads + h) * m.max_pages;
    std::fill_n(scores, pages, -std::numeric_limits<float>::infinity());
    const std::ptrdiff_t slot = slot_of(round, layer, s, h, m);
    for (std::int32_t row = round.slot_offsets[static_cast<std::size_t>(s)];
         row < round.slot_offsets[static_cast<std::size_t>(s) + 1]; ++row) {
      for (std::int32_t head = h * heads_a_group; head < (h + 1) * heads_a_group; ++head) {
        for (std::int32_t page = 0; page < pages; ++page) {
          const float* low = box(slot, page, m);
          const float* high = low + m.shape.head_dim;
          float score = 0.0f;
          for (std::int32_t d = 0; d < m.shape.head_dim; ++d) {
            score += (std::max)(q(row, head, d) * low[d], q(row, head, d) * high[d]);
          }
          scores[page] = (std::max)(scores[page], score);
        }
      }
    }
  }

  template <class Round>
  void keep_best(const Round& round, std::int32_t s, std::ptrdiff_t group, std::ptrdiff_t work,
                 page_memory& m) const {
    const std::int32_t kv_len = round.kv_lens[static_cast<std::size_t>(s)];
    const std::int32_t full = kv_len / page_size_;
    const std::int32_t all = (kv_len + page_size_ - 1) / page_size_;
    const auto wanted = static_cast<std::int32_t>(std::ceil(share_ * static_cast<float>(all)));
    const float* scores = m.scores.data() + work;
    std::int32_t* order = m.order.data() + work;
    const std::int32_t forced = (std::min)(full, 2);  // the first and the last of the full pages
    const std::int32_t take = std::clamp(wanted - (all - full), forced, full);
    const std::int32_t others = (std::max)(full - 2, 0);
    if (full > 0) order[0] = 0;
    std::iota(order + 1, order + 1 + others, 1);
    const auto heavier = [scores](std::int32_t a, std::int32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    };
    if (take < full) std::nth_element(order + 1, order + 1 + (take - forced), order + 1 + others, heavier);
    std::sort(order + 1, order + 1 + (take - forced));
    if (full > 1) order[take - 1] = full - 1;
    std::int32_t count = 0;
    for (std::int32_t i = 0; i < take; ++i) {
      for (std::int32_t p = 0; p < page_size_; ++p) round.kept.positions(group, count++) = order[i] * page_size_ + p;
    }
    detail::grow_list(round.kept, group, count, full * page_size_, kv_len);
  }

  float share_ = 0.25f;
  std::int32_t page_size_ = 16;
};

}  // namespace specattn::inline SPECATTN_CODE
