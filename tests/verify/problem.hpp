// Sampling and verification on host data: what the tests of every backend state and solve.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "oracle/verify_oracle.hpp"
#include "specattn/verify.hpp"

namespace verify_testing {

using specattn::no_token;
using specattn::random_use;
using specattn::sampler_options;
using row = std::vector<float>;
using tokens = std::vector<std::int32_t>;

constexpr std::int32_t stale = 0x5a5a5a5a;  // what an output holds before a call

inline sampler_options hot(std::uint64_t seed, float temperature = 1.0f) {
  sampler_options options;
  options.temperature = temperature;
  options.seed = seed;
  return options;
}

inline row random_row(std::int32_t vocab, std::mt19937& random, float spread = 2.0f) {
  std::normal_distribution<float> normal(0.0f, spread);
  row logits(static_cast<std::size_t>(vocab));
  for (float& logit : logits) logit = normal(random);
  return logits;
}

inline std::vector<double> law_of(const row& logits, const sampler_options& options) {
  return oracle::sampled_law(logits, options.temperature, options.top_k, options.top_p, options.min_p);
}

struct drawn {
  tokens token;
  std::vector<row> probabilities;
};

/// sample() over rows of equal length, each with its own sampler and position.
template <class Fixture>
drawn draw(Fixture& fixture, const std::vector<row>& logits, const std::vector<sampler_options>& samplers,
           const std::vector<std::int64_t>& positions, random_use use) {
  using specattn::view;
  using backend = typename Fixture::backend;
  const auto rows = static_cast<std::ptrdiff_t>(logits.size());
  const auto vocab = rows > 0 ? static_cast<std::ptrdiff_t>(logits[0].size()) : 0;
  row flat;
  for (const row& one : logits) flat.insert(flat.end(), one.begin(), one.end());
  auto& ctx = fixture.context();
  ctx.reserve_workspace(specattn::verify_workspace_bytes(ctx, rows, vocab));
  fixture.soil_workspace();
  const auto in = fixture.upload(flat);
  const auto options = fixture.upload(samplers);
  const auto where = fixture.upload(positions);
  const auto out = fixture.upload(row(flat.size(), -1.0f));
  const auto token = fixture.upload(tokens(logits.size(), stale));
  specattn::sample<backend>(ctx, view<const float, 2, backend>(in.data(), {rows, vocab}),
                            view<const sampler_options, 1, backend>(options.data(), {rows}),
                            view<const std::int64_t, 1, backend>(where.data(), {rows}), use,
                            view<float, 2, backend>(out.data(), {rows, vocab}),
                            view<std::int32_t, 1, backend>(token.data(), {rows}));
  drawn result{fixture.download(token), {}};
  const row all = fixture.download(out);
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    result.probabilities.emplace_back(all.begin() + r * vocab, all.begin() + (r + 1) * vocab);
  }
  return result;
}

/// One sequence of a round. target has one row more than drafted; draft is empty where the sampler is greedy.
struct turn {
  std::vector<row> target;
  std::vector<row> draft;
  tokens drafted;
  sampler_options sampler;
  std::int64_t position = 0;
};

struct outcome {
  std::int32_t accepted = stale;
  std::int32_t next = stale;
  bool operator==(const outcome&) const = default;
};

/// verify() over a ragged batch.
template <class Fixture>
std::vector<outcome> judge(Fixture& fixture, const std::vector<turn>& turns) {
  using backend = typename Fixture::backend;
  const auto vocab = turns.empty() ? std::ptrdiff_t{0} : static_cast<std::ptrdiff_t>(turns[0].target[0].size());
  row target, draft;
  tokens drafted, offsets{0};
  std::vector<sampler_options> samplers;
  std::vector<std::int64_t> positions;
  bool any_draft = false;
  for (const turn& one : turns) {
    for (const row& logits : one.target) target.insert(target.end(), logits.begin(), logits.end());
    for (std::size_t d = 0; d < one.drafted.size(); ++d) {
      if (one.draft.empty()) {
        draft.insert(draft.end(), static_cast<std::size_t>(vocab), std::numeric_limits<float>::quiet_NaN());
      } else {
        any_draft = true;
        draft.insert(draft.end(), one.draft[d].begin(), one.draft[d].end());
      }
    }
    drafted.insert(drafted.end(), one.drafted.begin(), one.drafted.end());
    offsets.push_back(offsets.back() + static_cast<std::int32_t>(one.target.size()));
    samplers.push_back(one.sampler);
    positions.push_back(one.position);
  }
  const auto sequences = static_cast<std::ptrdiff_t>(turns.size()), slots = std::ptrdiff_t{offsets.back()};
  auto& ctx = fixture.context();
  ctx.reserve_workspace(specattn::verify_workspace_bytes(ctx, slots, vocab));
  fixture.soil_workspace();
  const auto target_on = fixture.upload(target), draft_on = fixture.upload(draft);
  const auto drafted_on = fixture.upload(drafted), offsets_on = fixture.upload(offsets);
  const auto samplers_on = fixture.upload(samplers);
  const auto positions_on = fixture.upload(positions);
  const auto accepted_on = fixture.upload(tokens(turns.size(), stale)),
             next_on = fixture.upload(tokens(turns.size(), stale));
  specattn::verify_args<backend> args;
  args.target_logits = {target_on.data(), {slots, vocab}};
  if (any_draft) args.draft_probabilities = {draft_on.data(), {slots - sequences, vocab}};
  args.drafted = {drafted_on.data(), {static_cast<std::ptrdiff_t>(drafted.size())}};
  args.slot_offsets = {offsets_on.data(), {sequences + 1}};
  args.samplers = {samplers_on.data(), {sequences}};
  args.positions = {positions_on.data(), {sequences}};
  args.accepted = {accepted_on.data(), {sequences}};
  args.next_token = {next_on.data(), {sequences}};
  specattn::verify(ctx, args);
  const tokens accepted = fixture.download(accepted_on), next = fixture.download(next_on);
  std::vector<outcome> result;
  for (std::size_t s = 0; s < turns.size(); ++s) result.push_back({accepted[s], next[s]});
  return result;
}

}  // namespace verify_testing
