// What mix_importance() promises, for any backend. The including file defines `importance_fixture`, as select/cases.hpp
// describes it.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "specattn/importance.hpp"

namespace importance_testing {

struct shape {
  std::int32_t layers = 3, q_heads = 4, target_layers = 2, kv_heads = 3;
  std::int32_t spare = 5;  ///< positions of a row behind the prefix
  std::int32_t sequences = 1;
};

/// Host data of one call, and what it must give in double precision. `weights` are what a row means, whatever it is
/// stored as.
struct problem : shape {
  std::int32_t steps = 1;
  std::int32_t kv_len = 0, capacity = 0;
  std::vector<std::int32_t> lengths;  ///< of each sequence, where they are read from memory
  std::vector<std::int32_t> taken;    ///< steps of each sequence, where some took fewer
  bool separate_steps = false;
  specattn::sparse_mixture mixture;
  std::vector<float> weights, masses, history_weights;
  std::vector<std::int32_t> history_positions, history_counts, history_row_of;

  std::int32_t groups() const { return target_layers * kv_heads; }
  std::int32_t heads() const { return layers * q_heads; }
  std::int32_t rows() const { return steps * sequences * heads(); }
  std::int32_t row(std::int32_t step, std::int32_t s, std::int32_t head) const {
    return ((step * layers + head / q_heads) * sequences + s) * q_heads + head % q_heads;
  }
  std::int32_t out_rows() const { return separate_steps ? steps : 1; }
  std::int32_t out_row(std::int32_t s, std::int32_t g, std::int32_t r) const {
    return ((g / kv_heads * sequences + s) * kv_heads + g % kv_heads) * out_rows() + r;
  }
  std::int32_t length(std::int32_t s) const {
    return lengths.empty() ? kv_len : std::clamp(lengths[static_cast<std::size_t>(s)], 0, kv_len);
  }
  std::int32_t steps_of(std::int32_t s) const {
    return taken.empty() ? steps : std::clamp(taken[static_cast<std::size_t>(s)], 1, steps);
  }
  std::int32_t history_row(std::int32_t s, std::int32_t g) const {
    return history_row_of[static_cast<std::size_t>(s)] * groups() + g;
  }
  std::size_t cell(std::int32_t row, std::int32_t i) const {
    return static_cast<std::size_t>(row) * static_cast<std::size_t>(capacity) + static_cast<std::size_t>(i);
  }
};

/// Random signals. History is absent in every third group, listed in the next, dense in the last; its rows are in the
/// opposite order of the sequences.
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
  p.weights.resize(p.cell(p.rows(), 0));
  for (float& w : p.weights) w = unit(random);
  p.masses.resize(static_cast<std::size_t>(p.rows()));
  for (float& mass : p.masses) mass = random() % 9 == 0 ? 0.0f : 0.5f + unit(random);
  const std::int32_t history_rows = p.sequences * p.groups();
  p.history_weights.resize(p.cell(history_rows, 0));
  p.history_positions.resize(p.cell(history_rows, 0));
  p.history_counts.resize(static_cast<std::size_t>(history_rows));
  for (std::int32_t s = p.sequences; s-- > 0;) p.history_row_of.push_back(s);
  p.mixture.first.push_back(0);
  for (std::int32_t g = 0; g < p.groups(); ++g) {
    for (std::int32_t signal = 0; signal < p.mixture.signals.count(); ++signal) {
      if (random() % 2 == 0) p.mixture.terms.push_back({signal, unit(random)});
    }
    p.mixture.first.push_back(static_cast<std::int32_t>(p.mixture.terms.size()));
  }
  for (std::int32_t row = 0; row < history_rows; ++row) {
    std::int32_t count = 0;
    for (std::int32_t i = 0; i < kv_len; ++i) {
      p.history_weights[p.cell(row, i)] = unit(random);
      if (random() % 3 == 0) p.history_positions[p.cell(row, count++)] = i;
    }
    p.history_counts[static_cast<std::size_t>(row)] = row % 3 == 0 ? 0 : row % 3 == 1 ? count : specattn::keep_all;
  }
  return p;
}

/// Importance of each position of sequence s for group g from steps [from, to), by the definition.
inline std::vector<double> expected(const problem& p, std::int32_t s, std::int32_t g, std::int32_t from,
                                    std::int32_t to) {
  const specattn::signal_set& signals = p.mixture.signals;
  const auto at = static_cast<std::size_t>(g);
  const std::int32_t kv_len = p.length(s), past = p.history_row(s, g);
  const std::int32_t listed = p.history_counts[static_cast<std::size_t>(past)];
  std::vector<double> sums(static_cast<std::size_t>(kv_len));
  const auto add = [&](std::int32_t i, double value) {
    if (i < kv_len) sums[static_cast<std::size_t>(i)] += value;
  };
  for (std::int32_t t = p.mixture.first[at]; t < p.mixture.first[at + 1]; ++t) {
    const auto term = p.mixture.terms[static_cast<std::size_t>(t)];
    const double coefficient = term.coefficient;
    if (term.signal < p.heads()) {
      for (std::int32_t step = from; step < to; ++step) {
        const std::int32_t row = p.row(step, s, term.signal);
        const double mass = p.masses[static_cast<std::size_t>(row)];
        for (std::int32_t i = 0; mass > 0 && i < kv_len; ++i)
          add(i, coefficient * p.weights[p.cell(row, i)] / mass / (to - from));
      }
    } else if (term.signal < p.heads() + 2) {
      const std::int32_t window =
          std::min(signals.windows[static_cast<std::size_t>(term.signal - p.heads())], kv_len);
      for (std::int32_t i = kv_len - window; i < kv_len; ++i) add(i, coefficient / window);
    } else if (term.signal == p.heads() + 2) {
      const std::int32_t sinks = std::min(signals.sinks, kv_len);
      for (std::int32_t i = 0; i < sinks; ++i) add(i, coefficient / sinks);
    } else if (listed == specattn::keep_all) {
      for (std::int32_t i = 0; i < kv_len; ++i) add(i, coefficient * p.history_weights[p.cell(past, i)]);
    } else {
      for (std::int32_t j = 0; j < listed; ++j)
        add(p.history_positions[p.cell(past, j)], coefficient * p.history_weights[p.cell(past, j)]);
    }
  }
  return sums;
}

/// A problem in the backend's memory, rows stored as T. With a `split_len`, as multiples of their split's scale.
template <class Fixture, class T, class U = float>
struct resident_problem {
  using backend = typename Fixture::backend;
  template <class X>
  using buffer = specattn::buffer<X, backend>;

  specattn::resident_mixture<backend> mixture;
  buffer<T> weights;
  buffer<float> masses, scales, history_weights;
  buffer<U> out;
  buffer<std::int32_t> history_positions, history_counts, history_row_of, lengths, taken;
  specattn::importance_args<backend, T, U> args;

  /// Rounds p's weights to what is stored.
  resident_problem(Fixture& fixture, problem& p, std::int32_t split_len = 0)
      : mixture(specattn::sparse_mixture(p.mixture)),
        masses(fixture.upload(p.masses)),
        history_weights(fixture.upload(p.history_weights)),
        out(fixture.upload(
            std::vector<U>(p.cell(p.sequences * p.groups() * p.out_rows(), 0), specattn::from_float<U>(-7.0f)))),
        history_positions(fixture.upload(p.history_positions)),
        history_counts(fixture.upload(p.history_counts)),
        history_row_of(fixture.upload(p.history_row_of)),
        lengths(fixture.upload(p.lengths)),
        taken(fixture.upload(p.taken)) {
    store(fixture, p, split_len);
    args.draft_weights = {weights.data(), {p.steps, p.layers, p.sequences, p.q_heads, p.capacity}};
    args.masses = {masses.data(), {p.steps, p.layers, p.sequences, p.q_heads}};
    args.history.weights = {history_weights.data(), {p.sequences, p.groups(), p.capacity}};
    args.history.positions = {history_positions.data(), {p.sequences, p.groups(), p.capacity}};
    args.history.counts = {history_counts.data(), {p.sequences, p.groups()}};
    if (p.sequences > 1) args.history.row_of = {history_row_of.data(), {p.sequences}};
    args.kv_len = p.kv_len;
    if (!p.lengths.empty()) args.length = {lengths.data(), {p.sequences}};
    if (!p.taken.empty()) args.steps = {taken.data(), {p.sequences}};
    args.separate_steps = p.separate_steps;
    args.out = {out.data(), {p.target_layers, p.sequences, p.kv_heads, p.out_rows(), p.capacity}};
  }

  void store(Fixture& fixture, problem& p, std::int32_t split_len) {
    const std::int32_t rows = p.rows();
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
    args.split_scales = {scales.data(), {p.steps, p.layers, p.sequences, p.q_heads, splits}};
    args.split_len = split_len;
  }

  void reserve(Fixture& fixture) {
    auto& context = fixture.context();
    context.reserve_workspace(specattn::importance_workspace_bytes(context, mixture, args.draft_weights.extent(0),
                                                                   args.kv_len, args.sequences()));
    fixture.soil_workspace();
  }
  std::vector<float> run(Fixture& fixture) {
    reserve(fixture);
    specattn::mix_importance(fixture.context(), mixture, args);
    return results(fixture);
  }
  /// What out means; -7 where nothing was written.
  std::vector<float> results(Fixture& fixture) const {
    std::vector<float> values;
    for (const U x : fixture.download(out)) {
      const float value = specattn::to_float(x);
      values.push_back(value == -7.0f ? value : value * specattn::importance_unit<U>);
    }
    return values;
  }
};

/// Every value within importance_error (and fp16's rounding) of itself, zeros exact, nothing behind the prefix written.
template <class Backend, class U = float>
void check_importance(const problem& p, const std::vector<float>& got) {
  double worst = 0.0;
  bool zeros = true, untouched = true;
  for (std::int32_t i = 0; i < p.sequences * p.groups() * p.out_rows(); ++i) {
    const std::int32_t s = i / (p.groups() * p.out_rows()), g = i / p.out_rows() % p.groups(), r = i % p.out_rows();
    const std::int32_t last = p.steps_of(s), own = std::min(r, last - 1);
    const std::vector<double> want = expected(p, s, g, p.separate_steps ? own : 0, p.separate_steps ? own + 1 : last);
    const float* at = &got[p.cell(p.out_row(s, g, r), 0)];
    for (std::size_t j = 0; j < want.size(); ++j) {
      zeros = zeros && (at[j] == 0.0f) == (want[j] == 0.0);
      if (want[j] > 0) worst = std::max(worst, std::abs(at[j] - want[j]) / want[j]);
    }
    for (std::int32_t j = p.length(s); j < p.capacity; ++j) untouched = untouched && at[j] == -7.0f;
  }
  CHECK(worst < specattn::importance_error<Backend> + (std::same_as<U, float> ? 0.0 : 0x1p-11));
  CHECK(zeros);
  CHECK(untouched);
}

template <class T = float, class U = float, class Fixture>
void agrees(Fixture& fixture, problem p, std::int32_t split_len = 0) {
  resident_problem<Fixture, T, U> resident(fixture, p, split_len);
  check_importance<typename Fixture::backend, U>(p, resident.run(fixture));
}

/// Makes every signal's and every group's share one, as those of an alignment are.
inline void make_shares(problem& p) {
  const auto scale = [](float* first, std::ptrdiff_t count) {
    double sum = 0.0;
    for (std::ptrdiff_t i = 0; i < count; ++i) sum += first[i];
    for (std::ptrdiff_t i = 0; sum > 0 && i < count; ++i) first[i] = static_cast<float>(first[i] / sum);
  };
  for (std::int32_t row = 0; row < p.rows(); ++row) {
    scale(&p.weights[p.cell(row, 0)], p.kv_len);
    if (p.masses[static_cast<std::size_t>(row)] > 0) p.masses[static_cast<std::size_t>(row)] = 1.0f;
  }
  for (std::size_t row = 0; row < p.history_counts.size(); ++row) {
    const std::int32_t count = p.history_counts[row];
    scale(&p.history_weights[p.cell(static_cast<std::int32_t>(row), 0)],
          count == specattn::keep_all ? p.kv_len : count);
  }
  for (std::size_t g = 0; g + 1 < p.mixture.first.size(); ++g) {
    float sum = 0.0f;
    for (std::int32_t t = p.mixture.first[g]; t < p.mixture.first[g + 1]; ++t)
      sum += p.mixture.terms[static_cast<std::size_t>(t)].coefficient;
    for (std::int32_t t = p.mixture.first[g]; t < p.mixture.first[g + 1]; ++t)
      p.mixture.terms[static_cast<std::size_t>(t)].coefficient /= sum;
  }
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

TEST_CASE_TEMPLATE("importance: stored as fp16 it is rounded once more", Fixture, importance_fixture) {
  using specattn::fp16;
  Fixture fixture;
  std::uint32_t seed = 400;
  for (const shape& sizes : {shape{3, 5, 2, 3, 8, 3}, shape{2, 7, 5, 60, 2, 1}, shape{2, 33, 3, 4, 1, 2}}) {
    for (const std::int32_t kv_len : {1, 300, 1000}) {
      problem p = make_problem(kv_len, 2, ++seed, sizes);
      for (std::int32_t& count : p.history_counts) count = 0;  // rounded before it is added
      make_shares(p);
      agrees<float, fp16>(fixture, p);
      agrees<fp16, fp16>(fixture, p);
    }
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
    p.lengths = {length};
    agrees(fixture, p);
  }
}

TEST_CASE_TEMPLATE("importance: sequences of a batch have their own lengths, rows and history", Fixture,
                   importance_fixture) {
  Fixture fixture;
  std::uint32_t seed = 300;
  for (const shape& sizes : {shape{3, 5, 2, 3, 8, 3}, shape{2, 7, 5, 60, 8, 5}, shape{2, 33, 3, 4, 1, 2}}) {
    for (const std::int32_t steps : {1, 3}) {
      problem p = make_problem(700, steps, ++seed, sizes);
      agrees(fixture, p);
      p.separate_steps = true;
      for (std::int32_t s = 0; s < p.sequences; ++s) p.lengths.push_back(s == 1 ? 0 : 640 - 257 * (s / 2));
      agrees<specattn::bf16>(fixture, p, steps == 1 ? 256 : 0);
    }
  }
}

TEST_CASE_TEMPLATE(
    "importance: a sequence that took fewer steps is weighed by those, its last row standing for the rest", Fixture,
    importance_fixture) {
  Fixture fixture;
  for (const shape& sizes : {shape{3, 5, 2, 3, 8, 4}, shape{2, 33, 40, 8, 8, 4}}) {
    for (const bool separate : {false, true}) {
      problem p = make_problem(300, 3, 500, sizes);
      p.taken = {3, 1, 0, 9};
      p.separate_steps = separate;
      // Nothing is read of steps that were not taken.
      for (const std::int32_t s : {1, 2}) {
        for (std::int32_t row = 0; row < p.rows(); ++row) {
          if (row / p.q_heads % p.sequences != s || row < p.sequences * p.heads()) continue;
          p.masses[static_cast<std::size_t>(row)] = std::numeric_limits<float>::quiet_NaN();
          std::fill_n(p.weights.begin() + static_cast<std::ptrdiff_t>(p.cell(row, 0)), p.capacity,
                      std::numeric_limits<float>::quiet_NaN());
        }
      }
      agrees(fixture, p);
    }
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
