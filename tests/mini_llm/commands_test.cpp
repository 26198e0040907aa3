// The measuring commands on the embedded pair: what they compute, not how they print it.
#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "commands/bench.hpp"
#include "commands/calibrate.hpp"
#include "commands/calibrate_report.hpp"
#include "commands/perplexity.hpp"
#include "commands/perplexity_report.hpp"
#include "commands/svg.hpp"
#include "golden.hpp"
#include "input_error.hpp"

namespace {

using mini_llm::guide_kind;
using mini_llm::guide_point;
using mini_llm::token_text;

mini_llm::session open_pair(const char* kv) {
  mini_llm::session_options options;
  options.model = source_path("examples/models/books-7m");
  options.draft = source_path("examples/models/books-1m");
  options.guide = "none";
  options.kv = kv;
  options.threads = 2;
  return mini_llm::open_session(options);
}

token_text golden_text(std::size_t tokens) {
  std::vector<std::int32_t> ids = golden_values("books-7m").ids("long_ids");
  ids.resize(tokens);
  return {"golden", ids};
}

const auto quiet = [](std::size_t) {};

std::string message_of(const mini_llm::perplexity_options& options) {
  try {
    mini_llm::run_perplexity(options);
  } catch (const mini_llm::input_error& error) {
    return error.what();
  }
  return {};
}

}  // namespace

TEST_CASE("perplexity: the dense guide's losses are the golden ones") {
  mini_llm::session with = open_pair("f32");
  constexpr std::size_t tokens = 700;
  with.decode.max_positions = tokens;
  std::vector<float> losses;
  const auto result = mini_llm::score_texts(with, {guide_kind::none, 1}, {golden_text(tokens)}, 0.1, losses, quiet);
  const std::vector<float> golden = golden_values("books-7m").floats("long_nll");
  REQUIRE(losses.size() == 630);
  double sum = 0;
  for (std::size_t i = 0; i < losses.size(); ++i) {
    CHECK(losses[i] == doctest::Approx(golden[70 + i - 1]).epsilon(0.005));  // golden[i] is the loss of token i + 1
    sum += golden[70 + i - 1];
  }
  CHECK(std::abs(result.nll - sum / 630) < 1e-3);
  CHECK(mini_llm::reduction_percent(result) == 0.0);
}

TEST_CASE("calibrate: rows sum to one, and the mixture is nearer than the layer map and than any single head") {
  mini_llm::session with = open_pair("f16");
  specattn::calibration_options options;
  options.history = true;
  const auto made = mini_llm::calibrate_pair(with, {golden_text(600)}, options);
  const auto signals = static_cast<std::size_t>(made.fitted.signals.count());
  CHECK(mini_llm::signal_names(made.fitted.signals).size() == signals);
  REQUIRE(made.fitted.coefficients.size() == 16 * signals);
  for (std::size_t g = 0; g < 16; ++g) {
    const float* row = made.fitted.coefficients.data() + g * signals;
    CHECK(std::accumulate(row, row + signals, 0.0) == doctest::Approx(1.0).epsilon(1e-4));
  }
  CHECK_NOTHROW(made.fitted.check());
  const auto rules = mini_llm::compare_rules(made);
  for (std::size_t g = 0; g < 16; ++g) {
    CHECK(rules.mixture[g] <= rules.layer_map[g] + 1e-4f);
    CHECK(rules.mixture[g] <= rules.best_head[g] + 1e-4f);
  }
  CHECK(mini_llm::mean_of(rules.mixture) < 0.8 * mini_llm::mean_of(rules.layer_map));
  CHECK(made.fitted.target.weights == with.target->model->fingerprint().weights);

  SUBCASE("keeping everything scores exactly as dense does; keeping less reads less") {
    constexpr std::size_t tokens = 300;
    with.decode.max_positions = tokens;
    with.guide.alignment = made.fitted;
    std::vector<float> dense, all, some;
    const std::vector<token_text> texts{golden_text(tokens)};
    mini_llm::score_texts(with, {guide_kind::none, 1}, texts, 0.1, dense, quiet);
    mini_llm::score_texts(with, {guide_kind::draft, 1}, texts, 0.1, all, quiet);
    CHECK(all == dense);
    const auto half = mini_llm::score_texts(with, {guide_kind::draft, 0.5}, texts, 0.1, some, quiet);
    CHECK(mini_llm::reduction_percent(half) > 20);
    CHECK(some != dense);
  }
  SUBCASE("pictures and JSON hold every group") {
    CHECK(mini_llm::draw_divergence(made).find("</svg>") != std::string::npos);
    CHECK(mini_llm::draw_mixtures(made).find("history") != std::string::npos);
    CHECK(mini_llm::to_json(made)["group_divergence"]["mixture"].size() == 16);
  }
}

TEST_CASE("calibrate: a sampled text depends on its seed alone") {
  mini_llm::session with = open_pair("f16");
  const token_text first = mini_llm::sample_text(with, 40, 7);
  CHECK(first.tokens.size() == 40);
  CHECK(mini_llm::sample_text(with, 40, 7).tokens == first.tokens);
  CHECK(mini_llm::sample_text(with, 40, 8).tokens != first.tokens);
}

TEST_CASE("perplexity: bad inputs are named") {
  mini_llm::perplexity_options options;
  CHECK(message_of(options).find("--file") != std::string::npos);
  options.guides = "quest";
  options.files = {source_path("tests/golden/no_such_file.txt")};
  CHECK(message_of(options).find("no_such_file.txt") != std::string::npos);
  options.files = {source_path("tests/golden/README.md")};
  CHECK(message_of(options).find("at least 2048 are needed") != std::string::npos);
  options.contexts = "64,many";
  CHECK(message_of(options).find("'many'") != std::string::npos);
  options.guides = "guess";
  CHECK(message_of(options).find("'guess' is none of") != std::string::npos);
  options.guides = "draft";
  options.keep = "0.5,1.5";
  CHECK(message_of(options).find("'1.5'") != std::string::npos);
}

TEST_CASE("perplexity: rises at a reduction lie on the line between two points") {
  mini_llm::context_result result;
  const auto add = [&](guide_kind kind, double nll, std::int64_t read) {
    mini_llm::point_result point;
    point.point = {kind, 0.5};
    point.nll = nll;
    point.text_nll = {nll};
    point.counts.kv_rows_read = read;
    point.counts.kv_rows_dense = 100;
    result.points.push_back(point);
  };
  add(guide_kind::none, 0.0, 100);
  add(guide_kind::draft, std::log(1.02), 20);
  add(guide_kind::draft, std::log(1.01), 40);
  CHECK(mini_llm::rise_at(result, guide_kind::draft, 70) == doctest::Approx(1.5));
  CHECK(mini_llm::rise_at(result, guide_kind::draft, 80) == doctest::Approx(2.0));
  CHECK(std::isnan(mini_llm::rise_at(result, guide_kind::draft, 90)));
  CHECK(std::isnan(mini_llm::rise_at(result, guide_kind::quest, 70)));
}

TEST_CASE("bench: a decode test reports its rates and, with a draft, more than one token a round") {
  mini_llm::session with = open_pair("f16");
  mini_llm::bench_options options;
  options.repetitions = 2;
  options.warm_ups = 0;
  const auto prefill = mini_llm::measure_prefill(with, options, 32);
  CHECK(prefill.test == "pp32");
  CHECK(prefill.rates.size() == 2);
  CHECK(prefill.mean() > 0);
  const auto plain = mini_llm::measure_decode(with, options, with.guide, 0, 8, 16);
  CHECK(plain.test == "tg8 @ d16");
  CHECK(plain.tokens_a_round() == 1.0);
  CHECK(plain.reduction_percent() == 0.0);
  const auto drafted = mini_llm::measure_decode(with, options, with.guide, 4, 8, 16);
  CHECK(drafted.counts.emitted == 16);
  CHECK(drafted.tokens_a_round() >= 1.0);
}

TEST_CASE("svg: ticks are round and inside the axis") {
  using mini_llm::axis_scale;
  CHECK(mini_llm::axis_ticks(0, 1, axis_scale::linear, 5) ==
        std::vector<double>{0, 0.2, 0.4, 0.6000000000000001, 0.8, 1});
  for (const double tick : mini_llm::axis_ticks(0.3, 70, axis_scale::logarithmic)) {
    CHECK(tick >= 0.3);
    CHECK(tick <= 70);
  }
  const std::string picture = mini_llm::draw(mini_llm::line_chart{
      .title = "a < b & c", .x = {.label = "x"}, .y = {.label = "y"}, .series = {{"one", {{0, 0}, {1, 1}}}}});
  CHECK(picture.find("a &lt; b &amp; c") != std::string::npos);
}
