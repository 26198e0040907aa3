// Rounds that choose their own draft length, and whether to be sparse.
#include <doctest/doctest.h>

#include <cstdint>
#include <vector>

#include "decode/toy_model.hpp"
#include "specattn/specattn.hpp"

using namespace specattn;

namespace {

constexpr model_shape target_shape{
    .layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .vocab = 61, .max_positions = 320, .max_slots = 96};
constexpr model_shape draft_shape{
    .layers = 2, .q_heads = 4, .kv_heads = 1, .head_dim = 8, .vocab = 61, .max_positions = 320, .max_slots = 96};

struct fixture {
  context<cpu> ctx{2};
  toy::model target{7, target_shape};
  toy::model draft{7, draft_shape, 0.15f};
};

std::vector<std::int32_t> prompt_of(int length) {
  std::vector<std::int32_t> prompt;
  for (int i = 0; i < length; ++i)
    prompt.push_back(static_cast<std::int32_t>(uniform(3, static_cast<std::uint64_t>(i), random_use::emit) * 61));
  return prompt;
}

alignment flat_alignment() {
  alignment a;
  a.target = {.name = "toy", .layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .vocab = 61};
  a.draft = {.name = "toy draft", .layers = 2, .q_heads = 4, .kv_heads = 1, .head_dim = 8, .vocab = 61};
  a.signals = {2, 4, {}, 0, false};
  a.coefficients.assign(6 * 8, 1.0f / 8.0f);
  a.mixture_divergence.assign(6, 0.1f);
  a.divergence.assign(6, 0.5f);
  a.layer_map = {0, 0, 1};
  return a;
}

/// Decodes 200 tokens; notes each round's draft length and whether it was dense.
struct rounds {
  std::vector<std::int32_t> text;
  std::vector<std::int64_t> lengths;
  std::int64_t dense = 0;
};

template <class Decoder>
rounds decode(Decoder& decoder, const std::vector<std::int32_t>& prompt) {
  rounds seen;
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 200});
  while (decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
    seen.lengths.push_back(decoder.last_round().counts.proposed);
    seen.dense += decoder.last_round().counts.dense_rounds;
  }
  seen.text.assign(decoder.text(row).begin(), decoder.text(row).end());
  return seen;
}

}  // namespace

TEST_CASE("decode: adaptive rounds that verify densely emit the text of fixed ones, whatever they choose") {
  fixture f;
  const auto prompt = prompt_of(40);
  no_guide dense;
  auto fixed = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 3, .prefill_chunk = 32});
  auto adaptive = make_decoder<float>(f.ctx, f.target, f.draft, dense,
                                      {.draft_length = 6, .adaptive = true, .prefill_chunk = 32});
  const rounds want = decode(fixed, prompt);
  const rounds got = decode(adaptive, prompt);
  CHECK(got.text == want.text);
  CHECK(got.lengths.size() > 12);
  CHECK(got.lengths[0] == 1);
  CHECK(got.lengths[1] == 6);
  CHECK(got.lengths[2] == 3);
  for (const std::int64_t length : got.lengths) CHECK((length >= 0 && length <= 6));
  CHECK(fixed.planner() == nullptr);
  REQUIRE(adaptive.planner() != nullptr);
  CHECK(adaptive.planner()->cost().target.seconds(4, 500) > 0.0);
  CHECK(adaptive.planner()->workload().kept_share == 1.0);
}

TEST_CASE("decode: adaptive rounds try both sparse and dense verification and count them apart") {
  fixture f;
  draft_guide<> guide(flat_alignment(), {.top_p = 0.6f, .sinks = 2, .recent = 4, .rows = combine::mean});
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide,
                                     {.draft_length = 4, .adaptive = true, .prefill_chunk = 32});
  const rounds seen = decode(decoder, prompt_of(60));
  CHECK(seen.dense >= 6);
  CHECK(static_cast<std::int64_t>(seen.lengths.size()) - seen.dense >= 6);
  const double kept = decoder.planner()->workload().kept_share;
  CHECK(kept > 0.1);
  CHECK(kept < 1.0);
}
