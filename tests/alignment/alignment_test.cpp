// Divergences, the monotone layer map, mixtures and the consistency of an alignment.
#include "specattn/cpu/alignment.hpp"

#include "cpu_fixture.hpp"

using alignment_fixture = cpu_fixture;

#include "alignment/cases.hpp"

namespace alignment_testing {

using specattn::alignment;
using specattn::cpu;
using specattn::view;
using ctx_cpu = specattn::context<cpu>;

view<const float, 2> matrix(const std::vector<float>& values, std::ptrdiff_t rows) {
  return {values.data(), {rows, static_cast<std::ptrdiff_t>(values.size()) / rows}};
}

// ---- divergence ---------------------------------------------------------------------------------------------

TEST_CASE("logarithm: is log to single precision") {
  for (float x = 1e-37f; x < 1e37f; x *= 1.00137f) {
    const double want = std::log(static_cast<double>(x));
    REQUIRE(std::abs(specattn::detail::logarithm(x) - want) <= 1.5e-7 * std::max(1.0, std::abs(want)));
  }
  CHECK(specattn::detail::logarithm(1.0f) == 0.0f);
}

TEST_CASE("divergence_accumulator: reads rows of any stride, and any number of threads gives the same bits") {
  const auto target = random_rows(4 * 700, 1), draft = random_rows(3 * 700, 2);
  ctx_cpu one(1), four(4);
  specattn::divergence_accumulator<> a(4, 3), b(4, 3), c(4, 3);
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

TEST_CASE("a broken row is refused when it is added, and nothing is kept of it") {
  ctx_cpu ctx(1);
  specattn::divergence_accumulator<> sum(1, 1);
  CHECK_THROWS_AS(sum.add(ctx, matrix({1, nan_weight}, 1), matrix({1, 1}, 1)), contract_error);
  CHECK(sum.samples() == 0);
  CHECK(sum.mean() == std::vector<float>{0.0f});
  specattn::mixture_fit<> fit(1, 1, 0);
  CHECK_THROWS_AS(fit.add(ctx, matrix({1, nan_weight}, 1), matrix({1, 1}, 1), {}), contract_error);
  CHECK(fit.bytes() == 0);
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

TEST_CASE("mixture_fit: any number of threads gives the same bits") {
  held<cpu_fixture> on;
  const auto fit = fit_of(on, random_mixture(5, 6, 1, 3, 600, 6));
  ctx_cpu one(1), four(4);
  const auto a = fit.solve(one), b = fit.solve(four);
  CHECK(a.coefficients == b.coefficients);
  CHECK(a.divergence == b.divergence);
  CHECK(a.iterations == b.iterations);
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
