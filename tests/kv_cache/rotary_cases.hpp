// What append_rotated() promises, for any backend; the including file defines `kv_cache_fixture` as kv_cache/cases.hpp
// has it.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "oracle/rotary_oracle.hpp"
#include "specattn/kv_cache.hpp"

namespace kv_cache_testing {

/// Float's rounding of an angle below pi, of its sine and cosine, and of two products and their sum, relative to the
/// magnitudes that are turned.
constexpr double rotary_tolerance = 6e-7;

/// Three sequences of 3, 0 and 4 slots, and 2 rows of padding, at positions of a text that keep() shortened.
struct rotary_problem {
  static constexpr std::ptrdiff_t slots = 9, q_heads = 6, kv_heads = 2;
  std::int32_t head_dim;
  std::vector<std::int32_t> offsets = {0, 3, 3, 7}, lengths = {7, 0, 15}, rows = {2, 1, 0};
  std::vector<std::int32_t> positions = {9, 10, 11, 131069, 131070, 131071, 1000003, 0, 0};
  std::vector<float> frequencies;
  std::vector<float>
      heads;  // [slots, q_heads + 2 * kv_heads, head_dim]: queries, keys, values, as one product leaves them

  explicit rotary_problem(std::int32_t dim) : head_dim(dim) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    for (int d = 0; d < dim / 2; ++d)
      frequencies.push_back(static_cast<float>(std::pow(500000.0, -2.0 * d / static_cast<double>(dim))));
    heads.resize(static_cast<std::size_t>(slots * (q_heads + 2 * kv_heads) * dim));
    for (float& x : heads) x = normal(random);
  }

  std::vector<double> head(std::ptrdiff_t slot, std::ptrdiff_t which) const {
    const auto first = heads.begin() + (slot * (q_heads + 2 * kv_heads) + which) * head_dim;
    return {first, first + head_dim};
  }
  std::vector<double> turned(std::ptrdiff_t slot, std::ptrdiff_t which) const {
    return oracle::rotated(head(slot, which), positions[static_cast<std::size_t>(slot)],
                           {frequencies.begin(), frequencies.end()});
  }
  /// The largest difference from `want`, in units of the two magnitudes that each element is made of.
  double difference(const float* got, std::ptrdiff_t stride, const std::vector<double>& want, std::ptrdiff_t slot,
                    std::ptrdiff_t which) const {
    const auto from = head(slot, which);
    double worst = 0.0;
    for (std::size_t d = 0; d < want.size(); ++d) {
      const std::size_t other = (d + want.size() / 2) % want.size();
      const double away = std::abs(static_cast<double>(got[static_cast<std::ptrdiff_t>(d) * stride]) - want[d]);
      worst = (std::max)(worst, away / (std::abs(from[d]) + std::abs(from[other])));
      if (std::isnan(away)) return away;
    }
    return worst;
  }
};

/// A pass of a problem over a new cache, and what it left.
template <class Fixture, specattn::storage T>
struct rotary_pass {
  using B = typename Fixture::backend;
  specattn::kv_cache<T, B> cache;
  std::vector<float> heads;   // after the pass, laid out as they were
  std::ptrdiff_t stride = 1;  // of elements

  rotary_pass(Fixture& fixture, const rotary_problem& p, std::int32_t page_size, bool strided)
      : cache({3, 2, 2, p.head_dim, 40, page_size, 0}), stride(strided ? 3 : 1) {
    const std::ptrdiff_t all = p.q_heads + 2 * p.kv_heads, row = p.head_dim * stride;
    std::vector<float> spread(p.heads.size() * static_cast<std::size_t>(stride), -5.0f);
    for (std::size_t i = 0; i < p.heads.size(); ++i) spread[i * static_cast<std::size_t>(stride)] = p.heads[i];
    const auto memory = fixture.upload(spread);
    const auto part = [&](std::ptrdiff_t first, std::ptrdiff_t count) {
      return specattn::view<float, 3, B>(memory.data() + first * row, {p.slots, count, p.head_dim},
                                         {all * row, row, stride});
    };
    const auto offsets = fixture.upload(p.offsets), lengths = fixture.upload(p.lengths);
    const auto rows = fixture.upload(p.rows), positions = fixture.upload(p.positions);
    const auto frequencies = fixture.upload(p.frequencies);
    const auto zeros = fixture.upload(std::vector<float>(static_cast<std::size_t>(15 * 2 * p.head_dim)));
    for (std::size_t s : {0u, 2u}) {
      const auto before = zeros.shaped({p.lengths[s], 2, p.head_dim});
      cache.append(fixture.context(), 1, p.rows[s], before, before);
      cache.advance(p.rows[s], p.lengths[s]);
      cache.reserve(p.rows[s], p.offsets[s + 1] - p.offsets[s]);
    }
    const std::ptrdiff_t q_row = p.q_heads * p.head_dim;  // one more than there are slots stays as it is
    const auto kept = fixture.upload(std::vector<float>(static_cast<std::size_t>((p.slots + 1) * q_row), -5.0f));
    cache.append_rotated(fixture.context(), 1, {offsets.shaped({4}), lengths.shaped({3}), rows.shaped({3})},
                         part(0, p.q_heads), part(p.q_heads, p.kv_heads), part(p.q_heads + p.kv_heads, p.kv_heads),
                         {positions.shaped({p.slots}), frequencies.shaped({p.head_dim / 2})},
                         strided ? specattn::view<float, 3, B>() : kept.shaped({p.slots + 1, p.q_heads, p.head_dim}));
    heads = fixture.download(memory);
    const std::vector<float> twice = fixture.download(kept);
    for (std::ptrdiff_t i = 0; i < (p.slots + 1) * q_row; ++i) {
      const std::ptrdiff_t slot = i / q_row;
      const bool written = !strided && slot < p.slots;
      const float wanted = written ? head(p, slot, i % q_row / p.head_dim)[i % p.head_dim] : -5.0f;
      REQUIRE(twice[static_cast<std::size_t>(i)] == wanted);
    }
  }

  const float* head(const rotary_problem& p, std::ptrdiff_t slot, std::ptrdiff_t which) const {
    return heads.data() + (slot * (p.q_heads + 2 * p.kv_heads) + which) * p.head_dim * stride;
  }
  /// What the cache holds of a slot.
  std::vector<float> stored(Fixture& fixture, const rotary_problem& p, std::ptrdiff_t slot, std::int32_t kv_head,
                            bool value) const {
    const std::size_t s = slot < 3 ? 0 : 2;
    auto view = cache.layer(1);
    const auto table = fixture.read(view.block_table.data(), view.block_table.size());
    auto on_host = view;
    on_host.block_table = {table.data(), view.block_table.extents()};
    const auto position = p.lengths[s] + static_cast<std::int32_t>(slot) - p.offsets[s];
    const auto at = on_host.offset(p.rows[s], position, kv_head);
    std::vector<float> wide;
    for (const T x : fixture.read((value ? view.values : view.keys) + at, p.head_dim))
      wide.push_back(specattn::to_float(x));
    return wide;
  }
};

TEST_CASE_TEMPLATE(
    "append_rotated: queries in place and keys in the cache are the oracle's at any position, head_dim and layout; "
    "values and the keys given stay",
    Fixture, kv_cache_fixture) {
  for (const std::int32_t head_dim : {2, 6, 64, 128, 130, 256}) {
    for (const bool strided : {false, true}) {
      CAPTURE(head_dim);
      CAPTURE(strided);
      Fixture fixture;
      const rotary_problem p(head_dim);
      const rotary_pass<Fixture, float> pass(fixture, p, strided ? 8 : 0, strided);
      double queries = 0.0, keys = 0.0;
      bool others = true;
      for (std::ptrdiff_t slot = 0; slot < p.slots; ++slot) {
        for (std::ptrdiff_t which = 0; which < p.q_heads; ++which)
          queries = (std::max)(
              queries, p.difference(pass.head(p, slot, which), pass.stride, p.turned(slot, which), slot, which));
        for (std::ptrdiff_t which = p.q_heads; which < p.q_heads + 2 * p.kv_heads; ++which)
          others =
              others && p.difference(pass.head(p, slot, which), pass.stride, p.head(slot, which), slot, which) == 0;
        for (std::int32_t kv_head = 0; slot < 7 && kv_head < p.kv_heads; ++kv_head) {
          const auto key = p.q_heads + kv_head, value = key + p.kv_heads;
          keys = (std::max)(keys, p.difference(pass.stored(fixture, p, slot, kv_head, false).data(), 1,
                                               p.turned(slot, key), slot, key));
          others = others && p.difference(pass.stored(fixture, p, slot, kv_head, true).data(), 1, p.head(slot, value),
                                          slot, value) == 0;
        }
      }
      CHECK(queries <= rotary_tolerance);
      CHECK(keys <= rotary_tolerance);
      CHECK(others);
    }
  }
}

TEST_CASE_TEMPLATE("append_rotated: 16-bit keys are rounded once, after the rotation", Fixture, kv_cache_fixture) {
  Fixture fixture;
  const rotary_problem p(128);
  const rotary_pass<Fixture, specattn::fp16> pass(fixture, p, 8, false);
  double worst = 0.0;
  for (std::ptrdiff_t slot = 0; slot < 7; ++slot) {
    for (std::int32_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
      const auto key = p.q_heads + kv_head;
      const auto want = p.turned(slot, key), from = p.head(slot, key);
      const auto got = pass.stored(fixture, p, slot, kv_head, false);
      for (std::size_t d = 0; d < want.size(); ++d) {
        const double slack = rotary_tolerance * (std::abs(from[d]) + std::abs(from[(d + 64) % 128])) + 0x1p-25;
        worst = (std::max)(worst, (std::abs(static_cast<double>(got[d]) - want[d]) - slack) / std::abs(want[d]));
      }
    }
  }
  CHECK(worst <= 0x1p-11);
}

TEST_CASE_TEMPLATE("append_rotated: at position 0, and by frequencies of 0, it is append() to the bit", Fixture,
                   kv_cache_fixture) {
  for (const bool still : {false, true}) {
    Fixture fixture;
    rotary_problem p(64);
    if (still) {
      std::fill(p.frequencies.begin(), p.frequencies.end(), 0.0f);
    } else {
      std::fill(p.positions.begin(), p.positions.end(), 0);
    }
    const rotary_pass<Fixture, float> pass(fixture, p, 0, false);
    CHECK(pass.heads == p.heads);
    bool same = true;
    for (std::ptrdiff_t slot = 0; slot < 7; ++slot) {
      const auto key = p.head(slot, p.q_heads + 1);
      const auto got = pass.stored(fixture, p, slot, 1, false);
      same = same && std::equal(got.begin(), got.end(), key.begin());
    }
    CHECK(same);
  }
}

TEST_CASE_TEMPLATE("append_rotated: errors name the values and leave queries and cache unchanged", Fixture,
                   kv_cache_fixture) {
  using B = typename Fixture::backend;
  Fixture fixture;
  specattn::kv_cache<float, B> cache({1, 1, 1, 4, 8, 0, 0}), odd({1, 1, 1, 5, 8, 0, 0});
  const auto memory = fixture.upload(std::vector<float>(20, 1.0f));
  const auto numbers = fixture.upload(std::vector<std::int32_t>{0, 2, 0, 7, 7});
  const auto at = [&](std::ptrdiff_t first, std::ptrdiff_t count) {
    return specattn::view<const std::int32_t, 1, B>(numbers.data() + first, {count});
  };
  const auto refused = [&](auto& to, std::ptrdiff_t dim, std::ptrdiff_t q_slots, std::ptrdiff_t positions,
                           std::ptrdiff_t frequencies, const char* part) {
    const auto rows = memory.shaped({2, 1, dim});
    CHECK_THROWS_WITH_AS(
        to.append_rotated(fixture.context(), 0, {at(0, 2), at(2, 1), at(2, 1)}, memory.shaped({q_slots, 1, dim}),
                          rows, rows, {at(3, positions), memory.shaped({frequencies})}),
        doctest::Contains(part), specattn::contract_error);
    CHECK(fixture.download(memory) == std::vector<float>(20, 1.0f));
    CHECK(fixture.read(cache.layer(0).keys, 8) == std::vector<float>(8, 0.0f));
  };
  refused(cache, 4, 3, 2, 2, "q [3, 1, 4] with 2 keys of head_dim 4");
  refused(cache, 4, 2, 1, 2, "1 positions and 2 frequencies of 2 slots, head_dim 4");
  refused(cache, 4, 2, 2, 1, "2 positions and 1 frequencies of 2 slots, head_dim 4");
  refused(odd, 5, 2, 2, 2, "head_dim 5");
  const auto rows = memory.shaped({2, 1, 4});
  CHECK_THROWS_WITH_AS(cache.append_rotated(fixture.context(), 0, {at(0, 2), at(2, 1), at(2, 1)}, rows, rows, rows,
                                            {at(3, 2), memory.shaped({2})}, memory.shaped({1, 1, 4})),
                       doctest::Contains("q [2, 1, 4] to kept_q [1, 1, 4]"), specattn::contract_error);
}

}  // namespace kv_cache_testing
