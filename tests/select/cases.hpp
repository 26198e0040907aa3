// What select() promises, one claim a case, for any backend. The including file defines `select_fixture`:
//   using backend                      cpu or cuda
//   context()                          a context of that backend
//   upload(vector<T>), download(b)     host data to the backend's buffer and back
//   soil_workspace()                   fills the workspace with garbage
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "select/problem.hpp"

namespace select_testing {

using specattn::bf16;
using specattn::fp16;
using list = std::vector<int>;
constexpr float nan_weight = std::numeric_limits<float>::quiet_NaN();
constexpr float infinite = std::numeric_limits<float>::infinity();

inline list all_of(int count) {
  list everything(static_cast<std::size_t>(count));
  std::iota(everything.begin(), everything.end(), 0);
  return everything;
}

/// The list of one row under a rule, checked against the oracle on the way.
template <class Fixture>
list kept_of(const std::vector<float>& row, const specattn::selection_rule& rule) {
  Fixture fixture;
  const auto p = row_problem(row, rule);
  agrees_with_oracle(fixture, p);
  return solve(fixture, p).list(0);
}

template <class Fixture>
std::uint32_t status_of(const std::vector<float>& row, const specattn::selection_rule& rule) {
  Fixture fixture;
  return solve(fixture, row_problem(row, rule)).status[0];
}

// ---- the exact set ------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("select: keeps the least set whose mass reaches p", Fixture, select_fixture) {
  CHECK(kept_of<Fixture>({1, 4, 2, 1}, bare(0.5f)) == list{1});
  CHECK(kept_of<Fixture>({1, 4, 2, 1}, bare(0.51f)) == list{1, 2});
  CHECK(kept_of<Fixture>({1, 4, 2, 1}, bare(0.76f)) == list{0, 1, 2});
}

TEST_CASE_TEMPLATE("select: the kept mass is never below the target, and without its lightest it would be", Fixture,
                   select_fixture) {
  std::mt19937 random(11);
  Fixture fixture;
  for (const float p : {0.1f, 0.5f, 0.9f, 0.999f}) {
    const auto row = make_row(shape::softmax, 3001, random);
    const auto mass = oracle::select_masses(row);
    const auto target = oracle::select_target(p, oracle::total_of(mass));
    std::uint64_t kept = 0;
    std::uint64_t lightest = ~std::uint64_t{0};
    for (const int i : solve(fixture, row_problem(row, bare(p))).list(0)) {
      kept += mass[static_cast<std::size_t>(i)];
      lightest = std::min(lightest, mass[static_cast<std::size_t>(i)]);
    }
    CHECK(kept >= target);
    CHECK(kept - lightest < target);
  }
}

TEST_CASE_TEMPLATE("select: ties go to the smaller position, exactly as many as needed", Fixture, select_fixture) {
  CHECK(kept_of<Fixture>(std::vector<float>(100, 0.01f), bare(0.5f)) == all_of(50));
  CHECK(kept_of<Fixture>({1, 2, 1, 2, 1, 2}, bare(0.6f)) == list{1, 3, 5});
  CHECK(kept_of<Fixture>({1, 2, 1, 2, 1, 2}, bare(0.8f)) == list{0, 1, 2, 3, 5});
}

TEST_CASE_TEMPLATE("select: mass is relative to the row's own sum", Fixture, select_fixture) {
  std::mt19937 random(12);
  auto row = make_row(shape::uniform, 777, random);
  const list once = kept_of<Fixture>(row, bare(0.7f));
  for (float& w : row) w *= 0x1p-90f;
  CHECK(kept_of<Fixture>(row, bare(0.7f)) == once);
  for (float& w : row) w *= 0x1p+127f;
  CHECK(kept_of<Fixture>(row, bare(0.7f)) == once);
}

TEST_CASE_TEMPLATE("select: 20 000 random and adversarial rows equal the oracle's sets exactly", Fixture,
                   select_fixture) {
  Fixture fixture;
  std::mt19937 random(13);
  std::ptrdiff_t rows = 0;
  const std::ptrdiff_t lengths[] = {1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 509, 1021};
  const float shares[] = {0.05f, 0.5f, 0.9f, 0.95f, 0.97f, 0.99f, 0.9999f, 1.0f};
  for (int turn = 0; turn < 45; ++turn) {
    for (const std::ptrdiff_t length : lengths) {
      auto rule = bare(shares[random() % 8]);
      if (turn % 3 == 1) rule.sinks = 4, rule.recent = 16;
      if (turn % 5 == 1) rule.max_tokens = static_cast<std::int32_t>(random() % 100);
      auto p = dense_problem<float>(32, 1, length, rule);
      fill_mixed(p, random);
      rows += agrees_with_oracle(fixture, p);
    }
  }
  CHECK(rows >= 20000);
}

TEST_CASE_TEMPLATE("select: long rows of every kind equal the oracle's sets", Fixture, select_fixture) {
  Fixture fixture;
  std::mt19937 random(14);
  for (const std::ptrdiff_t length : {4096, 4099, 40000}) {
    for (int kind = 0; kind < static_cast<int>(shape::count); ++kind) {
      auto rule = bare(kind % 2 == 0 ? 0.95f : 0.5f);
      agrees_with_oracle(fixture, row_problem(make_row(static_cast<shape>(kind), length, random), rule));
      rule.max_tokens = static_cast<std::int32_t>(length / 10);
      agrees_with_oracle(fixture, row_problem(make_row(static_cast<shape>(kind), length, random), rule));
    }
  }
}

TEST_CASE_TEMPLATE("select: bf16 and fp16 weights equal the oracle's sets", Fixture, select_fixture) {
  Fixture fixture;
  std::mt19937 random(15);
  for (const std::ptrdiff_t length : {1, 33, 257, 4096}) {
    for (const float share : {0.5f, 0.95f, 0.99f}) {
      auto brain = dense_problem<bf16>(12, 2, length, bare(share));
      fill_mixed(brain, random);
      agrees_with_oracle(fixture, brain);
      auto half = dense_problem<fp16>(12, 2, length, bare(share));
      fill_mixed(half, random);
      agrees_with_oracle(fixture, half);
    }
  }
}

// ---- the edges ----------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("select: NaN, infinite and negative weights count as zero and are flagged", Fixture,
                   select_fixture) {
  const std::vector<float> row = {nan_weight, 3, infinite, -5, 1, -infinite, -nan_weight};
  CHECK(kept_of<Fixture>(row, bare(0.75f)) == list{1});
  CHECK(kept_of<Fixture>(row, bare(0.76f)) == list{1, 4});
  CHECK(status_of<Fixture>(row, bare(0.75f)) == specattn::selection_invalid_weight);
  CHECK(status_of<Fixture>(row, bare(1.0f)) == specattn::selection_invalid_weight);
  CHECK(kept_of<Fixture>({nan_weight, nan_weight}, bare(0.9f)).empty());
}

TEST_CASE_TEMPLATE("select: an invalid row does not touch the other groups", Fixture, select_fixture) {
  Fixture fixture;
  auto p = dense_problem<float>(3, 1, 4, bare(0.5f));
  p.memory = {1, 2, 3, 4, nan_weight, nan_weight, nan_weight, nan_weight, 4, 3, 2, 1};
  agrees_with_oracle(fixture, p);
  const answer got = solve(fixture, p);
  CHECK(got.list(0) == list{2, 3});
  CHECK(got.status == std::vector<std::uint32_t>{0, specattn::selection_invalid_weight, 0});
}

TEST_CASE_TEMPLATE("select: minus zero is zero and valid", Fixture, select_fixture) {
  CHECK(kept_of<Fixture>({-0.0f, 1, 0.0f, -0.0f}, bare(0.99f)) == list{1});
  CHECK(status_of<Fixture>({-0.0f, 1, 0.0f, -0.0f}, bare(0.99f)) == specattn::selection_ok);
}

TEST_CASE_TEMPLATE("select: a row of zeros keeps the forced positions only", Fixture, select_fixture) {
  auto rule = bare(0.95f);
  CHECK(kept_of<Fixture>(std::vector<float>(70, 0.0f), rule).empty());
  rule.sinks = 2;
  rule.recent = 1;
  CHECK(kept_of<Fixture>(std::vector<float>(70, 0.0f), rule) == list{0, 1, 69});
}

TEST_CASE_TEMPLATE("select: p <= 0 and NaN keep the forced positions only, NaN is flagged", Fixture, select_fixture) {
  const std::vector<float> row = {5, 1, 7, 1, 2};
  for (const float p : {0.0f, -1.0f, -infinite, nan_weight}) {
    auto rule = bare(p);
    CHECK(kept_of<Fixture>(row, rule).empty());
    rule.sinks = 1;
    rule.recent = 2;
    CHECK(kept_of<Fixture>(row, rule) == list{0, 3, 4});
  }
  CHECK(status_of<Fixture>(row, bare(nan_weight)) == specattn::selection_invalid_rule);
  CHECK(status_of<Fixture>(row, bare(0.0f)) == specattn::selection_ok);
}

TEST_CASE_TEMPLATE("select: p >= 1 keeps every position, zeros included", Fixture, select_fixture) {
  std::vector<float> row(200, 0.0f);
  row[5] = 1.0f;
  CHECK(kept_of<Fixture>(row, bare(1.0f)) == all_of(200));
  CHECK(kept_of<Fixture>(row, bare(infinite)) == all_of(200));
  CHECK(kept_of<Fixture>(row, bare(0.9999999f)) == list{5});
  CHECK(kept_of<Fixture>(std::vector<float>(3, 0.0f), bare(2.0f)) == all_of(3));
}

TEST_CASE_TEMPLATE("select: every edge length works with and without forced positions", Fixture, select_fixture) {
  Fixture fixture;
  std::mt19937 random(16);
  for (const std::ptrdiff_t length : {0, 1, 2, 3, 19, 20, 21, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193}) {
    auto p = dense_problem<float>(4, 1, length, specattn::selection_rule{});
    fill_mixed(p, random);
    agrees_with_oracle(fixture, p);
    p.rule = bare(0.9f);
    agrees_with_oracle(fixture, p);
  }
}

TEST_CASE_TEMPLATE("select: kv_len 0 gives an empty list; a length outside the weights is clamped and flagged",
                   Fixture, select_fixture) {
  Fixture fixture;
  auto p = dense_problem<float>(5, 1, 8, bare(1.0f));
  p.memory.assign(40, 1.0f);
  p.kv_lens = {0, -3, 8, 9, 5};
  const answer got = solve(fixture, p);
  CHECK(got.counts == std::vector<std::int32_t>{0, 0, 8, 8, 5});
  CHECK(got.positions[0] == -1);
  const std::uint32_t clamped = specattn::selection_invalid_length;
  CHECK(got.status == std::vector<std::uint32_t>{0, clamped, 0, clamped, 0});
  CHECK(got.mass == std::vector<float>(5, 1.0f));
}

TEST_CASE_TEMPLATE("select: nothing beyond a group's kv_len is read", Fixture, select_fixture) {
  Fixture fixture;
  std::mt19937 random(17);
  auto p = dense_problem<float>(6, 3, 200, specattn::selection_rule{});
  fill_mixed(p, random);
  p.kv_lens = {200, 0, 1, 63, 64, 130};
  for (std::ptrdiff_t g = 0; g < p.groups; ++g)
    for (std::ptrdiff_t r = 0; r < p.rows; ++r)
      for (std::ptrdiff_t i = p.length(g); i < p.kv_len; ++i) p.at(g, r, i) = nan_weight;
  for (const auto rows : {specattn::combine::unite, specattn::combine::mean, specattn::combine::max}) {
    p.rule.rows = rows;
    agrees_with_oracle(fixture, p);
  }
}

TEST_CASE_TEMPLATE("select: any strides and any alignment give the same lists", Fixture, select_fixture) {
  Fixture fixture;
  std::mt19937 random(18);
  auto plain = dense_problem<float>(3, 2, 150, specattn::selection_rule{});
  fill_mixed(plain, random);
  const answer want = solve(fixture, plain);
  const std::ptrdiff_t layouts[][4] = {
      {1, 300, 150, 1}, {3, 307, 151, 1}, {0, 1, 3, 6}, {5, 1000, 2, 5}, {900, -300, -150, 1}};
  for (const auto& layout : layouts) {
    auto p = plain;
    p.offset = layout[0];
    for (int d = 0; d < 3; ++d) p.strides[d] = layout[d + 1];
    p.memory.assign(4000, nan_weight);
    for (std::ptrdiff_t g = 0; g < 3; ++g)
      for (std::ptrdiff_t r = 0; r < 2; ++r)
        for (std::ptrdiff_t i = 0; i < 150; ++i) p.at(g, r, i) = plain.at(g, r, i);
    const answer got = solve(fixture, p);
    CHECK(got.positions == want.positions);
    CHECK(got.status == want.status);
  }
}

// ---- forced positions and the cap ---------------------------------------------------------------------------

TEST_CASE_TEMPLATE("select: forced positions count towards the mass", Fixture, select_fixture) {
  auto rule = bare(0.6f);
  rule.sinks = 1;
  CHECK(kept_of<Fixture>({7, 1, 2}, rule) == list{0});
  CHECK(kept_of<Fixture>({1, 7, 2}, rule) == list{0, 1});
  rule.recent = 1;
  rule.top_p = 0.59f;
  CHECK(kept_of<Fixture>({3, 2, 2, 3}, rule) == list{0, 3});
}

TEST_CASE_TEMPLATE("select: more sinks and recent positions than positions keeps all, by any margin", Fixture,
                   select_fixture) {
  auto rule = bare(0.1f);
  rule.sinks = 3;
  rule.recent = 3;
  for (int length = 1; length <= 6; ++length)
    CHECK(kept_of<Fixture>(std::vector<float>(static_cast<std::size_t>(length), 1.0f), rule) == all_of(length));
  rule.sinks = unlimited;
  rule.recent = unlimited;
  CHECK(kept_of<Fixture>(std::vector<float>(90, 1.0f), rule) == all_of(90));
}

TEST_CASE_TEMPLATE("select: a cap that bites keeps the heaviest and says so", Fixture, select_fixture) {
  auto rule = bare(1.0f);
  rule.max_tokens = 3;
  CHECK(kept_of<Fixture>({1, 5, 2, 4, 3, 2}, rule) == list{1, 3, 4});
  CHECK(status_of<Fixture>({1, 5, 2, 4, 3, 2}, rule) == specattn::selection_capped);
  rule.max_tokens = 4;  // the tie at 2 goes to the smaller position
  CHECK(kept_of<Fixture>({1, 5, 2, 4, 3, 2}, rule) == list{1, 2, 3, 4});
  rule.max_tokens = 0;
  CHECK(kept_of<Fixture>({1, 5, 2, 4, 3, 2}, rule).empty());
}

TEST_CASE_TEMPLATE("select: a cap equal to the count, or to the length, is no cap", Fixture, select_fixture) {
  auto rule = bare(0.75f);
  rule.max_tokens = 2;
  CHECK(kept_of<Fixture>({1, 4, 2, 1}, rule) == list{1, 2});
  CHECK(status_of<Fixture>({1, 4, 2, 1}, rule) == specattn::selection_ok);
  rule = bare(1.0f);
  rule.max_tokens = 4;
  CHECK(kept_of<Fixture>({1, 4, 2, 1}, rule) == all_of(4));
  CHECK(status_of<Fixture>({1, 4, 2, 1}, rule) == specattn::selection_ok);
}

TEST_CASE_TEMPLATE("select: the cap counts forced positions, drops them last and the lightest of them first", Fixture,
                   select_fixture) {
  auto rule = bare(0.95f);
  rule.sinks = 2;
  rule.recent = 1;
  rule.max_tokens = 4;
  const std::vector<float> row = {2, 1, 9, 8, 0, 3};
  CHECK(kept_of<Fixture>(row, rule) == list{0, 1, 2, 5});
  rule.max_tokens = 3;
  CHECK(kept_of<Fixture>(row, rule) == list{0, 1, 5});
  rule.max_tokens = 2;
  CHECK(kept_of<Fixture>(row, rule) == list{0, 5});
}

TEST_CASE_TEMPLATE("select: a capacity that is too small cuts like a cap", Fixture, select_fixture) {
  Fixture fixture;
  for (const std::ptrdiff_t capacity : {0, 1, 7, 64, 65, 99, 100}) {
    auto p = row_problem(std::vector<float>(100, 1.0f), bare(1.0f));
    p.capacity = capacity;
    agrees_with_oracle(fixture, p);
    CHECK(solve(fixture, p).status[0] == (capacity < 100 ? specattn::selection_capped : specattn::selection_ok));
  }
}
}  // namespace select_testing
