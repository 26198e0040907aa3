// The laws of attention_state: identity, merge of any split, order, finish.
#include "specattn/attention_state.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

using specattn::attention_state;

namespace {

constexpr float nothing = -std::numeric_limits<float>::infinity();

/// State and value sum of scores[first, last) with values equal to their index.
struct partial {
  attention_state state;
  double value = 0.0;
};

partial seen(const std::vector<float>& scores, std::size_t first, std::size_t last) {
  partial p;
  for (std::size_t i = first; i < last; ++i) p.state.max = std::max(p.state.max, scores[i]);
  for (std::size_t i = first; i < last; ++i) {
    const float weight = std::exp(scores[i] - p.state.max);
    p.state.sum += weight;
    p.value += static_cast<double>(weight) * static_cast<double>(i);
  }
  return p;
}

partial merged(const partial& a, const partial& b) {
  const auto m = specattn::merge(a.state, b.state);
  return {m.state, a.value * static_cast<double>(m.scale_a) + b.value * static_cast<double>(m.scale_b)};
}

double mean(const partial& p) { return p.value * static_cast<double>(specattn::finish_scale(p.state)); }

std::vector<float> random_scores(std::size_t count, std::uint32_t seed, float spread) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> scores(count);
  for (float& s : scores) s = normal(engine);
  return scores;
}

}  // namespace

TEST_CASE("attention_state: the empty state has maximum -inf and sum 0, and finishes to nothing") {
  const attention_state empty;
  CHECK(empty.max == nothing);
  CHECK(empty.sum == 0.0f);
  CHECK(specattn::finish_scale(empty) == 0.0f);
  CHECK(specattn::log_sum_exp(empty) == nothing);
}

TEST_CASE("attention_state: merging with the empty state changes nothing, on either side") {
  for (float max : {-300.0f, -1.0f, 0.0f, 88.0f}) {
    const attention_state some{max, 2.5f};
    const auto right = specattn::merge(some, {});
    CHECK(right.state.max == some.max);
    CHECK(right.state.sum == some.sum);
    CHECK(right.scale_a == 1.0f);
    CHECK(right.scale_b == 0.0f);
    const auto left = specattn::merge({}, some);
    CHECK(left.state.max == some.max);
    CHECK(left.state.sum == some.sum);
    CHECK(left.scale_a == 0.0f);
    CHECK(left.scale_b == 1.0f);
  }
  const auto both = specattn::merge({}, {});
  CHECK(both.state.max == nothing);
  CHECK(both.state.sum == 0.0f);
}

TEST_CASE(
    "attention_state: brought to a larger maximum, a state is scaled as merging scales it; the empty one to "
    "nothing") {
  const attention_state some{-1.5f, 2.5f};
  for (float max : {-1.5f, 0.0f, 3.25f}) {
    const auto m = specattn::merge(some, {max, 1.0f});
    CHECK(specattn::scale_to(some, max) == m.scale_a);
    CHECK(specattn::scale_to({}, max) == 0.0f);
  }
  CHECK(specattn::scale_to({}, nothing) == 0.0f);
}

TEST_CASE("attention_state: any split of the positions merges to the whole") {
  for (float spread : {0.1f, 3.0f, 40.0f}) {
    const auto scores = random_scores(97, 3, spread);
    const auto whole = seen(scores, 0, scores.size());
    for (std::size_t cut = 0; cut <= scores.size(); ++cut) {
      const auto m = merged(seen(scores, 0, cut), seen(scores, cut, scores.size()));
      CHECK(m.state.max == whole.state.max);
      CHECK(m.state.sum == doctest::Approx(whole.state.sum).epsilon(1e-5));
      CHECK(mean(m) == doctest::Approx(mean(whole)).epsilon(1e-5));
    }
  }
}

TEST_CASE("attention_state: the order of merging matters to rounding only") {
  const auto scores = random_scores(60, 4, 5.0f);
  std::vector<partial> parts;
  for (std::size_t i = 0; i < 60; i += 6) parts.push_back(seen(scores, i, i + 6));
  const auto whole = seen(scores, 0, 60);
  std::mt19937 engine(9);
  for (int trial = 0; trial < 50; ++trial) {
    std::shuffle(parts.begin(), parts.end(), engine);
    partial sum;
    for (const partial& p : parts) sum = merged(sum, p);
    CHECK(mean(sum) == doctest::Approx(mean(whole)).epsilon(1e-5));
    CHECK(specattn::log_sum_exp(sum.state) == doctest::Approx(specattn::log_sum_exp(whole.state)).epsilon(1e-6));
  }
}

TEST_CASE("attention_state: swapping the two sides swaps the scales and nothing else but rounding") {
  const attention_state a{1.5f, 3.0f};
  const attention_state b{-2.0f, 7.0f};
  const auto ab = specattn::merge(a, b);
  const auto ba = specattn::merge(b, a);
  CHECK(ab.scale_a == ba.scale_b);
  CHECK(ab.scale_b == ba.scale_a);
  CHECK(ab.state.max == ba.state.max);
  CHECK(ab.state.sum == doctest::Approx(ba.state.sum).epsilon(1e-7));
}

TEST_CASE("attention_state: scores of a thousand and of minus a thousand neither overflow nor vanish") {
  const auto m = specattn::merge({1000.0f, 1.0f}, {-1000.0f, 1.0f});
  CHECK(m.state.max == 1000.0f);
  CHECK(m.state.sum == 1.0f);
  CHECK(specattn::log_sum_exp({-1000.0f, 2.0f}) == doctest::Approx(-1000.0 + std::log(2.0)));
}
