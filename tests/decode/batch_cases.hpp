// What the decoding loop promises of sequences that share rounds and prefill passes, and of scoring, for any backend. The
// including file defines `decode_fixture` (decode/cases.hpp).
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "decode/cases.hpp"
#include "decode/problem.hpp"

namespace decode_testing {

inline bool go_on(std::int32_t, std::span<const std::int32_t>) { return true; }

template <class Decoder>
std::vector<std::int32_t> text_of(const Decoder& decoder, std::int32_t row) {
  return {decoder.text(row).begin(), decoder.text(row).end()};
}

/// A model that notes how many slots each of its passes had, and how many of them wanted logits.
template <class Model>
class observed_model {
 public:
  struct pass {
    std::int64_t slots, logit_rows;
  };
  explicit observed_model(Model& model) : model_(&model) {}

  specattn::model_shape shape() const { return model_->shape(); }
  template <class Context, class Batch, class Attention, class Logits>
  void forward(Context& ctx, const Batch& batch, Attention& attention, Logits logits) {
    passes.push_back({count(batch.tokens), count(batch.logit_rows)});
    model_->forward(ctx, batch, attention, logits);
  }

  std::vector<pass> passes;

 private:
  template <class Span>
  static std::int64_t count(const Span& of) {
    if constexpr (requires { of.extent(0); })
      return of.extent(0);
    else
      return static_cast<std::int64_t>(of.size());
  }
  Model* model_;
};

TEST_CASE("decode: a sequence with little room left, or that asks for less, does not shorten the others' drafts") {
  decode_fixture f;
  const auto full = prompt_of(57, 51), half = prompt_of(20, 52), free = prompt_of(26, 53);
  for (const float top_p : {2.0f, 0.6f}) {
    for (const bool sparse_draft : {false, true}) {
      decode_options options{.draft_length = 5, .max_sequences = 3, .max_positions = 60, .prefill_chunk = 32};
      options.sparse_draft = sparse_draft;
      const decode_request requests[] = {{.prompt = full, .max_new_tokens = 30},
                                         {.prompt = half, .max_new_tokens = 30, .draft_length = 2},
                                         {.prompt = free, .max_new_tokens = 30}};
      std::vector<std::vector<std::int32_t>> alone;
      for (const decode_request& request : requests) {
        guided guide(flat_alignment({8}, true), toy_rule(top_p));
        auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
        alone.push_back(finish_row(decoder, decoder.add(request)));
      }
      guided guide(flat_alignment({8}, true), toy_rule(top_p));
      auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
      std::vector<std::int32_t> rows;
      for (const decode_request& request : requests) rows.push_back(decoder.add(request));
      decoder.step(go_on);
      CHECK(decoder.counts(rows[0]).proposed == 3);  // of 60 positions 57 are taken
      CHECK(decoder.counts(rows[1]).proposed == 2);
      CHECK(decoder.counts(rows[2]).proposed == 5);
      while (decoder.step(go_on)) {
      }
      CHECK(decoder.finish(rows[0]) == finish_reason::context_full);
      // A sparse draft that shares its rounds records when others come and go, so that its lists differ.
      if (sparse_draft && top_p < 1.0f) continue;
      for (std::size_t i = 0; i < 3; ++i) CHECK(text_of(decoder, rows[i]) == alone[i]);
    }
  }
}

TEST_CASE(
    "decode: the draft runs on the last drafted token where a guide needs what it asks for, and draws nothing") {
  decode_fixture f;
  observed_model draft(f.draft);
  const auto prompt = prompt_of(40, 54);
  guided guide(flat_alignment(), toy_rule(0.5f));
  const auto steps_of = [&](decode_options options) {
    options.draft_length = 3;
    auto decoder = make_decoder<float>(f.ctx, f.target, draft, guide, options);
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30});
    draft.passes.clear();
    decoder.step(go_on);
    CHECK(decoder.counts(row).proposed == 3);
    CHECK(decoder.counts(row).draft_steps == static_cast<std::int64_t>(draft.passes.size()));
    return decoder.counts(row).draft_steps;
  };
  CHECK(steps_of({}) == 4);
  CHECK(draft.passes.back().logit_rows == 0);
  CHECK(steps_of({.record_steps = 4}) == 4);
  CHECK(steps_of({.record_steps = 3}) == 3);
  CHECK(steps_of({.record_steps = 1}) == 3);
  CHECK(steps_of({.min_context = 100}) == 3);  // a dense round asks nothing
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, draft, dense, {.draft_length = 3});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30});
  decoder.step(go_on);
  CHECK(decoder.counts(row).draft_steps == 3);
}

TEST_CASE(
    "decode: prompts that are added together are cached in shared chunks, between the rounds of those that run") {
  decode_fixture f;
  observed_model target(f.target), draft(f.draft);
  const auto running = prompt_of(20, 61);
  const std::vector<std::vector<std::int32_t>> prompts = {prompt_of(30, 62), prompt_of(1, 63), prompt_of(9, 64),
                                                          prompt_of(70, 65)};
  for (const std::int32_t page_size : {0, 8}) {
    no_guide dense;
    auto observed =
        make_decoder<float>(f.ctx, target, draft, dense,
                            {.draft_length = 2, .max_sequences = 5, .prefill_chunk = 16, .page_size = page_size});
    const auto first = observed.add({.prompt = running, .max_new_tokens = 60});
    observed.step(go_on);
    std::vector<decode_request> requests;
    for (const auto& prompt : prompts) requests.push_back({.prompt = prompt, .max_new_tokens = 25});
    std::vector<std::int32_t> rows(requests.size());
    observed.add(requests, rows);
    CHECK(observed.waiting(rows[0]) == 29);
    CHECK(observed.waiting(first) == 0);
    // 29 + 0 + 8 + 69 positions in chunks of 16; who is ready joins the round of the same step.
    const std::int32_t ready_after[] = {2, 1, 3, 7};
    for (std::int32_t step = 1; step <= 7; ++step) {
      target.passes.clear();
      draft.passes.clear();
      const auto before = observed.text(first).size();
      REQUIRE(observed.step(go_on));
      CHECK(observed.text(first).size() > before);
      CHECK(target.passes.front().slots == (step < 7 ? 16 : 29 + 8 + 69 - 6 * 16));
      CHECK(target.passes.front().logit_rows == 0);
      for (std::size_t i = 0; i < rows.size(); ++i) {
        CHECK((observed.waiting(rows[i]) == 0) == (step >= ready_after[i]));
        CHECK((observed.counts(rows[i]).rounds > 0) == (step >= ready_after[i]));
      }
    }
    while (observed.step(go_on)) {
    }
    CHECK(text_of(observed, first) == autoregressive(f, running, 60));
    for (std::size_t i = 0; i < rows.size(); ++i)
      CHECK(text_of(observed, rows[i]) == autoregressive(f, prompts[i], 25));
  }
}

TEST_CASE(
    "decode: of requests that are added together all are taken or none, and one that waits may leave or start over") {
  decode_fixture f;
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense,
                                     {.draft_length = 2, .max_sequences = 3, .prefill_chunk = 8});
  const auto prompt = prompt_of(40, 66), other = prompt_of(33, 67);
  const std::vector<std::int32_t> wild{1, 2, 61};
  std::vector<decode_request> requests{{.prompt = prompt, .max_new_tokens = 9}, {.prompt = wild}};
  std::vector<std::int32_t> rows(2);
  CHECK_THROWS_WITH_AS(decoder.add(requests, rows), "decode: the prompt has token 61 at 2, outside a vocab of 61",
                       contract_error);
  CHECK_THROWS_WITH_AS(decoder.add(requests, std::span(rows).first(1)), "decode: 2 requests, room for 1 rows",
                       contract_error);
  CHECK_FALSE(decoder.step(go_on));  // nobody is there
  requests[1] = {.prompt = other, .max_new_tokens = 9};
  decoder.add(requests, rows);
  REQUIRE(decoder.step(go_on));
  CHECK(decoder.waiting(rows[0]) == 31);
  decoder.remove(rows[0]);
  decoder.rewind(rows[1], {.max_new_tokens = 20});
  CHECK(decoder.waiting(rows[1]) == 32);
  CHECK(finish_row(decoder, rows[1]) == autoregressive(f, other, 20));
  CHECK(decoder.add({.prompt = prompt, .max_new_tokens = 9}) == rows[0]);
  CHECK(finish_row(decoder, rows[0]) == autoregressive(f, prompt, 9));
}

TEST_CASE("decode: scoring equals the dense losses when everything is kept, and reports the reduction when not") {
  decode_fixture f;
  const auto text = prompt_of(120, 8);
  std::vector<float> dense_loss(100), sparse_loss(100), all_loss(100);
  no_draft none;
  no_guide dense;
  auto plain = make_decoder<float>(f.ctx, f.target, none, dense, {.draft_length = 0});
  plain.score(text, 20, dense_loss);
  const auto differ = [&](const std::vector<float>& a, const std::vector<float>& b) {
    float worst = 0.0f;
    for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
    return worst;
  };
  const float same = std::same_as<decode_fixture::backend, specattn::cpu> ? 0.0f : 2e-5f;
  guided everything(flat_alignment(), toy_rule(1.0f));
  auto all = make_decoder<float>(f.ctx, f.target, f.draft, everything, {.draft_length = 4});
  const decode_counts full = all.score(text, 20, all_loss);
  CHECK(differ(all_loss, dense_loss) <= same);
  CHECK(full.emitted == 100);
  CHECK(full.accepted == full.proposed);
  guided few(flat_alignment(), toy_rule(0.3f));
  auto sparse = make_decoder<float>(f.ctx, f.target, f.draft, few, {.draft_length = 4});
  const decode_counts counts = sparse.score(text, 20, sparse_loss);
  CHECK(counts.kv_rows_read < counts.kv_rows_dense);
  CHECK(differ(sparse_loss, dense_loss) > 1e-3f);
  std::vector<float> again(100);
  sparse.score(text, 20, again);  // the decoder is free, and its row another text's
  CHECK(differ(again, sparse_loss) <= same);
  // Rounds of a text that is decoded, between two that are scored, are not forced.
  const auto prompt = prompt_of(30, 9);
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 4});
  decoder.score(text, 20, again);
  CHECK(differ(again, dense_loss) <= same);
  CHECK(finish_row(decoder, decoder.add({.prompt = prompt, .max_new_tokens = 20})) == autoregressive(f, prompt, 20));
}

}  // namespace decode_testing
