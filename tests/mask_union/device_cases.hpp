// What mask_union() on the device does its own way, and must do as the CPU does. Needs `cuda_fixture`: the device's, or the
// emulated one.
#pragma once

#include "cpu_fixture.hpp"
#include "mask_union/cases.hpp"
#include "specattn/cpu/mask_union.hpp"

namespace mask_union_testing {

inline void expect_same(const answer& got, const answer& want) {
  CHECK(got.counts == want.counts);
  CHECK(got.positions == want.positions);
  CHECK(got.words == want.words);
  CHECK(got.status == want.status);
}

/// Sequences of all kinds: shares, numbers of slots, keep_all, empty lists, flags, a capacity that may be too small.
inline problem drawn_problem(std::mt19937& random, std::int32_t sequences, std::int32_t longest) {
  const auto below = [&](std::int32_t n) {
    return static_cast<std::int32_t>(random() % static_cast<std::uint32_t>(n));
  };
  std::vector<std::int32_t> slots, kv_lens;
  for (std::int32_t s = 0; s < sequences; ++s) {
    slots.push_back(below(4) == 0 ? below(33) : below(8));
    kv_lens.push_back(below(5) == 0 ? below(3) : below(longest + 1));
  }
  problem p = random_problem(slots, kv_lens, 1 + below(3), below(101) * 0.01, static_cast<std::uint32_t>(random()));
  const std::int32_t everything = below(3) == 0 ? 2 : 9;
  for (std::size_t i = 0; i < p.lists.size(); ++i) {
    if (below(9) == 0) p.lists[i].clear();
    p.all[i] = below(everything) == 0;
    p.status[i] = below(4) == 0 ? 1u << below(4) : 0;
  }
  if (below(3) == 0) p.capacity = 1 + below(longest);
  return p;
}

inline void expect_cpus(cuda_fixture& fixture, cpu_fixture& cpu, std::int32_t turns, std::int32_t sequences,
                        std::int32_t longest) {
  std::mt19937 random(static_cast<std::uint32_t>(longest));
  for (std::int32_t turn = 0; turn < turns; ++turn) {
    CAPTURE(turn);
    const problem p = drawn_problem(random, sequences, longest);
    expect_same(run(fixture, p), run(cpu, p));
  }
}

TEST_CASE("mask_union on the device: lists of slots after the 32nd are left out") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  const auto more = random_problem({35}, {600}, 1, 0.2);
  auto p = more;
  p.slots[0] = 32;
  p.lists.resize(32);
  p.all.resize(32);
  p.status.resize(32);
  expect_same(run(fixture, more), run(cpu, p));
}

TEST_CASE("mask_union on the device: prefixes of one round and of several, up to the last position of a window") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  using namespace specattn::detail;
  constexpr std::int32_t round = union_window * union_max_cluster;
  for (const std::int32_t kv_len :
       {union_window - 1, union_window, union_window + 1, round, round + 1, 2 * round + 70}) {
    CAPTURE(kv_len);
    auto p = random_problem({3}, {kv_len}, 1, 0.1);
    p.lists[1] = {0, kv_len - 1};
    for (std::int32_t at = union_window - 1; at < kv_len - 1; at += union_window)
      p.lists[1].insert(p.lists[1].end() - 1, at);
    expect_same(run(fixture, p), run(cpu, p));
  }
}

}  // namespace mask_union_testing
