// recompute() on the CPU.
#include "specattn/cpu/recompute.hpp"

#include "cpu_fixture.hpp"
#include "specattn/cpu/attend.hpp"
#include "specattn/cpu/kv_cache.hpp"

struct attend_fixture : cpu_fixture {
  template <class T>
  static constexpr double tolerance = 2e-5;
};

#include "recompute/cases.hpp"

namespace attend_testing {

TEST_CASE("recompute: data out of range throws a message that names the values") {
  cpu_fixture fixture;
  const auto p = random_problem<float>(pass_shape{});
  const auto cache = filled_cache(fixture, p);
  std::vector<std::int32_t> offsets, kv_lens, counts, positions;
  std::vector<float> q(4 * 64), lse(4), weights(4 * 41);
  const auto refused = [&](auto spoil, const char* part) {
    offsets = {0, 1}, kv_lens = {40}, counts = {1, 1}, positions = {5, 39};
    specattn::recompute_args<float> args;
    args.q = specattn::view<const float, 3>(q.data(), {1, 4, 64});
    args.kv = cache.layer(1);
    args.slot_offsets = specattn::view<const std::int32_t, 1>(offsets.data(), {2});
    args.kv_lens = specattn::view<const std::int32_t, 1>(kv_lens.data(), {1});
    args.kept.positions = specattn::view<std::int32_t, 2>(positions.data(), {2, 1});
    args.kept.counts = specattn::view<std::int32_t, 1>(counts.data(), {2});
    args.lse = specattn::view<const float, 2>(lse.data(), {1, 4});
    args.recording.weights = specattn::view<float, 3>(weights.data(), {1, 4, 41});
    spoil(args);
    CHECK_THROWS_WITH_AS(specattn::recompute(fixture.context(), args), doctest::Contains(part),
                         specattn::contract_error);
  };
  using args = specattn::recompute_args<float>;
  refused([&](args&) { offsets[1] = 2; }, "sequence 0 has slots 0 … 2 of 1");
  refused([&](args&) { kv_lens[0] = -4; }, "kv_len -4");
  refused([&](args&) { counts[1] = 2; }, "selection group 1 has count 2, capacity 1");
  refused([&](args&) { counts[0] = -2; }, "count -2");
  refused([&](args&) { positions[1] = 40; }, "keeps positions 40 … 40, outside kv_len 40");
  refused(
      [&](args& a) {
        a.recording.weights = {weights.data(), {1, 4, 1}};
      },
      "has 2 weights a row, the recording holds 1");
}

}  // namespace attend_testing
