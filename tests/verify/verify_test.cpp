// sample() and verify() on the CPU.
#include "specattn/cpu/verify.hpp"

#include "cpu_fixture.hpp"

using verify_fixture = cpu_fixture;

#include "verify/law_cases.hpp"

namespace verify_testing {

TEST_CASE("sampling_weight: is exp to single precision, a multiple of the quantum, and one at the peak") {
  for (float x = 0.0f; x > -30.0f; x -= 0.00137f) {
    const float got = specattn::detail::sampling_weight(x, 0.0f, 1.0f);
    const double want = std::exp(static_cast<double>(x));
    REQUIRE(std::abs(got - want) <= 0x1p-35 * 1.0001 + want * 1.3e-7);
    const double quanta = static_cast<double>(got) * 0x1p34;
    REQUIRE(quanta == std::floor(quanta));
  }
  CHECK(specattn::detail::sampling_weight(3.5f, 3.5f, 0.7f) == 1.0f);
  CHECK(specattn::detail::sampling_weight(-infinite, 3.5f, 0.7f) == 0.0f);
}

TEST_CASE("accepts: probability min(1, target / draft), never where either is zero") {
  using specattn::detail::accepts;
  CHECK(accepts(0.999999, 0.5f, 0.5f));
  CHECK(accepts(0.999999, 0.6f, 0.5f));
  CHECK(accepts(0.4999, 0.25f, 0.5f));
  CHECK_FALSE(accepts(0.5, 0.25f, 0.5f));
  CHECK_FALSE(accepts(0.0, 0.0f, 0.5f));
  CHECK_FALSE(accepts(0.0, 0.5f, 0.0f));
  CHECK_FALSE(accepts(0.0, 0.5f, nan_logit));
}

TEST_CASE("verify: any number of threads gives the same outcome") {
  cpu_fixture one(1), four(4);
  const toy_pair pair = make_pair(40, 3, 0.8f);
  auto sampler = hot(0, 0.9f);
  sampler.top_p = 0.9f;
  CHECK(write(one, pair, sampler, sampler, 60, 4, 30).text == write(four, pair, sampler, sampler, 60, 4, 30).text);
}

TEST_CASE("verify: broken arguments are refused by name") {
  cpu_fixture fixture(1);
  const row logits{0, 1, 2};
  const turn good{{logits, logits}, {}, {1}, {}, 0};
  const auto refused = [&](const turn& bad, const char* part) {
    CHECK_THROWS_WITH_AS(judge(fixture, {good, bad}), doctest::Contains(part), specattn::contract_error);
  };
  turn bad = good;
  bad.drafted = {3};
  refused(bad, "drafted token 3 (entry 1) is outside the vocabulary of 3");
  bad.drafted = {-1};
  refused(bad, "drafted token -1");
  bad = good;
  bad.sampler = hot(1);
  refused(bad, "sequence 1 samples, but there are no draft_probabilities");
  CHECK_THROWS_WITH_AS(judge(fixture, {turn{{logits, logits, logits}, {}, {1}, {}, 0}, turn{}}),
                       doctest::Contains("sequence 1 has no slot"), specattn::contract_error);
  bad = good;
  bad.drafted = {1, 1};
  refused(bad, "3 drafted tokens for 4 slots of 2 sequences");
}

TEST_CASE("sample: a workspace that is too small, and extents that disagree, are refused") {
  specattn::context<specattn::cpu> ctx(1);
  const row logits(6, 0.0f);
  const std::vector<sampler_options> samplers(2);
  const std::vector<std::int64_t> positions(2);
  tokens out(2);
  const auto call = [&](std::ptrdiff_t rows) {
    specattn::sample<specattn::cpu>(ctx, {logits.data(), {rows, 3}}, {samplers.data(), {2}}, {positions.data(), {2}},
                                    random_use::emit, {}, {out.data(), {2}});
  };
  CHECK_THROWS_WITH_AS(call(2), doctest::Contains("sample: needs a workspace"), specattn::contract_error);
  CHECK_THROWS_WITH_AS(call(1), doctest::Contains("1 rows of logits, 2 samplers"), specattn::contract_error);
}

}  // namespace verify_testing
