// Philox against the known answers that the Random123 distribution ships (kat_vectors, philox4x32 10), and the
// uniform numbers made of it.
#include "specattn/random.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

using specattn::philox;
using specattn::philox_words;
using specattn::random_use;
using specattn::uniform;

TEST_CASE("philox: the known answers of Random123") {
  struct answer {
    philox_words counter;
    std::uint32_t key[2];
    philox_words out;
  };
  for (const answer& known : {answer{{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
                              answer{{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
                                     {0xffffffff, 0xffffffff},
                                     {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
                              answer{{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
                                     {0xa4093822, 0x299f31d0},
                                     {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}}) {
    const philox_words got = philox(known.counter, known.key[0], known.key[1]);
    for (int i = 0; i < 4; ++i) CHECK(got.word[i] == known.out.word[i]);
  }
}

TEST_CASE("uniform: lies in [0, 1), evenly, for every use") {
  for (const random_use use : {random_use::draft, random_use::accept, random_use::emit}) {
    constexpr int cells = 100, draws = 200000;
    std::vector<double> count(cells);
    double sum = 0.0, neighbours = 0.0, before = 0.5;
    for (int i = 0; i < draws; ++i) {
      const double u = uniform(12345, static_cast<std::uint64_t>(i), use);
      REQUIRE(u >= 0.0);
      REQUIRE(u < 1.0);
      ++count[static_cast<std::size_t>(u * cells)];
      sum += u;
      neighbours += (u - 0.5) * (before - 0.5);
      before = u;
    }
    double statistic = 0.0;
    for (const double seen : count) statistic += (seen - draws / cells) * (seen - draws / cells) * cells / draws;
    CHECK(statistic < 185.0);  // chi-square of 99 degrees: exceeded once in five million
    CHECK(std::abs(sum / draws - 0.5) < 5 * std::sqrt(1.0 / 12 / draws));
    CHECK(std::abs(neighbours / draws) < 5 * std::sqrt(1.0 / 144 / draws));
  }
}

TEST_CASE("uniform: seed, position and use each change the number, in all of their bits") {
  std::set<double> seen;
  for (int bit = 0; bit < 64; ++bit) {
    seen.insert(uniform(std::uint64_t{1} << bit, 0, random_use::draft));
    seen.insert(uniform(0, std::uint64_t{1} << bit, random_use::draft));
    seen.insert(uniform(0, std::uint64_t{1} << bit, random_use::accept));
    seen.insert(uniform(0, std::uint64_t{1} << bit, random_use::emit));
  }
  CHECK(seen.size() == 4 * 64);
}

TEST_CASE("uniform: is a compile-time constant of its arguments") {
  static_assert(uniform(1, 2, random_use::emit) == uniform(1, 2, random_use::emit));
  static_assert(uniform(1, 2, random_use::emit) != uniform(1, 2, random_use::draft));
  CHECK(uniform(1, 2, random_use::emit) < 1.0);
}
