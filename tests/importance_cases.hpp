// What mix_importance() promises, for any backend. The including file defines `importance_fixture`, as select_cases.hpp
// describes it.
#pragma once

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "specattn/importance.hpp"

namespace importance_testing {

/// Host data of one call, and what it must give in double precision.
struct problem {
  std::int32_t steps = 1, layers = 3, q_heads = 4, target_layers = 2, kv_heads = 3;
  std::int32_t kv_len = 0, capacity = 0;
  bool separate_steps = false;
  specattn::sparse_mixture mixture;
  std::vector<float> weights, masses, history_weights;
  std::vector<std::int32_t> history_positions, history_counts;

  std::int32_t groups() const { return target_layers * kv_heads; }
  std::int32_t heads() const { return layers * q_heads; }
  std::size_t cell(std::int32_t row, std::int32_t i) const {
    return static_cast<std::size_t>(row) * static_cast<std::size_t>(capacity) + static_cast<std::size_t>(i);
  }
};

/// Random signals. History is absent in every third group, listed in the next, dense in the last.
inline problem make_problem(std::int32_t kv_len, std::int32_t steps, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> unit(0.0f, 1.0f);
  problem p;
  p.steps = steps;
  p.kv_len = kv_len;
  p.capacity = kv_len + 5;
  p.mixture.kv_heads = p.kv_heads;
  p.mixture.signals = {p.layers, p.q_heads, {7, 300}, 4, true};
  p.weights.resize(p.cell(steps * p.heads(), 0));
  for (float& w : p.weights) w = unit(random);
  p.masses.resize(static_cast<std::size_t>(steps * p.heads()));
  for (float& mass : p.masses) mass = random() % 9 == 0 ? 0.0f : 0.5f + unit(random);
  p.history_weights.resize(p.cell(p.groups(), 0));
  p.history_positions.resize(p.cell(p.groups(), 0));
  p.history_counts.resize(static_cast<std::size_t>(p.groups()));
  p.mixture.first.push_back(0);
  for (std::int32_t g = 0; g < p.groups(); ++g) {
    for (std::int32_t signal = 0; signal < p.mixture.signals.count(); ++signal) {
      if (random() % 2 == 0) p.mixture.terms.push_back({signal, unit(random)});
    }
    p.mixture.first.push_back(static_cast<std::int32_t>(p.mixture.terms.size()));
    std::int32_t count = 0;
    for (std::int32_t i = 0; i < kv_len; ++i) {
      p.history_weights[p.cell(g, i)] = unit(random);
      if (random() % 3 == 0) p.history_positions[p.cell(g, count++)] = i;
    }
    p.history_counts[static_cast<std::size_t>(g)] = g % 3 == 0 ? 0 : g % 3 == 1 ? count : specattn::keep_all;
  }
  return p;
}

/// Importance of position i for group g from steps [from, to), by the definition.
inline double expected(const problem& p, std::int32_t g, std::int32_t from, std::int32_t to, std::int32_t i) {
  const specattn::signal_set& signals = p.mixture.signals;
  const auto at = static_cast<std::size_t>(g);
  double sum = 0.0;
  for (std::int32_t t = p.mixture.first[at]; t < p.mixture.first[at + 1]; ++t) {
    const auto term = p.mixture.terms[static_cast<std::size_t>(t)];
    double signal = 0.0;
    if (term.signal < p.heads()) {
      for (std::int32_t step = from; step < to; ++step) {
        const std::int32_t row = step * p.heads() + term.signal;
        const double mass = p.masses[static_cast<std::size_t>(row)];
        if (mass > 0) signal += p.weights[p.cell(row, i)] / mass / (to - from);
      }
    } else if (term.signal < p.heads() + 2) {
      const std::int32_t window =
          std::min(signals.windows[static_cast<std::size_t>(term.signal - p.heads())], p.kv_len);
      if (i >= p.kv_len - window) signal = 1.0 / window;
    } else if (term.signal == p.heads() + 2) {
      const std::int32_t sinks = std::min(signals.sinks, p.kv_len);
      if (i < sinks) signal = 1.0 / sinks;
    } else if (p.history_counts[at] == specattn::keep_all) {
      signal = p.history_weights[p.cell(g, i)];
    } else {
      for (std::int32_t j = 0; j < p.history_counts[at]; ++j) {
        if (p.history_positions[p.cell(g, j)] == i) signal = p.history_weights[p.cell(g, j)];
      }
    }
    sum += term.coefficient * signal;
  }
  return sum;
}

template <class Fixture>
void agrees(Fixture& fixture, const problem& p) {
  using backend = typename Fixture::backend;
  const std::int32_t rows = p.separate_steps ? p.steps : 1;
  const auto weights = fixture.upload(p.weights);
  const auto masses = fixture.upload(p.masses);
  const auto history_weights = fixture.upload(p.history_weights);
  const auto history_positions = fixture.upload(p.history_positions);
  const auto history_counts = fixture.upload(p.history_counts);
  const auto out = fixture.upload(std::vector<float>(p.cell(p.groups() * rows, 0), -7.0f));
  specattn::importance_args<backend> args;
  args.draft_weights = {weights.data(), {p.steps, p.layers, p.q_heads, p.capacity}};
  args.masses = {masses.data(), {p.steps, p.layers, p.q_heads}};
  args.history.weights = {history_weights.data(), {p.groups(), p.capacity}};
  args.history.positions = {history_positions.data(), {p.groups(), p.capacity}};
  args.history.counts = {history_counts.data(), {p.groups()}};
  args.kv_len = p.kv_len;
  args.separate_steps = p.separate_steps;
  args.out = {out.data(), {p.target_layers, p.kv_heads, rows, p.capacity}};
  auto& context = fixture.context();
  context.reserve_workspace(specattn::importance_workspace_bytes(context, p.mixture, p.steps));
  fixture.soil_workspace();
  specattn::mix_importance(context, p.mixture, args);
  const std::vector<float> got = fixture.download(out);
  double worst = 0.0;
  bool untouched = true;
  for (std::int32_t g = 0; g < p.groups(); ++g) {
    for (std::int32_t row = 0; row < rows; ++row) {
      const std::int32_t from = p.separate_steps ? row : 0;
      const std::int32_t to = p.separate_steps ? row + 1 : p.steps;
      for (std::int32_t i = 0; i < p.kv_len; ++i) {
        const double want = expected(p, g, from, to, i);
        worst = std::max(worst, std::abs(got[p.cell(g * rows + row, i)] - want) / (1.0 + want));
      }
      for (std::int32_t i = p.kv_len; i < p.capacity; ++i)
        untouched = untouched && got[p.cell(g * rows + row, i)] == -7.0f;
    }
  }
  CHECK(worst < 2e-6);
  CHECK(untouched);
}

TEST_CASE_TEMPLATE("importance: equals the weighted sum of its signals in double precision, at every length", Fixture,
                   importance_fixture) {
  Fixture fixture;
  for (const std::int32_t kv_len : {1, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 1000})
    agrees(fixture, make_problem(kv_len, 1, static_cast<std::uint32_t>(kv_len)));
}

TEST_CASE_TEMPLATE("importance: steps are scaled to unit mass and averaged, or kept apart", Fixture,
                   importance_fixture) {
  Fixture fixture;
  for (const bool separate : {false, true}) {
    problem p = make_problem(333, 4, 7);
    p.separate_steps = separate;
    agrees(fixture, p);
  }
}

TEST_CASE_TEMPLATE("importance: without history the other signals stand alone", Fixture, importance_fixture) {
  Fixture fixture;
  problem p = make_problem(500, 2, 8);
  for (std::int32_t& count : p.history_counts) count = 0;
  agrees(fixture, p);
}

TEST_CASE_TEMPLATE("importance: weights of another draft are refused with both shapes", Fixture, importance_fixture) {
  Fixture fixture;
  problem p = make_problem(10, 1, 9);
  p.q_heads = 2;
  std::string message;
  try {
    agrees(fixture, p);
  } catch (const specattn::contract_error& error) {
    message = error.what();
  }
  CHECK(message == "importance: weights of 3 draft layers × 2 heads, the mixture is over 3 × 4");
}

TEST_CASE("make_sparse_mixture: drops the small terms and keeps a sum of one") {
  specattn::alignment from;
  from.signals = {1, 3, {}, 0, false};
  from.target.layers = 1;
  from.target.kv_heads = 2;
  from.coefficients = {0.6f, 0.396f, 0.004f, 0.0f, 1.0f, 0.0f};
  const specattn::sparse_mixture mixture = specattn::make_sparse_mixture(from, 0.01f);
  CHECK(mixture.first == std::vector<std::int32_t>{0, 2, 3});
  REQUIRE(mixture.terms.size() == 3);
  CHECK(mixture.terms[0].coefficient == doctest::Approx(0.6 / 0.996));
  CHECK(mixture.terms[1].signal == 1);
  CHECK(mixture.terms[2].coefficient == 1.0f);
}

}  // namespace importance_testing
