// Guides that need no model: what they keep of given queries and keys, and how they leave their lists.
#include <doctest/doctest.h>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "specattn/specattn.hpp"

using namespace specattn;

namespace {

constexpr std::int32_t most = 256, dim = 4;

/// One layer, one kv head, one sequence of `length` positions in cache row 1.
struct scene {
  context<cpu> ctx{1};
  kv_cache<float> cache{
      {.sequences = 2, .layers = 1, .kv_heads = 1, .head_dim = dim, .max_positions = most + 1}};  // the slot
  selection<cpu> lists{1, most};
  std::vector<float> query = {1.0f, 0.0f, 0.0f, 0.0f};
  std::int32_t length = 0;

  /// Drops positions from `first` on and caches others up to `end`, heavy for the query in one page of 16.
  void write(std::int32_t first, std::int32_t end, std::int32_t heavy_page) {
    std::vector<float> keys(static_cast<std::size_t>((end - first) * dim), 0.0f);
    for (std::int32_t i = first; i < end; ++i)
      keys[static_cast<std::size_t>((i - first) * dim)] = i / 16 == heavy_page ? 10.0f : 0.0f;
    const view<const float, 3> rows(keys.data(), {end - first, 1, dim});
    cache.roll_back(1, first);
    cache.append(ctx, 0, 1, rows, rows);
    cache.advance(1, end - first);
    length = end;
  }

  /// The list a guide leaves, over entries that were stale.
  template <class Guide>
  std::vector<std::int32_t> kept(Guide& guide) {
    const auto out = lists.view();
    std::fill_n(out.positions.data(), most, 77);
    out.counts[0] = 0;
    std::int32_t rows[1] = {1}, lens[1] = {length}, offsets[2] = {0, 1}, replayed[1] = {0}, steps[1] = {0};
    std::uint8_t dense[1] = {0};
    round_state<float> round;
    round.target_cache = &cache;
    round.cache_rows = rows;
    round.kv_lens = lens;
    round.slot_offsets = offsets;
    round.dense = dense;
    round.replayed = replayed;
    round.draft_steps = steps;
    round.layers = round.kv_heads = 1;
    round.kept = out;
    ctx.reserve_workspace(guide.workspace_bytes(ctx));
    guide.before_verify(ctx, round);
    guide.before_layer(ctx, round, 0, view<const float, 3>(query.data(), {1, 1, dim}));
    validate(out, 0, length);
    return {out.positions.data(), out.positions.data() + out.counts[0]};
  }
  template <class Guide>
  std::vector<std::int32_t> kept_pages(Guide& guide) {
    std::vector<std::int32_t> pages;
    for (const std::int32_t position : kept(guide)) {
      if (pages.empty() || pages.back() != position / 16) pages.push_back(position / 16);
    }
    return pages;
  }
};

template <class Guide>
Guide prepared(Guide guide) {
  guide.prepare({{1, 1, 1, dim, 10, most, 64}, {}, 2, most, 4, 0});
  return guide;
}

using pages = std::vector<std::int32_t>;

}  // namespace

TEST_CASE("page_guide: boxes follow keys that are rewritten, be it all of them, some, or in many small steps") {
  scene s;
  auto guide = prepared(page_guide<cpu>(0.3f, 16));
  s.write(0, 160, 3);
  CHECK(s.kept_pages(guide) == pages{0, 3, 9});
  s.write(0, 160, 6);  // what a refresh does: roll back, rewrite, end where the text ended
  CHECK(s.kept_pages(guide) == pages{0, 6, 9});
  s.write(100, 160, 8);  // page 6 is light from position 100 on, and as heavy before
  CHECK(s.kept_pages(guide) == pages{0, 6, 9});
  s.write(90, 160, 7);
  CHECK(s.kept_pages(guide) == pages{0, 7, 9});
  for (std::int32_t first = 159; first > 40; --first) s.write(first, 160, 4);  // more than the cache remembers
  CHECK(s.kept_pages(guide) == pages{0, 4, 9});
  s.cache.clear(1);
  s.write(0, 160, 2);  // another text in the same row, though nobody said so
  CHECK(s.kept_pages(guide) == pages{0, 2, 9});
}

TEST_CASE("page_guide: after any roll-backs and appends it keeps what a guide keeps that sees these keys first") {
  scene s;
  auto guide = prepared(page_guide<cpu>(0.4f, 16));
  std::mt19937 random(3);
  for (int i = 0; i < 500; ++i) {
    const std::int32_t first = static_cast<std::int32_t>(random() % static_cast<unsigned>(s.length + 1));
    const std::int32_t end = (std::min)(most, first + 1 + static_cast<std::int32_t>(random() % 100u));
    s.write(first, end, static_cast<std::int32_t>(random() % 16u));
    if (random() % 3u == 0) continue;
    auto fresh = prepared(page_guide<cpu>(0.4f, 16));
    CHECK(s.kept(guide) == s.kept(fresh));
  }
}

TEST_CASE("page_guide: the first page, the newest full one and a page not yet full are kept at any share") {
  for (const float share : {0.001f, 0.1f, 0.5f, 1.0f}) {
    for (const std::int32_t length : {1, 15, 16, 17, 32, 33, 100, 112, 255, 256}) {
      CAPTURE(share);
      CAPTURE(length);
      scene s;
      s.write(0, length, 20);
      auto guide = prepared(page_guide<cpu>(share, 16));
      const auto kept = s.kept_pages(guide);
      const std::int32_t full = length / 16, all = (length + 15) / 16;
      const auto has = [&](std::int32_t page) { return std::find(kept.begin(), kept.end(), page) != kept.end(); };
      CHECK(has(0));
      if (full > 0) CHECK(has(full - 1));
      CHECK(has(all - 1));
      if (share == 1.0f) CHECK(kept.size() == static_cast<std::size_t>(all));
    }
  }
  scene s;  // an infinite key ties with what is forced, and must not push it out
  s.write(0, 160, 20);
  for (std::int32_t page = 1; page < 9; ++page)
    *const_cast<float*>(s.cache.layer(0).key(1, page * 16, 0)) = std::numeric_limits<float>::infinity();
  auto guide = prepared(page_guide<cpu>(0.3f, 16));
  CHECK(s.kept_pages(guide) == pages{0, 1, 9});
}

TEST_CASE_TEMPLATE("guides: every list is padded as selection_view says", Guide, window_guide, page_guide<cpu>,
                   oracle_guide<cpu>) {
  for (const std::int32_t length : {1, 16, 50, 63, 64, 65, 127, 128, 200, 256}) {
    CAPTURE(length);
    scene s;
    s.write(0, length, 2);
    Guide made;
    if constexpr (std::same_as<Guide, window_guide>) {
      made.sinks = 1;
      made.recent = length < 100 ? 2 : 62;
    }
    if constexpr (std::same_as<Guide, page_guide<cpu>>) made = Guide(0.25f, 16);
    if constexpr (std::same_as<Guide, oracle_guide<cpu>>) made = Guide({.top_p = 0.5f});
    auto guide = prepared(std::move(made));
    const auto count = static_cast<std::ptrdiff_t>(s.kept(guide).size());
    const std::int32_t* entries = s.lists.view().positions.data();
    const std::ptrdiff_t padded = padded_count(count, most);
    CHECK(std::all_of(entries + count, entries + padded, [](std::int32_t entry) { return entry == -1; }));
    CHECK(std::all_of(entries + padded, entries + most, [](std::int32_t entry) { return entry == 77; }));
  }
}

TEST_CASE("window_guide: sizes beyond the prefix, and below nothing, are cut to it") {
  scene s;
  s.write(0, 50, 0);
  const auto kept = [&](std::int32_t sinks, std::int32_t recent) {
    window_guide guide;
    guide.sinks = sinks;
    guide.recent = recent;
    return s.kept(guide);
  };
  CHECK(kept(2, 3) == pages{0, 1, 47, 48, 49});
  CHECK(kept(0, 0).empty());
  CHECK(kept(-1, INT32_MIN).empty());
  CHECK(kept(INT32_MAX, 4).size() == 50);
  CHECK(kept(4, INT32_MAX).size() == 50);
}
