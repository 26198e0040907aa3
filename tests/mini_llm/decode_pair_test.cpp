// The loop on the embedded pair: every exact way of decoding gives the golden greedy text.
#include <doctest/doctest.h>

#include <cstdint>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "commands/session.hpp"
#include "golden.hpp"
#include "input_error.hpp"
#include "model/engine.hpp"
#include "specattn/error.hpp"

namespace {

using mini_llm::guide_kind;

const auto quiet = [](std::int32_t, std::int32_t) {};
const auto go_on = [](std::int32_t, std::span<const std::int32_t>) { return true; };

mini_llm::session open_pair(const std::string& guide, const std::string& kv) {
  mini_llm::session_options options;
  options.model = source_path("examples/models/books-7m");
  options.draft = source_path("examples/models/books-1m");
  options.guide = guide;
  options.kv = kv;
  options.threads = 2;
  options.decode.max_positions = 512;
  options.decode.draft_length = 8;
  return mini_llm::open_session(options);
}

std::vector<std::int32_t> continuation(const mini_llm::engine& engine, std::int32_t row, std::size_t prompt) {
  const auto text = engine.text(row);
  return {text.begin() + static_cast<std::ptrdiff_t>(prompt), text.end()};
}

}  // namespace

TEST_CASE("decode: the golden greedy text, plainly and by dense speculation with every draft length") {
  const golden_values golden("books-7m");
  const std::vector<std::int32_t> prompt = golden.ids("prompt_ids");
  const std::vector<std::int32_t> expected = golden.ids("greedy_ids");
  const mini_llm::session pair = open_pair("none", "f32");
  const auto engine = pair.make(pair.guide, pair.decode);
  specattn::decode_request request{.prompt = prompt, .max_new_tokens = static_cast<std::int32_t>(expected.size())};
  const std::int32_t row = engine->add(request, quiet);
  for (std::int32_t gamma = 0; gamma <= 8; ++gamma) {
    CAPTURE(gamma);
    request.draft_length = gamma;
    engine->rewind(row, request);
    while (engine->step(go_on)) {
    }
    CHECK(continuation(*engine, row, prompt.size()) == expected);
    CHECK((engine->counts(row).accepted > 0) == (gamma > 0));
  }
}

TEST_CASE("decode: keeping the whole mass gives the golden greedy text, with a sparse draft and history too") {
  const golden_values golden("books-7m");
  const std::vector<std::int32_t> prompt = golden.ids("prompt_ids");
  const std::vector<std::int32_t> expected = golden.ids("greedy_ids");
  mini_llm::session pair = open_pair("draft", "f32");
  pair.guide.rule.top_p = 1.0f;
  pair.decode.sparse_draft = true;
  pair.decode.record_steps = 1;
  const auto engine = pair.make(pair.guide, pair.decode);
  const specattn::decode_request request{.prompt = prompt,
                                         .max_new_tokens = static_cast<std::int32_t>(expected.size())};
  const std::int32_t row = engine->add(request, quiet);
  while (engine->step(go_on)) {
  }
  CHECK(continuation(*engine, row, prompt.size()) == expected);
}

TEST_CASE("decode: ragged prompts in a batch of f16 caches give the text each gives alone") {
  const golden_values golden("books-7m");
  const std::vector<std::int32_t> prompt = golden.ids("prompt_ids");
  mini_llm::session pair = open_pair("none", "f16");
  pair.decode.draft_length = 4;
  std::vector<std::vector<std::int32_t>> alone;
  const std::size_t lengths[] = {1, 100, 256};
  for (const std::size_t length : lengths) {
    const auto engine = pair.make(pair.guide, pair.decode);
    const std::int32_t row = engine->add({.prompt = std::span(prompt).first(length), .max_new_tokens = 24}, quiet);
    while (engine->step(go_on)) {
    }
    alone.push_back(continuation(*engine, row, length));
  }
  pair.decode.max_sequences = 3;
  const auto engine = pair.make(pair.guide, pair.decode);
  for (const std::size_t length : lengths) {
    engine->add({.prompt = std::span(prompt).first(length), .max_new_tokens = 24}, quiet);
  }
  while (engine->step(go_on)) {
  }
  for (std::int32_t row = 0; row < 3; ++row) {
    CHECK(continuation(*engine, row, lengths[row]) == alone[static_cast<std::size_t>(row)]);
  }
}

TEST_CASE("session: what does not fit together is refused by name") {
  CHECK_THROWS_WITH_AS(open_pair("best", "f16"), "guide 'best' is none of none, draft, paper, window, quest, oracle",
                       mini_llm::input_error);
  CHECK_THROWS_WITH_AS(open_pair("none", "f8"), "key/value type 'f8' is none of f16, bf16, f32",
                       mini_llm::input_error);
  mini_llm::session_options swapped;
  swapped.model = source_path("examples/models/books-1m");
  swapped.draft = source_path("examples/models/books-7m");
  swapped.alignment = source_path("examples/models/alignment.json");
  CHECK_THROWS_AS(mini_llm::open_session(swapped), specattn::contract_error);
  swapped.alignment.clear();
  swapped.guide = "draft";
  CHECK_THROWS_AS(mini_llm::open_session(swapped), mini_llm::input_error);
}
