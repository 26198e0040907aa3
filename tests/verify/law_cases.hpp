// What verify() promises about the law of the emitted tokens, for any backend. Needs `verify_fixture`, as
// verify/cases.hpp does.
#pragma once

#include "verify/cases.hpp"

namespace verify_testing {

/// A pair of toy models: the next token's logits depend on the last token alone.
struct toy_pair {
  std::vector<row> target;  // [vocab, vocab]
  std::vector<row> draft;   // [vocab, vocab]
};

inline toy_pair make_pair(std::int32_t vocab, unsigned seed, float disagreement) {
  std::mt19937 random(seed);
  toy_pair pair;
  for (std::int32_t v = 0; v < vocab; ++v) {
    pair.target.push_back(random_row(vocab, random, 1.5f));
    row draft = random_row(vocab, random, disagreement);
    for (std::size_t i = 0; i < draft.size(); ++i) draft[i] += disagreement < 10.0f ? pair.target.back()[i] : 0.0f;
    pair.draft.push_back(draft);
  }
  return pair;
}

struct history {
  std::vector<tokens> text;          // of each sequence, `length` tokens or a few more
  std::vector<outcome> first_round;  // of each sequence
  std::int64_t drafted = 0, accepted = 0;
};

/// Writes at least `length` tokens after token 0 for every seed, in rounds of `gamma` drafted tokens.
template <class Fixture>
history write(Fixture& fixture, const toy_pair& pair, sampler_options sampler, sampler_options draft_sampler,
              std::size_t sequences, std::size_t gamma, std::size_t length) {
  history out;
  out.text.resize(sequences);
  std::vector<std::size_t> open(sequences);
  std::iota(open.begin(), open.end(), std::size_t{0});
  while (!open.empty()) {
    std::vector<turn> turns(open.size());
    for (std::size_t s = 0; s < open.size(); ++s) {
      const tokens& text = out.text[open[s]];
      turns[s].sampler = sampler;
      turns[s].sampler.seed = open[s] * 7919 + 13;
      turns[s].position = static_cast<std::int64_t>(text.size());
      turns[s].target.push_back(pair.target[static_cast<std::size_t>(text.empty() ? 0 : text.back())]);
    }
    for (std::size_t step = 0; step < gamma; ++step) {
      std::vector<row> logits;
      std::vector<sampler_options> samplers;
      std::vector<std::int64_t> positions;
      for (std::size_t s = 0; s < open.size(); ++s) {
        const tokens& text = out.text[open[s]];
        const std::int32_t last = step > 0 ? turns[s].drafted.back() : text.empty() ? 0 : text.back();
        logits.push_back(pair.draft[static_cast<std::size_t>(last)]);
        samplers.push_back(draft_sampler);
        samplers.back().seed = turns[s].sampler.seed;
        positions.push_back(turns[s].position + static_cast<std::int64_t>(step));
      }
      const drawn got = draw(fixture, logits, samplers, positions, random_use::draft);
      for (std::size_t s = 0; s < open.size(); ++s) {
        turns[s].draft.push_back(got.probabilities[s]);
        turns[s].drafted.push_back(got.token[s]);
        turns[s].target.push_back(pair.target[static_cast<std::size_t>(got.token[s])]);
      }
    }
    const auto outcomes = judge(fixture, turns);
    if (out.first_round.empty()) out.first_round = outcomes;
    std::vector<std::size_t> still;
    for (std::size_t s = 0; s < open.size(); ++s) {
      tokens& text = out.text[open[s]];
      text.insert(text.end(), turns[s].drafted.begin(), turns[s].drafted.begin() + outcomes[s].accepted);
      text.push_back(outcomes[s].next);
      out.drafted += static_cast<std::int64_t>(gamma);
      out.accepted += outcomes[s].accepted;
      if (text.size() < length) still.push_back(open[s]);
    }
    open = still;
  }
  return out;
}

inline void follows(const std::vector<long long>& counts, const std::vector<double>& law) {
  const auto test = oracle::compare_law(counts, law);
  CHECK_FALSE(test.impossible);
  CHECK(test.statistic < test.bound);
}

/// The law of positions 0 … length - 1 and of each pair of neighbours is the target's own chain.
inline void follows_chain(const history& got, const toy_pair& pair, const sampler_options& sampler,
                          std::size_t length) {
  const std::size_t vocab = pair.target.size();
  std::vector<std::vector<double>> step;
  for (const row& logits : pair.target) step.push_back(law_of(logits, sampler));
  std::vector<double> marginal = step[0];
  for (std::size_t position = 0; position < length; ++position) {
    CAPTURE(position);
    std::vector<long long> single(vocab), pairs(vocab * vocab);
    for (const tokens& text : got.text) {
      ++single[static_cast<std::size_t>(text[position])];
      if (position > 0) {
        ++pairs[static_cast<std::size_t>(text[position - 1]) * vocab + static_cast<std::size_t>(text[position])];
      }
    }
    if (position > 0) {
      std::vector<double> next(vocab), joint(vocab * vocab);
      for (std::size_t a = 0; a < vocab; ++a) {
        for (std::size_t b = 0; b < vocab; ++b) {
          joint[a * vocab + b] = marginal[a] * step[a][b];
          next[b] += joint[a * vocab + b];
        }
      }
      follows(pairs, joint);
      marginal = next;
    }
    follows(single, marginal);
  }
}

TEST_CASE_TEMPLATE("verify: emitted tokens and pairs follow the target's law at every position", Fixture,
                   verify_fixture) {
  struct setting {
    float disagreement, temperature, draft_temperature;
    std::int32_t top_k;
    float top_p, min_p;
  };
  constexpr std::size_t gamma = 3;
  for (const setting& s : {setting{0.7f, 1.0f, 1.0f, 0, 1.0f, 0.0f},      // near
                           setting{20.0f, 1.0f, 1.0f, 0, 1.0f, 0.0f},     // unrelated, and nearly one-hot
                           setting{1.0f, 0.7f, 1.3f, 0, 0.9f, 0.0f},      // different temperatures, nucleus
                           setting{1.0f, 1.2f, 1.2f, 4, 1.0f, 0.0f},      // top-k
                           setting{1.0f, 0.9f, 0.9f, 6, 0.85f, 0.1f}}) {  // all of them
    CAPTURE(s.disagreement);
    CAPTURE(s.temperature);
    CAPTURE(s.top_k);
    Fixture fixture;
    const toy_pair pair = make_pair(9, 77, s.disagreement);
    auto sampler = hot(0, s.temperature);
    sampler.top_k = s.top_k;
    sampler.top_p = s.top_p;
    sampler.min_p = s.min_p;
    auto draft_sampler = sampler;
    draft_sampler.temperature = s.draft_temperature;
    const history got = write(fixture, pair, sampler, draft_sampler, 12000, gamma, gamma + 2);
    follows_chain(got, pair, sampler, gamma + 2);
    CHECK(got.accepted > 0);
    CHECK(got.accepted < got.drafted);
  }
}

TEST_CASE_TEMPLATE("verify: the bonus token follows the target's law after its prefix", Fixture, verify_fixture) {
  Fixture fixture;
  const toy_pair pair = make_pair(7, 5, 0.4f);
  const auto sampler = hot(0, 0.9f);
  constexpr std::size_t gamma = 2;
  const history got = write(fixture, pair, sampler, sampler, 20000, gamma, gamma + 1);
  std::vector<std::vector<long long>> counts(7, std::vector<long long>(7));
  for (std::size_t s = 0; s < got.text.size(); ++s) {
    if (got.first_round[s].accepted != static_cast<std::int32_t>(gamma)) continue;
    ++counts[static_cast<std::size_t>(got.text[s][gamma - 1])][static_cast<std::size_t>(got.text[s][gamma])];
  }
  for (std::size_t last = 0; last < 7; ++last) follows(counts[last], law_of(pair.target[last], sampler));
}

TEST_CASE_TEMPLATE("verify: a draft equal to the target is always accepted", Fixture, verify_fixture) {
  Fixture fixture;
  toy_pair pair = make_pair(50, 6, 1.0f);
  pair.draft = pair.target;
  auto sampler = hot(0, 0.8f);
  for (const float top_p : {1.0f, 0.9f}) {
    sampler.top_p = top_p;
    const history got = write(fixture, pair, sampler, sampler, 3000, 4, 10);
    CHECK(got.accepted == got.drafted);
  }
}

TEST_CASE_TEMPLATE("verify: a token the target excludes is never emitted, however sure the draft", Fixture,
                   verify_fixture) {
  Fixture fixture;
  std::vector<turn> turns;
  for (std::uint64_t seed = 0; seed < 4000; ++seed) {
    turns.push_back({{{1, -infinite, 0.5f, -60}, {0, 0, 0, 0}}, {{0, 1, 0, 0}}, {1}, hot(seed), 0});
  }
  for (const outcome& one : judge(fixture, turns)) {
    CHECK(one.accepted == 0);
    CHECK((one.next == 0 || one.next == 2));
  }
}

TEST_CASE_TEMPLATE("verify: without a usable draft distribution the target's own law is emitted", Fixture,
                   verify_fixture) {
  Fixture fixture;
  const row logits{0.3f, 1.0f, -0.5f, 0.1f};
  for (const row& draft : {row(4, 0.0f), row(4, nan_logit), row{1, 0, 1, 1}, row(4, 1.0f)}) {
    std::vector<turn> turns;
    for (std::uint64_t seed = 0; seed < 8000; ++seed) {
      turns.push_back({{logits, logits}, {draft}, {1}, hot(seed), 0});
    }
    std::vector<long long> counts(4);
    bool drawn_from_residual = false;
    for (const outcome& one : judge(fixture, turns)) {
      CHECK(one.next >= 0);
      CHECK(one.next < 4);
      if (one.accepted == 0) ++counts[static_cast<std::size_t>(one.next)];
      drawn_from_residual = drawn_from_residual || (draft[0] == 1.0f && draft[1] == 0.0f);
    }
    if (drawn_from_residual) {
      CHECK(counts == std::vector<long long>{0, 8000, 0, 0});  // all the residual there is
    } else {
      follows(counts, law_of(logits, hot(0)));
    }
  }
}

TEST_CASE_TEMPLATE("verify: a sequence's outcome is the same alone and in a ragged batch", Fixture, verify_fixture) {
  std::mt19937 random(31);
  Fixture fixture;
  std::vector<turn> turns;
  for (int s = 0; s < 24; ++s) {
    turn one;
    one.sampler = hot(random(), s % 3 == 0 ? 0.0f : 0.9f);
    one.sampler.top_p = s % 2 == 0 ? 1.0f : 0.9f;
    one.position = static_cast<std::int64_t>(random());
    const int drafted = s % 6;
    one.target.push_back(random_row(97, random));
    for (int d = 0; d < drafted; ++d) {
      row draft_logits = one.target.back();
      for (float& logit : draft_logits) logit += 0.3f * std::normal_distribution<float>()(random);
      auto got = draw(fixture, {draft_logits}, {one.sampler}, {one.position + d}, random_use::draft);
      if (!one.sampler.greedy()) one.draft.push_back(got.probabilities[0]);
      one.drafted.push_back(got.token[0]);
      one.target.push_back(random_row(97, random));
    }
    turns.push_back(one);
  }
  const auto together = judge(fixture, turns);
  std::int32_t accepted = 0;
  for (std::size_t s = 0; s < turns.size(); ++s) {
    CAPTURE(s);
    CHECK(judge(fixture, {turns[s]})[0] == together[s]);
    accepted += together[s].accepted;
  }
  CHECK(accepted > 0);
  std::reverse(turns.begin(), turns.end());
  auto reversed = judge(fixture, turns);
  std::reverse(reversed.begin(), reversed.end());
  CHECK(reversed == together);
}

TEST_CASE_TEMPLATE("verify: a round that drafts nothing emits what plain sampling emits", Fixture, verify_fixture) {
  std::mt19937 random(41);
  Fixture fixture;
  for (int i = 0; i < 50; ++i) {
    const row logits = random_row(211, random);
    const auto sampler = hot(random());
    const auto plain = draw(fixture, {logits}, {sampler}, {i}, random_use::emit);
    CHECK(judge(fixture, {turn{{logits}, {}, {}, sampler, i}})[0] == outcome{0, plain.token[0]});
  }
}

TEST_CASE_TEMPLATE("sample and verify: read logits and probabilities of any stride", Fixture, verify_fixture) {
  using specattn::view;
  using B = typename Fixture::backend;
  Fixture fixture;
  auto& ctx = fixture.context();
  std::mt19937 random(2);
  constexpr std::ptrdiff_t vocab = 300;
  const row logits = random_row(vocab, random), other = random_row(vocab, random);
  row wide(2 * vocab);
  for (std::size_t i = 0; i < vocab; ++i) {
    wide[2 * i] = logits[i];
    wide[2 * i + 1] = other[i];
  }
  const auto wide_on = fixture.upload(wide);
  for (const float temperature : {0.0f, 1.0f}) {
    const std::vector<sampler_options> samplers(2, hot(5, temperature));
    const std::vector<std::int64_t> positions{3, 4};
    const auto want = draw(fixture, {logits, other}, samplers, positions, random_use::draft);
    ctx.reserve_workspace(specattn::verify_workspace_bytes(ctx, 2, vocab));
    const auto out_on = fixture.upload(row(2 * vocab, -1.0f));
    const auto tokens_on = fixture.upload(tokens(2));
    const auto samplers_on = fixture.upload(samplers);
    const auto positions_on = fixture.upload(positions);
    specattn::sample<B>(ctx, view<const float, 2, B>(wide_on.data(), {2, vocab}, {1, 2}),
                        view<const sampler_options, 1, B>(samplers_on.data(), {2}),
                        view<const std::int64_t, 1, B>(positions_on.data(), {2}), random_use::draft,
                        view<float, 2, B>(out_on.data(), {2, vocab}, {1, 2}),
                        view<std::int32_t, 1, B>(tokens_on.data(), {2}));
    CHECK(fixture.download(tokens_on) == want.token);
    const row out = fixture.download(out_on);
    for (std::size_t i = 0; i < vocab; ++i) REQUIRE(out[2 * i + 1] == want.probabilities[1][i]);

    const auto plain = judge(fixture, {turn{{logits, other}, {want.probabilities[1]}, {7}, samplers[0], 3}})[0];
    const auto offsets = fixture.upload(tokens{0, 2}), drafted = fixture.upload(tokens{7});
    const auto accepted = fixture.upload(tokens{stale}), next = fixture.upload(tokens{stale});
    specattn::verify_args<B> args;
    args.target_logits = {wide_on.data(), {2, vocab}, {1, 2}};
    args.draft_probabilities = {out_on.data() + 1, {1, vocab}, {1, 2}};
    args.drafted = {drafted.data(), {1}};
    args.slot_offsets = {offsets.data(), {2}};
    args.samplers = {samplers_on.data(), {1}};
    args.positions = {positions_on.data(), {1}};
    args.accepted = {accepted.data(), {1}};
    args.next_token = {next.data(), {1}};
    specattn::verify(ctx, args);
    CHECK(outcome{fixture.download(accepted)[0], fixture.download(next)[0]} == plain);
  }
}

TEST_CASE_TEMPLATE("verify: a negative draft probability counts as zero", Fixture, verify_fixture) {
  Fixture fixture;
  std::vector<turn> turns;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    turns.push_back({{{1, 1, -infinite}, {0, 0, 0}}, {{-1e30f, 1, 0}}, {1}, hot(seed), 0});
  }
  for (const outcome& one : judge(fixture, turns)) CHECK((one.accepted == 1 || one.next == 0));
}

}  // namespace verify_testing
