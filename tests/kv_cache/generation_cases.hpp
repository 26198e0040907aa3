// What kv_cache tells those who keep what they derived from keys. Needs what kv_cache/cases.hpp needs.
#pragma once

#include "kv_cache/cases.hpp"

namespace kv_cache_testing {

TEST_CASE_TEMPLATE("kv_cache: a row's generations tell which positions still hold what they held", Fixture,
                   kv_cache_fixture) {
  using B = typename Fixture::backend;
  Fixture fixture;
  specattn::kv_cache<float, B> cache(small(8));
  const std::uint64_t empty = cache.generation(0);
  grow(fixture, cache, 0, 0, 30);
  CHECK(cache.generation(0) == empty);  // appending changes nothing that was there
  cache.roll_back(0, 30);               // nor does dropping nothing
  CHECK(cache.generation(0) == empty);
  CHECK(cache.unchanged_since(0, empty) == 40);
  cache.roll_back(0, 20);
  grow(fixture, cache, 0, 20, 5);
  const std::uint64_t later = cache.generation(0);
  cache.roll_back(0, 24);
  CHECK(cache.unchanged_since(0, empty) == 20);
  CHECK(cache.unchanged_since(0, later) == 24);
  CHECK(cache.unchanged_since(1, cache.generation(1)) == 40);  // of this row alone
  for (int length = 23; length > 16; --length) cache.roll_back(0, length);
  CHECK(cache.unchanged_since(0, later) == 17);
  CHECK(cache.unchanged_since(0, empty) == 0);  // too long ago to be told
  const std::uint64_t before = cache.generation(0);
  cache.keep(fixture.context(), 0, std::vector<std::int32_t>{0, 5});
  CHECK(cache.unchanged_since(0, before) == 0);
  const std::uint64_t kept = cache.generation(0);
  cache.clear(0);
  CHECK(cache.unchanged_since(0, kept) == 0);
  CHECK(cache.unchanged_since(0, cache.generation(0) + 1) == 0);  // of another cache
}

}  // namespace kv_cache_testing
