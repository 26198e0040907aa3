// What attend() promises of lists of slots that are given as one union with a word of bits for each entry, for any
// backend. The including file defines `attend_fixture` as for attend/cases.hpp.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "attend/problem.hpp"

namespace attend_testing {

using specattn::bf16;
using specattn::fp16;

/// Each slot reads an entry of the union with probability `share`.
template <specattn::storage T>
void mask_random(problem<T>& p, double share, std::uint32_t seed = 11) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<double> uniform;
  p.masks.clear();
  for (const auto& sequence : p.kept) {
    p.masks.emplace_back();
    for (const list& positions : sequence) {
      std::vector<std::uint32_t> words(positions.size(), 0);
      for (std::uint32_t& word : words)
        for (int bit = 0; bit < 32; ++bit) word |= (uniform(engine) < share ? 1u : 0u) << bit;
      p.masks.back().push_back(words);
    }
  }
}
template <specattn::storage T>
void mask_all(problem<T>& p, std::uint32_t word) {
  mask_random(p, 0.0);
  for (auto& sequence : p.masks)
    for (auto& words : sequence) words.assign(words.size(), word);
}

/// Against the oracle, which attends to each slot's own list; entries of others are recorded as zero.
template <class Fixture, specattn::storage T>
void masked_agrees(Fixture& fixture, problem<T> p) {
  constexpr double tolerance = Fixture::template tolerance<T>;
  p.record = true;
  p.recorded = record_slots::all;
  answer a = run(fixture, p);
  std::int32_t slot_row = 0;
  for (std::size_t s = 0; s < p.shape.slots.size(); ++s) {
    for (std::int32_t slot = 0; slot < p.shape.slots[s]; ++slot, ++slot_row) {
      for (std::int32_t q_head = 0; q_head < p.q_heads(); ++q_head) {
        const auto head = static_cast<std::size_t>(q_head / p.shape.group);
        if (p.everything(s, head)) continue;
        float* weights = a.weights.data() + (slot_row * p.q_heads() + q_head) * a.capacity;
        const auto& words = p.masks[s][head];
        std::size_t left = 0;  // the row without the entries that the slot does not read, as the oracle has it
        bool zero = true;
        for (std::size_t i = 0; i < words.size() + static_cast<std::size_t>(slot) + 1; ++i) {
          const bool read = i >= words.size() || (words[i] >> slot & 1u) != 0;
          if (!read) zero = zero && weights[i] == 0.0f;
          if (read) weights[left++] = weights[i];
        }
        CHECK(zero);
        std::fill(weights + left, weights + words.size() + static_cast<std::size_t>(slot) + 1, stale);
      }
    }
  }
  const auto d = compare(p, a);
  CHECK_FALSE(!(d.out <= tolerance));
  CHECK_FALSE(!(d.lse <= tolerance));
  CHECK_FALSE(!(d.weights <= tolerance));
  CHECK_FALSE(!(d.sum <= 2e-5));
  CHECK(d.untouched_behind);
}

TEST_CASE_TEMPLATE("attend over masks: each slot attends to its own list of the union", Fixture, attend_fixture) {
  Fixture fixture;
  for (std::int32_t slots : {1, 2, 6, 32}) {
    for (std::int32_t group : {1, 4, 8}) {
      for (std::int32_t head_dim : {64, 128, 80}) {
        CAPTURE(slots);
        CAPTURE(group);
        CAPTURE(head_dim);
        pass_shape shape;
        shape.kv_lens = {slots == 6 ? 1500 : 90};
        shape.slots = {slots};
        shape.group = group;
        shape.head_dim = head_dim;
        const auto check = [&]<class T>(T) {
          auto p = random_problem<T>(shape);
          keep_random(p, 0.6);
          mask_random(p, 0.3);
          masked_agrees(fixture, p);
        };
        check(bf16{});
        if (head_dim == 64) check(float{});
        if (head_dim == 128) check(fp16{});
      }
    }
  }
}

TEST_CASE_TEMPLATE("attend over masks: ragged batches, dense heads beside masked ones, empty lists", Fixture,
                   attend_fixture) {
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {2000, 0, 41, 1, 260};
  shape.slots = {6, 2, 0, 1, 9};
  shape.group = 4;
  shape.page_size = 16;
  auto p = random_problem<bf16>(shape);
  keep_random(p, 0.4);
  p.kept[0][1].clear();
  p.all.assign(5, std::vector<bool>(2, false));
  p.all[4][0] = true;
  mask_random(p, 0.2);
  masked_agrees(fixture, p);
}

TEST_CASE_TEMPLATE("attend over masks: a union of every position", Fixture, attend_fixture) {
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {300};
  shape.slots = {6};
  const auto check = [&]<class T>(T) {
    auto p = random_problem<T>(shape);
    keep_random(p, 2.0);
    mask_random(p, 0.4);
    masked_agrees(fixture, p);
  };
  check(bf16{});
  check(float{});
}

TEST_CASE_TEMPLATE("attend over masks: no bit set is an empty selection", Fixture, attend_fixture) {
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {700};
  shape.slots = {6};
  const auto check = [&]<class T>(T) {
    auto p = random_problem<T>(shape);
    keep_random(p, 0.5);
    mask_all(p, 0);
    masked_agrees(fixture, p);
  };
  check(bf16{});
  check(float{});
}

TEST_CASE_TEMPLATE("attend over masks: all bits set gives the bits of no masks", Fixture, attend_fixture) {
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {1500, 300};
  shape.slots = {6, 3};
  const auto check = [&]<class T>(T) {
    auto p = random_problem<T>(shape);
    keep_random(p, 0.5);
    p.record = true;
    const answer without = run(fixture, p);
    mask_all(p, ~0u);
    const answer with = run(fixture, p);
    CHECK(with.out == without.out);
    CHECK(with.lse == without.lse);
    CHECK(with.weights == without.weights);
  };
  check(bf16{});
  check(float{});
}

TEST_CASE_TEMPLATE("attend over masks: misuse throws a message that names the values", Fixture, attend_fixture) {
  Fixture fixture;
  using B = typename Fixture::backend;
  const auto p = random_problem<float>(pass_shape{});
  const auto cache = filled_cache(fixture, p);
  const auto q = fixture.upload(p.q), out = fixture.upload(p.q);
  const auto offsets = fixture.upload(std::vector<std::int32_t>{0, 1}), kv_lens = fixture.upload(p.shape.kv_lens),
             counts = fixture.upload(std::vector<std::int32_t>{3, 3}),
             positions = fixture.upload(std::vector<std::int32_t>{1, 2, 3, 4, 5, 6});
  const auto words = fixture.upload(std::vector<std::uint32_t>(6, 1));
  specattn::attend_args<float, B> args;
  args.q = q.shaped({1, 4, 64});
  args.out = out.shaped({1, 4, 64});
  args.kv = cache.layer(1);
  args.slot_offsets = offsets.shaped({2});
  args.kv_lens = kv_lens.shaped({1});
  args.slot_masks = words.shaped({2, 3});
  CHECK_THROWS_WITH_AS(specattn::attend(fixture.context(), args), "attend: slot_masks without a selection",
                       specattn::contract_error);
  args.kept.positions = positions.shaped({2, 3});
  args.kept.counts = counts.shaped({2});
  args.kept_sequence_stride = 2;
  args.slot_masks = words.shaped({1, 3});
  CHECK_THROWS_WITH_AS(specattn::attend(fixture.context(), args),
                       "attend: slot_masks is [1, 3], the selection [2, 3]", specattn::contract_error);
  args.slot_masks = words.shaped({2, 2});
  CHECK_THROWS_WITH_AS(specattn::attend(fixture.context(), args), doctest::Contains("slot_masks is [2, 2]"),
                       specattn::contract_error);
}

}  // namespace attend_testing
