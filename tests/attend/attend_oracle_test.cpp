// The attention oracle against results known in closed form.
#include <doctest/doctest.h>

#include <cmath>

#include "oracle/attend_oracle.hpp"

using rows = std::vector<std::vector<double>>;

TEST_CASE("attend oracle: equal scores average the values") {
  const auto r =
      oracle::attend({1.0, 0.0}, rows{{2.0, 1.0}, {2.0, -7.0}, {2.0, 3.0}}, rows{{3, 0}, {6, 3}, {0, 6}}, 0.5);
  CHECK(r.out[0] == doctest::Approx(3.0));
  CHECK(r.out[1] == doctest::Approx(3.0));
  CHECK(r.lse == doctest::Approx(1.0 + std::log(3.0)));
  for (double w : r.weights) CHECK(w == doctest::Approx(1.0 / 3));
}

TEST_CASE("attend oracle: a difference of log 3 in the score weighs three times as much") {
  const auto r = oracle::attend({1.0}, rows{{std::log(3.0)}, {0.0}}, rows{{8.0}, {4.0}}, 1.0);
  CHECK(r.weights[0] == doctest::Approx(0.75));
  CHECK(r.weights[1] == doctest::Approx(0.25));
  CHECK(r.out[0] == doctest::Approx(7.0));
  CHECK(r.lse == doctest::Approx(std::log(4.0)));
}

TEST_CASE("attend oracle: scores of a thousand do not overflow") {
  const auto r = oracle::attend({1.0}, rows{{1000.0}, {999.0}}, rows{{1.0}, {0.0}}, 1.0);
  CHECK(r.out[0] == doctest::Approx(1.0 / (1.0 + std::exp(-1.0))));
}

TEST_CASE("attend oracle: no positions give zeros and a log-sum-exp of minus infinity") {
  const auto r = oracle::attend({1.0, 2.0}, {}, {}, 1.0);
  CHECK(r.out == std::vector<double>{0.0, 0.0});
  CHECK(r.weights.empty());
  CHECK(std::isinf(r.lse));
}
