// What mask_union() promises, one claim a case, for any backend. The including file defines `mask_union_fixture`.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "specattn/mask_union.hpp"

namespace mask_union_testing {

using list = std::vector<std::int32_t>;
constexpr std::int32_t stale = 0x5a5a5a5a;  // what the output holds before a call

struct problem {
  std::vector<std::int32_t> slots;    // of each sequence
  std::vector<std::int32_t> kv_lens;  // of each sequence
  std::int32_t kv_heads = 1;
  std::vector<list> lists;            // [slot * kv_heads + kv head]
  std::vector<bool> all;              // beside them: keep_all instead
  std::vector<std::uint32_t> status;  // beside them
  std::ptrdiff_t capacity = 0;        // of a union; 0: the longest prefix
  std::size_t row = 0;                // entries a list has room for, at least
  std::ptrdiff_t apart = 1;           // how far entries of a list or a union lie apart
  std::ptrdiff_t groups() const { return static_cast<std::ptrdiff_t>(slots.size()) * kv_heads; }
};

/// Every slot keeps a position with probability `share`; neighbours agree on most.
inline problem random_problem(const std::vector<std::int32_t>& slots, const std::vector<std::int32_t>& kv_lens,
                              std::int32_t kv_heads, double share, std::uint32_t seed = 5) {
  problem p{slots, kv_lens, kv_heads, {}, {}, {}};
  std::mt19937 engine(seed);
  const auto drawn = [&](double probability) { return static_cast<double>(engine()) * 0x1p-32 < probability; };
  for (std::size_t s = 0; s < slots.size(); ++s) {
    std::vector<std::vector<bool>> common(static_cast<std::size_t>(kv_heads));
    for (auto& bits : common)
      for (std::int32_t at = 0; at < kv_lens[s]; ++at) bits.push_back(drawn(share));
    for (std::int32_t slot = 0; slot < slots[s]; ++slot) {
      for (const auto& bits : common) {
        list positions;
        for (std::int32_t at = 0; at < kv_lens[s]; ++at)
          if (drawn(0.1) ? drawn(share) : bits[static_cast<std::size_t>(at)]) positions.push_back(at);
        p.lists.push_back(positions);
      }
    }
  }
  p.all.assign(p.lists.size(), false);
  p.status.assign(p.lists.size(), 0);
  return p;
}

struct answer {
  std::ptrdiff_t capacity = 0;
  std::vector<std::int32_t> positions, counts;
  std::vector<std::uint32_t> words, status;
};

/// A problem in a backend's memory, and room for its answer.
template <class Fixture>
class staged {
 public:
  using backend = typename Fixture::backend;
  template <class T>
  using buffer = specattn::buffer<T, backend>;

  staged(Fixture& fixture, const problem& p) : groups_(p.groups()), apart_(p.apart), kv_heads_(p.kv_heads) {
    if (p.capacity > 0) capacity_ = p.capacity;
    if (p.capacity == 0)
      for (std::int32_t kv_len : p.kv_lens) capacity_ = (std::max)(capacity_, std::ptrdiff_t{kv_len});
    std::size_t row = p.row;
    for (const list& each : p.lists) row = (std::max)(row, each.size());
    row_ = static_cast<std::ptrdiff_t>(row);
    const auto apart = static_cast<std::size_t>(apart_);
    list entries(p.lists.size() * row * apart, -1), sizes, offsets = {0};
    for (std::size_t i = 0; i < p.lists.size(); ++i) {
      for (std::size_t e = 0; e < p.lists[i].size(); ++e) entries[(i * row + e) * apart] = p.lists[i][e];
      sizes.push_back(p.all[i] ? specattn::keep_all : static_cast<std::int32_t>(p.lists[i].size()));
    }
    for (std::int32_t count : p.slots) offsets.push_back(offsets.back() + count);
    lists = fixture.upload(entries);
    list_counts = fixture.upload(sizes);
    list_status = fixture.upload(p.status);
    slot_offsets = fixture.upload(offsets);
    kv_lens = fixture.upload(p.kv_lens);
    const auto groups = static_cast<std::size_t>(groups_);
    const auto cells = groups * static_cast<std::size_t>(capacity_ * apart_);
    positions = fixture.upload(list(cells, stale));
    counts = fixture.upload(list(groups, stale));
    words = fixture.upload(std::vector<std::uint32_t>(cells, stale));
    status = fixture.upload(std::vector<std::uint32_t>(groups, stale));
  }

  specattn::mask_union_args<backend> args() const {
    specattn::mask_union_args<backend> a;
    const auto count = static_cast<std::ptrdiff_t>(list_counts.size());
    a.lists.positions = {lists.data(), {count, row_}, {row_ * apart_, apart_}};
    a.lists.counts = list_counts.shaped({count});
    a.lists.status = list_status.shaped({count});
    a.slot_offsets = slot_offsets.shaped({static_cast<std::ptrdiff_t>(slot_offsets.size())});
    a.kv_lens = kv_lens.shaped({static_cast<std::ptrdiff_t>(kv_lens.size())});
    a.kv_heads = kv_heads_;
    a.out.positions = {positions.data(), {groups_, capacity_}, {capacity_ * apart_, apart_}};
    a.out.counts = counts.shaped({groups_});
    a.out.status = status.shaped({groups_});
    a.slot_masks = {words.data(), {groups_, capacity_}, {capacity_ * apart_, apart_}};
    return a;
  }

  answer read(Fixture& fixture) const {
    answer a;
    a.capacity = capacity_;
    const auto all_positions = fixture.download(positions);
    const auto all_words = fixture.download(words);
    bool between = false;  // something was written where nothing belongs
    for (std::size_t i = 0; i < all_words.size(); ++i) {
      if (i % static_cast<std::size_t>(apart_) == 0) {
        a.positions.push_back(all_positions[i]);
        a.words.push_back(all_words[i]);
      } else {
        between = between || all_positions[i] != stale || all_words[i] != static_cast<std::uint32_t>(stale);
      }
    }
    CHECK_FALSE(between);
    a.counts = fixture.download(counts);
    a.status = fixture.download(status);
    return a;
  }

  buffer<std::int32_t> lists, list_counts, slot_offsets, kv_lens, positions, counts;
  buffer<std::uint32_t> list_status, words, status;

 private:
  std::ptrdiff_t groups_, apart_, row_ = 0, capacity_ = 1;
  std::int32_t kv_heads_;
};

template <class Fixture>
answer run(Fixture& fixture, const problem& p) {
  staged<Fixture> on(fixture, p);
  specattn::mask_union(fixture.context(), on.args());
  return on.read(fixture);
}

/// Against a map from positions to the slots that keep them.
inline void expect_union(const problem& p, const answer& a, std::ptrdiff_t g, std::size_t first_slot) {
  const auto s = static_cast<std::size_t>(g / p.kv_heads);
  std::map<std::int32_t, std::uint32_t> readers;
  std::uint32_t status = 0;
  bool everything = p.slots[s] > 0;
  for (std::int32_t slot = 0; slot < p.slots[s]; ++slot) {
    const std::size_t i = (first_slot + static_cast<std::size_t>(slot)) * static_cast<std::size_t>(p.kv_heads) +
                          static_cast<std::size_t>(g % p.kv_heads);
    everything = everything && p.all[i];
    status |= p.status[i];
    for (std::int32_t at = 0; p.all[i] && at < p.kv_lens[s]; ++at) readers[at] |= 1u << slot;
    for (std::size_t e = 0; !p.all[i] && e < p.lists[i].size(); ++e) readers[p.lists[i][e]] |= 1u << slot;
  }
  if (everything) readers.clear();
  const auto size = static_cast<std::ptrdiff_t>(readers.size());
  const std::ptrdiff_t count = (std::min)(size, a.capacity);
  if (size > a.capacity) status |= specattn::selection_capped;
  CAPTURE(g);
  const auto group = static_cast<std::size_t>(g);
  REQUIRE(a.counts[group] == (everything ? specattn::keep_all : static_cast<std::int32_t>(count)));
  CHECK(a.status[group] == status);
  auto reader = readers.begin();
  std::ptrdiff_t wrong = -1;
  for (std::ptrdiff_t i = 0; i < a.capacity; ++i) {
    const auto at = static_cast<std::size_t>(g * a.capacity + i);
    const bool inside = i < count;
    const std::int32_t position = inside ? reader->first : i < specattn::padded_count(count, a.capacity) ? -1 : stale;
    const bool right =
        a.positions[at] == position && a.words[at] == (inside ? reader->second : static_cast<std::uint32_t>(stale));
    if (!right && wrong < 0) wrong = i;
    if (inside) ++reader;
  }
  CHECK(wrong == -1);  // the first entry that differs
}

template <class Fixture>
void expect_unions(Fixture& fixture, const problem& p) {
  const answer a = run(fixture, p);
  for (std::ptrdiff_t g = 0; g < p.groups(); ++g) {
    std::size_t first_slot = 0;
    for (std::ptrdiff_t s = 0; s < g / p.kv_heads; ++s)
      first_slot += static_cast<std::size_t>(p.slots[static_cast<std::size_t>(s)]);
    expect_union(p, a, g, first_slot);
  }
}

TEST_CASE_TEMPLATE("mask_union: any number of slots gives the ascending union and who reads each entry", Fixture,
                   mask_union_fixture) {
  Fixture fixture;
  for (std::int32_t slots : {1, 2, 6, 16, 31, 32}) {
    for (std::int32_t kv_len : {1, 2, 63, 64, 65, 997}) {
      CAPTURE(slots);
      CAPTURE(kv_len);
      expect_unions(fixture, random_problem({slots}, {kv_len}, 2, 0.3));
    }
  }
}

TEST_CASE_TEMPLATE("mask_union: long prefixes, dense and thin lists", Fixture, mask_union_fixture) {
  Fixture fixture;
  for (std::int32_t kv_len : {8191, 8192, 8193, 40000}) {
    CAPTURE(kv_len);
    expect_unions(fixture, random_problem({6}, {kv_len}, 1, 0.22));
    expect_unions(fixture, random_problem({3}, {kv_len}, 1, 1.0));
    expect_unions(fixture, random_problem({3}, {kv_len}, 1, 0.0005));
  }
}

TEST_CASE_TEMPLATE("mask_union: ragged batches, empty lists, sequences without slots or prefix", Fixture,
                   mask_union_fixture) {
  Fixture fixture;
  auto p = random_problem({6, 2, 0, 1, 9}, {700, 0, 41, 1, 9000}, 4, 0.2);
  for (std::size_t i = 0; i < p.lists.size(); i += 5) p.lists[i].clear();
  for (std::size_t i = 1; i < p.status.size(); i += 7) p.status[i] = specattn::selection_invalid_weight;
  expect_unions(fixture, p);
  for (list& positions : p.lists) positions.clear();
  expect_unions(fixture, p);
  expect_unions(fixture, random_problem({}, {}, 2, 0.5));
}

TEST_CASE_TEMPLATE("mask_union: keep_all of some slots lists the prefix, of every slot is keep_all", Fixture,
                   mask_union_fixture) {
  Fixture fixture;
  auto p = random_problem({4, 4, 1}, {9000, 130, 0}, 2, 0.1);
  for (std::size_t i = 0; i < p.all.size(); ++i) p.all[i] = i < 8 ? i % 4 == 0 : i % 2 == 1;
  expect_unions(fixture, p);
  p.all.assign(p.all.size(), true);
  expect_unions(fixture, p);
}

TEST_CASE_TEMPLATE("mask_union: a union over the capacity keeps its smallest positions and says so", Fixture,
                   mask_union_fixture) {
  Fixture fixture;
  auto p = random_problem({5, 2}, {9000, 300}, 2, 0.3);
  for (std::ptrdiff_t capacity : {1, 64, 100, 3000}) {
    CAPTURE(capacity);
    p.capacity = capacity;
    expect_unions(fixture, p);
  }
}

TEST_CASE_TEMPLATE(
    "mask_union: a union that fills the capacity is capped if one more entry follows, however far away", Fixture,
    mask_union_fixture) {
  Fixture fixture;
  for (const bool more : {false, true}) {
    auto p = random_problem({2}, {70000}, 1, 0.0);
    p.lists[0] = {3, 4, 9};
    p.lists[1] = {4, 8};
    p.capacity = 4;
    if (more) p.lists[1].push_back(69999);
    expect_unions(fixture, p);
    CHECK(run(fixture, p).status[0] == (more ? specattn::selection_capped : specattn::selection_ok));
  }
}

TEST_CASE_TEMPLATE("mask_union: entries may lie apart, and nothing between them is written", Fixture,
                   mask_union_fixture) {
  Fixture fixture;
  auto p = random_problem({3, 7}, {5000, 130}, 2, 0.3);
  p.apart = 3;
  expect_unions(fixture, p);
}

TEST_CASE_TEMPLATE("mask_union: status is optional, of the lists and of the unions", Fixture, mask_union_fixture) {
  Fixture fixture;
  const auto p = random_problem({3, 2}, {300, 70}, 2, 0.3);
  const answer want = run(fixture, p);
  staged<Fixture> on(fixture, p);
  auto args = on.args();
  args.lists.status = args.out.status = {};
  specattn::mask_union(fixture.context(), args);
  const answer got = on.read(fixture);
  CHECK(got.positions == want.positions);
  CHECK(got.counts == want.counts);
  CHECK(got.words == want.words);
  CHECK(got.status == std::vector<std::uint32_t>(got.status.size(), static_cast<std::uint32_t>(stale)));
}

TEST_CASE_TEMPLATE("mask_union: misuse throws a message that names the values", Fixture, mask_union_fixture) {
  Fixture fixture;
  using args = specattn::mask_union_args<typename Fixture::backend>;
  const auto integers = fixture.upload(list(64, 0));
  const auto words = fixture.upload(std::vector<std::uint32_t>(64, 0));
  const auto refused = [&](auto spoil, const char* part) {
    args a;
    a.kv_heads = 2;
    a.lists.positions = integers.shaped({6, 4});
    a.lists.counts = integers.shaped({6});
    a.slot_offsets = integers.shaped({2});
    a.kv_lens = integers.shaped({1});
    a.out.positions = integers.shaped({2, 8});
    a.out.counts = integers.shaped({2});
    a.slot_masks = words.shaped({2, 8});
    spoil(a);
    CHECK_THROWS_WITH_AS(specattn::mask_union(fixture.context(), a), doctest::Contains(part),
                         specattn::contract_error);
  };
  refused([&](args& a) { a.kv_heads = 4; }, "mask_union: 6 lists of slots over 4 kv_heads");
  refused([&](args& a) { a.kv_heads = 0; }, "6 lists of slots over 0 kv_heads");
  refused([&](args& a) { a.slot_offsets = integers.shaped({1}); }, "1 slot_offsets for 1 sequences");
  refused([&](args& a) { a.out.counts = integers.shaped({1}); }, "out has 1 counts and 2 lists");
  refused([&](args& a) { a.slot_masks = words.shaped({2, 7}); }, "slot_masks is [2, 7], out [2, 8]");
  refused([&](args& a) { a.slot_masks = {}; }, "slot_masks is [0, 0], out [2, 8]");
  refused([&](args& a) { a.out.status = words.shaped({3}); }, "3 status entries for 2 groups");
}

}  // namespace mask_union_testing
