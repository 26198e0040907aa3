// What kv_cache promises, one claim a case, for any backend. The including file defines `kv_cache_fixture`:
//   using backend                      cpu or cuda
//   context()                          a context of that backend
//   upload(vector<T>), download(b)     host data to the backend's buffer and back
//   read(pointer, count)               `count` elements at a backend pointer, on the host
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "specattn/kv_cache.hpp"

namespace kv_cache_testing {

using specattn::contract_error;
using specattn::kv_cache_shape;

/// 3 rows, 2 layers, 2 kv heads, head_dim 5, 40 positions; contiguous or pages of 8.
inline kv_cache_shape small(std::int32_t page_size = 0, std::int32_t pages = 0) {
  return {3, 2, 2, 5, 40, page_size, pages};
}

/// A number that says which element it is: exact in float and, at this size, in bf16's and fp16's range to rounding.
inline float element(int row, int layer, int position, int head, int d, bool value) {
  return static_cast<float>(((((row * 2 + layer) * 64 + position) * 2 + head) * 5 + d) * 2 + (value ? 1 : 0));
}

/// Appends positions first … first + count of a row's text to both layers, and advances.
template <class Fixture, specattn::storage T>
void grow(Fixture& fixture, specattn::kv_cache<T, typename Fixture::backend>& cache, int row, int first, int count) {
  for (int layer = 0; layer < 2; ++layer) {
    std::vector<float> k, v;
    for (int p = first; p < first + count; ++p)
      for (int i = 0; i < 10; ++i) {
        k.push_back(element(row, layer, p, i / 5, i % 5, false));
        v.push_back(element(row, layer, p, i / 5, i % 5, true));
      }
    const auto keys = fixture.upload(k);
    const auto values = fixture.upload(v);
    cache.append(fixture.context(), layer, row, keys.shaped({count, 2, 5}), values.shaped({count, 2, 5}));
  }
  cache.advance(row, count);
}

/// The text position that each cached position of a row holds, read back through the layer's view; -1 for a wrong one.
template <class Fixture, class B>
std::vector<int> held(Fixture& fixture, const specattn::kv_cache<float, B>& cache, int row, int layer, int head) {
  std::vector<int> positions;
  const auto view = cache.layer(layer);
  std::vector<std::int32_t> table = fixture.read(view.block_table.data(), view.block_table.size());
  auto on_host = view;
  on_host.block_table = {table.data(), view.block_table.extents()};
  for (int i = 0; i < cache.length(row); ++i) {
    const auto offset = on_host.offset(row, i, head);
    const auto k = fixture.read(view.keys + offset, 5);
    const auto v = fixture.read(view.values + offset, 5);
    const int position = static_cast<int>(k[0]) / 20 % 64;
    bool right = true;
    for (int d = 0; d < 5; ++d)
      right = right && k[static_cast<std::size_t>(d)] == element(row, layer, position, head, d, false) &&
              v[static_cast<std::size_t>(d)] == element(row, layer, position, head, d, true);
    positions.push_back(right ? position : -1);
  }
  return positions;
}

inline std::vector<int> count_up(int first, int last) {
  std::vector<int> positions;
  for (int i = first; i < last; ++i) positions.push_back(i);
  return positions;
}

template <class Fixture, class B>
void holds(Fixture& fixture, const specattn::kv_cache<float, B>& cache, int row, const std::vector<int>& positions) {
  for (int layer = 0; layer < 2; ++layer)
    for (int head = 0; head < 2; ++head) CHECK(held(fixture, cache, row, layer, head) == positions);
}

TEST_CASE_TEMPLATE("kv_cache: what was appended is read back, from interleaved rows, in any layout", Fixture,
                   kv_cache_fixture) {
  for (std::int32_t page_size : {0, 1, 8, 64}) {
    CAPTURE(page_size);
    Fixture fixture;
    specattn::kv_cache<float, typename Fixture::backend> cache(small(page_size));
    for (int done = 0; done < 39; done += 3)
      for (int row = 0; row < 3; ++row) grow(fixture, cache, row, done, 3);
    for (int row = 0; row < 3; ++row) {
      CHECK(cache.length(row) == 39);
      CHECK(cache.next_position(row) == 39);
      holds(fixture, cache, row, count_up(0, 39));
    }
  }
}

TEST_CASE_TEMPLATE("kv_cache: bytes are known beforehand and are what is allocated", Fixture, kv_cache_fixture) {
  using B = typename Fixture::backend;
  for (std::int32_t page_size : {0, 8, 64}) {
    for (std::int32_t pages : {0, 4}) {
      if (page_size == 0 && pages > 0) continue;
      const auto shape = small(page_size, pages);
      CHECK(specattn::kv_cache<float, B>(shape).allocated_bytes() == specattn::kv_cache<float, B>::bytes(shape));
      CHECK(specattn::kv_cache<specattn::fp16, B>(shape).allocated_bytes() ==
            specattn::kv_cache<specattn::fp16, B>::bytes(shape));
    }
  }
  CHECK(specattn::kv_cache<specattn::bf16, B>::bytes({1, 32, 8, 128, 4096, 0, 0}) == 512u * 1024 * 1024 + 4);
}

TEST_CASE_TEMPLATE("kv_cache: bytes in use count live positions, or whole pages", Fixture, kv_cache_fixture) {
  Fixture fixture;
  constexpr std::size_t position_bytes = 2 * sizeof(float) * 2 * 2 * 5;  // k and v, layers, heads, head_dim
  specattn::kv_cache<float, typename Fixture::backend> contiguous(small());
  specattn::kv_cache<float, typename Fixture::backend> paged(small(8));
  grow(fixture, contiguous, 1, 0, 9);
  grow(fixture, paged, 1, 0, 9);
  CHECK(contiguous.bytes_in_use() == 9 * position_bytes);
  CHECK(paged.bytes_in_use() == 16 * position_bytes);
  CHECK(paged.free_pages() == 13);
  CHECK(contiguous.free_pages() == 0);
}

TEST_CASE_TEMPLATE("kv_cache: rolling back drops the newest positions and returns their pages", Fixture,
                   kv_cache_fixture) {
  for (std::int32_t page_size : {0, 8}) {
    Fixture fixture;
    specattn::kv_cache<float, typename Fixture::backend> cache(small(page_size));
    grow(fixture, cache, 0, 0, 20);
    grow(fixture, cache, 2, 0, 20);
    for (int length : {20, 17, 16, 9}) {
      cache.roll_back(0, length);
      CHECK(cache.length(0) == length);
      CHECK(cache.next_position(0) == length);
      if (page_size > 0) CHECK(cache.free_pages() == 15 - 3 - (length + 7) / 8);
    }
    grow(fixture, cache, 0, 9, 6);
    holds(fixture, cache, 0, count_up(0, 15));
    holds(fixture, cache, 2, count_up(0, 20));
    cache.clear(0);
    CHECK(cache.length(0) == 0);
    CHECK(cache.next_position(0) == 0);
    if (page_size > 0) CHECK(cache.free_pages() == 15 - 3);
  }
}

TEST_CASE_TEMPLATE("kv_cache: appending ahead of the length leaves it, and slots written twice hold the second",
                   Fixture, kv_cache_fixture) {
  Fixture fixture;
  specattn::kv_cache<float, typename Fixture::backend> cache(small(8));
  grow(fixture, cache, 0, 0, 7);
  const auto wrong = fixture.upload(std::vector<float>(20, -1.0f));
  cache.append(fixture.context(), 0, 0, wrong.shaped({2, 2, 5}), wrong.shaped({2, 2, 5}));
  cache.append(fixture.context(), 0, 0, wrong.shaped({2, 2, 5}), wrong.shaped({2, 2, 5}), 3);
  CHECK(cache.length(0) == 7);
  grow(fixture, cache, 0, 7, 6);
  holds(fixture, cache, 0, count_up(0, 13));
}

TEST_CASE_TEMPLATE("kv_cache: keep compacts every layer and head, frees the pages behind, and text goes on", Fixture,
                   kv_cache_fixture) {
  for (std::int32_t page_size : {0, 8}) {
    Fixture fixture;
    specattn::kv_cache<float, typename Fixture::backend> cache(small(page_size));
    grow(fixture, cache, 1, 0, 30);
    const std::vector<std::int32_t> kept = {0, 3, 4, 11, 28, 29};
    cache.keep(fixture.context(), 1, kept);
    CHECK(cache.length(1) == 6);
    CHECK(cache.next_position(1) == 30);
    if (page_size > 0) CHECK(cache.free_pages() == 14);
    holds(fixture, cache, 1, {0, 3, 4, 11, 28, 29});
    grow(fixture, cache, 1, 30, 4);
    CHECK(cache.next_position(1) == 34);
    holds(fixture, cache, 1, {0, 3, 4, 11, 28, 29, 30, 31, 32, 33});
    cache.roll_back(1, 7);
    CHECK(cache.next_position(1) == 31);
    holds(fixture, cache, 1, {0, 3, 4, 11, 28, 29, 30});
    CHECK_THROWS_WITH_AS(cache.roll_back(1, 5),
                         doctest::Contains("to 5 inside the 6 positions that keep() compacted"), contract_error);
    cache.keep(fixture.context(), 1, std::vector<std::int32_t>{});
    CHECK(cache.length(1) == 0);
  }
}

TEST_CASE_TEMPLATE("kv_cache: keep takes a list for each layer and head", Fixture, kv_cache_fixture) {
  Fixture fixture;
  specattn::kv_cache<float, typename Fixture::backend> cache(small(8));
  grow(fixture, cache, 0, 0, 20);
  const std::vector<std::int32_t> lists = {0, 1, 2, 5, 6, 19, 0, 10, 11, 17, 18, 19};
  cache.keep(fixture.context(), 0, specattn::view<const std::int32_t, 2>(lists.data(), {4, 3}));
  for (int list = 0; list < 4; ++list)
    CHECK(held(fixture, cache, 0, list / 2, list % 2) ==
          std::vector<int>(lists.begin() + list * 3, lists.begin() + list * 3 + 3));
}

TEST_CASE_TEMPLATE("kv_cache: rows are rounded to the storage type exactly as from_float does", Fixture,
                   kv_cache_fixture) {
  Fixture fixture;
  std::mt19937 engine(5);
  std::vector<float> numbers;  // every magnitude, halfway cases, zeros and infinities among them
  for (int i = 0; i < 40 * 37; ++i) {
    auto bits = static_cast<std::uint32_t>(engine());
    if (i % 3 == 0) bits &= 0xffffe000u;
    if (i % 7 == 0) bits = (bits & 0x80000000u) | (0x33000000u + (bits & 0x07ffffffu));
    const float x = std::bit_cast<float>(bits);
    numbers.push_back(std::isnan(x) ? 0.0f : x);
  }
  const auto check = [&]<class T>(T) {
    specattn::kv_cache<T, typename Fixture::backend> cache({1, 1, 1, 37, 40, 0, 0});
    const auto rows = fixture.upload(numbers);
    cache.append(fixture.context(), 0, 0, rows.shaped({40, 1, 37}), rows.shaped({40, 1, 37}));
    const auto stored = fixture.read(cache.layer(0).keys, 40 * 37);
    int wrong = 0;
    for (std::size_t i = 0; i < numbers.size(); ++i)
      wrong += stored[i].bits != specattn::from_float<T>(numbers[i]).bits ? 1 : 0;
    CHECK(wrong == 0);
  };
  check(specattn::fp16{});
  check(specattn::bf16{});
  check(specattn::fp8_e4m3{});
}

TEST_CASE_TEMPLATE("kv_cache: k and v may have any strides", Fixture, kv_cache_fixture) {
  Fixture fixture;
  std::vector<float> memory(3 * 2 * 8 * 2 + 1);
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i);
  const auto from = fixture.upload(memory);
  using rows = specattn::view<const float, 3, typename Fixture::backend>;
  for (const auto& strides : {specattn::dimensions<3>{2, 48, 6}, {16, 8, 1}, {0, 0, 1}}) {
    for (std::ptrdiff_t offset : {0, 1}) {
      specattn::kv_cache<float, typename Fixture::backend> cache({1, 1, 2, 8, 8, 0, 0});
      const rows odd(from.data() + offset, {3, 2, 8}, strides);
      const rows on_host(memory.data() + offset, {3, 2, 8}, strides);  // for its arithmetic only
      cache.append(fixture.context(), 0, 0, odd, odd);
      const auto view = cache.layer(0);
      for (int head = 0; head < 2; ++head) {
        const auto stored = fixture.read(view.values + head * view.head_stride, 3 * 8);
        for (int p = 0; p < 3; ++p)
          for (int d = 0; d < 8; ++d) CHECK(stored[static_cast<std::size_t>(p * 8 + d)] == on_host(p, head, d));
      }
    }
  }
}

TEST_CASE_TEMPLATE("kv_cache: a batch's slots go behind each sequence's prefix, rows without a sequence nowhere",
                   Fixture, kv_cache_fixture) {
  using B = typename Fixture::backend;
  for (std::int32_t page_size : {0, 8}) {
    Fixture fixture;
    specattn::kv_cache<float, B> cache(small(page_size));
    grow(fixture, cache, 2, 0, 7);
    grow(fixture, cache, 0, 0, 15);
    const std::vector<std::int32_t> offsets = {0, 3, 3, 7}, lengths = {7, 0, 15}, rows = {2, 1, 0};
    const auto on_offsets = fixture.upload(offsets), on_lengths = fixture.upload(lengths);
    const auto on_rows = fixture.upload(rows);
    const specattn::pass_layout<B> layout{on_offsets.shaped({4}), on_lengths.shaped({3}), on_rows.shaped({3})};
    cache.reserve(2, 3);
    cache.reserve(0, 4);
    for (int layer = 0; layer < 2; ++layer) {
      std::vector<float> k, v;
      for (int slot = 0; slot < 9; ++slot)
        for (int i = 0; i < 10; ++i) {
          const int row = slot < 3 ? 2 : 0, position = slot < 3 ? 7 + slot : 15 + slot - 3;
          k.push_back(element(row, layer, position, i / 5, i % 5, false));
          v.push_back(element(row, layer, position, i / 5, i % 5, true));
        }
      const auto keys = fixture.upload(k), values = fixture.upload(v);
      cache.append(fixture.context(), layer, layout, keys.shaped({9, 2, 5}), values.shaped({9, 2, 5}));
    }
    cache.advance(2, 3);
    cache.advance(0, 4);
    holds(fixture, cache, 2, count_up(0, 10));
    holds(fixture, cache, 0, count_up(0, 19));
    const auto few = fixture.upload(std::vector<float>(20));
    const auto refused = specattn::pass_layout<B>{layout.slot_offsets, layout.kv_lens, on_rows.shaped({2})};
    CHECK_THROWS_WITH_AS(cache.append(fixture.context(), 0, refused, few.shaped({2, 2, 5}), few.shaped({2, 2, 5})),
                         doctest::Contains("4 slot_offsets, 3 kv_lens and 2 cache_rows"), contract_error);
  }
}

TEST_CASE_TEMPLATE("kv_cache: long lists, alike or each its own, and a table of thousands of pages", Fixture,
                   kv_cache_fixture) {
  using B = typename Fixture::backend;
  constexpr std::int32_t length = 20000, head_dim = 8;
  std::vector<float> rows(std::size_t{2} * length * head_dim);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i);
  std::mt19937 random(7);
  for (const std::int32_t page_size : {0, 4}) {
    for (const bool alike : {true, false}) {
      Fixture fixture;
      specattn::kv_cache<float, B> cache({2, 2, 2, head_dim, length, page_size, 0});
      const auto from = fixture.upload(rows);
      const auto first = from.shaped({length, 2, head_dim});
      for (int layer = 0; layer < 2; ++layer) cache.append(fixture.context(), layer, 1, first, first);
      cache.advance(1, length);
      std::vector<std::int32_t> lists;
      for (int list = 0; list < (alike ? 1 : 4); ++list) {
        auto all = count_up(0, length);
        std::shuffle(all.begin() + 5, all.end(), random);
        std::sort(all.begin(), all.begin() + 9001);
        lists.insert(lists.end(), all.begin(), all.begin() + 9001);
      }
      cache.keep(fixture.context(), 1,
                 specattn::view<const std::int32_t, 2>(lists.data(), {4, 9001}, {alike ? 0 : 9001, 1}));
      const std::vector<std::int32_t> kept = lists;
      std::fill(lists.begin(), lists.end(), -1);  // they may go when keep() has returned
      for (int list = 0; list < 4; ++list) {
        const auto view = cache.layer(list / 2);
        const std::vector<std::int32_t> table = fixture.read(view.block_table.data(), view.block_table.size());
        auto on_host = view;
        on_host.block_table = {table.data(), view.block_table.extents()};
        const auto stored = fixture.read(list % 2 == 0 ? view.keys : view.values, 4 * length * head_dim);
        int wrong = 0;
        for (std::int32_t i = 0; i < 9001; ++i) {
          const auto at = static_cast<std::size_t>(on_host.offset(1, i, list % 2));
          const std::int32_t position = kept[static_cast<std::size_t>((alike ? 0 : list * 9001) + i)];
          for (std::size_t d = 0; d < head_dim; ++d)
            wrong += stored[at + d] != static_cast<float>((position * 2 + list % 2) * head_dim) + float(d) ? 1 : 0;
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE_TEMPLATE("kv_cache: keep serves thousands of layers and heads", Fixture, kv_cache_fixture) {
  Fixture fixture;
  specattn::kv_cache<float, typename Fixture::backend> cache({1, 2100, 4, 1, 3, 0, 0});
  const auto rows = fixture.upload(std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12});
  for (int layer = 0; layer < 2100; ++layer)
    cache.append(fixture.context(), layer, 0, rows.shaped({3, 4, 1}), rows.shaped({3, 4, 1}));
  cache.advance(0, 3);
  std::vector<std::int32_t> lists;
  for (int list = 0; list < 8400; ++list) lists.push_back(list % 3);
  cache.keep(fixture.context(), 0, specattn::view<const std::int32_t, 2>(lists.data(), {8400, 1}));
  const auto stored = fixture.read(cache.layer(0).keys, 8400 * 3);
  int wrong = 0;
  for (int list = 0; list < 8400; ++list)
    wrong += stored[static_cast<std::size_t>(list * 3)] != static_cast<float>(list % 3 * 4 + list % 4 + 1) ? 1 : 0;
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("kv_cache: errors name the values and leave the cache unchanged", Fixture, kv_cache_fixture) {
  using B = typename Fixture::backend;
  Fixture fixture;
  auto& ctx = fixture.context();
  using cache_type = specattn::kv_cache<float, B>;
  CHECK_THROWS_WITH_AS(cache_type({1, 0, 2, 8, 16, 0, 0}), doctest::Contains("0 layers"), contract_error);
  CHECK_THROWS_WITH_AS(cache_type(small(12)), doctest::Contains("page_size 12 is neither 0 nor a power of two"),
                       contract_error);
  CHECK_THROWS_WITH_AS(cache_type(small(0, 4)), doctest::Contains("4 pages with page_size 0"), contract_error);
  CHECK_THROWS_WITH_AS(cache_type({1 << 30, 1 << 20, 1 << 10, 1 << 10, 1 << 20, 0, 0}),
                       doctest::Contains("does not fit the address space"), contract_error);

  cache_type cache(small(8, 4));
  grow(fixture, cache, 0, 0, 20);  // three pages of four
  const auto rows = fixture.upload(std::vector<float>(100, -1.0f));
  const auto ten = rows.shaped({10, 2, 5});
  const auto refused = [&](auto operation, const char* part) {
    CHECK_THROWS_WITH_AS(operation(), doctest::Contains(part), contract_error);
    CHECK(cache.length(0) == 20);
    CHECK(cache.length(1) == 0);
    CHECK(cache.free_pages() == 1);
    CHECK(held(fixture, cache, 0, 1, 1) == count_up(0, 20));
  };
  refused([&] { cache.reserve(1, 9); }, "row 1 needs 2 more pages of 8 positions, 1 of 4 are free");
  refused([&] { cache.reserve(0, 21); }, "row 0 holds 20 positions, 21 more were asked for, max_positions is 40");
  refused([&] { cache.reserve(3, 1); }, "reserve of row 3 of 3");
  refused([&] { cache.append(ctx, 2, 0, ten, ten); }, "append of layer 2 of 2");
  refused([&] { cache.append(ctx, 0, 1, ten, ten); }, "row 1 needs 2 more pages");
  refused([&] { cache.append(ctx, 0, 0, ten, ten, 11); }, "10 were appended at 11 behind them");
  refused([&] { cache.append(ctx, 0, 0, rows.shaped({10, 5, 2}), rows.shaped({10, 5, 2})); }, "k [10, 5, 2]");
  refused([&] { cache.advance(0, 5); }, "advance of row 0 by 5 beyond the 24 positions");
  refused([&] { cache.roll_back(0, 21); }, "roll_back of row 0 to 21, outside 0 … its length 20");
  refused([&] { cache.roll_back(0, -1); }, "to -1");
  refused([&] { cache.keep(ctx, 0, std::vector<std::int32_t>{1, 1}); }, "entry 1 is 1 after 1 with length 20");
  refused([&] { cache.keep(ctx, 0, std::vector<std::int32_t>{0, 20}); }, "entry 1 is 20");
  refused([&] { cache.keep(ctx, 0, specattn::view<const std::int32_t, 2>(nullptr, {3, 0})); }, "3 lists, needs 4");
  refused([&] { (void)cache.layer(-1); }, "layer of layer -1 of 2");
  refused([&] { (void)cache.length(-1); }, "length of row -1 of 3");
}

}  // namespace kv_cache_testing
