// The device's select() on the CPU: its cases, and rows on one CTA and on a cluster against the CPU's lists.
#include "specattn/cuda/select.cuh"

#include "cpu_fixture.hpp"
#include "cuda_fixture.cuh"
#include "specattn/cpu/select.hpp"

using select_fixture = cuda_fixture;

#include "select/cases.hpp"
#include "select/device_cases.hpp"
#include "select/group_cases.hpp"

namespace specattn::inline SPECATTN_CODE::detail {
thread_local uint4 member_memory[4608];  // a CTA's dynamic shared memory: keys of its part of a row, or scores
}

namespace select_testing {

TEST_CASE("select, emulated: rows of every kind, on one CTA and on a cluster, give the CPU's lists") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  std::mt19937 random(57);
  for (const std::ptrdiff_t length : {700, 5000, 16384, 40000, 131072}) {
    for (const float top_p : {0.5f, 0.95f}) {
      specattn::selection_rule rule;
      rule.top_p = top_p;
      if (length == 16384) rule.recent = 2000;
      auto p = dense_problem<float>(6, 1, length, rule);
      fill_kinds(p, random);
      same_as_cpu(fixture, cpu, p);
    }
  }
}

TEST_CASE("select plan: no device is asked for more shared memory than a CTA of it can have, on any shape and rule") {
  using namespace specattn::detail;
  for (const std::size_t kilobytes : {48, 64, 99, 100, 163, 227}) {
    for (const int largest_cluster : {1, 8}) {
      const std::size_t room = kilobytes * 1024;
      const select_planner planner({largest_cluster, 132, room});
      std::size_t most[2] = {};  // of the resident and the scored way: a limit that no launch moves
      for (std::ptrdiff_t kv_len = 1; kv_len <= select_max_kv_len; kv_len = kv_len * 5 / 4 + 31) {
        for (const std::ptrdiff_t groups : {1, 4, 100, 5000}) {
          for (const bool combined : {false, true}) {
            CAPTURE(kilobytes);
            CAPTURE(kv_len);
            const auto plan = planner.plan(groups, kv_len, 4, {}, combined);
            const std::size_t fixed =
                plan.way == select_way::resident ? sizeof(select_row_memory) : sizeof(select_team_memory);
            CHECK(static_shared_bytes(fixed) + plan.most_shared_bytes <= room);
            CHECK(plan.shared_bytes <= plan.most_shared_bytes);
            CHECK(plan.cluster >= 1);
            CHECK(plan.cluster <= largest_cluster);
            CHECK((plan.way == select_way::swept) == (planner.group_bytes(kv_len, {}, combined) > 0));
            if (plan.way == select_way::swept) continue;
            std::size_t& known = most[plan.way == select_way::scored ? 1 : 0];
            if (known == 0) known = plan.most_shared_bytes;
            CHECK(plan.most_shared_bytes == known);
          }
        }
      }
    }
  }
}

TEST_CASE("select plan: rows stay in shared memory as far as ever on Hopper, and on devices with 99 KB nearly so") {
  using namespace specattn::detail;
  const select_planner hopper({8, 132, 232448}), ampere({1, 108, 166912}), consumer({8, 170, 101376});
  CHECK(hopper.way(131072, {}, false) == select_way::resident);
  CHECK(hopper.way(131073, {}, false) == select_way::swept);
  CHECK(hopper.way(65536, {}, true) == select_way::scored);
  CHECK(hopper.way(65537, {}, true) == select_way::swept);
  CHECK(ampere.way(16384, {}, false) == select_way::resident);
  CHECK(ampere.way(4096, {}, true) == select_way::scored);
  CHECK(ampere.way(4097, {}, true) == select_way::swept);
  CHECK(consumer.way(131072, {}, false) == select_way::resident);
  CHECK(consumer.way(32768, {}, true) == select_way::scored);
  CHECK(consumer.way(32769, {}, true) == select_way::swept);
}

TEST_CASE(
    "launch: a grid's rows are folded into y and z, all of them and no other; what cannot be is left to be refused") {
  using specattn::detail::folded;
  for (const unsigned rows : {1u, 65535u, 65536u, 65664u, 513u * 128u, 131071u * 2u, 65535u * 65535u}) {
    const dim3 grid = folded(dim3{7, rows, 1});
    CAPTURE(rows);
    CHECK(grid.x == 7);
    CHECK(std::uint64_t{grid.y} * grid.z == rows);
    if (rows != 131071u * 2u) CHECK(grid.y <= 65535);
    if (rows <= 65535u) CHECK(grid.z == 1);
  }
  CHECK(folded(dim3{1, 65537, 1}).y == 65537);  // a prime
}

}  // namespace select_testing
