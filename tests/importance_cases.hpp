// What mix_importance() promises, for any backend. The including file defines `importance_fixture`, as select_cases.hpp
// describes it.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "specattn/importance.hpp"

namespace importance_testing {

struct shape {
  std::int32_t layers = 3, q_heads = 4, target_layers = 2, kv_heads = 3;
  std::int32_t spare = 5;  ///< positions of a row behind the prefix
};

/// Host data of one call, and what it must give in double precision. `weights` are what a row means, whatever it is
/// stored as.
struct problem : shape {
  std::int32_t steps = 1;
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
inline problem make_problem(std::int32_t kv_len, std::int32_t steps, std::uint32_t seed, const shape& sizes = {}) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> unit(0.0f, 1.0f);
  problem p;
  static_cast<shape&>(p) = sizes;
  p.steps = steps;
  p.kv_len = kv_len;
  p.capacity = kv_len + p.spare;
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

/// Importance of each position for group g from steps [from, to), by the definition.
inline std::vector<double> expected(const problem& p, std::int32_t g, std::int32_t from, std::int32_t to) {
  const specattn::signal_set& signals = p.mixture.signals;
  const auto at = static_cast<std::size_t>(g);
  std::vector<double> sums(static_cast<std::size_t>(p.kv_len));
  const auto add = [&](std::int32_t i, double value) { sums[static_cast<std::size_t>(i)] += value; };
  for (std::int32_t t = p.mixture.first[at]; t < p.mixture.first[at + 1]; ++t) {
    const auto term = p.mixture.terms[static_cast<std::size_t>(t)];
    const double coefficient = term.coefficient;
    if (term.signal < p.heads()) {
      for (std::int32_t step = from; step < to; ++step) {
        const std::int32_t row = step * p.heads() + term.signal;
        const double mass = p.masses[static_cast<std::size_t>(row)];
        for (std::int32_t i = 0; mass > 0 && i < p.kv_len; ++i)
          add(i, coefficient * p.weights[p.cell(row, i)] / mass / (to - from));
      }
    } else if (term.signal < p.heads() + 2) {
      const std::int32_t window =
          std::min(signals.windows[static_cast<std::size_t>(term.signal - p.heads())], p.kv_len);
      for (std::int32_t i = p.kv_len - window; i < p.kv_len; ++i) add(i, coefficient / window);
    } else if (term.signal == p.heads() + 2) {
      const std::int32_t sinks = std::min(signals.sinks, p.kv_len);
      for (std::int32_t i = 0; i < sinks; ++i) add(i, coefficient / sinks);
    } else if (p.history_counts[at] == specattn::keep_all) {
      for (std::int32_t i = 0; i < p.kv_len; ++i) add(i, coefficient * p.history_weights[p.cell(g, i)]);
    } else {
      for (std::int32_t j = 0; j < p.history_counts[at]; ++j)
        add(p.history_positions[p.cell(g, j)], coefficient * p.history_weights[p.cell(g, j)]);
    }
  }
  return sums;
}

/// A problem in the backend's memory, rows stored as T. With a `split_len`, as multiples of their split's scale.
template <class Fixture, class T>
struct resident_problem {
  using backend = typename Fixture::backend;
  template <class U>
  using buffer = specattn::buffer<U, backend>;

  specattn::resident_mixture<backend> mixture;
  buffer<T> weights;
  buffer<float> masses, scales, history_weights, out;
  buffer<std::int32_t> history_positions, history_counts;
  specattn::importance_args<backend, T> args;

  /// Rounds p's weights to what is stored.
  resident_problem(Fixture& fixture, problem& p, std::int32_t split_len = 0)
      : mixture(specattn::sparse_mixture(p.mixture)),
        masses(fixture.upload(p.masses)),
        history_weights(fixture.upload(p.history_weights)),
        out(fixture.upload(std::vector<float>(p.cell(p.groups() * (p.separate_steps ? p.steps : 1), 0), -7.0f))),
        history_positions(fixture.upload(p.history_positions)),
        history_counts(fixture.upload(p.history_counts)) {
    store(fixture, p, split_len);
    args.draft_weights = {weights.data(), {p.steps, p.layers, p.q_heads, p.capacity}};
    args.masses = {masses.data(), {p.steps, p.layers, p.q_heads}};
    args.history.weights = {history_weights.data(), {p.groups(), p.capacity}};
    args.history.positions = {history_positions.data(), {p.groups(), p.capacity}};
    args.history.counts = {history_counts.data(), {p.groups()}};
    args.kv_len = p.kv_len;
    args.separate_steps = p.separate_steps;
    args.out = {out.data(), {p.target_layers, p.kv_heads, p.separate_steps ? p.steps : 1, p.capacity}};
  }

  void store(Fixture& fixture, problem& p, std::int32_t split_len) {
    const std::int32_t rows = p.steps * p.heads();
    const std::int32_t splits = split_len > 0 ? (p.kv_len + split_len - 1) / split_len : 1;
    std::vector<T> stored(p.weights.size());
    std::vector<float> scale(static_cast<std::size_t>(rows * splits), 1.0f);
    for (std::int32_t row = 0; row < rows; ++row) {
      for (std::int32_t i = 0; i < p.capacity; ++i) {
        float* each =
            &scale[static_cast<std::size_t>(row * splits + (split_len > 0 && i < p.kv_len ? i / split_len : 0))];
        if (split_len > 0 && *each == 1.0f) *each = 0.001f * static_cast<float>(1 + (row + i) % 977);
        float& weight = p.weights[p.cell(row, i)];
        stored[p.cell(row, i)] = specattn::from_float<T>(weight);
        weight = specattn::to_float(stored[p.cell(row, i)]) * *each;
      }
    }
    weights = fixture.upload(stored);
    if (split_len == 0) return;
    scales = fixture.upload(scale);
    args.split_scales = {scales.data(), {p.steps, p.layers, p.q_heads, splits}};
    args.split_len = split_len;
  }

  void reserve(Fixture& fixture) {
    auto& context = fixture.context();
    context.reserve_workspace(
        specattn::importance_workspace_bytes(context, mixture, args.draft_weights.extent(0), args.kv_len));
    fixture.soil_workspace();
  }
  std::vector<float> run(Fixture& fixture) {
    reserve(fixture);
    specattn::mix_importance(fixture.context(), mixture, args);
    return fixture.download(out);
  }
};

/// Every value within importance_error of itself, zeros exact, nothing behind the prefix written.
template <class Backend>
void check_importance(const problem& p, const std::vector<float>& got) {
  const std::int32_t rows = p.separate_steps ? p.steps : 1;
  double worst = 0.0;
  bool zeros = true, untouched = true;
  for (std::int32_t g = 0; g < p.groups(); ++g) {
    for (std::int32_t row = 0; row < rows; ++row) {
      const std::vector<double> want =
          expected(p, g, p.separate_steps ? row : 0, p.separate_steps ? row + 1 : p.steps);
      const float* at = &got[p.cell(g * rows + row, 0)];
      for (std::int32_t i = 0; i < p.kv_len; ++i) {
        const double exact = want[static_cast<std::size_t>(i)];
        zeros = zeros && (at[i] == 0.0f) == (exact == 0.0);
        if (exact > 0) worst = std::max(worst, std::abs(at[i] - exact) / exact);
      }
      for (std::int32_t i = p.kv_len; i < p.capacity; ++i) untouched = untouched && at[i] == -7.0f;
    }
  }
  CHECK(worst < specattn::importance_error<Backend>);
  CHECK(zeros);
  CHECK(untouched);
}

template <class T = float, class Fixture>
void agrees(Fixture& fixture, problem p, std::int32_t split_len = 0) {
  resident_problem<Fixture, T> resident(fixture, p, split_len);
  check_importance<typename Fixture::backend>(p, resident.run(fixture));
}

TEST_CASE_TEMPLATE("importance: equals the weighted sum of its signals in double precision, at every length", Fixture,
                   importance_fixture) {
  Fixture fixture;
  for (const std::int32_t kv_len : {1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 1000})
    agrees(fixture, make_problem(kv_len, 1, static_cast<std::uint32_t>(kv_len)));
}

TEST_CASE_TEMPLATE("importance: any number of groups and draft heads, rows aligned or not", Fixture,
                   importance_fixture) {
  Fixture fixture;
  std::uint32_t seed = 100;
  for (const shape& sizes : {shape{1, 1, 1, 1, 8}, shape{5, 13, 16, 16, 8}, shape{2, 32, 257, 1, 1},
                             shape{3, 43, 75, 8, 24}, shape{2, 3, 131, 8, 7}}) {
    for (const std::int32_t kv_len : {40, 400}) agrees(fixture, make_problem(kv_len, 2, ++seed, sizes));
  }
}

TEST_CASE_TEMPLATE("importance: steps are scaled to unit mass and averaged, or kept apart", Fixture,
                   importance_fixture) {
  Fixture fixture;
  for (const std::int32_t steps : {4, 19}) {
    for (const bool separate : {false, true}) {
      problem p = make_problem(333, steps, 7);
      p.separate_steps = separate;
      agrees(fixture, p);
    }
  }
}

TEST_CASE_TEMPLATE("importance: recordings of 16 bits, plain or relative to their splits' scales", Fixture,
                   importance_fixture) {
  Fixture fixture;
  const shape sizes{6, 20, 5, 4, 8};
  for (const std::int32_t split_len : {0, 256, 512}) {
    agrees<specattn::bf16>(fixture, make_problem(1000, 3, 11, sizes), split_len);
    agrees<specattn::fp16>(fixture, make_problem(1003, 3, 12, sizes), split_len);
    agrees(fixture, make_problem(777, 2, 13), split_len);
  }
}

TEST_CASE_TEMPLATE("importance: without history the other signals stand alone", Fixture, importance_fixture) {
  Fixture fixture;
  problem p = make_problem(500, 2, 8);
  for (std::int32_t& count : p.history_counts) count = 0;
  agrees(fixture, p);
}

TEST_CASE_TEMPLATE("importance: a length read from memory shortens the prefix, and never lengthens it", Fixture,
                   importance_fixture) {
  Fixture fixture;
  for (const std::int32_t length : {-3, 0, 1, 130, 299, 300, 5000}) {
    problem p = make_problem(300, 2, 14);
    for (std::int32_t& count : p.history_counts) count = 0;
    resident_problem<Fixture, float> resident(fixture, p);
    const auto on_backend = fixture.upload(std::vector<std::int32_t>{length});
    resident.args.length = {on_backend.data(), {1}};
    p.kv_len = std::min(std::max(length, 0), 300);
    check_importance<typename Fixture::backend>(p, resident.run(fixture));
  }
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

TEST_CASE("make_sparse_mixture: hundreds of signals that share a group evenly all stay") {
  specattn::alignment from;
  from.signals = {22, 32, {}, 0, false};
  from.target.layers = from.target.kv_heads = 1;
  from.coefficients.assign(704, 1.0f / 704.0f);
  from.coefficients[5] = 0.0f;
  const specattn::sparse_mixture mixture = specattn::make_sparse_mixture(from);
  REQUIRE(mixture.terms.size() == 703);
  CHECK(mixture.terms[0].coefficient == doctest::Approx(1.0 / 703));
}

}  // namespace importance_testing
