// Options in random combinations: where every position is kept, the text is plain decoding's whatever they are. For any
// backend; the including file defines `decode_fixture` (decode/cases.hpp).
#pragma once

#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "decode/option_draw.hpp"
#include "decode/problem.hpp"

namespace decode_testing {

/// Seconds that the random test goes on: SPECATTN_RANDOM_SECONDS, else `otherwise`.
inline double random_seconds(double otherwise) {
  const char* given = std::getenv("SPECATTN_RANDOM_SECONDS");
  return given != nullptr ? std::strtod(given, nullptr) : otherwise;
}

/// At once, or in chunks between the rounds of others.
template <class Decoder>
std::int32_t admit_either_way(Decoder& decoder, option_draw& draw, const decode_request& request) {
  if (draw.chance(2)) return decoder.add(request);
  std::int32_t row = -1;
  decoder.add({&request, 1}, {&row, 1});
  return row;
}

/// Decodes prompts that join one by one, in rounds of one guide, and compares each with its plain text.
template <class Guide>
void compare_with_plain(decode_fixture& f, option_draw& draw, const decode_options& options, Guide& guide) {
  constexpr std::size_t kinds = 4;
  static const auto prompts = [] {
    std::vector<std::vector<std::int32_t>> all;
    for (const int length : {1, 23, 60, 130})
      all.push_back(prompt_of(length, 70 + static_cast<std::uint64_t>(length)));
    return all;
  }();
  static const auto plain = [&] {
    std::vector<std::vector<std::int32_t>> all;
    for (const auto& prompt : prompts) {
      no_draft none;
      no_guide dense;
      auto decoder = make_decoder<float>(f.ctx, f.target, none, dense, {.draft_length = 0});
      const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 60});
      while (decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
      }
      all.emplace_back(decoder.text(row).begin(), decoder.text(row).end());
    }
    return all;
  }();
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
  std::vector<std::int32_t> row_of(static_cast<std::size_t>(options.max_sequences), -1);  // which text
  int admitted = 0, finished = 0;
  const int texts = options.max_sequences + 1;
  while (finished < texts) {
    const bool has_room = admitted - finished < options.max_sequences && admitted < texts;
    if (has_room && (admitted == finished || draw.chance(3))) {
      const auto kind = static_cast<std::size_t>(draw.number(0, kinds - 1));
      const auto row = admit_either_way(decoder, draw,
                                        {.prompt = prompts[kind],
                                         .max_new_tokens = draw.number(1, 60),
                                         .draft_length = draw.chance(4) ? draw.number(0, options.draft_length) : -1});
      row_of[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(kind);
      ++admitted;
    }
    decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; });
    for (std::int32_t row = 0; row < options.max_sequences; ++row) {
      std::int32_t& kind = row_of[static_cast<std::size_t>(row)];
      if (kind < 0 || decoder.finish(row) == finish_reason::running) continue;
      const auto text = decoder.text(row);
      const auto& whole = plain[static_cast<std::size_t>(kind)];
      REQUIRE(text.size() <= whole.size());
      const bool same = std::equal(text.begin(), text.end(), whole.begin());
      REQUIRE(same);
      const decode_counts& c = decoder.counts(row);
      REQUIRE(c.accepted + c.rounds == c.emitted + c.discarded);
      REQUIRE(c.kv_rows_read == c.kv_rows_dense);
      REQUIRE(c.draft_failures == 0);
      decoder.remove(row);
      kind = -1;
      ++finished;
    }
  }
}

TEST_CASE("decode: options in random combinations change nothing of a text that reads every position") {
  using clock = std::chrono::steady_clock;
  decode_fixture f;
  const auto end = clock::now() + std::chrono::duration<double>(random_seconds(decode_fixture::seconds));
  std::uint32_t seed = 0;
  for (; seed < 20 || clock::now() < end; ++seed) {
    option_draw draw(seed);
    const decode_options options = draw.options();
    CAPTURE(seed);
    const std::string what = describe(options);
    CAPTURE(what);
    if (draw.chance(4)) {
      no_guide guide;
      compare_with_plain(f, draw, options, guide);
    } else {
      selection_rule rule = toy_rule(1.0f);
      if (draw.chance(3)) rule.rows = combine::unite;
      draft_guide<decode_fixture::backend> guide(flat_alignment({4, 16}, draw.chance(2)), rule);
      compare_with_plain(f, draw, options, guide);
    }
  }
  MESSAGE(seed << " combinations");
}

TEST_CASE("decode: options in random combinations run over a selection, and count no more than dense rounds read") {
  using clock = std::chrono::steady_clock;
  decode_fixture f;
  const auto end = clock::now() + std::chrono::duration<double>(0.5 * random_seconds(decode_fixture::seconds));
  for (std::uint32_t seed = 1000; seed < 1020 || clock::now() < end; ++seed) {
    option_draw draw(seed);
    const decode_options options = draw.options();
    CAPTURE(seed);
    const std::string what = describe(options);
    CAPTURE(what);
    draft_guide<decode_fixture::backend> guide(flat_alignment({8}, draw.chance(2)),
                                               toy_rule(0.1f * static_cast<float>(draw.number(0, 9))));
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
    for (std::int32_t i = 0; i < options.max_sequences; ++i) {
      const auto prompt = prompt_of(draw.number(1, 130), seed + static_cast<std::uint32_t>(i));
      decoder.add({.prompt = prompt,
                   .max_new_tokens = draw.number(1, 60),
                   .sampler = {.temperature = draw.chance(3) ? 0.8f : 0.0f, .seed = seed}});
      decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; });
    }
    while (decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
    }
    for (std::int32_t row = 0; row < options.max_sequences; ++row) {
      const decode_counts& c = decoder.counts(row);
      REQUIRE((decoder.finish(row) == finish_reason::length ||
               (decoder.finish(row) == finish_reason::context_full && options.max_positions > 0)));
      REQUIRE(c.kv_rows_read <= c.kv_rows_dense);
      REQUIRE(c.accepted + c.rounds == c.emitted + c.discarded);
      REQUIRE(c.reused_rounds <= c.rounds);
    }
  }
}

}  // namespace decode_testing
