// mask_union() on the CPU.
#include "specattn/cpu/mask_union.hpp"

#include "cpu_fixture.hpp"

using mask_union_fixture = cpu_fixture;

#include "mask_union/cases.hpp"

namespace mask_union_testing {

TEST_CASE("mask_union: data out of range throws a message that names the values") {
  cpu_fixture fixture;
  const auto refused = [&](auto spoil, const char* part) {
    auto p = random_problem({3}, {40}, 1, 0.5);
    spoil(p);
    CHECK_THROWS_WITH_AS(run(fixture, p), doctest::Contains(part), specattn::contract_error);
  };
  refused([](problem& p) { p.slots[0] = 4; }, "sequence 0 has slots 0 … 4 of 3");
  refused([](problem& p) { p.kv_lens[0] = -1; }, "sequence 0 has kv_len -1");
  refused([](problem& p) { p.lists[1].assign(41, 7); }, "group 1 has count 41, capacity 41, kv_len 40");
  refused([](problem& p) { p = random_problem({33}, {4}, 1, 0.5); }, "sequence 0 has 33 slots, a word 32");
}

}  // namespace mask_union_testing
