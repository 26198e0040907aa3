// kv_cache on the CPU.
#include "specattn/cpu/kv_cache.hpp"

#include "cpu_fixture.hpp"

struct kv_cache_fixture : cpu_fixture {
  template <class T>
  std::vector<std::remove_const_t<T>> read(T* from, std::ptrdiff_t count) {
    return {from, from + count};
  }
};

#include "kv_cache/cases.hpp"
#include "kv_cache/fp8_cases.hpp"
#include "kv_cache/generation_cases.hpp"
#include "kv_cache/rotary_cases.hpp"

namespace kv_cache_testing {

TEST_CASE("kv_cache: rows appended by a team of threads are the rows appended by one") {
  std::vector<float> rows(700 * 2 * 64);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i % 1999) * 0.37f - 300.0f;
  const specattn::view<const float, 3> view(rows.data(), {700, 2, 64});
  specattn::context<specattn::cpu> team(3);
  specattn::context<specattn::cpu> alone(1);
  const kv_cache_shape shape{1, 1, 2, 64, 700, 16, 0};
  specattn::kv_cache<specattn::bf16> a(shape);
  specattn::kv_cache<specattn::bf16> b(shape);
  a.append(team, 0, 0, view, view);
  for (int i = 0; i < 700; ++i) b.append(alone, 0, 0, view.slice(i, 1), view.slice(i, 1), i);
  int different = 0;
  for (int i = 0; i < 700; ++i)
    for (int head = 0; head < 2; ++head)
      for (int d = 0; d < 64; ++d)
        different += a.layer(0).key(0, i, head)[d].bits != b.layer(0).key(0, i, head)[d].bits ? 1 : 0;
  CHECK(different == 0);
}

TEST_CASE("kv_cache: a batch of which one sequence does not fit takes no page and writes nothing, in any layout") {
  cpu_fixture fixture;
  auto& ctx = fixture.context();
  std::vector<float> numbers(20 * 2 * 4, 3.0f), queries(20 * 2 * 4, 1.0f), frequencies(2, 0.5f);
  const specattn::view<float, 3> q(queries.data(), {20, 2, 4});
  const specattn::view<const float, 3> rows(numbers.data(), {20, 2, 4});
  std::vector<std::int32_t> offsets, lens, cache_rows, positions(20, 1);
  const specattn::rotary_view<specattn::cpu> rotary{{positions.data(), {20}}, {frequencies.data(), {2}}};
  for (const std::int32_t page_size : {0, 4}) {
    CAPTURE(page_size);
    const std::int32_t pages = page_size == 0 ? 0 : 4;
    specattn::kv_cache<float> cache({3, 1, 2, 4, 18, page_size, pages});
    const auto untouched = [&] {
      const auto layer = cache.layer(0);
      return std::all_of(layer.keys, layer.keys + 16 * 2 * 4, [](float x) { return x == 0.0f; }) &&
             cache.free_pages() == pages && cache.capacity(0) == (page_size == 0 ? 18 : 0);
    };
    const auto refused = [&](std::vector<std::int32_t> at, std::vector<std::int32_t> lengths,
                             std::vector<std::int32_t> of, const char* part) {
      offsets = at, lens = lengths, cache_rows = of;
      const auto n = static_cast<std::ptrdiff_t>(lens.size());
      const specattn::pass_layout<specattn::cpu> layout{
          {offsets.data(), {n + 1}}, {lens.data(), {n}}, {cache_rows.data(), {n}}};
      CHECK_THROWS_WITH_AS(cache.append(ctx, 0, layout, rows, rows), doctest::Contains(part), contract_error);
      CHECK(untouched());
      CHECK_THROWS_WITH_AS(cache.append_rotated(ctx, 0, layout, q, rows, rows, rotary), doctest::Contains(part),
                           contract_error);
      CHECK(untouched());
      CHECK(queries == std::vector<float>(20 * 2 * 4, 1.0f));
    };
    refused({0, 4, 20}, {0, 3}, {0, 1}, "row 1 holds 0 positions, 16 were appended at 3");
    refused({0, 4, 8}, {0, 0}, {0, 3}, "row 3 of 3");
    refused({0, 4, 8}, {0, -1}, {0, 1}, "4 were appended at -1");
    refused({0, 4, 21}, {0, 0}, {0, 1}, "slots 4 … 21 of 20 by sequence 1");
    if (page_size > 0)
      refused({0, 4, 12, 20}, {0, 0, 0}, {0, 1, 2}, "3 sequences need 5 more pages of 4 positions, 4");
  }
}

TEST_CASE("rotary oracle: a quarter turn swaps the pair, turns add up, and position 0 changes nothing") {
  const std::vector<double> head = {1.0, 2.0, 3.0, 4.0}, frequencies = {std::acos(0.0), 0.3};
  const auto quarter = oracle::rotated(head, 1, frequencies);
  CHECK(quarter[0] == doctest::Approx(-3.0));
  CHECK(quarter[2] == doctest::Approx(1.0));
  CHECK(oracle::rotated(head, 0, frequencies) == head);
  const auto once = oracle::rotated(head, 7, frequencies);
  const auto twice = oracle::rotated(oracle::rotated(head, 3, frequencies), 4, frequencies);
  for (std::size_t d = 0; d < 4; ++d) CHECK(once[d] == doctest::Approx(twice[d]));
}

TEST_CASE("append_rotated: rows rotated by a team of threads are the rows rotated by one") {
  constexpr std::ptrdiff_t slots = 1100;
  std::vector<float> memory(slots * 3 * 64), again;
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i % 1999) * 0.37f - 300.0f;
  again = memory;
  std::vector<std::int32_t> positions(slots);
  for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<std::int32_t>(5 * i);
  const std::vector<float> frequencies(16, 0.7f);
  const std::vector<std::int32_t> numbers = {0, slots, 0};
  const auto run = [&](int threads, std::vector<float>& heads) {
    specattn::context<specattn::cpu> ctx(threads);
    specattn::kv_cache<specattn::bf16> cache({1, 1, 2, 32, slots, 16, 0});
    const auto part = [&](std::ptrdiff_t first, std::ptrdiff_t count) {
      return specattn::view<float, 3>(heads.data() + first * 32, {slots, count, 32}, {6 * 32, 32, 1});
    };
    cache.append_rotated(ctx, 0, {{numbers.data(), {2}}, {numbers.data() + 2, {1}}, {numbers.data() + 2, {1}}},
                         part(0, 4), part(4, 2), part(2, 2),
                         {{positions.data(), {slots}}, {frequencies.data(), {16}}});
    std::vector<std::uint16_t> bits;
    for (std::ptrdiff_t i = 0; i < 1104 * 64; ++i) bits.push_back(cache.layer(0).keys[i].bits);
    return bits;
  };
  CHECK(run(3, memory) == run(1, again));
  CHECK(memory == again);
}

}  // namespace kv_cache_testing
