// What select() promises about rows, pages, the bisection rule and its callers. Needs `select_fixture`, as
// select/cases.hpp does.
#pragma once

#include "select/cases.hpp"

namespace select_testing {

inline problem<float> two_rows(const std::vector<float>& first, const std::vector<float>& second,
                               const specattn::selection_rule& rule) {
  auto p = dense_problem<float>(1, 2, static_cast<std::ptrdiff_t>(first.size()), rule);
  p.memory = first;
  p.memory.insert(p.memory.end(), second.begin(), second.end());
  return p;
}

template <class Fixture>
list kept_of_two(const std::vector<float>& first, const std::vector<float>& second,
                 const specattn::selection_rule& rule) {
  Fixture fixture;
  const auto p = two_rows(first, second, rule);
  agrees_with_oracle(fixture, p);
  return solve(fixture, p).list(0);
}

// ---- rows ---------------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("select: unite keeps what any row keeps", Fixture, select_fixture) {
  auto rule = bare(0.5f);
  CHECK(kept_of_two<Fixture>({8, 0, 0, 1}, {0, 0.2f, 0.3f, 0}, rule) == list{0, 2});
  rule.top_p = 0.7f;
  CHECK(kept_of_two<Fixture>({8, 0, 0, 1}, {0, 0.2f, 0.3f, 0}, rule) == list{0, 1, 2});
}

TEST_CASE_TEMPLATE("select: mean and max weigh every row alike, whatever its sum", Fixture, select_fixture) {
  auto rule = bare(0.51f);
  rule.rows = specattn::combine::mean;
  CHECK(kept_of_two<Fixture>({800, 0, 0, 0}, {0, 0.25f, 0.75f, 0}, rule) == list{0, 2});
  rule.rows = specattn::combine::max;
  CHECK(kept_of_two<Fixture>({800, 0, 0, 0}, {0, 0.25f, 0.75f, 0}, rule) == list{0, 2});
  // mean: 0.75 + 0.25 at position 1, 0.25 + 0.75 at 2; max: 0.75 at both
  rule.rows = specattn::combine::mean;
  CHECK(kept_of_two<Fixture>({0, 3, 1, 0}, {0, 1, 3, 0}, rule) == list{1, 2});
}

TEST_CASE_TEMPLATE("select: rows may be unnormalised, each with a scale of its own, under every rule", Fixture,
                   select_fixture) {
  Fixture fixture;
  std::mt19937 random(43);
  for (const std::ptrdiff_t rows : {1, 4}) {
    for (int variant = 0; variant < 6; ++variant) {
      specattn::selection_rule rule;
      rule.top_p = 0.9f;
      rule.rows = variant == 1   ? specattn::combine::mean
                  : variant == 2 ? specattn::combine::max
                                 : specattn::combine::unite;
      if (variant == 3) rule.max_tokens = 60;
      if (variant == 4) rule.page_size = 16;
      if (variant == 5) rule.method = specattn::threshold_method::bisection;
      auto own = dense_problem<float>(5, rows, 900, rule);
      auto scaled = own;
      for (std::ptrdiff_t g = 0; g < own.groups; ++g) {
        for (std::ptrdiff_t r = 0; r < rows; ++r) {
          const auto row = make_row(shape::softmax, own.kv_len, random);
          const int exponent = static_cast<int>(random() % 80u) - 40;  // as of a row's maximum or its log-sum-exp
          for (std::ptrdiff_t i = 0; i < own.kv_len; ++i) {
            own.at(g, r, i) = row[static_cast<std::size_t>(i)];
            scaled.at(g, r, i) = std::ldexp(row[static_cast<std::size_t>(i)], exponent);
          }
        }
      }
      const answer want = solve(fixture, own);
      const answer got = solve(fixture, scaled);
      CHECK(got.counts == want.counts);
      CHECK(got.positions == want.positions);
      CHECK(got.mass == want.mass);
      CHECK(got.status == want.status);
      agrees_with_oracle(fixture, scaled);
    }
  }
}

TEST_CASE_TEMPLATE("select: with one row unite, mean and max are the same", Fixture, select_fixture) {
  std::mt19937 random(21);
  const auto row = make_row(shape::softmax, 1000, random);
  specattn::selection_rule rule;
  const list want = kept_of<Fixture>(row, rule);
  rule.rows = specattn::combine::mean;
  CHECK(kept_of<Fixture>(row, rule) == want);
  rule.rows = specattn::combine::max;
  CHECK(kept_of<Fixture>(row, rule) == want);
}

TEST_CASE_TEMPLATE("select: a row of zeros adds nothing to its group", Fixture, select_fixture) {
  for (const auto rows : {specattn::combine::unite, specattn::combine::mean, specattn::combine::max}) {
    auto rule = bare(0.75f);
    rule.rows = rows;
    CHECK(kept_of_two<Fixture>({0, 0, 0, 0}, {1, 0, 3, 1}, rule) == list{0, 2});
  }
}

TEST_CASE_TEMPLATE("select: a cap over a union keeps the positions of largest summed share", Fixture,
                   select_fixture) {
  auto rule = bare(0.9f);
  rule.max_tokens = 2;
  // shares 0.5 0.4 0.1 0 and 0 0.3 0.3 0.4: the union is everything, the sums 0.5 0.7 0.4 0.4
  CHECK(kept_of_two<Fixture>({50, 40, 10, 0}, {0, 0.3f, 0.3f, 0.4f}, rule) == list{0, 1});
  rule.recent = 1;
  CHECK(kept_of_two<Fixture>({50, 40, 10, 0}, {0, 0.3f, 0.3f, 0.4f}, rule) == list{1, 3});
}

TEST_CASE_TEMPLATE("select: the mass of a union is the mean of its rows' kept shares", Fixture, select_fixture) {
  Fixture fixture;
  const answer got = solve(fixture, two_rows({6, 2, 0, 0}, {0, 1, 1, 2}, bare(0.5f)));
  CHECK(got.list(0) == list{0, 3});
  CHECK(got.mass[0] == doctest::Approx((0.75 + 0.5) / 2));
}

TEST_CASE_TEMPLATE("select: groups of many rows equal the oracle's sets under every combination", Fixture,
                   select_fixture) {
  Fixture fixture;
  std::mt19937 random(22);
  for (int turn = 0; turn < 120; ++turn) {
    specattn::selection_rule rule;
    rule.top_p = turn % 7 == 0 ? 1.0f : 0.5f + 0.07f * static_cast<float>(turn % 7);
    rule.rows = static_cast<specattn::combine>(turn % 3);
    if (turn % 4 == 0) rule.max_tokens = static_cast<std::int32_t>(random() % 150);
    if (turn % 5 == 0) rule.page_size = 1 + static_cast<std::int32_t>(random() % 40);
    if (turn % 10 == 0 && rule.page_size > 1) rule.output = specattn::emit::pages;
    auto p = dense_problem<float>(4, 1 + static_cast<std::ptrdiff_t>(random() % 6), 257, rule);
    fill_mixed(p, random);
    p.kv_lens = {257, 64, 100, 1};
    p.top_p = {rule.top_p, 0.9f, nan_weight, 0.3f};
    p.wants_mass = turn % 6 != 0;
    agrees_with_oracle(fixture, p);
  }
}

TEST_CASE_TEMPLATE("select: top_p of each group takes the place of the rule's", Fixture, select_fixture) {
  Fixture fixture;
  auto p = dense_problem<float>(4, 1, 4, bare(0.1f));
  for (int g = 0; g < 4; ++g)
    for (int i = 0; i < 4; ++i) p.at(g, 0, i) = static_cast<float>(4 - i);
  p.top_p = {0.0f, 0.375f, 0.625f, 1.0f};
  agrees_with_oracle(fixture, p);
  CHECK(solve(fixture, p).counts == std::vector<std::int32_t>{0, 1, 2, 4});
}

// ---- pages --------------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("select: a page weighs the sum of its positions and is kept whole", Fixture, select_fixture) {
  auto rule = bare(0.39f);
  rule.page_size = 2;
  CHECK(kept_of<Fixture>({1, 1, 3, 0, 2, 2, 1}, rule) == list{4, 5});
  rule.output = specattn::emit::pages;
  CHECK(kept_of<Fixture>({1, 1, 3, 0, 2, 2, 1}, rule) == list{2});
  rule.top_p = 1.0f;
  CHECK(kept_of<Fixture>({1, 1, 3, 0, 2, 2, 1}, rule) == list{0, 1, 2, 3});
}

TEST_CASE_TEMPLATE("select: a page with a forced position is forced", Fixture, select_fixture) {
  auto rule = bare(0.0f);
  rule.page_size = 4;
  rule.sinks = 1;
  rule.recent = 3;
  CHECK(kept_of<Fixture>(std::vector<float>(18, 1.0f), rule) == list{0, 1, 2, 3, 12, 13, 14, 15, 16, 17});
}

TEST_CASE_TEMPLATE("select: with pages the cap counts whole pages, a partial last one too", Fixture, select_fixture) {
  auto rule = bare(1.0f);
  rule.page_size = 4;
  const std::vector<float> row = {1, 1, 1, 1, 2, 2, 2, 2, 9};
  for (const int cap : {3, 4, 7, 8, 9}) {
    rule.max_tokens = cap;
    const std::size_t want[] = {0, 1, 1, 5, 9};
    CHECK(kept_of<Fixture>(row, rule).size() == want[cap == 3 ? 0 : cap == 4 ? 1 : cap == 7 ? 2 : cap == 8 ? 3 : 4]);
  }
}

TEST_CASE_TEMPLATE("select: pages of any size equal the oracle's sets", Fixture, select_fixture) {
  Fixture fixture;
  std::mt19937 random(23);
  for (const std::int32_t page : {2, 3, 16, 63, 64, 65, 1000, 1 << 30}) {
    for (const std::ptrdiff_t length : {1, 15, 16, 17, 640, 4099}) {
      specattn::selection_rule rule;
      rule.page_size = page;
      rule.top_p = 0.6f;
      auto p = dense_problem<float>(6, 1, length, rule);
      fill_mixed(p, random);
      agrees_with_oracle(fixture, p);
      p.rule.output = specattn::emit::pages;
      p.capacity = (length + page - 1) / page;
      agrees_with_oracle(fixture, p);
    }
  }
}

// ---- the paper's bisection ----------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("select: bisection equals ten literal halvings", Fixture, select_fixture) {
  Fixture fixture;
  std::mt19937 random(24);
  for (int turn = 0; turn < 60; ++turn) {
    specattn::selection_rule rule = turn % 2 == 0 ? bare(0.9f) : specattn::selection_rule{};
    rule.method = specattn::threshold_method::bisection;
    rule.rows = static_cast<specattn::combine>(turn % 3);
    if (turn % 4 == 3) rule.page_size = 16;
    auto p = dense_problem<float>(8, 1 + turn % 2, 500, rule);
    fill_mixed(p, random);
    agrees_with_oracle(fixture, p);
  }
}

TEST_CASE_TEMPLATE(
    "select: bisection keeps the exact set and, beyond it, only weights within max/1024 of its lightest", Fixture,
    select_fixture) {
  Fixture fixture;
  std::mt19937 random(25);
  for (int turn = 0; turn < 20; ++turn) {
    const auto row = make_row(turn % 2 == 0 ? shape::softmax : shape::uniform, 2000, random);
    auto rule = bare(0.5f + 0.02f * static_cast<float>(turn));
    const list exact = solve(fixture, row_problem(row, rule)).list(0);
    rule.method = specattn::threshold_method::bisection;
    const list halved = solve(fixture, row_problem(row, rule)).list(0);
    float lightest = infinite;
    for (const int i : exact) lightest = std::min(lightest, row[static_cast<std::size_t>(i)]);
    CHECK(std::includes(halved.begin(), halved.end(), exact.begin(), exact.end()));
    const float step = *std::max_element(row.begin(), row.end()) / 1024;
    bool near = true;
    for (const int i : halved) near = near && row[static_cast<std::size_t>(i)] > lightest - 1.0001f * step;
    CHECK(near);
  }
}

// ---- callers ------------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("select: repeats to the bit over a soiled workspace", Fixture, select_fixture) {
  Fixture fixture;
  std::mt19937 random(26);
  for (const auto rows : {specattn::combine::unite, specattn::combine::mean}) {
    specattn::selection_rule rule;
    rule.rows = rows;
    auto p = dense_problem<float>(8, 3, 1000, rule);
    fill_mixed(p, random);
    const answer first = solve(fixture, p);
    for (int turn = 0; turn < 20; ++turn) {
      const answer again = solve(fixture, p);
      CHECK(again.positions == first.positions);
      CHECK(again.mass == first.mass);
    }
  }
}

TEST_CASE_TEMPLATE("select: mass and status may be left out, and no groups are no work", Fixture, select_fixture) {
  Fixture fixture;
  specattn::selection_view<typename Fixture::backend> out;
  const auto weights = fixture.upload(std::vector<float>{1, 2, 3});
  const auto positions = fixture.upload(std::vector<std::int32_t>(3, stale));
  const auto counts = fixture.upload(std::vector<std::int32_t>(1, stale));
  out.positions = {positions.data(), {1, 3}};
  out.counts = {counts.data(), {1}};
  specattn::weight_rows<float, typename Fixture::backend> from;
  from.weights = {weights.data(), {1, 1, 3}};
  auto& context = fixture.context();
  context.reserve_workspace(specattn::select_workspace_bytes(context, 1, 1, 3, bare(0.5f)));
  specattn::select(context, from, bare(0.5f), out);
  CHECK(fixture.download(positions) == std::vector<std::int32_t>{2, -1, -1});
  CHECK(solve(fixture, dense_problem<float>(0, 1, 3, bare(0.5f))).counts.empty());
}

TEST_CASE_TEMPLATE("select: the workspace never shrinks as the shape grows", Fixture, select_fixture) {
  Fixture fixture;
  for (const std::int32_t page : {1, 16}) {
    specattn::selection_rule rule;
    rule.page_size = page;
    std::size_t before = 0;
    for (const std::ptrdiff_t n : {0, 1, 2, 63, 64, 65, 1000, 4096, 100000}) {
      const std::size_t one = specattn::select_workspace_bytes(fixture.context(), 1, 1, n, rule);
      CHECK(one >= before);
      CHECK(specattn::select_workspace_bytes(fixture.context(), 1, 2, n, rule) >= one);
      CHECK(specattn::select_workspace_bytes(fixture.context(), 9, 1, n, rule) >= one);
      before = one;
    }
  }
}

TEST_CASE_TEMPLATE("select: misuse throws contract_error and says what is wrong", Fixture, select_fixture) {
  Fixture fixture;
  const auto thrown = [&](auto change) {
    auto p = dense_problem<float>(2, 1, 8, bare(0.5f));
    change(p);
    try {
      solve(fixture, p);
    } catch (const specattn::contract_error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  using problem_type = problem<float>;
  CHECK(thrown([](problem_type& p) { p.rule.sinks = -1; }) ==
        "select: sinks -1, recent 0 and max_tokens 2147483647 must not be negative");
  CHECK(thrown([](problem_type& p) { p.rule.page_size = 0; }) == "select: page_size 0 must be at least 1");
  CHECK(thrown([](problem_type& p) { p.rule.output = specattn::emit::pages; }) ==
        "select: page numbers need a page_size above 1");
  CHECK(thrown([](problem_type& p) { p.rows = 0; }) == "select: 2 groups of no rows");
  CHECK(thrown([](problem_type& p) { p.kv_len = (1 << 22) + 1; }) ==
        "select: 1 rows of 4194305 positions exceed the limits of 16384 and 4194304");
  CHECK(thrown([](problem_type&) {}) == "");
}

TEST_CASE_TEMPLATE("select: outputs and lengths of another number of groups are refused", Fixture, select_fixture) {
  Fixture fixture;
  const auto ints = fixture.upload(std::vector<std::int32_t>(64));
  const auto floats = fixture.upload(std::vector<float>(64));
  using backend = typename Fixture::backend;
  specattn::weight_rows<float, backend> from;
  from.weights = {floats.data(), {2, 1, 8}};
  specattn::selection_view<backend> out;
  out.positions = {ints.data(), {2, 8}};
  out.counts = {ints.data(), {2}};
  const auto refused = [&](const auto& some_from, const auto& some_out) {
    try {
      specattn::select(fixture.context(), some_from, bare(0.5f), some_out);
    } catch (const specattn::contract_error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  auto wrong_out = out;
  wrong_out.counts = {ints.data(), {3}};
  CHECK(refused(from, wrong_out) == "select: importance has 2 groups, the selection 3 counts and 2 lists");
  wrong_out = out;
  wrong_out.mass = {floats.data(), {1}};
  CHECK(refused(from, wrong_out) == "select: 1 mass entries for 2 groups");
  auto wrong_from = from;
  wrong_from.kv_lens = {ints.data(), {1}};
  CHECK(refused(wrong_from, out) == "select: 1 kv_lens for 2 groups");
  wrong_from = from;
  wrong_from.top_p = {floats.data(), {5}};
  CHECK(refused(wrong_from, out) == "select: 5 top_p for 2 groups");
}

}  // namespace select_testing
