// Divergences, the monotone layer map, mixtures and the consistency of an alignment.
#include "specattn/cpu/alignment.hpp"

#include <doctest/doctest.h>

#include <limits>

#include "alignment_problem.hpp"

namespace alignment_testing {

using specattn::alignment;
using specattn::contract_error;
using specattn::cpu;
using specattn::view;
using ctx_cpu = specattn::context<cpu>;

constexpr float nan_weight = std::numeric_limits<float>::quiet_NaN();

view<const float, 2> matrix(const std::vector<float>& values, std::ptrdiff_t rows) {
  return {values.data(), {rows, static_cast<std::ptrdiff_t>(values.size()) / rows}};
}

oracle::numbers row_of(const std::vector<float>& rows, std::ptrdiff_t r, std::ptrdiff_t length) {
  return {rows.begin() + r * length, rows.begin() + (r + 1) * length};
}

std::vector<float> random_rows(std::ptrdiff_t size, unsigned seed, float zeros = 0.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(size));
  for (float& x : rows) {
    x = std::uniform_real_distribution<float>()(random) < zeros ? 0.0f : std::exp(3.0f * normal(random));
  }
  return rows;
}

// ---- divergence ---------------------------------------------------------------------------------------------

TEST_CASE("logarithm: is log to single precision") {
  for (float x = 1e-37f; x < 1e37f; x *= 1.00137f) {
    const double want = std::log(static_cast<double>(x));
    REQUIRE(std::abs(specattn::detail::logarithm(x) - want) <= 1.5e-7 * std::max(1.0, std::abs(want)));
  }
  CHECK(specattn::detail::logarithm(1.0f) == 0.0f);
}

TEST_CASE("divergence_accumulator: equals the oracle for any length, zeros of either side included") {
  ctx_cpu ctx(2);
  for (const std::ptrdiff_t length : {1, 2, 15, 16, 17, 511, 512, 513, 1031}) {
    CAPTURE(length);
    specattn::divergence_accumulator sum(3, 2);
    std::vector<double> want(6);
    for (unsigned sample = 0; sample < 3; ++sample) {
      auto target = random_rows(3 * length, 10 + sample, length > 1 ? 0.3f : 0.0f);
      target[0] = target[static_cast<std::size_t>(length)] = target[static_cast<std::size_t>(2 * length)] = 1.0f;
      const auto draft = random_rows(2 * length, 20 + sample, 0.3f);
      sum.add(ctx, matrix(target, 3), matrix(draft, 2));
      for (std::ptrdiff_t pair = 0; pair < 6; ++pair) {
        want[static_cast<std::size_t>(pair)] +=
            oracle::divergence(row_of(target, pair / 2, length), row_of(draft, pair % 2, length)) / 3;
      }
    }
    CHECK(sum.samples() == 3);
    const auto got = sum.mean();
    for (std::size_t i = 0; i < 6; ++i) CHECK(std::abs(got[i] - want[i]) < 2e-5 * (1.0 + want[i]));
  }
}

TEST_CASE(
    "divergence_accumulator: of a row with itself is zero, of disjoint rows the floor's, and scale is nothing") {
  ctx_cpu ctx(1);
  specattn::divergence_accumulator sum(2, 2);
  CHECK(sum.mean() == std::vector<float>(4, 0.0f));
  sum.add(ctx, matrix({1, 0, 0, 4}, 2), matrix({8, 0, 0, 1}, 2));
  CHECK(sum.mean()[0] == 0.0f);
  CHECK(sum.mean()[3] == 0.0f);
  CHECK(sum.mean()[1] == doctest::Approx(std::log(1e10)));
  CHECK(sum.mean()[2] == doctest::Approx(std::log(1e10)));
}

TEST_CASE("divergence_accumulator: reads rows of any stride, and any number of threads gives the same bits") {
  const auto target = random_rows(4 * 700, 1), draft = random_rows(3 * 700, 2);
  ctx_cpu one(1), four(4);
  specattn::divergence_accumulator a(4, 3), b(4, 3), c(4, 3);
  a.add(one, matrix(target, 4), matrix(draft, 3));
  b.add(four, matrix(target, 4), matrix(draft, 3));
  std::vector<float> columns(target.size());
  for (std::size_t r = 0; r < 4; ++r) {
    for (std::size_t i = 0; i < 700; ++i) columns[i * 4 + r] = target[r * 700 + i];
  }
  c.add(one, {columns.data(), {4, 700}, {1, 4}}, matrix(draft, 3));
  CHECK(a.mean() == b.mean());
  CHECK(a.mean() == c.mean());
}

TEST_CASE("divergence_accumulator: refuses broken rows and counts nothing of them") {
  ctx_cpu ctx(1);
  specattn::divergence_accumulator sum(2, 1);
  const auto refused = [&](const std::vector<float>& target, const std::vector<float>& draft, const char* part) {
    CHECK_THROWS_WITH_AS(sum.add(ctx, matrix(target, 2), matrix(draft, 1)), doctest::Contains(part), contract_error);
  };
  refused({1, 1, 0, 0}, {1, 1}, "target row 1 has no mass");
  refused({1, 1, 1, nan_weight}, {1, 1}, "target row 1 holds a weight");
  refused({1, 1, 1, 1}, {1, -1}, "draft row 0 holds a weight");
  refused({1, 1, 1, 1}, {1, INFINITY}, "draft row 0 holds a weight");
  refused({1, 1, 1, 1}, {1, 1, 1}, "expected 2 and 1 rows of one length");
  CHECK(sum.samples() == 0);
  CHECK_THROWS_AS(specattn::divergence_accumulator(0, 1), contract_error);
}

// ---- the layer map ------------------------------------------------------------------------------------------

TEST_CASE("monotone_layer_map: costs what the best of all non-decreasing maps costs") {
  std::mt19937 random(4);
  for (int trial = 0; trial < 300; ++trial) {
    const std::size_t targets = 1 + random() % 6, drafts = 1 + random() % 5;
    std::vector<oracle::numbers> cost(targets, oracle::numbers(drafts));
    std::vector<float> flat;
    for (auto& row : cost) {
      for (double& x : row) {
        x = static_cast<double>(random() % (trial % 2 == 0 ? 4u : 1000u));  // many ties in every second trial
        flat.push_back(static_cast<float>(x));
      }
    }
    const auto map = specattn::monotone_layer_map(matrix(flat, static_cast<std::ptrdiff_t>(targets)));
    REQUIRE(map.size() == targets);
    REQUIRE(std::is_sorted(map.begin(), map.end()));
    REQUIRE(oracle::map_cost(cost, {map.begin(), map.end()}) == oracle::best_map_cost(cost));
  }
}

TEST_CASE("monotone_layer_map: ties take the smaller draft layer; what is not a number is refused") {
  CHECK(specattn::monotone_layer_map(matrix(std::vector<float>(12, 1.0f), 3)) == std::vector<std::int32_t>{0, 0, 0});
  CHECK(specattn::monotone_layer_map(matrix({5, 1, 1, 5}, 2)) == std::vector<std::int32_t>{0, 0});  // 6: 0,0 and 1,1
  CHECK(specattn::monotone_layer_map(matrix({1, 5, 5, 5, 1, 1}, 2)) == std::vector<std::int32_t>{0, 1});
  CHECK_THROWS_WITH_AS(specattn::monotone_layer_map(matrix({1, 2, nan_weight, 1}, 2)),
                       doctest::Contains("target layer 1 and draft layer 0"), contract_error);
  CHECK_THROWS_AS(specattn::monotone_layer_map({}), contract_error);
}

// ---- mixtures -----------------------------------------------------------------------------------------------

specattn::mixture_fit fit_of(const mixture_problem& problem) {
  specattn::mixture_fit fit(problem.groups, problem.shared, problem.own);
  for (const auto& s : problem.samples) {
    fit.add({s.target.data(), {problem.groups, s.length}}, {s.signals.data(), {problem.shared, s.length}},
            {s.history.data(), {problem.groups, problem.own, s.length}});
  }
  return fit;
}

TEST_CASE("mixture_fit: is within the tolerance of the optimum, and says how far it may be") {
  ctx_cpu ctx(2);
  struct setting {
    std::int32_t groups, shared, own;
    int samples;
    std::ptrdiff_t length;
  };
  for (const setting& s : {setting{1, 1, 0, 1, 5}, setting{2, 2, 0, 2, 40}, setting{3, 5, 1, 3, 200},
                           setting{2, 0, 3, 2, 90}, setting{2, 12, 1, 4, 510}}) {
    for (const float tolerance : {1e-3f, 1e-5f}) {
      CAPTURE(s.shared);
      CAPTURE(tolerance);
      const auto problem = random_mixture(s.groups, s.shared, s.own, s.samples, s.length, 9);
      const auto got = fit_of(problem).solve(ctx, 5000, tolerance);
      const auto signals = static_cast<std::size_t>(s.shared + s.own);
      for (std::int32_t g = 0; g < s.groups; ++g) {
        const auto group = problem.of_group(g);
        const auto first = got.coefficients.begin() + static_cast<std::ptrdiff_t>(signals) * g;
        const oracle::numbers coefficients(first, first + static_cast<std::ptrdiff_t>(signals));
        const double reached = oracle::mixture_divergence(group, coefficients);
        const auto at = static_cast<std::size_t>(g);
        CHECK(std::abs(got.divergence[at] - reached) < 3e-6);
        CHECK(got.excess[at] <= tolerance);
        CHECK(reached - oracle::best_mixture_divergence(group, signals) <= tolerance + 3e-6);
      }
    }
  }
}

TEST_CASE("mixture_fit: meets the conditions of an optimum") {
  ctx_cpu ctx(2);
  const auto problem = random_mixture(3, 10, 1, 4, 300, 12);
  const auto got = fit_of(problem).solve(ctx, 5000, 1e-5f);
  for (std::int32_t g = 0; g < 3; ++g) {
    const oracle::numbers coefficients(got.coefficients.begin() + 11 * g, got.coefficients.begin() + 11 * (g + 1));
    const auto slopes = oracle::mixture_slopes(problem.of_group(g), coefficients);
    double sum = 0.0;
    for (std::size_t i = 0; i < 11; ++i) {
      sum += coefficients[i];
      CHECK(coefficients[i] >= 0.0);
      CHECK(slopes[i] >= -1.0 - 2e-5);                                      // no signal would help
      if (coefficients[i] > 0.05) CHECK(std::abs(slopes[i] + 1.0) < 1e-3);  // all in use help alike
    }
    CHECK(sum == doctest::Approx(1.0).epsilon(1e-5));
  }
}

TEST_CASE("mixture_fit: finds the signal a target equals, and never does worse than a single one") {
  ctx_cpu ctx(1);
  auto problem = random_mixture(2, 4, 0, 3, 100, 5);
  for (auto& s : problem.samples) {
    std::copy_n(s.signals.begin() + 2 * s.length, s.length, s.target.begin());
  }
  const auto got = fit_of(problem).solve(ctx, 5000, 1e-5f);
  CHECK(got.coefficients[2] > 0.999f);
  CHECK(got.divergence[0] < 2e-5f);
  const auto group = problem.of_group(1);
  for (std::size_t i = 0; i < 4; ++i) {
    oracle::numbers alone(4, 0.0);
    alone[i] = 1.0;
    CHECK(got.divergence[1] <= oracle::mixture_divergence(group, alone) + 2e-5);
  }
}

TEST_CASE("mixture_fit: any number of threads gives the same bits") {
  const auto fit = fit_of(random_mixture(5, 6, 1, 3, 600, 6));
  ctx_cpu one(1), four(4);
  const auto a = fit.solve(one), b = fit.solve(four);
  CHECK(a.coefficients == b.coefficients);
  CHECK(a.divergence == b.divergence);
  CHECK(a.iterations == b.iterations);
}

TEST_CASE("mixture_fit: stops at the limit of iterations, and reports the excess that is left") {
  ctx_cpu ctx(1);
  const auto problem = random_mixture(1, 8, 0, 2, 300, 7);
  const auto fit = fit_of(problem);
  double before = INFINITY;
  for (const std::int32_t limit : {1, 2, 3, 4, 5, 7, 10, 30}) {
    const auto got = fit.solve(ctx, limit, 0.0f);
    CHECK(got.iterations == limit);
    CHECK(got.divergence[0] <= before + 1e-6);
    const double best = oracle::best_mixture_divergence(problem.of_group(0), 8);
    CHECK(got.divergence[0] - best <= got.excess[0] + 3e-6);
    before = got.divergence[0];
  }
}

TEST_CASE("mixture_fit: signals without mass take no share, and uncovered positions leave a finite divergence") {
  ctx_cpu ctx(1);
  specattn::mixture_fit fit(1, 2, 1);
  const std::vector<float> target{1, 2, 1}, shared{1, 2, 0, 0, 0, 0}, own{0, 0, 0};
  fit.add(matrix(target, 1), matrix(shared, 2), {own.data(), {1, 1, 3}});
  const auto got = fit.solve(ctx);
  CHECK(got.coefficients[0] > 0.999f);
  CHECK(std::isfinite(got.divergence[0]));
  CHECK(fit.bytes() == 4 * 3 * sizeof(float));
  specattn::mixture_fit blind(1, 2, 0);  // nothing at all to go by: the start remains
  blind.add(matrix(target, 1), matrix(std::vector<float>(6, 0.0f), 2), {});
  CHECK(blind.solve(ctx).coefficients == std::vector<float>{0.5f, 0.5f});
}

TEST_CASE("mixture_fit: refuses broken samples and keeps nothing of them") {
  ctx_cpu ctx(1);
  specattn::mixture_fit fit(1, 1, 0);
  CHECK_THROWS_WITH_AS(fit.solve(ctx), doctest::Contains("no samples"), contract_error);
  CHECK_THROWS_WITH_AS(fit.add(matrix({1, nan_weight}, 1), matrix({1, 1}, 1), {}), doctest::Contains("target 0"),
                       contract_error);
  CHECK_THROWS_WITH_AS(fit.add(matrix({1, 1}, 1), matrix({1, -1}, 1), {}), doctest::Contains("shared signal 0"),
                       contract_error);
  CHECK_THROWS_WITH_AS(fit.add(matrix({1, 1}, 1), matrix({1, 1, 1}, 1), {}), doctest::Contains("of one length"),
                       contract_error);
  CHECK(fit.bytes() == 0);
  CHECK_THROWS_AS(specattn::mixture_fit(1, 0, 0), contract_error);
}

// ---- the alignment ------------------------------------------------------------------------------------------

TEST_CASE("model_fingerprint: matches by everything but the name; an unknown hash is not compared") {
  const specattn::model_fingerprint one{"a", 4, 4, 2, 16, 50, 7};
  auto other = one;
  other.name = "b";
  CHECK(one.matches(other));
  other.weights = 0;
  CHECK(one.matches(other));
  CHECK(other.matches(one));
  other.weights = 8;
  CHECK_FALSE(one.matches(other));
  for (auto field : {&specattn::model_fingerprint::layers, &specattn::model_fingerprint::q_heads,
                     &specattn::model_fingerprint::kv_heads, &specattn::model_fingerprint::head_dim,
                     &specattn::model_fingerprint::vocab}) {
    other = one;
    ++(other.*field);
    CHECK_FALSE(one.matches(other));
  }
}

TEST_CASE("alignment: layer_map_only is the paper's rule, consistent, and exactly the head means") {
  const auto paper = small_alignment().layer_map_only();
  paper.check();
  CHECK(paper.signals.count() == 6);
  for (std::size_t g = 0; g < 8; ++g) {
    const auto layer = static_cast<std::size_t>(paper.layer_map[g / 2]);
    for (std::size_t i = 0; i < 6; ++i) CHECK(paper.coefficients[g * 6 + i] == (i / 2 == layer ? 0.5f : 0.0f));
    CHECK(paper.mixture_divergence[g] == small_alignment().divergence[g / 2 * 3 + layer]);
  }
}

TEST_CASE("alignment: check names the first inconsistency") {
  small_alignment().check();
  const auto refused = [](auto spoil, const char* part) {
    alignment bad = small_alignment();
    spoil(bad);
    CHECK_THROWS_WITH_AS(bad.check(), doctest::Contains(part), contract_error);
  };
  refused([](alignment& a) { a.target.layers = 0; }, "a model of 0 layers");
  refused([](alignment& a) { a.draft.layers = 1 << 16; }, "none may exceed 32768");
  refused([](alignment& a) { a.target.kv_heads = 3; }, "4 q_heads and 3 kv_heads");
  refused([](alignment& a) { a.signals.draft_layers = 2; }, "signals of 2 × 2 draft heads, the draft has 3 × 2");
  refused([](alignment& a) { a.signals.windows[1] = 0; }, "a recency window of 0");
  refused([](alignment& a) { a.signals.windows.assign(65, 1); }, "65 recency windows");
  refused([](alignment& a) { a.signals.sinks = -1; }, "a sink signal over -1 positions");
  refused([](alignment& a) { a.coefficients.pop_back(); }, "79 coefficients for 8 groups × 10 signals");
  refused([](alignment& a) { a.mixture_divergence.clear(); }, "0 divergences for 8 groups");
  refused([](alignment& a) { a.divergence.push_back(0); }, "13 divergences for 4 × 3 layers");
  refused([](alignment& a) { a.layer_map.pop_back(); }, "a map of 3 layers");
  refused([](alignment& a) { a.coefficients[5] = nan_weight; }, "coefficients holds nan at 5");
  refused([](alignment& a) { a.coefficients[5] = -0.1f; }, "coefficients holds -0.1");
  refused([](alignment& a) { a.divergence[1] = INFINITY; }, "divergence holds inf at 1");
  refused([](alignment& a) { a.coefficients[12] += 0.01f; }, "the coefficients of group 1 sum to 1.0");
  refused([](alignment& a) { a.layer_map[3] = 1; }, "target layer 3 maps to draft layer 1");
  refused([](alignment& a) { a.layer_map[3] = 3; }, "target layer 3 maps to draft layer 3");
}

}  // namespace alignment_testing
