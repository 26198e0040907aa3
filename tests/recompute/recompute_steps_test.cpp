// recompute_steps() on the CPU.
#include "specattn/cpu/recompute_steps.hpp"

#include "specattn/cpu/attend.hpp"  // keep_queries

#include "cpu_fixture.hpp"

struct key_fixture : cpu_fixture {
  template <class T>
  static constexpr double tolerance = 5e-5;
};

#include "recompute/steps_cases.hpp"

namespace key_testing {

TEST_CASE("recompute_steps: data out of range throws a message that names the values") {
  cpu_fixture fixture;
  const std::vector<float> q(4 * 8), lse(4), keys(16 * 8);
  std::vector<float> weights(4 * 16), masses(4);
  std::vector<std::int32_t> table = {0}, lens = {9}, rows = {0}, slots = {0};
  const auto refused = [&](auto spoil, const char* part) {
    lens = {9}, rows = {0}, slots = {0};
    specattn::recompute_steps_args<float> args;
    args.q = {q.data(), {1, 1, 1, 4, 8}};
    args.lse = {lse.data(), {1, 1, 1, 4}};
    args.slot_of = {slots.data(), {1, 1}};
    args.kv.keys = const_cast<float*>(keys.data());
    args.kv.kv_heads = 4;
    args.kv.head_dim = 8;
    args.kv.block_table = {table.data(), {1, 1}};
    args.kv_lens = {lens.data(), {1}};
    args.cache_rows = {rows.data(), {1}};
    args.weights = {weights.data(), {1, 1, 1, 4, 16}};
    args.masses = {masses.data(), {1, 1, 1, 4}};
    spoil(args);
    CHECK_THROWS_WITH_AS(specattn::recompute_steps(fixture.context(), args), doctest::Contains(part),
                         specattn::contract_error);
  };
  using args = specattn::recompute_steps_args<float>;
  refused([&](args&) { lens[0] = -1; }, "kv_len -1");
  refused([&](args&) { lens[0] = 17; }, "kv_len 17, the recording holds 16");
  refused([&](args&) { slots[0] = 1; }, "asks by slot 1 of 1");
  refused([&](args&) { rows[0] = 1; }, "cache row 1 of 1");
  refused([&](args& a) { a.kv.page_shift = 2; }, "has 9 positions, its block table 1 pages of 4");
}

}  // namespace key_testing
