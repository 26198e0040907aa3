// What kv_cache promises of fp8_e4m3 and its scales, for any backend; the including file defines `kv_cache_fixture` as
// kv_cache/cases.hpp has it.
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

using specattn::fp8_e4m3;

/// Numbers for every bit pattern of fp8_e4m3, between them and beyond, at the magnitude that a scale gives.
inline std::vector<float> numbers_around(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> numbers;
  for (std::size_t i = 0; i < count; ++i) {
    const float stored = specattn::to_float(fp8_e4m3{static_cast<std::uint8_t>(random() % 256u)});
    numbers.push_back(std::isnan(stored) ? 1000.0f
                                         : stored * (0.9f + 0.0002f * static_cast<float>(random() % 1000u)));
  }
  return numbers;
}

/// The scales of 2 layers of 3 heads, keys' and values'; powers of two and others.
struct head_scales {
  std::vector<float> keys = {0.5f, 0.013f, 3.0f, 1.0f, 0.7f, 0x1p-7f};
  std::vector<float> values = {0.011f, 1.0f, 0.25f, 5.3f, 0x1p-9f, 0.2f};
};

/// The cache's layer as host memory, and where a row's head lies in it.
template <class Fixture>
struct layer_on_host {
  specattn::kv_view<fp8_e4m3, typename Fixture::backend> view;
  std::vector<std::int32_t> table;
  std::vector<fp8_e4m3> keys, values;

  layer_on_host(Fixture& fixture, const specattn::kv_cache<fp8_e4m3, typename Fixture::backend>& cache,
                std::int32_t layer)
      : view(cache.layer(layer)), table(fixture.read(view.block_table.data(), view.block_table.size())) {
    view.block_table = {table.data(), view.block_table.extents()};
    const auto elements = static_cast<std::ptrdiff_t>(table.size()) * view.page_stride;
    keys = fixture.read(view.keys, elements);
    values = fixture.read(view.values, elements);
  }
  const fp8_e4m3* key(std::int32_t row, std::int32_t position, std::int32_t head) const {
    return keys.data() + view.offset(row, position, head);
  }
  const fp8_e4m3* value(std::int32_t row, std::int32_t position, std::int32_t head) const {
    return values.data() + view.offset(row, position, head);
  }
};

TEST_CASE_TEMPLATE("kv_cache of fp8: rows are multiplied by 1 / their head's scale and rounded as from_float does",
                   Fixture, kv_cache_fixture) {
  using B = typename Fixture::backend;
  Fixture fixture;
  const head_scales scales;
  const auto key_scales = fixture.upload(scales.keys), value_scales = fixture.upload(scales.values);
  for (const std::int32_t head_dim : {37, 64}) {
    for (const std::int32_t page_size : {0, 8}) {
      const std::size_t row = static_cast<std::size_t>(3 * head_dim);
      const auto k = numbers_around(20 * row, 1), v = numbers_around(20 * row, 2);
      const auto keys = fixture.upload(k), values = fixture.upload(v);
      specattn::kv_cache<fp8_e4m3, B> scaled({2, 2, 3, head_dim, 24, page_size, 0}, key_scales.shaped({2, 3}),
                                             value_scales.shaped({2, 3}));
      specattn::kv_cache<fp8_e4m3, B> plain({2, 2, 3, head_dim, 24, page_size, 0});
      for (auto* cache : {&scaled, &plain}) {
        cache->append(fixture.context(), 1, 1, keys.shaped({20, 3, head_dim}), values.shaped({20, 3, head_dim}));
        const layer_on_host<Fixture> stored(fixture, *cache, 1);
        int wrong = 0;
        for (std::int32_t i = 0; i < 20; ++i) {
          for (std::int32_t head = 0; head < 3; ++head) {
            const float by_key = cache == &plain ? 1.0f : 1.0f / scales.keys[static_cast<std::size_t>(3 + head)];
            const float by_value = cache == &plain ? 1.0f : 1.0f / scales.values[static_cast<std::size_t>(3 + head)];
            for (std::int32_t d = 0; d < head_dim; ++d) {
              const auto at = static_cast<std::size_t>((i * 3 + head) * head_dim + d);
              wrong += stored.key(1, i, head)[d].bits != specattn::from_float<fp8_e4m3>(k[at] * by_key).bits;
              wrong += stored.value(1, i, head)[d].bits != specattn::from_float<fp8_e4m3>(v[at] * by_value).bits;
            }
          }
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE_TEMPLATE("kv_cache of fp8: append_rotated() rounds the turned keys once, at their head's scale", Fixture,
                   kv_cache_fixture) {
  using B = typename Fixture::backend;
  Fixture fixture;
  const head_scales scales;
  const auto key_scales = fixture.upload(scales.keys), value_scales = fixture.upload(scales.values);
  constexpr std::int32_t head_dim = 48, slots = 5;
  specattn::kv_cache<fp8_e4m3, B> cache({2, 2, 3, head_dim, 40, 8, 0}, key_scales.shaped({2, 3}),
                                        value_scales.shaped({2, 3}));
  cache.reserve(1, 30);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> k(slots * 3 * head_dim), v(k.size()), frequencies(head_dim / 2);
  for (std::size_t i = 0; i < k.size(); ++i) {  // of the scales' magnitude, so that every exponent is met
    const std::size_t head = i / head_dim % 3;
    k[i] = 100.0f * scales.keys[3 + head] * normal(random);
    v[i] = 100.0f * scales.values[3 + head] * normal(random);
  }
  for (std::size_t d = 0; d < frequencies.size(); ++d) frequencies[d] = 1.0f / static_cast<float>(1 + d);
  const std::vector<std::int32_t> positions = {70, 71, 72, 73, 74};
  const auto q = fixture.upload(k), keys = fixture.upload(k), values = fixture.upload(v);
  const auto angles = fixture.upload(frequencies);
  const auto at = fixture.upload(positions), offsets = fixture.upload(std::vector<std::int32_t>{0, slots});
  const auto lens = fixture.upload(std::vector<std::int32_t>{0}), rows = fixture.upload(std::vector<std::int32_t>{1});
  const std::ptrdiff_t extents[3] = {slots, 3, head_dim};
  cache.append_rotated(fixture.context(), 1, {offsets.shaped({2}), lens.shaped({1}), rows.shaped({1})},
                       q.shaped(extents), keys.shaped(extents), values.shaped(extents),
                       {at.shaped({slots}), angles.shaped({head_dim / 2})});
  const layer_on_host<Fixture> stored(fixture, cache, 1);
  int wrong = 0;
  for (std::int32_t i = 0; i < slots; ++i) {
    for (std::int32_t head = 0; head < 3; ++head) {
      const std::ptrdiff_t first = (i * 3 + head) * head_dim;
      const auto turned =
          oracle::rotated({k.begin() + first, k.begin() + first + head_dim}, positions[static_cast<std::size_t>(i)],
                          {frequencies.begin(), frequencies.end()});
      const double scale = double{scales.keys[static_cast<std::size_t>(3 + head)]};
      const float by_value = 1.0f / scales.values[static_cast<std::size_t>(3 + head)];
      for (std::int32_t d = 0; d < head_dim; ++d) {
        const double want = turned[static_cast<std::size_t>(d)] / scale;  // at most half a step of it
        const double got = double{specattn::to_float(stored.key(1, i, head)[d])};
        const double most = std::min(std::abs(want), 448.0) * (0x1p-4 + 1e-4) + 0x1p-10 + 1e-4;
        wrong += std::abs(got - std::min(std::max(want, -448.0), 448.0)) <= most ? 0 : 1;
        wrong += stored.value(1, i, head)[d].bits !=
                 specattn::from_float<fp8_e4m3>(v[static_cast<std::size_t>(first + d)] * by_value).bits;
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("kv_cache of fp8: keep compacts rows of any number of bytes, bit by bit", Fixture,
                   kv_cache_fixture) {
  using B = typename Fixture::backend;
  Fixture fixture;
  for (const std::int32_t head_dim : {5, 40, 64, 128, 256}) {
    for (const std::int32_t page_size : {0, 16}) {
      CAPTURE(head_dim);
      specattn::kv_cache<fp8_e4m3, B> cache({2, 2, 2, head_dim, 300, page_size, 0});
      const std::size_t row = static_cast<std::size_t>(2 * head_dim);
      const auto keys = fixture.upload(numbers_around(300 * row, 4)),
                 values = fixture.upload(numbers_around(300 * row, 5));
      for (int layer = 0; layer < 2; ++layer)
        cache.append(fixture.context(), layer, 1, keys.shaped({300, 2, head_dim}), values.shaped({300, 2, head_dim}));
      cache.advance(1, 300);
      std::vector<std::int32_t> lists;  // a list for each layer and head
      for (int list = 0; list < 4; ++list)
        for (std::int32_t i = 0; i < 90; ++i) lists.push_back(i * 3 + list % 3 + (i > 40 ? 27 : 0));
      const layer_on_host<Fixture> before[2] = {{fixture, cache, 0}, {fixture, cache, 1}};
      cache.keep(fixture.context(), 1, specattn::view<const std::int32_t, 2>(lists.data(), {4, 90}));
      int wrong = 0;
      for (int list = 0; list < 4; ++list) {
        const layer_on_host<Fixture> after(fixture, cache, list / 2);
        for (std::int32_t i = 0; i < 90; ++i) {
          const std::int32_t from = lists[static_cast<std::size_t>(list * 90 + i)];
          for (std::int32_t d = 0; d < head_dim; ++d) {
            wrong += after.key(1, i, list % 2)[d].bits != before[list / 2].key(1, from, list % 2)[d].bits;
            wrong += after.value(1, i, list % 2)[d].bits != before[list / 2].value(1, from, list % 2)[d].bits;
          }
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE_TEMPLATE("kv_cache of fp8: an element is a byte, and scales of another shape are refused", Fixture,
                   kv_cache_fixture) {
  using cache_type = specattn::kv_cache<fp8_e4m3, typename Fixture::backend>;
  Fixture fixture;
  CHECK(cache_type::bytes({1, 32, 8, 128, 4096, 0, 0}) == 256u * 1024 * 1024 + 4);
  const kv_cache_shape shape{1, 2, 3, 8, 16, 0, 0};
  CHECK(cache_type(shape).allocated_bytes() == cache_type::bytes(shape));
  const auto scales = fixture.upload(std::vector<float>(6, 1.0f));
  CHECK_NOTHROW(cache_type(shape, scales.shaped({2, 3}), {}));
  CHECK_THROWS_WITH_AS(cache_type(shape, scales.shaped({3, 2}), {}),
                       doctest::Contains("scales [3, 2] for 2 layers of 3 kv_heads"), contract_error);
  CHECK_THROWS_WITH_AS(cache_type(shape, scales.shaped({2, 3}), scales.shaped({1, 3})),
                       doctest::Contains("scales [1, 3] for 2 layers of 3 kv_heads"), contract_error);
}

}  // namespace kv_cache_testing
