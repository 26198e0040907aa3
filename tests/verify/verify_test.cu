// sample() and verify() on the device: the CPU's cases, and what only a device can get wrong.
#include "specattn/cuda/verify.cuh"

#include "cpu_fixture.hpp"
#include "cuda_fixture.cuh"
#include "cuda_replay.cuh"
#include "specattn/cpu/verify.hpp"

using verify_fixture = cuda_fixture;

#include "verify/law_cases.hpp"

namespace verify_testing {

using device = specattn::cuda;

sampler_options any_options(std::mt19937& random) {
  sampler_options options = hot(random());
  options.temperature = random() % 8 == 0 ? 0.0f : 0.3f + 0.1f * static_cast<float>(random() % 15);
  if (random() % 3 == 0) options.top_k = static_cast<std::int32_t>(1 + random() % (random() % 2 == 0 ? 40 : 4000));
  if (random() % 2 == 0) options.top_p = static_cast<float>(random() % 1000) / 1000.0f;
  if (random() % 4 == 0) options.min_p = 0.02f * static_cast<float>(random() % 10);
  return options;
}

/// Rows with many ties, masked tokens, one heap, and plain ones.
row any_row(std::int32_t vocab, std::mt19937& random) {
  const auto kind = random() % 5;
  row logits = random_row(vocab, random, kind == 4 ? 8.0f : 2.5f);
  for (float& logit : logits) {
    if (kind == 1) logit = std::round(logit);
    if (kind == 2 && random() % 3 == 0) logit = -infinite;
    if (kind == 3) logit = 1.5f;
  }
  return logits;
}

TEST_CASE("sample on the device: tokens and probabilities are the CPU's to the bit, whatever the vocabulary") {
  cuda_fixture fixture;
  cpu_fixture cpu(16);
  std::mt19937 random(61);
  for (const std::int32_t vocab : {1, 3, 130, 4096, 4097, 32000, 128256, 151937, 262144, 524288}) {
    CAPTURE(vocab);
    for (int turn = 0; turn < (vocab > 10000 ? 2 : 20); ++turn) {
      std::vector<row> logits;
      std::vector<sampler_options> samplers;
      std::vector<std::int64_t> positions;
      for (int r = 0; r < 24; ++r) {
        logits.push_back(any_row(vocab, random));
        samplers.push_back(any_options(random));
        positions.push_back(static_cast<std::int64_t>(random()) << 4);
      }
      const drawn want = draw(cpu, logits, samplers, positions, random_use::emit);
      const drawn got = draw(fixture, logits, samplers, positions, random_use::emit);
      CHECK(got.token == want.token);
      int different = 0;
      for (std::size_t r = 0; r < logits.size(); ++r) different += got.probabilities[r] != want.probabilities[r];
      CHECK(different == 0);
    }
  }
}

std::vector<turn> any_turns(cpu_fixture& cpu, std::int32_t vocab, int sequences, std::mt19937& random) {
  std::vector<turn> turns;
  for (int s = 0; s < sequences; ++s) {
    turn one;
    one.sampler = any_options(random);
    one.position = static_cast<std::int64_t>(random());
    const auto drafted = static_cast<int>(random() % 6);
    for (int d = 0; d <= drafted; ++d) one.target.push_back(any_row(vocab, random));
    for (int d = 0; d < drafted; ++d) {
      row near = one.target[static_cast<std::size_t>(d)];
      const float noise = 0.2f * static_cast<float>(random() % 5);
      for (float& logit : near) logit += noise * std::normal_distribution<float>()(random);
      const drawn got = draw(cpu, {near}, {one.sampler}, {one.position + d}, random_use::draft);
      if (!one.sampler.greedy()) one.draft.push_back(got.probabilities[0]);
      one.drafted.push_back(std::max(got.token[0], 0));
    }
    turns.push_back(one);
  }
  return turns;
}

TEST_CASE("verify on the device: accepted counts and tokens are the CPU's, whatever the vocabulary") {
  cuda_fixture fixture;
  cpu_fixture cpu(16);
  std::mt19937 random(62);
  std::int64_t accepted = 0, rejected = 0;
  for (const std::int32_t vocab : {1, 3, 130, 4097, 32000, 128256, 262144}) {
    CAPTURE(vocab);
    for (int round = 0; round < (vocab > 10000 ? 2 : 40); ++round) {
      const auto turns = any_turns(cpu, vocab, vocab > 10000 ? 8 : 30, random);
      const auto want = judge(cpu, turns);
      CHECK(judge(fixture, turns) == want);
      for (std::size_t s = 0; s < turns.size(); ++s) {
        accepted += want[s].accepted;
        rejected += want[s].accepted < static_cast<std::int32_t>(turns[s].drafted.size()) ? 1 : 0;
      }
    }
  }
  CHECK(accepted > 1000);
  CHECK(rejected > 200);
}

TEST_CASE("verify on the device: what only the data shows to be broken is rejected, not read") {
  cuda_fixture fixture;
  const row logits{0, 1, 2};
  for (const std::int32_t token : {3, -1, 2147483647, -2147483647}) {
    CHECK(judge(fixture, {turn{{logits, logits}, {}, {token}, {}, 0}})[0] == outcome{0, 2});
    const outcome sampled = judge(fixture, {turn{{logits, logits}, {row{0, 1, 0}}, {token}, hot(3), 0}})[0];
    CHECK(sampled.accepted == 0);
    CHECK((sampled.next == 0 || sampled.next == 2));  // token 1 has no residual
  }
  std::vector<turn> turns(4000, turn{{logits, logits}, {}, {1}, {}, 0});
  std::vector<long long> counts(3);
  for (std::size_t s = 0; s < turns.size(); ++s) turns[s].sampler = hot(s);
  for (const outcome& one : judge(fixture, turns)) {  // no draft_probabilities: the target's own law
    CHECK(one.accepted == 0);
    ++counts[static_cast<std::size_t>(one.next)];
  }
  follows(counts, law_of(logits, hot(0)));
}

TEST_CASE("verify on the device: a captured graph follows offsets and logits that change between replays") {
  cuda_fixture fixture;
  cpu_fixture cpu(16);
  constexpr std::ptrdiff_t vocab = 9001, slots = 20, sequences = 4;
  std::mt19937 random(63);
  const specattn::buffer<float, device> target(slots * vocab), draft((slots - sequences) * vocab);
  const specattn::buffer<std::int32_t, device> drafted(slots - sequences), offsets(sequences + 1),
      accepted(sequences), next(sequences);
  const specattn::buffer<sampler_options, device> samplers(sequences);
  const specattn::buffer<std::int64_t, device> positions(sequences);
  const specattn::verify_args<device> args{
      target.shaped({slots, vocab}),       draft.shaped({slots - sequences, vocab}),
      drafted.shaped({slots - sequences}), offsets.shaped({sequences + 1}),
      samplers.shaped({sequences}),        positions.shaped({sequences}),
      accepted.shaped({sequences}),        next.shaped({sequences})};
  auto& ctx = fixture.context();
  ctx.reserve_workspace(specattn::verify_workspace_bytes(ctx, slots, vocab));
  fixture.soil_workspace();
  const cuda_replay captured(fixture, [&] { specattn::verify(ctx, args); });
  for (int replay = 0; replay < 30; ++replay) {
    const auto turns = any_turns(cpu, vocab, sequences, random);
    tokens ends{0}, all_drafted;
    std::vector<sampler_options> options;
    std::vector<std::int64_t> places;
    row logits, probabilities;
    for (const turn& one : turns) {
      for (const row& r : one.target) logits.insert(logits.end(), r.begin(), r.end());
      for (const row& r : one.draft) probabilities.insert(probabilities.end(), r.begin(), r.end());
      if (one.draft.empty()) probabilities.resize(probabilities.size() + one.drafted.size() * vocab);
      all_drafted.insert(all_drafted.end(), one.drafted.begin(), one.drafted.end());
      ends.push_back(ends.back() + static_cast<std::int32_t>(one.target.size()));
      options.push_back(one.sampler);
      places.push_back(one.position);
    }
    if (ends.back() > slots) continue;
    const auto set = [](const auto& to, const auto& from) {
      cudaMemcpy(to.data(), from.data(), from.size() * sizeof(from[0]), cudaMemcpyHostToDevice);
    };
    set(target, logits);
    set(draft, probabilities);
    set(drafted, all_drafted);
    set(offsets, ends);
    set(samplers, options);
    set(positions, places);
    captured.launch();
    const auto want = judge(cpu, turns);
    const tokens counts = fixture.download(accepted), emitted = fixture.download(next);
    for (std::size_t s = 0; s < turns.size(); ++s) CHECK(outcome{counts[s], emitted[s]} == want[s]);
  }
}

}  // namespace verify_testing
