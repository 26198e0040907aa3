// What recompute_steps() promises, one claim a case, for any backend. The including file defines `key_fixture`: a backend's
// fixture with `tolerance<T>`, how far a weight may be from the exact one, relative to itself.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "specattn/recompute.hpp"

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
  std::int32_t slots() const { return sequences() + 2; }
};

/// Numbers for a shape, and what they make.
template <specattn::storage T>
struct problem {
  shape of;
  std::vector<T> keys;                // [layers, cache rows, pages, kv_heads, page, head_dim]
  std::vector<float> q, lse, scales;  // scales: [layers, kv_heads] of keys, where storage has them
  std::vector<std::int32_t> table, cache_rows, slot_of;
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
    for (std::int32_t i = 0; i < s.layers * s.kv_heads; ++i)
      scales.push_back(specattn::scaled_storage<T> ? 0.5f + 0.25f * static_cast<float>(i % 5) : 1.0f);
    for (std::int32_t i = 0; i < s.steps * n; ++i) slot_of.push_back((i % n + i / n) % s.slots());
    q.resize(static_cast<std::size_t>(s.steps * s.layers * s.slots() * s.heads() * s.head_dim));
    for (float& x : q) x = 1.5f * normal(random);
    lse.assign(static_cast<std::size_t>(s.steps * s.layers * s.slots() * s.heads()), 0.0f);
    for (std::int32_t step = 0; step < s.steps; ++step)
      for (std::int32_t part = 0; part < s.layers * n * s.heads(); ++part)
        lse[row_of(step, part)] = exact_lse(step, part);
    if (s.absent) slot_of.back() = -1;
  }

  std::int32_t sequence_of(std::int32_t part) const { return part / of.heads() % of.sequences(); }
  /// Of a step: what (layer, sequence, head) `part` asks by.
  std::size_t row_of(std::int32_t step, std::int32_t part) const {
    const std::int32_t slot = slot_of[static_cast<std::size_t>(step * of.sequences() + sequence_of(part))];
    const std::int32_t layer = part / of.heads() / of.sequences();
    return static_cast<std::size_t>(((step * of.layers + layer) * of.slots() + slot) * of.heads() +
                                    part % of.heads());
  }
  double score(std::int32_t step, std::int32_t part, std::int32_t position) const {
    const std::int32_t head = part % of.heads(), layer = part / of.heads() / of.sequences();
    const std::size_t row = row_of(step, part), s = static_cast<std::size_t>(sequence_of(part));
    const std::int32_t entry = table[static_cast<std::size_t>(cache_rows[s] * pages + position / page)];
    const std::ptrdiff_t at = layer * layer_stride + std::ptrdiff_t{entry} * page * of.kv_heads * of.head_dim +
                              (std::ptrdiff_t{head / of.group} * page + position % page) * of.head_dim + of.shift;
    double sum = 0.0;
    for (std::int32_t d = 0; d < of.head_dim; ++d)
      sum += double{q[row * static_cast<std::size_t>(of.head_dim) + static_cast<std::size_t>(d)]} *
             double{specattn::to_float(keys[static_cast<std::size_t>(at + d)])};
    sum *= double{scales[static_cast<std::size_t>(layer * of.kv_heads + head / of.group)]};
    return sum * (of.scale != 0.0f ? double{of.scale} : 1.0 / std::sqrt(double{static_cast<double>(of.head_dim)}));
  }
  /// Of the prefix and as much again: rows have a mass of one half.
  float exact_lse(std::int32_t step, std::int32_t part) const {
    const std::int32_t length = of.kv_lens[static_cast<std::size_t>(sequence_of(part))];
    double sum = 0.0;
    for (std::int32_t i = 0; i < length; ++i) sum += std::exp(score(step, part, i));
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
             lens = fixture.upload(s.kv_lens), slots = fixture.upload(p.slot_of);
  const stored stale = specattn::from_float<stored>(-7.0f);
  const auto weights = fixture.upload(std::vector<stored>(static_cast<std::size_t>(rows * s.capacity()), stale));
  const auto masses = fixture.upload(std::vector<float>(static_cast<std::size_t>(rows)));
  specattn::recompute_steps_args<T, B> args;
  args.q = q.shaped({s.steps, s.layers, s.slots(), s.heads(), s.head_dim});
  args.lse = lse.shaped({s.steps, s.layers, s.slots(), s.heads()});
  args.slot_of = slots.shaped({s.steps, n});
  args.kv.keys = const_cast<T*>(keys.data()) + s.shift;
  args.kv.page_stride = std::ptrdiff_t{p.page} * s.kv_heads * s.head_dim;
  args.kv.position_stride = s.head_dim;
  args.kv.head_stride = std::ptrdiff_t{p.page} * s.head_dim;
  args.kv.page_shift = s.page_shift;
  args.kv.block_table = table.shaped({n, p.pages});
  args.kv.kv_heads = s.kv_heads;
  args.kv.head_dim = s.head_dim;
  args.layer_stride = p.layer_stride;
  const auto scales = fixture.upload(p.scales);
  if constexpr (specattn::scaled_storage<T>) args.key_scales = scales.shaped({s.layers, s.kv_heads});
  args.kv_lens = lens.shaped({n});
  args.cache_rows = cache_rows.shaped({n});
  args.scale = s.scale;
  args.weights = weights.shaped({s.rows(), s.layers, n, s.heads(), s.capacity()});
  args.masses = masses.shaped({s.rows(), s.layers, n, s.heads()});
  fixture.context().reserve_workspace(
      specattn::recompute_steps_workspace_bytes(fixture.context(), rows, s.capacity()));
  fixture.soil_workspace();
  specattn::recompute_steps(fixture.context(), args);
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
    for (std::int32_t part = 0; part < s.layers * s.sequences() * s.heads(); ++part, ++row) {
      const std::int32_t length = s.kv_lens[static_cast<std::size_t>(p.sequence_of(part))];
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
          if (p.slot_of[static_cast<std::size_t>(t * s.sequences() + p.sequence_of(part))] < 0) continue;
          exact += std::exp(p.score(t, part, i) - double{p.lse[p.row_of(t, part)]}) / (s.each ? 1 : s.steps);
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

TEST_CASE_TEMPLATE("recompute_steps: prefixes of any length, their mean over steps and each step's rows", Fixture,
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

TEST_CASE_TEMPLATE("recompute_steps: any steps, group and head_dim, in every storage, contiguous and paged", Fixture,
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

TEST_CASE_TEMPLATE("recompute_steps: ragged batches, empty prefixes, and a sequence that asked nothing in a step",
                   Fixture, key_fixture) {
  Fixture fixture;
  shape s{.steps = 4, .layers = 3, .kv_lens = {700, 0, 41, 1, 2260}, .group = 2, .room = 61, .scale = 0.2f};
  for (const bool each : {false, true}) {
    s.each = each, s.absent = true;
    equals_definition_in_all_storage(fixture, s);
  }
}

TEST_CASE_TEMPLATE("recompute_steps: keys at any address", Fixture, key_fixture) {
  Fixture fixture;
  for (const std::int32_t shift : {1, 4, 8}) {
    CAPTURE(shift);
    equals_definition_in_all_storage(fixture, {.kv_lens = {100, 37}, .shift = shift});
  }
}

/// Weights and mass of one row whose scores stand `above` its log-sum-exp.
template <class Fixture, specattn::storage T>
answer far_above(Fixture& fixture, const std::vector<float>& above) {
  problem<T> p({.steps = 1,
                .layers = 1,
                .kv_lens = {static_cast<std::int32_t>(above.size())},
                .kv_heads = 1,
                .group = 1,
                .head_dim = 32,
                .scale = 1.0f});
  std::fill(p.q.begin(), p.q.end(), 0.0f);
  std::fill(p.lse.begin(), p.lse.end(), 0.0f);
  std::fill(p.keys.begin(), p.keys.end(), specattn::from_float<T>(0.0f));
  p.q[p.row_of(0, 0) * 32] = 1.0f;
  for (std::size_t i = 0; i < above.size(); ++i) p.keys[i * 32] = specattn::from_float<T>(above[i]);
  return run(fixture, p);
}

TEST_CASE_TEMPLATE(
    "recompute_steps: a score far above its log-sum-exp weighs exp of that, up to the largest stored number", Fixture,
    key_fixture) {
  Fixture fixture;
  const bool on_cpu = std::is_same_v<typename Fixture::backend, specattn::cpu>;
  const double unit = double{specattn::recorded_unit<typename Fixture::backend>};
  const double most = on_cpu ? double{std::numeric_limits<float>::max()} : 65504.0 * unit;
  const double beyond = on_cpu ? std::numeric_limits<double>::infinity() : most;
  const auto check = [&]<specattn::storage T>(T) {
    // every one once where a register's lanes are and once behind them; all are bf16's numbers
    std::vector<float> above;
    for (int i = 0; i < 4; ++i)
      for (const float x : {-100.0f, -3.0f, 0.5f, 10.0f, 80.0f, 88.0f, 88.5f, 89.0f, 95.0f, 200.0f, 3.0e4f})
        above.push_back(x);
    const answer found = far_above<Fixture, T>(fixture, above);
    double mass = 0.0;
    for (std::size_t i = 0; i < above.size(); ++i) {
      CAPTURE(above[i]);
      const double exact = std::exp(double{above[i]}), right = exact > most ? beyond : exact;
      if (std::isinf(right)) {
        CHECK(found.weights[i] == right);
      } else {
        CHECK(std::abs(found.weights[i] - right) <= Fixture::template tolerance<T> * (right + 1e-7));
      }
      mass += right;
    }
    if (std::isinf(mass)) {
      CHECK(found.masses[0] == mass);
    } else {
      CHECK(found.masses[0] == doctest::Approx(mass).epsilon(1e-3));
    }
  };
  check(float{});
  check(bf16{});
}

TEST_CASE_TEMPLATE("recompute_steps: the same numbers every time", Fixture, key_fixture) {
  Fixture fixture;
  const problem<bf16> p({.kv_lens = {4100, 2500}, .group = 8});
  const answer first = run(fixture, p);
  for (int i = 0; i < 3; ++i) {
    const answer again = run(fixture, p);
    CHECK(again.weights == first.weights);
    CHECK(again.masses == first.masses);
  }
}

TEST_CASE_TEMPLATE("keep_queries: every slot's queries, and nothing behind them", Fixture, key_fixture) {
  using B = typename Fixture::backend;
  Fixture fixture;
  std::vector<float> numbers(3 * 2 * 4);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(i + 1);
  const auto q = fixture.upload(numbers), kept = fixture.upload(std::vector<float>(4 * 8, -1.0f));
  specattn::detail::attend_impl<B>::keep_queries(fixture.context(), q.shaped({3, 2, 4}), kept.shaped({4, 2, 4}));
  numbers.resize(4 * 8, -1.0f);
  CHECK(fixture.download(kept) == numbers);
}

TEST_CASE_TEMPLATE("recompute_steps: misuse throws a message that names the values", Fixture, key_fixture) {
  using B = typename Fixture::backend;
  Fixture fixture;
  const auto q = fixture.upload(std::vector<float>(2 * 4 * 8)), lse = fixture.upload(std::vector<float>(8)),
             masses = fixture.upload(std::vector<float>(8));
  const auto weights = fixture.upload(std::vector<specattn::recorded_weight<B>>(8 * 16));
  const auto table = fixture.upload(std::vector<std::int32_t>{0}),
             lens = fixture.upload(std::vector<std::int32_t>{9, 9}),
             slots = fixture.upload(std::vector<std::int32_t>{0, 0, 0});
  const auto refused = [&](auto spoil, const char* part) {
    specattn::recompute_steps_args<float, B> args;
    args.q = q.shaped({2, 1, 1, 4, 8});
    args.lse = lse.shaped({2, 1, 1, 4});
    args.slot_of = slots.shaped({2, 1});
    args.kv.kv_heads = 2;
    args.kv.head_dim = 8;
    args.kv.block_table = table.shaped({1, 1});
    args.kv_lens = lens.shaped({1});
    args.weights = weights.shaped({1, 1, 1, 4, 16});
    args.masses = masses.shaped({1, 1, 1, 4});
    spoil(args);
    CHECK_THROWS_WITH_AS(specattn::recompute_steps(fixture.context(), args), doctest::Contains(part),
                         specattn::contract_error);
  };
  using args = specattn::recompute_steps_args<float, B>;
  refused([](args& a) { a.kv.kv_heads = 3; }, "4 q_heads over 3 kv_heads");
  refused([](args& a) { a.kv.head_dim = 16; }, "q has head_dim 8 of stride 1, the cache 16");
  refused([&](args& a) { a.slot_of = slots.shaped({3, 1}); }, "slot_of [3, 1] and 0 cache_rows for 2 steps of 1 seq");
  refused([&](args& a) { a.cache_rows = lens.shaped({2}); }, "slot_of [2, 1] and 2 cache_rows for 2 steps of 1 seq");
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
