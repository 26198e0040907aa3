// What divergences and mixtures promise, one claim a case, for any backend. The including file defines
// `alignment_fixture`, with what cpu_fixture.hpp has.
#pragma once

#include <doctest/doctest.h>

#include <limits>
#include <vector>

#include "alignment/problem.hpp"

namespace alignment_testing {

using specattn::contract_error;

constexpr float nan_weight = std::numeric_limits<float>::quiet_NaN();

/// A fixture that keeps what it uploads.
template <class Fixture>
struct held : Fixture {
  using B = typename Fixture::backend;

  template <std::size_t Rank>
  specattn::view<const float, static_cast<int>(Rank), B> shaped(const std::vector<float>& values,
                                                                const std::ptrdiff_t (&extents)[Rank]) {
    memory_.push_back(this->upload(values));
    return memory_.back().shaped(extents);
  }
  specattn::view<const float, 2, B> matrix(const std::vector<float>& values, std::ptrdiff_t rows) {
    return shaped(values, {rows, static_cast<std::ptrdiff_t>(values.size()) / rows});
  }
  void add(specattn::divergence_accumulator<B>& sum, const std::vector<float>& target, std::int32_t targets,
           const std::vector<float>& draft, std::int32_t drafts) {
    const auto length = static_cast<std::ptrdiff_t>(target.size()) / targets;
    this->context().reserve_workspace(specattn::divergence_accumulator<B>::workspace_bytes(targets, drafts, length));
    this->soil_workspace();
    sum.add(this->context(), matrix(target, targets), matrix(draft, drafts));
  }

 private:
  std::vector<specattn::buffer<float, B>> memory_;
};

inline oracle::numbers row_of(const std::vector<float>& rows, std::ptrdiff_t r, std::ptrdiff_t length) {
  return {rows.begin() + r * length, rows.begin() + (r + 1) * length};
}

inline std::vector<float> random_rows(std::ptrdiff_t size, unsigned seed, float zeros = 0.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(size));
  for (float& x : rows) {
    x = std::uniform_real_distribution<float>()(random) < zeros ? 0.0f : std::exp(3.0f * normal(random));
  }
  return rows;
}

// ---- divergence ---------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("divergence_accumulator: equals the oracle for any length, zeros of either side included", Fixture,
                   alignment_fixture) {
  held<Fixture> on;
  using B = typename Fixture::backend;
  for (const std::ptrdiff_t length : {1, 2, 15, 16, 17, 511, 512, 513, 1031}) {
    CAPTURE(length);
    specattn::divergence_accumulator<B> sum(3, 2);
    std::vector<double> want(6);
    for (unsigned sample = 0; sample < 3; ++sample) {
      auto target = random_rows(3 * length, 10 + sample, length > 1 ? 0.3f : 0.0f);
      target[0] = target[static_cast<std::size_t>(length)] = target[static_cast<std::size_t>(2 * length)] = 1.0f;
      const auto draft = random_rows(2 * length, 20 + sample, 0.3f);
      on.add(sum, target, 3, draft, 2);
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

TEST_CASE_TEMPLATE(
    "divergence_accumulator: of a row with itself is zero, of disjoint rows the floor's, and scale is nothing",
    Fixture, alignment_fixture) {
  held<Fixture> on;
  using B = typename Fixture::backend;
  specattn::divergence_accumulator<B> sum(2, 2);
  CHECK(sum.mean() == std::vector<float>(4, 0.0f));
  on.add(sum, {1, 0, 0, 4}, 2, {8, 0, 0, 1}, 2);
  CHECK(sum.mean()[0] == 0.0f);
  CHECK(sum.mean()[3] == 0.0f);
  CHECK(sum.mean()[1] == doctest::Approx(std::log(1e10)));
  CHECK(sum.mean()[2] == doctest::Approx(std::log(1e10)));
}

TEST_CASE_TEMPLATE("divergence_accumulator: refuses broken rows and counts nothing of them", Fixture,
                   alignment_fixture) {
  held<Fixture> on;
  using B = typename Fixture::backend;
  const auto refused = [&](const std::vector<float>& target, const std::vector<float>& draft, const char* part) {
    specattn::divergence_accumulator<B> sum(2, 1);
    on.add(sum, {1, 1, 1, 1}, 2, {1, 1}, 1);
    const auto add_and_look = [&] {
      on.add(sum, target, 2, draft, 1);
      (void)sum.mean();
    };
    CHECK_THROWS_WITH_AS(add_and_look(), doctest::Contains(part), contract_error);
    CHECK(sum.samples() == 1);
  };
  refused({1, 1, 0, 0}, {1, 1}, "target row 1 has no mass");
  refused({1, 1, 1, nan_weight}, {1, 1}, "target row 1 holds a weight");
  refused({1, 1, 1, 1}, {1, -1}, "draft row 0 holds a weight");
  refused({1, 1, 1, 1}, {1, INFINITY}, "draft row 0 holds a weight");
  refused({1, 1, 1, 1}, {1, 1, 1}, "expected 2 and 1 rows of one length");
  CHECK_THROWS_AS(specattn::divergence_accumulator<B>(0, 1), contract_error);
}

// ---- mixtures -----------------------------------------------------------------------------------------------

template <class Fixture>
specattn::mixture_fit<typename Fixture::backend> fit_of(held<Fixture>& on, const mixture_problem& problem) {
  specattn::mixture_fit<typename Fixture::backend> fit(problem.groups, problem.shared, problem.own);
  for (const auto& s : problem.samples) {
    fit.add(on.context(), on.shaped(s.target, {problem.groups, s.length}),
            on.shaped(s.signals, {problem.shared, s.length}),
            on.shaped(s.history, {problem.groups, problem.own, s.length}));
  }
  return fit;
}

TEST_CASE_TEMPLATE("mixture_fit: is within the tolerance of the optimum, and says how far it may be", Fixture,
                   alignment_fixture) {
  held<Fixture> on;
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
      const auto got = fit_of(on, problem).solve(on.context(), 5000, tolerance);
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

TEST_CASE_TEMPLATE("mixture_fit: meets the conditions of an optimum", Fixture, alignment_fixture) {
  held<Fixture> on;
  const auto problem = random_mixture(3, 10, 1, 4, 300, 12);
  const auto got = fit_of(on, problem).solve(on.context(), 5000, 1e-5f);
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

TEST_CASE_TEMPLATE("mixture_fit: finds the signal a target equals, and never does worse than a single one", Fixture,
                   alignment_fixture) {
  held<Fixture> on;
  auto problem = random_mixture(2, 4, 0, 3, 100, 5);
  for (auto& s : problem.samples) {
    std::copy_n(s.signals.begin() + 2 * s.length, s.length, s.target.begin());
  }
  const auto got = fit_of(on, problem).solve(on.context(), 5000, 1e-5f);
  CHECK(got.coefficients[2] > 0.999f);
  CHECK(got.divergence[0] < 2e-5f);
  const auto group = problem.of_group(1);
  for (std::size_t i = 0; i < 4; ++i) {
    oracle::numbers alone(4, 0.0);
    alone[i] = 1.0;
    CHECK(got.divergence[1] <= oracle::mixture_divergence(group, alone) + 2e-5);
  }
}

TEST_CASE_TEMPLATE("mixture_fit: stops at the limit of iterations, and reports the excess that is left", Fixture,
                   alignment_fixture) {
  held<Fixture> on;
  const auto problem = random_mixture(1, 8, 0, 2, 300, 7);
  const auto fit = fit_of(on, problem);
  double before = INFINITY;
  for (const std::int32_t limit : {1, 2, 3, 4, 5, 7, 10, 30}) {
    const auto got = fit.solve(on.context(), limit, 0.0f);
    CHECK(got.iterations == limit);
    CHECK(got.divergence[0] <= before + 1e-6);
    const double best = oracle::best_mixture_divergence(problem.of_group(0), 8);
    CHECK(got.divergence[0] - best <= got.excess[0] + 3e-6);
    before = got.divergence[0];
  }
}

TEST_CASE_TEMPLATE(
    "mixture_fit: signals without mass take no share, and uncovered positions leave a finite divergence", Fixture,
    alignment_fixture) {
  held<Fixture> on;
  using B = typename Fixture::backend;
  specattn::mixture_fit<B> fit(1, 2, 1);
  const std::vector<float> target{1, 2, 1}, shared{1, 2, 0, 0, 0, 0}, own{0, 0, 0};
  fit.add(on.context(), on.matrix(target, 1), on.matrix(shared, 2), on.shaped(own, {1, 1, 3}));
  const auto got = fit.solve(on.context());
  CHECK(got.coefficients[0] > 0.999f);
  CHECK(std::isfinite(got.divergence[0]));
  CHECK(fit.bytes() == 4 * 3 * sizeof(float));
  specattn::mixture_fit<B> blind(1, 2, 0);  // nothing at all to go by: the start remains
  blind.add(on.context(), on.matrix(target, 1), on.matrix(std::vector<float>(6, 0.0f), 2), {});
  CHECK(blind.solve(on.context()).coefficients == std::vector<float>{0.5f, 0.5f});
}

TEST_CASE_TEMPLATE("mixture_fit: refuses broken samples", Fixture, alignment_fixture) {
  held<Fixture> on;
  using B = typename Fixture::backend;
  specattn::mixture_fit<B> empty(1, 1, 0);
  CHECK_THROWS_WITH_AS(empty.solve(on.context()), doctest::Contains("no samples"), contract_error);
  CHECK(empty.bytes() == 0);
  const auto refused = [&](const std::vector<float>& target, const std::vector<float>& shared,
                           const std::vector<float>& own, const char* part) {
    specattn::mixture_fit<B> fit(1, 1, 1);
    const auto add_and_solve = [&] {
      fit.add(on.context(), on.matrix(target, 1), on.matrix(shared, 1), on.shaped(own, {1, 1, 2}));
      (void)fit.solve(on.context());
    };
    CHECK_THROWS_WITH_AS(add_and_solve(), doctest::Contains(part), contract_error);
  };
  refused({1, nan_weight}, {1, 1}, {1, 1}, "target 0");
  refused({1, 1}, {1, -1}, {1, 1}, "shared signal 0");
  refused({1, 1}, {1, 1}, {1, INFINITY}, "a signal of group 0");
  refused({1, 1}, {1, 1, 1}, {1, 1}, "of one length");
  CHECK_THROWS_AS(specattn::mixture_fit<B>(1, 0, 0), contract_error);
}

}  // namespace alignment_testing
