// The Llama model against golden values computed in float64 by an independent implementation.
#include "model/llama.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "golden.hpp"
#include "plain_attention.hpp"

namespace {

using specattn::context;
using specattn::cpu;

static_assert(specattn::language_model<mini_llm::llama, cpu>);

#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
constexpr std::size_t long_tokens = 4096;
#else
constexpr std::size_t long_tokens = 384;  // the same claim over less text: plain loops are slow there
#endif

std::int32_t greatest(const float* logits, std::int32_t vocab) {
  return static_cast<std::int32_t>(std::max_element(logits, logits + vocab) - logits);
}

/// -log softmax(logits)[token], in double.
double loss(const float* logits, std::int32_t vocab, std::int32_t token) {
  const double top = static_cast<double>(*std::max_element(logits, logits + vocab));
  double sum = 0.0;
  for (std::int32_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(logits[i]) - top);
  return std::log(sum) + top - static_cast<double>(logits[token]);
}

const std::vector<std::string> pair = {"books-1m", "books-7m"};

}  // namespace

TEST_CASE("llama: logits and attention weights of the embedded pair equal the golden ones") {
  context<cpu> ctx(2);
  for (const std::string& name : pair) {
    CAPTURE(name);
    const golden_values golden(name);
    mini_llm::llama model = load_model(name);
    const auto ids = golden.ids("input_ids");
    const auto rows = golden.ids("logit_rows");
    const auto weights = golden.floats("attention");
    plain_attention attention(ctx, model.shape(), 1024);
    double weights_off = 0.0;
    std::size_t seen = 0;
    attention.record = [&](std::int32_t layer, std::int64_t head, std::int64_t position, const float* row) {
      const auto at = std::find(rows.begin(), rows.end(), static_cast<std::int32_t>(position));
      if (at == rows.end()) return;
      ++seen;
      const std::size_t place = (static_cast<std::size_t>(layer * model.shape().q_heads + head) * rows.size() +
                                 static_cast<std::size_t>(at - rows.begin())) *
                                ids.size();
      for (std::size_t j = 0; j <= static_cast<std::size_t>(position); ++j) {
        weights_off = std::max(weights_off, std::abs(static_cast<double>(row[j] - weights[place + j])));
      }
    };
    const auto logits = all_logits(ctx, model, attention, ids, 256);
    const auto expected = golden.floats("logits");
    const auto vocab = static_cast<std::size_t>(model.shape().vocab);
    double logits_off = 0.0;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      for (std::size_t i = 0; i < vocab; ++i) {
        const float got = logits[static_cast<std::size_t>(rows[r]) * vocab + i];
        logits_off = std::max(logits_off, std::abs(static_cast<double>(got - expected[r * vocab + i])));
      }
    }
    MESSAGE(name, ": logits within ", logits_off, ", attention weights within ", weights_off);
    CHECK(logits_off <= 2e-3);
    CHECK(weights_off <= 1e-4);
    CHECK(seen == static_cast<std::size_t>(model.shape().layers * model.shape().q_heads) * rows.size());
  }
}

TEST_CASE("llama: the losses over a text as long as the context equal the golden ones") {
  context<cpu> ctx(2);
  for (const std::string& name : pair) {
    CAPTURE(name);
    const golden_values golden(name);
    mini_llm::llama model = load_model(name);
    auto ids = golden.ids("long_ids");
    const auto expected = golden.floats("long_nll");
    ids.resize(long_tokens);
    plain_attention attention(ctx, model.shape(), static_cast<std::int64_t>(long_tokens));
    const auto logits = all_logits(ctx, model, attention, ids, 256);
    double sum = 0.0;
    double expected_sum = 0.0;
    double off = 0.0;
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      const float* const row = logits.data() + i * static_cast<std::size_t>(model.shape().vocab);
      const double got = loss(row, model.shape().vocab, ids[i + 1]);
      sum += got;
      expected_sum += static_cast<double>(expected[i]);
      off = std::max(off, std::abs(got - static_cast<double>(expected[i])));
    }
    const double count = static_cast<double>(ids.size() - 1);
    MESSAGE(name, ": mean loss ", sum / count, ", golden ", expected_sum / count, "; a token within ", off);
    CHECK(std::abs(sum - expected_sum) / count <= 1e-5);
    CHECK(off <= 2e-3);
  }
}

TEST_CASE("llama: greedy continuation equals the golden one") {
  context<cpu> ctx(2);
  for (const std::string& name : pair) {
    CAPTURE(name);
    const golden_values golden(name);
    mini_llm::llama model = load_model(name);
    const auto expected = golden.ids("greedy_ids");
    const std::int32_t vocab = model.shape().vocab;
    plain_attention attention(ctx, model.shape(), 512);
    const auto prompt = golden.ids("prompt_ids");
    auto logits = all_logits(ctx, model, attention, prompt, 256);
    const float* last = logits.data() + (prompt.size() - 1) * static_cast<std::size_t>(vocab);
    std::vector<std::int32_t> written;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      written.push_back(greatest(last, vocab));
      logits = all_logits(ctx, model, attention, {written.back()}, 1);
      last = logits.data();
    }
    CHECK(written == expected);
  }
}

TEST_CASE("llama: a row has the same bits alone, among 2, 5, 9 or 256 and with any number of threads") {
  for (const std::string& name : pair) {
    CAPTURE(name);
    const auto all_ids = golden_values(name).ids("input_ids");
    const std::vector<std::int32_t> ids(all_ids.begin(), all_ids.begin() + 256);
    mini_llm::llama model = load_model(name);
    std::vector<float> reference;
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      for (const std::size_t chunk :
           {std::size_t{1}, std::size_t{2}, std::size_t{5}, std::size_t{9}, std::size_t{256}}) {
        CAPTURE(threads);
        CAPTURE(chunk);
        plain_attention attention(ctx, model.shape(), 256);
        const auto logits = all_logits(ctx, model, attention, ids, chunk);
        if (reference.empty()) reference = logits;
        CHECK(std::memcmp(logits.data(), reference.data(), logits.size() * sizeof(float)) == 0);
      }
    }
  }
}

TEST_CASE("llama: asking for some rows' logits gives the bits that asking for all gives") {
  context<cpu> ctx(2);
  const auto all_ids = golden_values("books-1m").ids("input_ids");
  const std::vector<std::int32_t> ids(all_ids.begin(), all_ids.begin() + 40);
  mini_llm::llama model = load_model("books-1m", 40);
  const auto vocab = static_cast<std::size_t>(model.shape().vocab);
  plain_attention attention(ctx, model.shape(), 40);
  const auto all = all_logits(ctx, model, attention, ids, 40);
  std::vector<std::int32_t> positions(ids.size());
  std::iota(positions.begin(), positions.end(), 0);
  const std::vector<std::int32_t> rows = {0, 3, 17, 39};
  std::vector<float> some(rows.size() * vocab);
  attention.roll_back(0);
  model.forward(
      ctx, {ids, positions, rows}, attention,
      specattn::view<float, 2>(some.data(), {static_cast<std::ptrdiff_t>(rows.size()), model.shape().vocab}));
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const float* const expected = all.data() + static_cast<std::size_t>(rows[r]) * vocab;
    CHECK(std::memcmp(some.data() + r * vocab, expected, vocab * sizeof(float)) == 0);
  }
  model.forward(ctx, {ids, positions, {}}, attention, {});  // none wanted: no logits needed
}

TEST_CASE("llama: forward refuses what does not fit, with the numbers") {
  context<cpu> ctx(1);
  mini_llm::llama model = load_model("books-1m", 4);
  plain_attention attention(ctx, model.shape(), 16);
  std::vector<float> memory(2 * 4096);
  const specattn::view<float, 2> one_row(memory.data(), {1, 4096});
  using ids = std::vector<std::int32_t>;
  const auto refuse = [&](const ids& tokens, const ids& positions, const ids& rows) {
    try {
      model.forward(ctx, {tokens, positions, rows}, attention, one_row);
    } catch (const specattn::contract_error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  CHECK(refuse({1, 2, 3, 4, 5}, {0, 1, 2, 3, 4}, {0}).find("5 tokens") != std::string::npos);
  CHECK(refuse({1}, {0, 1}, {0}).find("2 positions") != std::string::npos);
  CHECK(refuse({4096}, {0}, {0}).find("token 4096") != std::string::npos);
  CHECK(refuse({-1}, {0}, {0}).find("token -1") != std::string::npos);
  CHECK(refuse({1}, {4096}, {0}).find("position 4096") != std::string::npos);
  CHECK(refuse({1}, {0}, {1}).find("logit row 1") != std::string::npos);
  CHECK(refuse({1, 2}, {0, 1}, {1, 0}).find("logit row 0") != std::string::npos);
  CHECK(refuse({1, 2}, {0, 1}, {0, 1}).find("needed [2, 4096]") != std::string::npos);
  CHECK(refuse({1}, {0}, {0}).empty());
}
