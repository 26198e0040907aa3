// What is left of a decoder after something of the caller's has thrown, for any backend. The including file defines
// `decode_fixture` (decode/cases.hpp) with
//   fault_stride           of the places at which something could throw, one in so many is tried
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "decode/faults.hpp"
#include "decode/option_draw.hpp"
#include "decode/problem.hpp"

namespace decode_testing {

using text_of_row = std::vector<std::int32_t>;

/// One way to decode. `exact`: the text does not depend on what is drafted, so that the draft may fail too.
struct failure_setting {
  const char* name;
  decode_options options;
  float top_p;  // of the guide; 0: no guide
  bool history;
  bool exact;
};

inline std::vector<failure_setting> failure_settings() {
  const auto base = [] { return decode_options{.draft_length = 3, .max_sequences = 2, .prefill_chunk = 16}; };
  std::vector<failure_setting> all;
  all.push_back({"dense", base(), 0.0f, false, true});
  all.push_back({"keeps every position, with history", base(), 1.0f, true, true});
  all.push_back({"sparse draft, lists reused", base(), 1.0f, false, true});
  all.back().options.sparse_draft = true;
  all.back().options.record_every = 3;
  all.push_back({"refreshed, paged, a dense layer, lists reused", base(), 1.0f, true, true});
  all.back().options.refresh_every = 2;
  all.back().options.page_size = 8;
  all.back().options.dense_layers = 1;
  all.back().options.record_every = 2;
  all.push_back({"over a selection", base(), 0.6f, true, false});
  all.push_back({"over a selection, refreshed", base(), 0.5f, false, false});
  all.back().options.refresh_every = 2;
  return all;
}

/// Three texts in two rows: the third takes the row of the first to end, its prompt cached between rounds; the second
/// starts over once. Everything that throws is done again. Returns the texts as on_tokens was told them, in the order of admission.
template <class Decoder>
std::vector<text_of_row> decode_with_faults(Decoder& decoder, fault_plan& plan, const failure_setting& setting) {
  const text_of_row prompts[] = {prompt_of(37, 41), prompt_of(50, 42), prompt_of(21, 43)};
  const sampler_options drawn{.temperature = 0.9f, .top_k = 20, .seed = 3};
  const std::int32_t lengths[] = {7, 26, 15};
  std::vector<text_of_row> heard(3);
  std::map<std::int32_t, std::size_t> who;  // row -> text
  const auto request = [&](std::size_t i) {
    return decode_request{.prompt = prompts[i],
                          .max_new_tokens = lengths[i],
                          .sampler = i == 1 && !setting.exact ? drawn : sampler_options{}};
  };
  const auto admit = [&](std::size_t i) {
    const auto row =
        persist([&] { return decoder.add(request(i), [&](std::int32_t, std::int32_t) { plan.pass(); }); });
    who[row] = i;
    heard[i] = prompts[i];
    return row;
  };
  const auto step = [&] {
    return persist([&] {
      return decoder.step([&](std::int32_t row, std::span<const std::int32_t> tokens) {
        auto& text = heard[who.at(row)];
        text.insert(text.end(), tokens.begin(), tokens.end());
        plan.pass();
        return true;
      });
    });
  };
  const auto first = admit(0);
  step();
  const auto second = admit(1);
  while (decoder.finish(first) == finish_reason::running) step();
  CHECK(text_of_row(decoder.text(first).begin(), decoder.text(first).end()) == heard[0]);
  decoder.remove(first);
  decoder.rewind(second, request(1));
  heard[1] = prompts[1];
  const decode_request late = request(2);
  std::int32_t third = -1;
  decoder.add({&late, 1}, {&third, 1});
  who[third] = 2;
  heard[2] = prompts[2];
  CHECK(third == first);
  while (step()) {
  }
  for (const auto& [row, i] : who) {
    if (row == first && i == 0) continue;
    CHECK(text_of_row(decoder.text(row).begin(), decoder.text(row).end()) == heard[i]);
  }
  return heard;
}

template <class Use>
void with_decoder(decode_fixture& f, fault_plan& plan, const failure_setting& setting, Use&& use) {
  faulty_model target(f.target, &plan);
  faulty_model draft(f.draft, setting.exact ? &plan : nullptr);
  if (setting.top_p == 0.0f) {
    no_guide guide;
    auto decoder = make_decoder<float>(f.ctx, target, draft, guide, setting.options);
    use(decoder);
  } else {
    draft_guide<decode_fixture::backend> guide(flat_alignment({8}, setting.history), toy_rule(setting.top_p));
    auto decoder = make_decoder<float>(f.ctx, target, draft, guide, setting.options);
    use(decoder);
  }
}

TEST_CASE("decode: whatever throws once, wherever, the texts are what they would have been and no token is lost") {
  decode_fixture f;
  std::int64_t offset = 0;
  for (const failure_setting& setting : failure_settings()) {
    const std::string name = setting.name;
    CAPTURE(name);
    fault_plan none;
    std::vector<text_of_row> wanted;
    with_decoder(f, none, setting, [&](auto& decoder) { wanted = decode_with_faults(decoder, none, setting); });
    REQUIRE(none.seen > 50);
    std::int64_t tried = 0;
    for (std::int64_t at = offset++ % decode_fixture::fault_stride; at < none.seen;
         at += decode_fixture::fault_stride) {
      CAPTURE(at);
      fault_plan plan{.at = at};
      with_decoder(f, plan, setting, [&](auto& decoder) {
        const bool same = decode_with_faults(decoder, plan, setting) == wanted;
        CHECK(same);
      });
      CHECK(plan.struck());
      ++tried;
    }
    CHECK(tried >= 50 / decode_fixture::fault_stride);
  }
}

TEST_CASE("decode: under options in random combinations, too") {
  decode_fixture f;
  int struck = 0;
  for (std::uint32_t seed = 0; seed < 40; ++seed) {
    option_draw draw(seed);
    failure_setting setting{"random", draw.options(), draw.chance(4) ? 0.0f : 1.0f, draw.chance(2), true};
    setting.options.max_sequences = (std::max)(setting.options.max_sequences, 2);
    setting.options.refresh_every = (std::min)(setting.options.refresh_every, 2);
    CAPTURE(seed);
    const std::string what = describe(setting.options);
    CAPTURE(what);
    fault_plan none;
    std::vector<text_of_row> wanted;
    with_decoder(f, none, setting, [&](auto& decoder) { wanted = decode_with_faults(decoder, none, setting); });
    for (int i = 0; i < 6; ++i) {
      fault_plan plan{.at = draw.number(0, static_cast<std::int32_t>(none.seen) - 1)};
      CAPTURE(plan.at);
      with_decoder(f, plan, setting, [&](auto& decoder) {
        const bool same = decode_with_faults(decoder, plan, setting) == wanted;
        CHECK(same);
      });
      struck += plan.struck() ? 1 : 0;  // adaptive rounds are not as many each time
    }
  }
  CHECK(struck > 200);
}

TEST_CASE("decode: a round that is given up leaves counts, lengths and lists as they were") {
  decode_fixture f;
  fault_plan plan;
  faulty_model target(f.target, &plan);
  draft_guide<decode_fixture::backend> guide(flat_alignment({8}, true), toy_rule(0.6f));
  decode_options options{.draft_length = 3, .max_sequences = 2, .record_every = 2};
  options.sparse_draft = true;
  const auto run = [&](bool fails) {
    auto decoder = make_decoder<float>(f.ctx, target, f.draft, guide, options);
    const auto row = decoder.add({.prompt = prompt_of(60, 45), .max_new_tokens = 30});
    const auto go = [](std::int32_t, std::span<const std::int32_t>) { return true; };
    for (std::int64_t round = 0; decoder.finish(row) == finish_reason::running; ++round) {
      const decode_counts before = decoder.counts(row);
      const auto cached = decoder.target_cache().length(row), drafted = decoder.draft_cache().length(row);
      plan.at = fails ? plan.seen + round % 5 : -1;
      try {
        decoder.step(go);
      } catch (const fault&) {
        CHECK(decoder.counts(row).rounds == before.rounds);
        CHECK(decoder.counts(row).draft_rows_read == before.draft_rows_read);
        CHECK(decoder.target_cache().length(row) == cached);
        CHECK(decoder.draft_cache().length(row) <= cached);
        CHECK(decoder.draft_cache().length(row) >= drafted);
        plan.at = -1;
        decoder.step(go);
      }
    }
    const auto& c = decoder.counts(row);
    text_of_row result(decoder.text(row).begin(), decoder.text(row).end());
    for (const std::int64_t count : {c.rounds, c.reused_rounds, c.kv_rows_read, c.kv_rows_dense, c.draft_rows_read,
                                     c.draft_rows_dense, c.accepted, c.emitted, c.draft_failures})
      result.push_back(static_cast<std::int32_t>(count));
    return result;
  };
  CHECK(run(true) == run(false));
}

/// Throws in every pass.
struct broken_draft {
  model_shape of;
  model_shape shape() const { return of; }
  template <class Context, class Batch, class Attention, class Logits>
  void forward(Context&, const Batch&, Attention&, Logits) {
    throw fault();
  }
};

TEST_CASE("decode: a draft that fails in every round costs its tokens alone, and is counted") {
  decode_fixture f;
  broken_draft draft{f.draft.shape()};
  const auto prompt = prompt_of(40, 46);
  no_draft none;
  no_guide dense;
  auto plain = make_decoder<float>(f.ctx, f.target, none, dense, {.draft_length = 0});
  const auto go = [](std::int32_t, std::span<const std::int32_t>) { return true; };
  const auto plain_row = plain.add({.prompt = prompt, .max_new_tokens = 20});
  while (plain.step(go)) {
  }
  draft_guide<decode_fixture::backend> guide(flat_alignment(), toy_rule(0.3f));
  auto decoder = make_decoder<float>(f.ctx, f.target, draft, guide, {.draft_length = 3});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 20});
  while (decoder.step(go)) {
  }
  CHECK(text_of_row(decoder.text(row).begin(), decoder.text(row).end()) ==
        text_of_row(plain.text(plain_row).begin(), plain.text(plain_row).end()));
  const decode_counts& c = decoder.counts(row);
  CHECK(c.draft_failures == c.rounds - 1);  // the last round has one token left to decide and drafts nothing
  CHECK(c.proposed == 0);
  CHECK(c.dense_rounds == c.rounds);
  CHECK_THROWS_AS(std::rethrow_exception(decoder.draft_failure()), fault);
}

TEST_CASE("decode: on_tokens may add, remove and rewind; every other call from inside a call is refused by name") {
  decode_fixture f;
  const text_of_row prompts[] = {prompt_of(30, 47), prompt_of(20, 48), prompt_of(25, 49)};
  no_guide dense;
  const auto go = [](std::int32_t, std::span<const std::int32_t>) { return true; };
  const auto alone = [&](std::size_t i, std::int32_t tokens) {
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 3});
    const auto row = decoder.add({.prompt = prompts[i], .max_new_tokens = tokens});
    while (decoder.step(go)) {
    }
    return text_of_row(decoder.text(row).begin(), decoder.text(row).end());
  };
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 3, .max_sequences = 3});
  const auto a = decoder.add({.prompt = prompts[0], .max_new_tokens = 30});
  const auto b = decoder.add({.prompt = prompts[1], .max_new_tokens = 40});
  std::optional<std::int32_t> c;
  bool rewound = false;
  while (decoder.step([&](std::int32_t row, std::span<const std::int32_t>) {
    CHECK_THROWS_WITH_AS(decoder.step(go), "decode: step() was called from inside on_tokens; let step() return first",
                         contract_error);
    if (row == a && !c) {
      decoder.remove(a);
      c = decoder.add({.prompt = prompts[2], .max_new_tokens = 20}, [&](std::int32_t, std::int32_t) {
        CHECK_THROWS_WITH_AS(decoder.remove(b), doctest::Contains("decode: remove() was called while another call"),
                             contract_error);
        CHECK_THROWS_WITH_AS(decoder.step(go), doctest::Contains("decode: step() was called while another call"),
                             contract_error);
      });
      CHECK(*c == a);
      return false;  // of a text that is gone: cancels nothing
    }
    if (row == b && !rewound) {
      rewound = true;
      decoder.rewind(b, {.max_new_tokens = 33});
    }
    return true;
  })) {
  }
  CHECK(text_of_row(decoder.text(b).begin(), decoder.text(b).end()) == alone(1, 33));
  CHECK(text_of_row(decoder.text(*c).begin(), decoder.text(*c).end()) == alone(2, 20));
  CHECK(decoder.finish(*c) == finish_reason::length);
}

TEST_CASE("decode: a rewind that is refused changes nothing") {
  decode_fixture f;
  no_guide dense;
  const auto prompt = prompt_of(30, 50);
  const auto go = [](std::int32_t, std::span<const std::int32_t>) { return true; };
  text_of_row texts[2];
  for (const bool refused : {false, true}) {
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 3});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30});
    for (int i = 0; i < 3; ++i) decoder.step(go);
    if (refused) CHECK_THROWS_AS(decoder.rewind(row, {.max_new_tokens = 30, .draft_length = 9}), contract_error);
    while (decoder.step(go)) {
    }
    texts[refused].assign(decoder.text(row).begin(), decoder.text(row).end());
  }
  CHECK(texts[0] == texts[1]);
}

TEST_CASE("decode: one guide serves two decoders of different sizes") {
  decode_fixture f;
  const auto first_prompt = prompt_of(60, 51), second_prompt = prompt_of(30, 52);
  const auto rule = toy_rule(0.6f);
  const auto alone = [&](const text_of_row& prompt, const decode_options& options) {
    draft_guide<decode_fixture::backend> own(flat_alignment({8}, true), rule);
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, own, options);
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 40});
    while (decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
    }
    return text_of_row(decoder.text(row).begin(), decoder.text(row).end());
  };
  const decode_options large{.draft_length = 4, .max_sequences = 2}, small{.draft_length = 1, .max_positions = 80};
  draft_guide<decode_fixture::backend> shared(flat_alignment({8}, true), rule);
  auto first = make_decoder<float>(f.ctx, f.target, f.draft, shared, large);
  const auto a = first.add({.prompt = first_prompt, .max_new_tokens = 40});
  const auto go = [](std::int32_t, std::span<const std::int32_t>) { return true; };
  first.step(go);
  auto second = make_decoder<float>(f.ctx, f.target, f.draft, shared, small);
  const auto b = second.add({.prompt = second_prompt, .max_new_tokens = 40});
  for (bool more = true; more;) {
    more = first.step(go);
    more = second.step(go) || more;
  }
  CHECK(text_of_row(first.text(a).begin(), first.text(a).end()) == alone(first_prompt, large));
  CHECK(text_of_row(second.text(b).begin(), second.text(b).end()) == alone(second_prompt, small));
}

template <class Model>
struct short_draft {
  Model* inner;
  std::int32_t reach;
  model_shape shape() const {
    model_shape of = inner->shape();
    of.max_positions = reach;
    return of;
  }
  template <class Context, class Batch, class Attention, class Logits>
  void forward(Context& ctx, const Batch& batch, Attention& attention, Logits logits) {
    inner->forward(ctx, batch, attention, logits);
  }
};

TEST_CASE("decode: a draft with a shorter context drafts as far as it reaches") {
  decode_fixture f;
  const auto prompt = prompt_of(40, 53);
  const auto go = [](std::int32_t, std::span<const std::int32_t>) { return true; };
  text_of_row wanted;
  for (const std::int32_t reach : {320, 70, 41, 40, 39, 10, 1}) {
    CAPTURE(reach);
    short_draft<decltype(f.draft)> draft{&f.draft, reach};
    draft_guide<decode_fixture::backend> guide(flat_alignment(), toy_rule(1.0f));
    auto decoder = make_decoder<float>(f.ctx, f.target, draft, guide, {.draft_length = 3, .prefill_chunk = 16});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 60});
    while (decoder.step(go)) {
    }
    const text_of_row text(decoder.text(row).begin(), decoder.text(row).end());
    if (wanted.empty()) wanted = text;
    CHECK(text == wanted);
    const decode_counts& c = decoder.counts(row);
    CHECK((c.proposed > 0) == (reach >= 40));
    if (reach < 100) CHECK(c.rounds > 20 + (70 - reach) / 4);
    CHECK(c.draft_failures == 0);
  }
}

}  // namespace decode_testing
