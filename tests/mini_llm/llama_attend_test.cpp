// The Llama model with the library's cache and attention, against the golden values.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cached_attention.hpp"
#include "golden.hpp"
#include "model/llama.hpp"
#include "specattn/alignment.hpp"
#include "specattn/cpu/alignment.hpp"

namespace {

using specattn::context;
using specattn::cpu;

const std::vector<std::string> pair = {"books-1m", "books-7m"};

double difference(const float* a, const float* b, std::size_t count) {
  double off = 0.0;
  for (std::size_t i = 0; i < count; ++i) off = std::max(off, std::abs(static_cast<double>(a[i] - b[i])));
  return off;
}

/// The weights of every position of a text, averaged over the heads: [layers, tokens, tokens].
std::vector<float> head_means(context<cpu>& ctx, const std::string& name, const std::vector<std::int32_t>& ids) {
  mini_llm::llama model = load_model(name);
  const auto tokens = static_cast<std::int32_t>(ids.size());
  cached_attention<float> attention(ctx, model.shape(), tokens);
  attention.record_all();
  std::vector<float> means(static_cast<std::size_t>(model.shape().layers) * ids.size() * ids.size());
  for (std::int32_t first = 0; first < tokens; first += model.shape().max_slots) {
    const std::int32_t count = std::min(tokens - first, model.shape().max_slots);
    all_logits(ctx, model, attention, {ids.begin() + first, ids.begin() + first + count}, ids.size());
    for (std::int32_t layer = 0; layer < model.shape().layers; ++layer) {
      for (std::int32_t slot = 0; slot < count; ++slot) {
        float* const to = means.data() + static_cast<std::size_t>((layer * tokens + first + slot) * tokens);
        for (std::int32_t head = 0; head < model.shape().q_heads; ++head) {
          const float* const from = &attention.weights()(layer, slot, head, 0);
          for (std::int32_t j = 0; j <= first + slot; ++j) {
            to[j] += from[j] / static_cast<float>(model.shape().q_heads);
          }
        }
      }
    }
  }
  return means;
}

}  // namespace

TEST_CASE("llama with attend: divergences between the pair's layers equal the golden ones") {
  context<cpu> ctx(2);
  const golden_values golden("divergence");
  const auto ids = golden.ids("input_ids");
  const auto expected = golden.get<double>("divergence");
  const std::ptrdiff_t tokens = static_cast<std::ptrdiff_t>(ids.size());
  const auto draft = head_means(ctx, "books-1m", ids);
  const auto target = head_means(ctx, "books-7m", ids);
  const auto last_off = [&](const std::vector<float>& means, const std::vector<float>& last, std::size_t layers) {
    double off = 0.0;
    for (std::size_t l = 0; l < layers; ++l) {
      const float* const row = means.data() + ((l + 1) * ids.size() - 1) * ids.size();
      off = std::max(off, difference(row, last.data() + l * ids.size(), ids.size()));
    }
    return off;
  };
  CHECK(last_off(draft, golden.floats("draft_weights_last_row"), 4) <= 1e-4);
  CHECK(last_off(target, golden.floats("target_weights_last_row"), 8) <= 1e-4);

  specattn::divergence_accumulator<> sum(8, 4);
  for (std::ptrdiff_t row = 0; row < tokens; ++row) {
    const specattn::view<const float, 2> of_target(target.data() + row * tokens, {8, row + 1}, {tokens * tokens, 1});
    const specattn::view<const float, 2> of_draft(draft.data() + row * tokens, {4, row + 1}, {tokens * tokens, 1});
    sum.add(ctx, of_target, of_draft);
  }
  const auto means = sum.mean();
  REQUIRE(means.size() == expected.size());
  double off = 0.0;
  for (std::size_t i = 0; i < means.size(); ++i) {
    off = std::max(off, std::abs(static_cast<double>(means[i]) - expected[i]));
  }
  MESSAGE("divergences within ", off);
  CHECK(off <= 1e-3);
}

TEST_CASE("llama with attend: logits and recorded weights equal the golden ones") {
  context<cpu> ctx(2);
  for (const std::string& name : pair) {
    CAPTURE(name);
    const golden_values golden(name);
    mini_llm::llama model = load_model(name, 256);
    const auto ids = golden.ids("input_ids");
    const auto wanted = golden.ids("logit_rows");
    const auto expected_logits = golden.floats("logits");
    const auto expected_weights = golden.floats("attention");
    const auto vocab = static_cast<std::size_t>(model.shape().vocab);
    cached_attention<float> attention(ctx, model.shape(), 1024);
    attention.record_all();
    double logits_off = 0.0;
    double weights_off = 0.0;
    std::size_t rows_seen = 0;
    for (std::int32_t first = 0; first < 1024; first += 256) {
      const std::vector<std::int32_t> chunk(ids.begin() + first, ids.begin() + first + 256);
      const auto logits = all_logits(ctx, model, attention, chunk, 256);
      for (std::size_t r = 0; r < wanted.size(); ++r) {
        if (wanted[r] < first || wanted[r] >= first + 256) continue;
        ++rows_seen;
        const std::int32_t slot = wanted[r] - first;
        logits_off = std::max(logits_off, difference(logits.data() + static_cast<std::size_t>(slot) * vocab,
                                                     expected_logits.data() + r * vocab, vocab));
        for (std::int32_t layer = 0; layer < model.shape().layers; ++layer) {
          for (std::int32_t head = 0; head < model.shape().q_heads; ++head) {
            const std::size_t place =
                (static_cast<std::size_t>(layer * model.shape().q_heads + head) * wanted.size() + r) * ids.size();
            weights_off = std::max(
                weights_off, difference(&attention.weights()(layer, slot, head, 0), expected_weights.data() + place,
                                        static_cast<std::size_t>(wanted[r] + 1)));
          }
        }
      }
    }
    MESSAGE(name, ": logits within ", logits_off, ", recorded weights within ", weights_off);
    CHECK(logits_off <= 2e-3);
    CHECK(weights_off <= 1e-4);
    CHECK(rows_seen == wanted.size());
  }
}

TEST_CASE("llama with attend: greedy continuation equals the golden one") {
  context<cpu> ctx(2);
  for (const std::string& name : pair) {
    CAPTURE(name);
    const golden_values golden(name);
    mini_llm::llama model = load_model(name);
    const auto expected = golden.ids("greedy_ids");
    const auto prompt = golden.ids("prompt_ids");
    const auto vocab = static_cast<std::size_t>(model.shape().vocab);
    cached_attention<float> attention(ctx, model.shape(), 512);
    auto logits = all_logits(ctx, model, attention, prompt, 256);
    std::vector<std::int32_t> written;
    while (written.size() < expected.size()) {
      const auto last = logits.end() - static_cast<std::ptrdiff_t>(vocab);
      written.push_back(static_cast<std::int32_t>(std::max_element(last, logits.end()) - last));
      logits = all_logits(ctx, model, attention, {written.back()}, 1);
    }
    CHECK(written == expected);
  }
}

TEST_CASE_TEMPLATE("llama with attend: a row has the same bits alone, among 2, 5, 9 or 256, with 1 to 3 threads", T,
                   float, specattn::bf16) {
  for (const std::string& name : pair) {
    CAPTURE(name);
    const auto all_ids = golden_values(name).ids("input_ids");
    const std::vector<std::int32_t> ids(all_ids.begin(), all_ids.begin() + 600);
    mini_llm::llama model = load_model(name);
    std::vector<float> reference;
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      for (const std::size_t chunk :
           {std::size_t{1}, std::size_t{2}, std::size_t{5}, std::size_t{9}, std::size_t{256}}) {
        if (threads == 3 && chunk == 1) continue;  // three threads on fewer cores: slow, and nothing new
        CAPTURE(threads);
        CAPTURE(chunk);
        cached_attention<T> attention(ctx, model.shape(), 600);
        const auto logits = all_logits(ctx, model, attention, ids, chunk);
        if (reference.empty()) reference = logits;
        CHECK(std::memcmp(logits.data(), reference.data(), logits.size() * sizeof(float)) == 0);
      }
    }
  }
}
