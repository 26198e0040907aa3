// What record_keys() promises, one claim a case, for any backend. The including file defines `key_fixture`: a backend's
// fixture with `tolerance<T>`, how far a weight may be from the exact one, relative to itself.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "specattn/key_recording.hpp"

namespace key_testing {

using specattn::bf16;
using specattn::fp16;
using specattn::fp8_e4m3;

struct shape {
  std::int32_t steps = 4, layers = 2;
  std::vector<std::int32_t> kv_lens = {300};
  std::int32_t kv_heads = 2, group = 4, head_dim = 64;
  std::int32_t page_shift = 31;
  std::int32_t room = 0;   ///< behind the longest prefix, in a row
  std::int32_t shift = 0;  ///< elements that keys begin behind a whole 16 bytes
  bool each = false;       ///< a row for each step
  bool absent = false;     ///< the last sequence has asked nothing in the last step
  float scale = 0.0f;

  std::int32_t sequences() const { return static_cast<std::int32_t>(kv_lens.size()); }
  std::int32_t heads() const { return kv_heads * group; }
  std::int32_t capacity() const { return *std::max_element(kv_lens.begin(), kv_lens.end()) + room; }
  std::int32_t rows() const { return each ? steps : 1; }
};

/// Numbers for a shape, and what they make.
template <specattn::storage T>
struct problem {
  shape of;
  std::vector<T> keys;  // [layers, cache rows, pages, kv_heads, page, head_dim]
  std::vector<float> q, lse;
  std::vector<std::int32_t> table, cache_rows;
  std::int32_t pages, page;
  std::ptrdiff_t layer_stride;

  explicit problem(const shape& s) : of(s) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    page = s.page_shift == 31 ? s.capacity() + 8 : 1 << s.page_shift;
    pages = (s.capacity() + page - 1) / page;
    const std::int32_t n = s.sequences();
    for (std::int32_t i = 0; i < n * pages; ++i) table.push_back(n * pages - 1 - i);
    for (std::int32_t i = 0; i < n; ++i) cache_rows.push_back((i + 1) % n);
    layer_stride = std::ptrdiff_t{n} * pages * page * s.kv_heads * s.head_dim;
    keys.resize(static_cast<std::size_t>(s.layers * layer_stride + s.shift));
    for (T& x : keys) x = specattn::from_float<T>(normal(random));
    q.resize(static_cast<std::size_t>(s.steps * s.layers * n * s.heads() * s.head_dim));
    for (float& x : q) x = 1.5f * normal(random);
    lse.resize(static_cast<std::size_t>(s.steps * s.layers * n * s.heads()));
    for (std::size_t i = 0; i < lse.size(); ++i) lse[i] = exact_lse(i);
    if (!s.absent) return;
    for (std::int32_t layer = 0; layer < s.layers; ++layer)
      for (std::int32_t h = 0; h < s.heads(); ++h)
        lse[row_of(s.steps - 1, layer, n - 1, h)] = std::numeric_limits<float>::infinity();
  }

  std::size_t row_of(std::int32_t step, std::int32_t layer, std::int32_t s, std::int32_t head) const {
    return static_cast<std::size_t>(((step * of.layers + layer) * of.sequences() + s) * of.heads() + head);
  }
  double score(std::size_t row, std::int32_t position) const {
    const auto head = static_cast<std::int32_t>(row % static_cast<std::size_t>(of.heads()));
    const auto s = static_cast<std::size_t>(row / static_cast<std::size_t>(of.heads())) %
                   static_cast<std::size_t>(of.sequences());
    const auto layer =
        static_cast<std::ptrdiff_t>(row / static_cast<std::size_t>(of.heads() * of.sequences())) % of.layers;
    const std::int32_t entry = table[static_cast<std::size_t>(cache_rows[s] * pages + position / page)];
    const std::ptrdiff_t at = layer * layer_stride + std::ptrdiff_t{entry} * page * of.kv_heads * of.head_dim +
                              (std::ptrdiff_t{head / of.group} * page + position % page) * of.head_dim + of.shift;
    double sum = 0.0;
    for (std::int32_t d = 0; d < of.head_dim; ++d)
      sum += double{q[row * static_cast<std::size_t>(of.head_dim) + static_cast<std::size_t>(d)]} *
             double{specattn::to_float(keys[static_cast<std::size_t>(at + d)])};
    return sum * (of.scale != 0.0f ? double{of.scale} : 1.0 / std::sqrt(double{static_cast<double>(of.head_dim)}));
  }
  /// Of the prefix and as much again: rows have a mass of one half.
  float exact_lse(std::size_t row) const {
    const std::int32_t length =
        of.kv_lens[row / static_cast<std::size_t>(of.heads()) % static_cast<std::size_t>(of.sequences())];
    double sum = 0.0;
    for (std::int32_t i = 0; i < length; ++i) sum += std::exp(score(row, i));
    return static_cast<float>(std::log(2.0 * (length == 0 ? 1.0 : sum)));
  }
};

struct answer {
  std::vector<double> weights, masses;
  bool untouched = true;
};

template <class Fixture, specattn::storage T>
answer run(Fixture& fixture, const problem<T>& p) {
  using B = typename Fixture::backend;
  using stored = specattn::recorded_weight<B>;
  const shape& s = p.of;
  const std::ptrdiff_t n = s.sequences(), rows = std::ptrdiff_t{s.rows()} * s.layers * n * s.heads();
  const auto keys = fixture.upload(p.keys);
  const auto q = fixture.upload(p.q), lse = fixture.upload(p.lse);
  const auto table = fixture.upload(p.table), cache_rows = fixture.upload(p.cache_rows),
             lens = fixture.upload(s.kv_lens);
  const stored stale = specattn::from_float<stored>(-7.0f);
  const auto weights = fixture.upload(std::vector<stored>(static_cast<std::size_t>(rows * s.capacity()), stale));
  const auto masses = fixture.upload(std::vector<float>(static_cast<std::size_t>(rows)));
  specattn::key_recording_args<T, B> args;
  args.q = q.shaped({s.steps, s.layers, n, s.heads(), s.head_dim});
  args.lse = lse.shaped({s.steps, s.layers, n, s.heads()});
  args.kv.keys = const_cast<T*>(keys.data()) + s.shift;
  args.kv.page_stride = std::ptrdiff_t{p.page} * s.kv_heads * s.head_dim;
  args.kv.position_stride = s.head_dim;
  args.kv.head_stride = std::ptrdiff_t{p.page} * s.head_dim;
  args.kv.page_shift = s.page_shift;
  args.kv.block_table = table.shaped({n, p.pages});
  args.kv.kv_heads = s.kv_heads;
  args.kv.head_dim = s.head_dim;
  args.layer_stride = p.layer_stride;
  args.kv_lens = lens.shaped({n});
  args.cache_rows = cache_rows.shaped({n});
  args.scale = s.scale;
  args.weights = weights.shaped({s.rows(), s.layers, n, s.heads(), s.capacity()});
  args.masses = masses.shaped({s.rows(), s.layers, n, s.heads()});
  fixture.context().reserve_workspace(specattn::key_recording_workspace_bytes(fixture.context(), rows, s.capacity()));
  fixture.soil_workspace();
  specattn::record_keys(fixture.context(), args);
  answer found;
  for (const stored x : fixture.download(weights))
    found.weights.push_back(double{specattn::to_float(x)} * double{specattn::recorded_unit<B>});
  for (const float x : fixture.download(masses))
    found.masses.push_back(double{x} * double{specattn::recorded_unit<B>});
  return found;
}

template <class Fixture, specattn::storage T>
void equals_definition(Fixture& fixture, const shape& s) {
  const problem<T> p(s);
  const answer found = run(fixture, p);
  const double unit = double{specattn::recorded_unit<typename Fixture::backend>};
  double worst = 0.0, worst_mass = 0.0;
  bool untouched = true;
  std::size_t row = 0;
  for (std::int32_t r = 0; r < s.rows(); ++r) {
    for (std::size_t part = 0; part < static_cast<std::size_t>(s.layers * s.sequences() * s.heads()); ++part, ++row) {
      const std::int32_t length =
          s.kv_lens[part / static_cast<std::size_t>(s.heads()) % static_cast<std::size_t>(s.sequences())];
      double mass = 0.0;
      for (std::int32_t i = 0; i < s.capacity(); ++i) {
        const double weight =
            found.weights[row * static_cast<std::size_t>(s.capacity()) + static_cast<std::size_t>(i)];
        if (i >= length) {
          untouched = untouched && weight == -7.0 * unit;
          continue;
        }
        double exact = 0.0;
        for (std::int32_t t = s.each ? r : 0; t < (s.each ? r + 1 : s.steps); ++t) {
          const std::size_t asked =
              static_cast<std::size_t>(t) * static_cast<std::size_t>(s.layers * s.sequences() * s.heads()) + part;
          exact += std::exp(p.score(asked, i) - double{p.lse[asked]}) / (s.each ? 1 : s.steps);
        }
        mass += exact;
        const double off = std::abs(weight - exact) / (exact + 1e-7);
        if (!(off <= worst)) worst = off;
      }
      const double off = std::abs(found.masses[row] - mass) / (mass + 1e-7);
      if (!(off <= worst_mass)) worst_mass = off;
    }
  }
  CHECK_FALSE(!(worst <= Fixture::template tolerance<T>));
  CHECK_FALSE(!(worst_mass <= Fixture::template tolerance<T>));
  CHECK(untouched);
}

template <class Fixture>
void equals_definition_in_all_storage(Fixture& fixture, const shape& s) {
  equals_definition<Fixture, float>(fixture, s);
  equals_definition<Fixture, fp16>(fixture, s);
  equals_definition<Fixture, bf16>(fixture, s);
  equals_definition<Fixture, fp8_e4m3>(fixture, s);
}

TEST_CASE_TEMPLATE("record_keys: prefixes of any length, their mean over steps and each step's rows", Fixture,
                   key_fixture) {
  Fixture fixture;
  for (const bool each : {false, true}) {
    for (const std::int32_t kv_len : {1, 2, 31, 32, 33, 255, 256, 300, 2047, 2048, 2049, 4500}) {
      CAPTURE(each);
      CAPTURE(kv_len);
      equals_definition<Fixture, bf16>(fixture,
                                       {.steps = 3, .layers = 1, .kv_lens = {kv_len}, .kv_heads = 1, .each = each});
    }
  }
}

TEST_CASE_TEMPLATE("record_keys: any steps, group and head_dim, in every storage, contiguous and paged", Fixture,
                   key_fixture) {
  Fixture fixture;
  for (const std::int32_t group : {1, 2, 4, 7, 8, 12}) {
    for (const std::int32_t head_dim : {7, 32, 48, 64, 128, 200}) {
      CAPTURE(group);
      CAPTURE(head_dim);
      shape s{.steps = 1 + group % 5, .kv_lens = {333}, .group = group, .head_dim = head_dim};
      s.page_shift = group % 2 == 0 ? 4 : 31;
      s.each = group == 7;
      s.room = group == 4 ? 3 : 0;
      equals_definition_in_all_storage(fixture, s);
    }
  }
}

TEST_CASE_TEMPLATE("record_keys: ragged batches, empty prefixes, and a sequence that asked nothing in a step",
                   Fixture, key_fixture) {
  Fixture fixture;
  shape s{.steps = 4, .layers = 3, .kv_lens = {700, 0, 41, 1, 2260}, .group = 2, .room = 61, .scale = 0.2f};
  for (const bool each : {false, true}) {
    s.each = each, s.absent = true;
    equals_definition_in_all_storage(fixture, s);
  }
}

TEST_CASE_TEMPLATE("record_keys: keys at any address", Fixture, key_fixture) {
  Fixture fixture;
  for (const std::int32_t shift : {1, 4, 8}) {
    CAPTURE(shift);
    equals_definition_in_all_storage(fixture, {.kv_lens = {100, 37}, .shift = shift});
  }
}

TEST_CASE_TEMPLATE("record_keys: the same numbers every time", Fixture, key_fixture) {
  Fixture fixture;
  const problem<bf16> p({.kv_lens = {4100, 2500}, .group = 8});
  const answer first = run(fixture, p);
  for (int i = 0; i < 3; ++i) {
    const answer again = run(fixture, p);
    CHECK(again.weights == first.weights);
    CHECK(again.masses == first.masses);
  }
}

TEST_CASE_TEMPLATE("keep_queries: the newest slot's queries, and +infinity for sequences without slots", Fixture,
                   key_fixture) {
  using B = typename Fixture::backend;
  Fixture fixture;
  const std::vector<std::int32_t> offsets = {0, 2, 2, 3};
  std::vector<float> numbers(3 * 2 * 4), lse = {1, 2, 3, 4, 5, 6};
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(i + 1);
  const auto slot_offsets = fixture.upload(offsets);
  const auto q = fixture.upload(numbers), slot_lse = fixture.upload(lse),
             out = fixture.upload(std::vector<float>(2 * 3 * 8, -1.0f)),
             lse_out = fixture.upload(std::vector<float>(2 * 3 * 2, -1.0f));
  const specattn::query_log<B> log{out.shaped({2, 3, 2, 4}), lse_out.shaped({2, 3, 2}), slot_lse.shaped({3, 2})};
  specattn::detail::key_recording_impl<B>::keep_queries(fixture.context(), slot_offsets.shaped({4}),
                                                        q.shaped({3, 2, 4}), log, 1);
  const auto kept = fixture.download(out), found = fixture.download(lse_out);
  for (std::size_t i = 0; i < 24; ++i) CHECK(kept[i] == -1.0f);  // the other layer's
  for (std::size_t i = 0; i < 8; ++i) {
    CHECK(kept[24 + i] == static_cast<float>(8 + i + 1));
    CHECK(kept[24 + 8 + i] == 0.0f);
    CHECK(kept[24 + 16 + i] == static_cast<float>(16 + i + 1));
  }
  const float none = std::numeric_limits<float>::infinity();
  CHECK(std::vector<float>(found.begin() + 6, found.end()) == std::vector<float>{3, 4, none, none, 5, 6});
}

TEST_CASE_TEMPLATE("record_keys: misuse throws a message that names the values", Fixture, key_fixture) {
  using B = typename Fixture::backend;
  Fixture fixture;
  const auto q = fixture.upload(std::vector<float>(2 * 4 * 8)), lse = fixture.upload(std::vector<float>(8)),
             masses = fixture.upload(std::vector<float>(8));
  const auto weights = fixture.upload(std::vector<specattn::recorded_weight<B>>(8 * 16));
  const auto table = fixture.upload(std::vector<std::int32_t>{0}),
             lens = fixture.upload(std::vector<std::int32_t>{9, 9});
  const auto refused = [&](auto spoil, const char* part) {
    specattn::key_recording_args<float, B> args;
    args.q = q.shaped({2, 1, 1, 4, 8});
    args.lse = lse.shaped({2, 1, 1, 4});
    args.kv.kv_heads = 2;
    args.kv.head_dim = 8;
    args.kv.block_table = table.shaped({1, 1});
    args.kv_lens = lens.shaped({1});
    args.weights = weights.shaped({1, 1, 1, 4, 16});
    args.masses = masses.shaped({1, 1, 1, 4});
    spoil(args);
    CHECK_THROWS_WITH_AS(specattn::record_keys(fixture.context(), args), doctest::Contains(part),
                         specattn::contract_error);
  };
  using args = specattn::key_recording_args<float, B>;
  refused([](args& a) { a.kv.kv_heads = 3; }, "4 q_heads over 3 kv_heads");
  refused([](args& a) { a.kv.head_dim = 16; }, "q has head_dim 8 of stride 1, the cache 16");
  refused([&](args& a) { a.kv_lens = lens.shaped({2}); }, "2 kv_lens and 0 cache_rows for 1 sequences");
  refused(
      [&](args& a) {
        a.key_scales = masses.shaped({1, 2});
      },
      "key_scales [1, 2] for 1 layers of 2 kv_heads, whose");
  refused([&](args& a) { a.lse = lse.shaped({1, 1, 1, 4}); }, "lse is [1, 1, 1, 4], needed [2, 1, 1, 4]");
  refused([&](args& a) { a.weights = weights.shaped({3, 1, 1, 2, 16}); }, "weights are [3, 1, 1, 2, …]");
  refused([&](args& a) { a.masses = masses.shaped({2, 1, 1, 4}); }, "masses [2, 1, 1, 4]");
}

}  // namespace key_testing
