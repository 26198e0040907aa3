// What the decoding loop promises, one claim a case, for any backend. The including file defines `decode_fixture`:
//   using backend          cpu or cuda
//   ctx, target, draft     a context of that backend, and the toy models of decode_testing's shapes there
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "decode/problem.hpp"

namespace decode_testing {

using guided = specattn::draft_guide<decode_fixture::backend>;

template <class Decoder>
std::vector<std::int32_t> finish_row(Decoder& decoder, std::int32_t row) {
  while (decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
  }
  return {decoder.text(row).begin(), decoder.text(row).end()};
}

inline std::vector<std::int32_t> autoregressive(decode_fixture& f, std::span<const std::int32_t> prompt,
                                                std::int32_t new_tokens, sampler_options sampler = {}) {
  no_draft none;
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, none, dense, {.draft_length = 0, .prefill_chunk = 32});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = new_tokens, .sampler = sampler});
  return finish_row(decoder, row);
}

TEST_CASE("decode: dense speculation emits exactly the autoregressive greedy text for every draft length") {
  decode_fixture f;
  const auto prompt = prompt_of(37, 1);
  const auto expected = autoregressive(f, prompt, 60);
  std::int64_t accepted = 0;
  for (std::int32_t gamma = 1; gamma <= 8; ++gamma) {
    no_guide dense;
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = gamma, .prefill_chunk = 16});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 60});
    CHECK(finish_row(decoder, row) == expected);
    CHECK(decoder.finish(row) == finish_reason::length);
    accepted += decoder.counts(row).accepted;
    CHECK(decoder.counts(row).emitted == 60);
  }
  CHECK(accepted > 100);  // the draft resembles the target: both outcomes of a round occur
}

TEST_CASE("decode: keeping every position equals plain decoding, with every guide signal and a sparse draft") {
  decode_fixture f;
  const auto prompt = prompt_of(50, 2);
  const auto expected = autoregressive(f, prompt, 40);
  for (const bool history : {false, true}) {
    for (const bool unite : {false, true}) {
      selection_rule rule = toy_rule(1.0f);
      if (unite) rule.rows = combine::unite;
      guided guide(flat_alignment({4, 16}, history), rule);
      decode_options options{.draft_length = 3, .prefill_chunk = 32};
      options.record_steps = unite ? 0 : 1;
      options.sparse_draft = !unite;
      auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
      const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 40});
      CHECK(finish_row(decoder, row) == expected);
      CHECK(decoder.counts(row).kv_rows_read == decoder.counts(row).kv_rows_dense);
    }
  }
}

TEST_CASE("decode: a ragged batch gives every sequence the text it has alone") {
  decode_fixture f;
  std::vector<std::vector<std::int32_t>> prompts;
  std::vector<std::vector<std::int32_t>> expected;
  for (int i = 0; i < 5; ++i) {
    prompts.push_back(prompt_of(1 + 17 * i, 10 + static_cast<std::uint64_t>(i)));
    expected.push_back(autoregressive(f, prompts.back(), 20 + 3 * i));
  }
  for (const float top_p : {2.0f, 0.8f}) {
    guided guide(flat_alignment({8}, true), toy_rule(top_p));
    if (top_p < 1.0f) {  // sparse: the reference is the same method, alone
      for (int i = 0; i < 5; ++i) {
        guided own(flat_alignment({8}, true), toy_rule(top_p));
        auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, own, {.draft_length = 3, .prefill_chunk = 32});
        const auto row = decoder.add({
            .prompt = prompts[static_cast<std::size_t>(i)],
            .max_new_tokens = 20 + 3 * i,
        });
        expected[static_cast<std::size_t>(i)] = finish_row(decoder, row);
      }
    }
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide,
                                       {.draft_length = 3, .max_sequences = 5, .prefill_chunk = 32});
    std::vector<std::int32_t> rows;
    for (int i = 0; i < 5; ++i) {
      rows.push_back(decoder.add({
          .prompt = prompts[static_cast<std::size_t>(i)],
          .max_new_tokens = 20 + 3 * i,
      }));
    }
    finish_row(decoder, rows[0]);
    for (std::size_t i = 0; i < 5; ++i) {
      const auto text = decoder.text(rows[i]);
      CHECK(std::vector<std::int32_t>(text.begin(), text.end()) == expected[i]);
    }
  }
}

TEST_CASE("decode: sequences join and leave between rounds without changing the others' text") {
  decode_fixture f;
  const auto first = prompt_of(40, 21);
  const auto second = prompt_of(23, 22);
  const auto third = prompt_of(31, 23);
  for (const std::int32_t page_size : {0, 8}) {
    guided guide(flat_alignment({8}), toy_rule(1.5f));
    auto decoder =
        make_decoder<float>(f.ctx, f.target, f.draft, guide,
                            {.draft_length = 4, .max_sequences = 2, .prefill_chunk = 32, .page_size = page_size});
    const auto go = [](std::int32_t, std::span<const std::int32_t>) { return true; };
    const auto a = decoder.add({.prompt = first, .max_new_tokens = 50});
    decoder.step(go);
    const auto b = decoder.add({.prompt = second, .max_new_tokens = 50});
    CHECK_THROWS_WITH_AS(decoder.add({.prompt = third, .max_new_tokens = 1}),
                         "decode: all 2 rows are taken; remove() one first", contract_error);
    for (int i = 0; i < 3; ++i) decoder.step(go);
    decoder.remove(b);
    const auto c = decoder.add({.prompt = third, .max_new_tokens = 30});
    CHECK(c == b);
    CHECK(finish_row(decoder, a) == autoregressive(f, first, 50));
    CHECK(std::vector<std::int32_t>(decoder.text(c).begin(), decoder.text(c).end()) == autoregressive(f, third, 30));
  }
}

TEST_CASE("decode: nothing behind a stop token is emitted or counted, and the stop inside the budget wins") {
  decode_fixture f;
  const auto prompt = prompt_of(37, 1);
  const auto plain = autoregressive(f, prompt, 40);
  for (std::size_t at = prompt.size(); at < prompt.size() + 12; ++at) {
    const std::int32_t stop = plain[at];
    const auto first = std::find(plain.begin() + static_cast<std::ptrdiff_t>(prompt.size()), plain.end(), stop);
    const auto expected = std::vector<std::int32_t>(plain.begin(), first + 1);
    for (const std::int32_t gamma : {1, 4, 8}) {
      no_guide dense;
      auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = gamma});
      std::vector<std::int32_t> seen = prompt;
      const auto row =
          decoder.add({.prompt = prompt, .max_new_tokens = 40, .stop_tokens = {&stop, 1}, .sampler = {}});
      while (decoder.step([&](std::int32_t, std::span<const std::int32_t> tokens) {
        seen.insert(seen.end(), tokens.begin(), tokens.end());
        return true;
      })) {
      }
      CHECK(seen == expected);
      CHECK(decoder.finish(row) == finish_reason::stop_token);
      const decode_counts& c = decoder.counts(row);
      CHECK(c.emitted == static_cast<std::int64_t>(expected.size() - prompt.size()));
      CHECK(c.accepted + c.rounds == c.emitted + c.discarded);
      CHECK(c.corrected + c.bonus == c.rounds);
    }
  }
}

TEST_CASE("decode: the token limit and the context limit end a text exactly there") {
  decode_fixture f;
  const auto prompt = prompt_of(30, 3);
  for (std::int32_t limit = 0; limit <= 7; ++limit) {
    no_guide dense;
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 4});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = limit});
    CHECK(finish_row(decoder, row).size() == prompt.size() + static_cast<std::size_t>(limit));
    CHECK(decoder.finish(row) == finish_reason::length);
  }
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 4, .max_positions = 40});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 1000});
  const auto text = finish_row(decoder, row);
  CHECK(decoder.finish(row) == finish_reason::context_full);
  CHECK(text.size() == 41);  // 40 cached positions and the token they predict
  const auto expected = autoregressive(f, prompt, 11);
  CHECK(text == expected);
}

TEST_CASE("decode: a row starts over from its prompt, with another draft length, and gives the same text") {
  decode_fixture f;
  const auto prompt = prompt_of(45, 12);
  const auto expected = autoregressive(f, prompt, 30);
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 6, .prefill_chunk = 16});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30, .draft_length = 0});
  CHECK(finish_row(decoder, row) == expected);
  CHECK(decoder.counts(row).proposed == 0);
  for (const std::int32_t gamma : {6, 0, 1, 3}) {
    decoder.rewind(row, {.max_new_tokens = 30, .draft_length = gamma});
    CHECK(finish_row(decoder, row) == expected);
    CHECK((decoder.counts(row).proposed > 0) == (gamma > 0));
  }
  CHECK_THROWS_WITH_AS(decoder.rewind(row, {.draft_length = 7}),
                       "decode: a request's draft_length 7 is over the options' 6", contract_error);
}

TEST_CASE("decode: a callback that returns false cancels its sequence alone") {
  decode_fixture f;
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 2, .max_sequences = 2});
  const auto prompt = prompt_of(12, 4);
  const auto a = decoder.add({.prompt = prompt, .max_new_tokens = 30});
  const auto b = decoder.add({.prompt = prompt, .max_new_tokens = 30});
  while (decoder.step([&](std::int32_t row, std::span<const std::int32_t>) { return row != a; })) {
  }
  CHECK(decoder.finish(a) == finish_reason::cancelled);
  CHECK(decoder.counts(a).rounds == 1);
  CHECK(decoder.text(b).size() == 42);
}

TEST_CASE("decode: below the minimum context and in dense layers everything is read") {
  decode_fixture f;
  const auto prompt = prompt_of(60, 6);
  const auto expected = autoregressive(f, prompt, 30);
  guided guide(flat_alignment(), toy_rule(0.3f));
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, {.draft_length = 3, .min_context = 300});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30});
  CHECK(finish_row(decoder, row) == expected);
  CHECK(decoder.counts(row).dense_rounds == decoder.counts(row).rounds);

  guided layered(flat_alignment(), toy_rule(0.3f));
  auto all_layers = make_decoder<float>(f.ctx, f.target, f.draft, layered, {.draft_length = 3, .dense_layers = 3});
  const auto second = all_layers.add({.prompt = prompt, .max_new_tokens = 30});
  CHECK(finish_row(all_layers, second) == expected);
}

TEST_CASE("decode: rounds that reuse lists and keep every position equal plain decoding") {
  decode_fixture f;
  const auto prompt = prompt_of(50, 2);
  const auto expected = autoregressive(f, prompt, 60);
  for (const bool history : {false, true}) {
    for (const std::int32_t every : {2, 3, 100}) {
      for (const bool sparse_draft : {false, true}) {
        guided guide(flat_alignment({4, 16}, history), toy_rule(1.0f));
        decode_options options{.draft_length = 3, .record_every = every, .prefill_chunk = 32};
        options.sparse_draft = sparse_draft;
        auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
        const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 60});
        CHECK(finish_row(decoder, row) == expected);
        const decode_counts& c = decoder.counts(row);
        CHECK(c.kv_rows_read == c.kv_rows_dense);
        // On the device a recording reads the draft's keys once more, half of their rows.
        const bool reads_keys = std::same_as<decode_fixture::backend, specattn::cuda>;
        if (!sparse_draft) CHECK((c.draft_rows_read > c.draft_rows_dense) == reads_keys);
        CHECK(c.reused_rounds > 0);
        CHECK(c.reused_rounds < c.rounds);
      }
    }
  }
}

TEST_CASE("decode: a round that reuses lists leaves out what the round that selected them did, and nothing since") {
  decode_fixture f;
  const auto prompt = prompt_of(90, 8);
  constexpr std::int32_t gamma = 3, every = 4;
  guided guide(flat_alignment({4}), toy_rule(0.5f));
  decode_options options{.draft_length = gamma, .record_every = every, .prefill_chunk = 32};
  options.sparse_draft = true;
  options.draft_rule = toy_rule(0.6f);
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 120});
  const std::int64_t a_position = std::int64_t{f.draft.shape().layers} * f.draft.shape().kv_heads;
  std::int64_t target = 0, draft = 0;  // left out, by the pass or by each sparse step
  for (int i = 0; i < 16; ++i) {
    const bool records = i % every == 0;
    const auto prefix = static_cast<std::int64_t>(decoder.text(row).size()) - 1;
    REQUIRE(decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; }));
    const decode_counts& c = decoder.last_round().counts;
    CHECK(c.reused_rounds == (records ? 0 : 1));
    if (records) target = c.kv_rows_dense - c.kv_rows_read;
    CHECK(target > 0);
    CHECK(c.kv_rows_dense - c.kv_rows_read == target);
    // A recording reads keys alone: half of a row of every position. Its lists are for the rounds behind it.
    const std::int64_t keys = records ? (prefix * a_position + 1) / 2 : 0;
    const std::int64_t left_out = c.draft_rows_dense - (c.draft_rows_read - keys);
    CHECK(c.draft_steps == (records ? gamma + 1 : gamma));  // a guide's recording asks on the last drafted token, too
    if (i % every == 1) draft = left_out / gamma;
    if (i > 0) CHECK(draft > 0);
    CHECK(left_out == c.draft_steps * draft);
  }
}

TEST_CASE("decode: a sequence that joins, leaves or starts over makes the next round record") {
  decode_fixture f;
  const auto prompt = prompt_of(60, 14);
  guided guide(flat_alignment({4}), toy_rule(0.5f));
  decode_options options{.draft_length = 2, .max_sequences = 2, .record_every = 100, .prefill_chunk = 32};
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
  const auto reused = [&] {
    decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; });
    return decoder.last_round().counts.reused_rounds;
  };
  const auto a = decoder.add({.prompt = prompt, .max_new_tokens = 100});
  CHECK(reused() == 0);
  CHECK(reused() == 1);
  const auto b = decoder.add({.prompt = prompt_of(40, 15), .max_new_tokens = 100});
  CHECK(reused() == 0);
  CHECK(reused() == 2);
  decoder.remove(b);
  const auto c = decoder.add({.prompt = prompt_of(33, 16), .max_new_tokens = 100});
  CHECK(c == b);
  CHECK(reused() == 0);
  CHECK(reused() == 2);
  decoder.remove(c);
  CHECK(reused() == 0);
  decoder.rewind(a, {.max_new_tokens = 50});
  CHECK(reused() == 0);
  CHECK(reused() == 1);
}

TEST_CASE("decode: sampling is reproducible, alone and in a batch") {
  decode_fixture f;
  const auto prompt = prompt_of(30, 9);
  const sampler_options sampler{.temperature = 0.9f, .top_p = 0.95f, .seed = 42};
  std::vector<std::vector<std::int32_t>> texts;
  for (const std::int32_t batch : {1, 3}) {
    no_guide dense;
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 4, .max_sequences = batch});
    std::int32_t row = 0;
    for (std::int32_t i = 0; i < batch; ++i) {
      sampler_options own = sampler;
      if (i + 1 < batch) own.seed = 100 + static_cast<std::uint64_t>(i);
      row = decoder.add({.prompt = prompt, .max_new_tokens = 40, .sampler = own});
    }
    texts.push_back(finish_row(decoder, row));
  }
  CHECK(texts[0] == texts[1]);
  no_guide dense;
  auto other = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 4});
  sampler_options different = sampler;
  different.seed = 43;
  const auto row = other.add({.prompt = prompt, .max_new_tokens = 40, .sampler = different});
  CHECK(finish_row(other, row) != texts[0]);
}

}  // namespace decode_testing
