// The decoding loop after failures, on the CPU: the cases of both backends, and NaN logits in a chosen row.
#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "decode/problem.hpp"
#include "decode/toy_model.hpp"
#include "specattn/specattn.hpp"

struct decode_fixture {
  using backend = specattn::cpu;
#if defined(__SANITIZE_THREAD__)
  // One thread alone: there is little for the sanitizer to see, at twenty times the time.
  static constexpr std::int64_t fault_stride = 23;
#else
  static constexpr std::int64_t fault_stride = 1;
#endif
  specattn::context<specattn::cpu> ctx{1};
  toy::model target{7, decode_testing::target_shape};
  toy::model draft{7, decode_testing::draft_shape, 0.15f};
};

#include "decode/failure_cases.hpp"

using namespace decode_testing;

namespace {

bool go(std::int32_t, std::span<const std::int32_t>) { return true; }

/// A model of which one pass leaves a NaN in a row of logits, or every pass from some on.
struct spoilt_model {
  toy::model* inner;
  std::int64_t from = -1, to = -1;  // passes with logits
  std::ptrdiff_t row = 0;
  std::int64_t passes = 0;

  model_shape shape() const { return inner->shape(); }
  template <class Attention>
  void forward(context<cpu>& ctx, const forward_batch<>& batch, Attention& attention, view<float, 2> logits) {
    inner->forward(ctx, batch, attention, logits);
    if (batch.logit_rows.empty()) return;
    if (passes >= from && passes < to && row < logits.extent(0))
      logits(row, 3) = std::numeric_limits<float>::quiet_NaN();
    ++passes;
  }
};

text_of_row alone(decode_fixture& f, const text_of_row& prompt) {
  no_draft none;
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, none, dense, {.draft_length = 0});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30});
  while (decoder.step(go)) {
  }
  return {decoder.text(row).begin(), decoder.text(row).end()};
}

}  // namespace

TEST_CASE(
    "decode: NaN among one sequence's target logits is an error of that sequence; it can be retried or removed") {
  decode_fixture f;
  const text_of_row prompts[] = {prompt_of(30, 61), prompt_of(44, 62)};
  const text_of_row wanted[] = {alone(f, prompts[0]), alone(f, prompts[1])};
  for (const bool removed : {false, true}) {
    for (std::int64_t at = 0; at < 6; ++at) {
      for (const std::ptrdiff_t spoilt : {0, 2, 5}) {  // rows of logits: the first or the second sequence's
        spoilt_model target{&f.target, at, at + 1, spoilt};
        draft_guide<> guide(flat_alignment({8}, true), toy_rule(1.0f));
        auto decoder = make_decoder<float>(f.ctx, target, f.draft, guide, {.draft_length = 3, .max_sequences = 2});
        std::int32_t rows[2];
        text_of_row heard[2];
        for (std::size_t i = 0; i < 2; ++i) {
          rows[i] = decoder.add({.prompt = prompts[i], .max_new_tokens = 30});
          heard[i] = prompts[i];
        }
        int lost = -1;
        for (bool more = true; more;) {
          try {
            more = decoder.step([&](std::int32_t row, std::span<const std::int32_t> tokens) {
              auto& text = heard[row == rows[0] ? 0 : 1];
              text.insert(text.end(), tokens.begin(), tokens.end());
              return true;
            });
          } catch (const contract_error& error) {
            const std::string message = error.what();
            lost = message.find("of row " + std::to_string(rows[0])) != std::string::npos ? 0 : 1;
            CHECK(message.find("the target's logits for position") != std::string::npos);
            CHECK(decoder.text(rows[lost]).size() == heard[lost].size());
            if (removed) decoder.remove(rows[lost]);
          }
        }
        for (int i = 0; i < 2; ++i) {
          if (!removed || i != lost) CHECK(heard[i] == wanted[i]);
        }
      }
    }
  }
}

TEST_CASE("decode: a draft whose logits hold NaN loses its tokens from there on, and the text stays exact") {
  decode_fixture f;
  const auto prompt = prompt_of(30, 63);
  const auto wanted = alone(f, prompt);
  for (std::int64_t from = 0; from < 5; ++from) {
    for (const std::int64_t passes : {std::int64_t{1}, std::int64_t{1000}}) {
      for (const bool sampled : {false, true}) {
        spoilt_model draft{&f.draft, from, from + passes};
        no_guide dense;
        auto decoder = make_decoder<float>(f.ctx, f.target, draft, dense, {.draft_length = 3, .max_sequences = 2});
        const auto other = decoder.add({.prompt = prompt_of(20, 64), .max_new_tokens = 30});
        const auto row = decoder.add(
            {.prompt = prompt, .max_new_tokens = 30, .sampler = {.temperature = sampled ? 0.7f : 0.0f, .seed = 4}});
        while (decoder.step(go)) {
        }
        CHECK(decoder.counts(other).draft_failures >= 1);  // the first row of the draft's logits is its
        CHECK((decoder.counts(row).draft_failures > 0) == (passes > 1));
        CHECK(decoder.finish(row) == finish_reason::length);
        if (!sampled) CHECK(text_of_row(decoder.text(row).begin(), decoder.text(row).end()) == wanted);
      }
    }
  }
}

TEST_CASE("decode: score() passes on what throws, refuses NaN logits, and leaves the decoder free") {
  decode_fixture f;
  const auto text = prompt_of(60, 65);
  std::vector<float> losses(40), again(40);
  fault_plan none;
  faulty_model counted(f.target, &none), counted_draft(f.draft, &none);
  draft_guide<> guide(flat_alignment({8}, true), toy_rule(0.6f));
  const decode_options options{.draft_length = 3, .refresh_every = 2, .prefill_chunk = 8};
  {
    auto decoder = make_decoder<float>(f.ctx, counted, counted_draft, guide, options);
    decoder.score(text, 20, losses);
  }
  for (std::int64_t at = 0; at < none.seen; ++at) {
    fault_plan plan{.at = at};
    faulty_model target(f.target, &plan), draft(f.draft, &plan);
    auto decoder = make_decoder<float>(f.ctx, target, draft, guide, options);
    CHECK_THROWS_AS(decoder.score(text, 20, again), fault);
    decoder.score(text, 20, again);
    CHECK(again == losses);
    CHECK(decoder.add({.prompt = text, .max_new_tokens = 5}) == 0);
  }
  spoilt_model target{&f.target, 3, 4};
  auto decoder = make_decoder<float>(f.ctx, target, f.draft, guide, options);
  CHECK_THROWS_WITH_AS(decoder.score(text, 20, again), doctest::Contains("of the text hold no finite value"),
                       contract_error);
  decoder.score(text, 20, again);
  CHECK(again == losses);
}
