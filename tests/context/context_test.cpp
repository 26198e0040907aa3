// context<cpu>: a team that covers every index once, whatever the counts, and starts and stops cleanly.
#include "specattn/cpu/context.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

using specattn::context;
using specattn::cpu;

TEST_CASE("context: parallel_for calls every index once, for any count and team") {
  for (int threads : {1, 2, 3, 4, 9}) {
    context<cpu> ctx(threads);
    CHECK(ctx.threads() == threads);
    for (std::ptrdiff_t count : {0, 1, 2, 3, 7, 64, 1000}) {
      std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count));
      std::atomic<bool> member_in_range{true};
      ctx.parallel_for(count, [&](std::ptrdiff_t i, int member) {
        calls[static_cast<std::size_t>(i)].fetch_add(1, std::memory_order_relaxed);
        if (member < 0 || member >= threads) member_in_range = false;
      });
      for (const auto& c : calls) CHECK(c.load() == 1);
      CHECK(member_in_range.load());
    }
  }
}

TEST_CASE("context: what one call wrote, the caller and the next call read, over thousands of calls") {
  context<cpu> ctx(3);
  std::vector<std::int64_t> values(17, 0);
  for (int round = 0; round < 5000; ++round)
    ctx.parallel_for(17, [&](std::ptrdiff_t i, int) { values[static_cast<std::size_t>(i)] += i + round; });
  for (std::ptrdiff_t i = 0; i < 17; ++i)
    CHECK(values[static_cast<std::size_t>(i)] == 5000 * i + std::int64_t{4999} * 5000 / 2);
}

TEST_CASE("context: no member works on two indices at once") {
  context<cpu> ctx(4);
  std::vector<int> busy(4, 0);  // not atomic: a second user of one entry is a race that TSan reports
  std::atomic<int> clashes{0};
  ctx.parallel_for(400, [&](std::ptrdiff_t, int member) {
    if (busy[static_cast<std::size_t>(member)]++ != 0) clashes.fetch_add(1);
    busy[static_cast<std::size_t>(member)]--;
  });
  CHECK(clashes.load() == 0);
}

TEST_CASE("context: teams may be used from inside another team's work") {
  context<cpu> outer(2);
  std::vector<std::unique_ptr<context<cpu>>> inner;
  for (int i = 0; i < 2; ++i) inner.push_back(std::make_unique<context<cpu>>(2));
  std::atomic<int> calls{0};
  for (int round = 0; round < 50; ++round)
    outer.parallel_for(20, [&](std::ptrdiff_t, int member) {
      inner[static_cast<std::size_t>(member)]->parallel_for(5, [&](std::ptrdiff_t, int) { calls.fetch_add(1); });
    });
  CHECK(calls.load() == 50 * 20 * 5);
}

TEST_CASE("context: a team that has gone to sleep wakes up") {
  context<cpu> ctx(3);
  for (int round = 0; round < 3; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    std::atomic<int> calls{0};
    ctx.parallel_for(8, [&](std::ptrdiff_t, int) { calls.fetch_add(1); });
    CHECK(calls.load() == 8);
  }
}

TEST_CASE("context: starting and stopping is clean, used or not") {
  for (int round = 0; round < 40; ++round) {
    context<cpu> ctx(1 + round % 5);
    if (round % 2 == 0) continue;
    std::atomic<int> calls{0};
    ctx.parallel_for(3, [&](std::ptrdiff_t, int) { calls.fetch_add(1); });
    CHECK(calls.load() == 3);
  }
}

TEST_CASE("context: zero threads means one for each of the machine's, and nonsense is refused") {
  CHECK(context<cpu>().threads() >= 1);
  CHECK_THROWS_WITH_AS(context<cpu>(-1), doctest::Contains("-1 threads"), specattn::contract_error);
  CHECK_THROWS_WITH_AS(context<cpu>(5000), doctest::Contains("5000 threads"), specattn::contract_error);
}

TEST_CASE("context: the workspace is aligned, grows on demand and refuses more than it has") {
  context<cpu> ctx(1, 100);
  CHECK(ctx.workspace_bytes() == 100);
  CHECK(reinterpret_cast<std::uintptr_t>(ctx.workspace(100, "test")) % 64 == 0);
  CHECK_THROWS_WITH_AS(ctx.workspace(101, "scrub"),
                       doctest::Contains("scrub: needs a workspace of 101 bytes, the context has 100"),
                       specattn::contract_error);
  ctx.reserve_workspace(5000);
  CHECK(ctx.workspace_bytes() >= 5000);
  ctx.reserve_workspace(10);
  CHECK(ctx.workspace_bytes() >= 5000);
}
