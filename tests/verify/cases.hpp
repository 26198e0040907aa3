// What sample() and verify() promise about single rows and rounds, one claim a case, for any backend. The including
// file defines `verify_fixture`, with what cpu_fixture.hpp has.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "verify/problem.hpp"

namespace verify_testing {

constexpr float nan_logit = std::numeric_limits<float>::quiet_NaN();
constexpr float infinite = std::numeric_limits<float>::infinity();

/// What one row's sampler draws from.
template <class Fixture>
row distribution(const row& logits, const sampler_options& options) {
  Fixture fixture;
  return draw(fixture, {logits}, {options}, {0}, random_use::draft).probabilities[0];
}

template <class Fixture>
std::int32_t token_of(const row& logits, const sampler_options& options) {
  Fixture fixture;
  return draw(fixture, {logits}, {options}, {7}, random_use::emit).token[0];
}

/// The tokens of positive probability.
inline tokens support(const row& probabilities) {
  tokens kept;
  for (std::size_t i = 0; i < probabilities.size(); ++i) {
    if (probabilities[i] > 0.0f) kept.push_back(static_cast<std::int32_t>(i));
  }
  return kept;
}

inline row logs(std::vector<double> probabilities) {
  row logits;
  for (double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

// ---- one row ------------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("sample: greedy takes the largest logit, the smaller token among equals", Fixture,
                   verify_fixture) {
  std::mt19937 random(3);
  for (const std::int32_t vocab : {1, 2, 15, 16, 17, 255, 256, 257, 1031, 4096}) {
    CAPTURE(vocab);
    row logits = random_row(vocab, random);
    const std::int32_t first = static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab));
    const std::int32_t second = static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab));
    logits[static_cast<std::size_t>(first)] = 50.0f;
    logits[static_cast<std::size_t>(second)] = 50.0f;
    CHECK(token_of<Fixture>(logits, {}) == std::min(first, second));
  }
  CHECK(token_of<Fixture>({0.0f, -0.0f}, {}) == 0);
  CHECK(token_of<Fixture>({-0.0f, 0.0f}, {}) == 0);
}

TEST_CASE_TEMPLATE("sample: a temperature that is not above zero is greedy", Fixture, verify_fixture) {
  for (const float temperature : {0.0f, -0.0f, -1.0f, nan_logit, -infinite}) {
    CHECK(token_of<Fixture>({1, 3, 2}, hot(1, temperature)) == 1);
  }
}

TEST_CASE_TEMPLATE("sample: the distribution equals the oracle's for every option", Fixture, verify_fixture) {
  std::mt19937 random(5);
  for (const std::int32_t vocab : {1, 2, 31, 256, 257, 4096, 5003}) {
    for (const float temperature : {0.1f, 0.7f, 1.0f, 2.0f}) {
      for (const std::int32_t top_k : {0, 1, 5, 50, 1000, 10000}) {
        for (const float top_p : {1.0f, 0.95f, 0.5f}) {
          CAPTURE(vocab);
          CAPTURE(temperature);
          CAPTURE(top_k);
          CAPTURE(top_p);
          auto options = hot(1, temperature);
          options.top_k = top_k;
          options.top_p = top_p;
          options.min_p = random() % 3 == 0 ? 0.05f : 0.0f;
          const row logits = random_row(vocab, random, 3.0f);
          const row got = distribution<Fixture>(logits, options);
          const auto want = law_of(logits, options);
          double worst = 0.0;
          for (std::size_t i = 0; i < want.size(); ++i) {
            worst = std::max(worst, std::abs(static_cast<double>(got[i]) - want[i]) / (1e-4 + want[i]));
          }
          CHECK(worst < 2e-5);
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("sample: ties at the boundary of top-k and top-p are cut, the smaller tokens stay", Fixture,
                   verify_fixture) {
  auto options = hot(1);
  options.top_k = 2;
  CHECK(support(distribution<Fixture>(logs({0.3, 0.4, 0.3}), options)) == tokens{0, 1});
  CHECK(support(distribution<Fixture>(row(4096, 1.5f), options)) == tokens{0, 1});
  options.top_k = 0;
  options.top_p = 0.5f;
  CHECK(support(distribution<Fixture>({1, 1, 1, 1}, options)) == tokens{0, 1});
  CHECK(support(distribution<Fixture>({0, 1, 1, 1, 1}, options)).size() == 3);  // 2/4.37 < 0.5
  options.top_p = 0.25f;
  CHECK(support(distribution<Fixture>(row(4096, 0.0f), options)).size() == 1024);
  CHECK(support(distribution<Fixture>(row(4096, 0.0f), options)).back() == 1023);
}

TEST_CASE_TEMPLATE("sample: top-p measures what top-k left, min-p the likeliest token", Fixture, verify_fixture) {
  auto options = hot(1);
  options.top_k = 2;
  options.top_p = 0.55f;  // of 0.3 + 0.25: the first alone has 0.5454
  CHECK(support(distribution<Fixture>(logs({0.3, 0.25, 0.25, 0.2}), options)) == tokens{0, 1});
  options.top_p = 0.54f;
  CHECK(support(distribution<Fixture>(logs({0.3, 0.25, 0.25, 0.2}), options)) == tokens{0});
  options = hot(1);
  options.min_p = 0.5f;
  CHECK(support(distribution<Fixture>(logs({0.4, 0.21, 0.19, 0.2001}), options)) == tokens{0, 1, 3});
}

TEST_CASE_TEMPLATE("sample: the likeliest token survives any truncation", Fixture, verify_fixture) {
  for (const float extreme : {0.0f, -1.0f, -infinite}) {
    auto options = hot(1);
    options.top_p = extreme;
    CHECK(support(distribution<Fixture>({0, 2, 1, 2}, options)) == tokens{1});
  }
  auto options = hot(1);
  options.min_p = 7.0f;
  CHECK(support(distribution<Fixture>({0, 2, 1}, options)) == tokens{1});
  options = hot(1);
  options.top_k = 1;
  CHECK(support(distribution<Fixture>({0, 2, 1, 2}, options)) == tokens{1});
}

TEST_CASE_TEMPLATE("sample: options out of their range switch a truncation off", Fixture, verify_fixture) {
  auto options = hot(1);
  options.top_k = -3;
  options.top_p = nan_logit;
  options.min_p = nan_logit;
  CHECK(support(distribution<Fixture>({0, 2, 1}, options)).size() == 3);
}

TEST_CASE_TEMPLATE("sample: extreme temperatures and logits give a distribution", Fixture, verify_fixture) {
  for (const float temperature : {1e-45f, 1e-30f, 1e-3f, 1e30f, infinite}) {
    CAPTURE(temperature);
    const row got = distribution<Fixture>({-3e38f, 3e38f, -infinite, 1.0f}, hot(1, temperature));
    double total = 0.0;
    for (float p : got) {
      CHECK(p >= 0.0f);
      total += p;
    }
    CHECK(total == doctest::Approx(1.0));
    CHECK(got[2] == 0.0f);
  }
  CHECK(distribution<Fixture>({5, 4, 3, 5}, hot(1, infinite))[2] == doctest::Approx(0.25));
  CHECK(support(distribution<Fixture>({5, 4, 3, 5}, hot(1, 1e-45f))) == tokens{0, 3});
}

TEST_CASE_TEMPLATE("sample: a row with NaN or +inf, or all masked, yields no token; a masked one never comes",
                   Fixture, verify_fixture) {
  for (const auto& options : {sampler_options{}, hot(1)}) {
    for (const std::size_t where : {0u, 16u, 299u}) {
      for (const float poison : {nan_logit, -nan_logit, infinite}) {
        row logits(300, 1.0f);
        logits[where] = poison;
        CHECK(token_of<Fixture>(logits, options) == no_token);
      }
    }
    CHECK(token_of<Fixture>(row(40, -infinite), options) == no_token);
    row one(40, -infinite);
    one[23] = -3e38f;
    CHECK(token_of<Fixture>(one, options) == 23);
  }
  CHECK(support(distribution<Fixture>({1, nan_logit}, hot(1))).empty());
}

TEST_CASE_TEMPLATE("sample: tokens follow the distribution", Fixture, verify_fixture) {
  std::mt19937 random(8);
  Fixture fixture;
  for (const auto& [temperature, top_k, top_p, vocab] :
       {std::tuple{1.0f, 0, 1.0f, 300}, {0.6f, 40, 0.9f, 300}, {1.5f, 0, 0.8f, 17}, {1.0f, 1, 1.0f, 17}}) {
    const row logits = random_row(vocab, random);
    std::vector<sampler_options> samplers;
    std::vector<std::int64_t> positions;
    for (int i = 0; i < 20000; ++i) {
      samplers.push_back(hot(static_cast<std::uint64_t>(i / 4), temperature));
      samplers.back().top_k = top_k;
      samplers.back().top_p = top_p;
      positions.push_back(i % 4);
    }
    const auto got = draw(fixture, std::vector<row>(samplers.size(), logits), samplers, positions, random_use::emit);
    std::vector<long long> counts(static_cast<std::size_t>(vocab));
    for (const std::int32_t token : got.token) ++counts[static_cast<std::size_t>(token)];
    const auto test = oracle::compare_law(counts, law_of(logits, samplers[0]));
    CHECK_FALSE(test.impossible);
    CHECK(test.statistic < test.bound);
  }
}

TEST_CASE_TEMPLATE("sample: a row's token is the same alone and in any batch", Fixture, verify_fixture) {
  std::mt19937 random(9);
  Fixture fixture;
  std::vector<row> logits;
  std::vector<sampler_options> samplers;
  std::vector<std::int64_t> positions;
  for (int i = 0; i < 33; ++i) {
    logits.push_back(random_row(777, random));
    samplers.push_back(hot(random(), i % 5 == 0 ? 0.0f : 0.9f));
    samplers.back().top_p = i % 2 == 0 ? 0.9f : 1.0f;
    positions.push_back(static_cast<std::int64_t>(random()) << 8);
  }
  const auto together = draw(fixture, logits, samplers, positions, random_use::draft);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const auto alone = draw(fixture, {logits[i]}, {samplers[i]}, {positions[i]}, random_use::draft);
    CHECK(alone.token[0] == together.token[i]);
    CHECK(alone.probabilities[0] == together.probabilities[i]);
  }
}

// ---- one round, greedy --------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("verify: greedy accepts exactly the tokens before the first difference", Fixture, verify_fixture) {
  std::mt19937 random(21);
  Fixture fixture;
  for (int drafted = 0; drafted <= 8; ++drafted) {
    for (int agreed = 0; agreed <= drafted; ++agreed) {
      turn one;
      tokens choice;
      for (int i = 0; i <= drafted; ++i) {
        one.target.push_back(random_row(61, random));
        choice.push_back(token_of<Fixture>(one.target.back(), {}));
      }
      one.drafted.assign(choice.begin(), choice.begin() + drafted);
      if (agreed < drafted)
        one.drafted[static_cast<std::size_t>(agreed)] = (choice[static_cast<std::size_t>(agreed)] + 1) % 61;
      const auto got = judge(fixture, {one});
      CHECK(got[0] == outcome{agreed, choice[static_cast<std::size_t>(agreed)]});
    }
  }
}

TEST_CASE_TEMPLATE("verify: agreement after the first difference counts for nothing", Fixture, verify_fixture) {
  Fixture fixture;
  const turn one{{{0, 1}, {1, 0}, {0, 1}}, {}, {0, 0}, {}, 0};
  CHECK(judge(fixture, {one})[0] == outcome{0, 1});
}

TEST_CASE_TEMPLATE("verify: no drafted token leaves the bonus alone, and an empty batch nothing", Fixture,
                   verify_fixture) {
  Fixture fixture;
  CHECK(judge(fixture, {turn{{{0, 1, 0}}, {}, {}, {}, 0}})[0] == outcome{0, 1});
  CHECK(judge(fixture, {}).empty());
}

TEST_CASE_TEMPLATE("verify: a row without a distribution accepts nothing and yields no token", Fixture,
                   verify_fixture) {
  Fixture fixture;
  const row fine{0, 9, 0}, broken{0, nan_logit, 9}, masked(3, -infinite);
  for (const row& bad : {broken, masked}) {
    CHECK(judge(fixture, {turn{{fine, bad, fine}, {}, {1, 1}, {}, 0}})[0] == outcome{1, no_token});
    CHECK(judge(fixture, {turn{{fine, fine, bad}, {}, {1, 1}, {}, 0}})[0] == outcome{2, no_token});
    CHECK(judge(fixture, {turn{{fine, bad, fine}, {}, {1, 0}, {}, 0}})[0] == outcome{1, no_token});
    const row certain{0, 1, 0};
    auto sampler = hot(1);
    sampler.top_k = 1;
    CHECK(judge(fixture, {turn{{fine, bad, fine}, {certain, certain}, {1, 1}, sampler, 0}})[0] ==
          outcome{1, no_token});
  }
}

}  // namespace verify_testing
