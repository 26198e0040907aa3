// Two toy models, a guide, a loop: plain decoding against SpecAttn at top_p = 1 (exact), then at 0.8. Expect:
//   plain decoding equals SpecAttn at top_p = 1: yes
//   at top_p = 0.8: … % of the KV rows read, … tokens a round
#include <cmath>
#include <cstdio>
#include <specattn/specattn.hpp>

using namespace specattn;

/// One attention layer over random embeddings. See bring_your_model.cpp for a real one.
struct toy {
  float noise;
  model_shape shape() const { return {1, 2, 1, 16, 50, 512, 128}; }
  float embedding(int token, int d) const {
    const auto at = static_cast<std::uint64_t>(token * 32 + d);
    return uniform(1, at, random_use::draft) - 0.5f + noise * (uniform(2, at, random_use::draft) - 0.5f);
  }
  template <class Attention>
  void forward(context<cpu>&, const forward_batch<>& batch, Attention& attention, view<float, 2> logits) {
    const auto slots = static_cast<std::ptrdiff_t>(batch.tokens.size());
    std::vector<float> q(slots * 32), k(slots * 16), out(slots * 32);
    for (std::ptrdiff_t s = 0; s < slots; ++s) {
      const float turn = 0.1f * static_cast<float>(batch.positions[s]);
      for (int d = 0; d < 32; ++d) q[s * 32 + d] = 4 * embedding(batch.tokens[s], d) + std::sin(turn * (d % 5));
      for (int d = 0; d < 16; ++d) k[s * 16 + d] = q[s * 32 + d];
    }
    const view<const float, 3> keys(k.data(), {slots, 1, 16});
    attention(0, view<const float, 3>(q.data(), {slots, 2, 16}), keys, keys,
              view<float, 3>(out.data(), {slots, 2, 16}));
    for (std::size_t r = 0; r < batch.logit_rows.size(); ++r) {
      for (int token = 0; token < 50; ++token) {
        float& sum = logits(r, token) = 0;
        for (int d = 0; d < 32; ++d) sum += out[batch.logit_rows[r] * 32 + d] * embedding(token, (d * 7 + 3) % 32);
      }
    }
  }
};

int main() {
  context<cpu> ctx;
  toy target{0.0f}, draft{0.1f};
  std::vector<std::int32_t> prompt;
  for (int i = 0; i < 200; ++i) prompt.push_back(i * i % 50);
  const auto run = [&](auto guide, std::int32_t draft_length) {
    auto decoder = make_decoder<float>(ctx, target, draft, guide, {.draft_length = draft_length});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 64});
    while (decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
    }
    const decode_counts c = decoder.counts(row);
    return std::pair(std::vector(decoder.text(row).begin(), decoder.text(row).end()), c);
  };
  const alignment pair = calibrate<float>(ctx, target, draft, prompt, {.prefill = 64}, [](auto, auto) {});
  const auto plain = run(no_guide{}, 0).first;
  const bool equal = plain == run(draft_guide<>(pair, {.top_p = 1.0f}), 4).first;
  std::printf("plain decoding equals SpecAttn at top_p = 1: %s\n", equal ? "yes" : "NO");
  const decode_counts c = run(draft_guide<>(pair, {.top_p = 0.8f}), 4).second;
  std::printf("at top_p = 0.8: %.0f %% of the KV rows read, %.2f tokens a round\n",
              100.0 * double(c.kv_rows_read) / double(c.kv_rows_dense), double(c.emitted) / double(c.rounds));
  return equal && c.kv_rows_read < c.kv_rows_dense ? 0 : 1;
}
