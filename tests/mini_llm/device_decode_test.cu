// The loop on the GPU on the embedded pair. Its greedy text is judged by the CPU's model, which reads what the GPU wrote:
// each token must be the CPU's own choice or, by its logits, as good as that up to rounding.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cached_attention.hpp"
#include "commands/session.hpp"
#include "golden.hpp"
#include "input_error.hpp"
#include "model/engine.hpp"
#include "specattn/error.hpp"

namespace {

using ids = std::vector<std::int32_t>;

/// In logits, whose spread is about 3.5. Rounding moves a logit by about 0.02 (see device_llama_test.cu), so that the
/// better of two that are closer than this may be either.
constexpr float gap_allowed = 0.1f;

const auto quiet = [](std::int32_t, std::int32_t) {};
const auto go_on = [](std::int32_t, std::span<const std::int32_t>) { return true; };

mini_llm::session_options pair_on_the_gpu(const std::string& guide) {
  mini_llm::session_options options;
  options.device = "cuda";
  options.model = source_path("examples/models/books-7m");
  options.draft = source_path("examples/models/books-1m");
  options.alignment = source_path("examples/models/alignment.json");
  options.guide = guide;
  options.threads = 2;
  options.decode.max_positions = 512;
  options.decode.draft_length = 4;
  return options;
}

ids continuation(const mini_llm::engine& engine, std::int32_t row, std::size_t prompt) {
  const auto text = engine.text(row);
  return {text.begin() + static_cast<std::ptrdiff_t>(prompt), text.end()};
}

ids write(mini_llm::engine& engine, const ids& prompt, std::int32_t count) {
  const std::int32_t row = engine.add({.prompt = prompt, .max_new_tokens = count}, quiet);
  while (engine.step(go_on)) {
  }
  CHECK(engine.counts(row).emitted == count);
  return continuation(engine, row, prompt.size());
}

/// How the CPU's target, with the same key/value type, sees a text.
struct judgement {
  float worst = 0.0f;          ///< the greatest gap between its best logit and that of the token written
  std::int32_t disagreed = 0;  ///< tokens that it would not have written
};
judgement judge(const ids& prompt, const ids& written) {
  static mini_llm::llama model = load_model("books-7m");
  specattn::context<specattn::cpu> ctx(2);
  cached_attention<specattn::fp16> attention(ctx, model.shape(), 512);
  ids text = prompt;
  text.insert(text.end(), written.begin(), written.end());
  const auto logits = all_logits(ctx, model, attention, text, 128);
  judgement made;
  for (std::size_t i = prompt.size(); i < text.size(); ++i) {
    const auto vocab = static_cast<std::size_t>(model.shape().vocab);
    const std::span<const float> row(logits.data() + (i - 1) * vocab, vocab);
    const float gap = *std::max_element(row.begin(), row.end()) - row[static_cast<std::size_t>(text[i])];
    made.worst = std::max(made.worst, gap);
    made.disagreed += gap > 0.0f;
  }
  return made;
}

void check_greedy(const ids& prompt, const ids& written) {
  const judgement made = judge(prompt, written);
  MESSAGE(made.disagreed, " of ", written.size(), " tokens are not the CPU's choice; the worst by ", made.worst);
  CHECK(made.worst <= gap_allowed);
}

}  // namespace

TEST_CASE("decode on the GPU: greedy text is the CPU's up to rounding, plainly and by dense speculation") {
  const ids prompt = golden_values("books-7m").ids("prompt_ids");
  for (const std::int32_t gamma : {0, 1, 2, 5, 8}) {
    CAPTURE(gamma);
    mini_llm::session_options options = pair_on_the_gpu("none");
    options.decode.draft_length = gamma;
    const mini_llm::session pair = mini_llm::open_session(options);
    const auto engine = pair.make(pair.guide, pair.decode);
    check_greedy(prompt, write(*engine, prompt, 128));
    CHECK((engine->counts(0).accepted > 0) == (gamma > 0));
    CHECK(engine->counts(0).kv_rows_read == engine->counts(0).kv_rows_dense);
  }
}

TEST_CASE("decode on the GPU: keeping the whole mass gives greedy text that is the CPU's up to rounding") {
  const ids prompt = golden_values("books-7m").ids("prompt_ids");
  for (const bool sparse_draft : {false, true}) {
    CAPTURE(sparse_draft);
    mini_llm::session pair = mini_llm::open_session(pair_on_the_gpu("draft"));
    pair.guide.rule.top_p = 1.0f;
    pair.decode.sparse_draft = sparse_draft;
    pair.decode.record_steps = sparse_draft ? 1 : 0;
    const auto engine = pair.make(pair.guide, pair.decode);
    check_greedy(prompt, write(*engine, prompt, 128));
  }
}

TEST_CASE("decode on the GPU: the guides draft and paper read fewer rows, and drafts are accepted") {
  const ids prompt = golden_values("books-7m").ids("prompt_ids");
  for (const std::string guide : {"draft", "paper"}) {
    CAPTURE(guide);
    mini_llm::session pair = mini_llm::open_session(pair_on_the_gpu(guide));
    pair.guide.rule.top_p = 0.9f;
    const auto engine = pair.make(pair.guide, pair.decode);
    const ids written = write(*engine, prompt, 128);
    const specattn::decode_counts& counts = engine->counts(0);
    const judgement made = judge(prompt, written);
    MESSAGE(guide, ": ", counts.kv_rows_read, " of ", counts.kv_rows_dense, " rows read, ", counts.accepted, " of ",
            counts.proposed, " drafts accepted, ", made.disagreed, " tokens are not the CPU's dense choice");
    CHECK(counts.kv_rows_read < counts.kv_rows_dense * 3 / 4);
    CHECK(counts.accepted * 5 > counts.proposed);
    CHECK(made.disagreed < 40);
  }
}

TEST_CASE("decode on the GPU: ragged prompts in a batch give greedy text that is the CPU's up to rounding") {
  const ids prompt = golden_values("books-7m").ids("prompt_ids");
  mini_llm::session pair = mini_llm::open_session(pair_on_the_gpu("none"));
  pair.decode.max_sequences = 3;
  pair.decode.page_size = 16;
  const auto engine = pair.make(pair.guide, pair.decode);
  const std::size_t lengths[] = {1, 100, 256};
  for (const std::size_t length : lengths) {
    engine->add({.prompt = std::span(prompt).first(length), .max_new_tokens = static_cast<std::int32_t>(length)},
                quiet);
  }
  while (engine->step(go_on)) {
  }
  for (std::int32_t row = 0; row < 3; ++row) {
    CAPTURE(row);
    const std::size_t length = lengths[row];
    const ids written = continuation(*engine, row, length);
    CHECK(written.size() == length);
    check_greedy({prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(length)}, written);
  }
}

TEST_CASE("decode on the GPU: a sampled text is the seed's") {
  const ids prompt = golden_values("books-7m").ids("prompt_ids");
  const mini_llm::session pair = mini_llm::open_session(pair_on_the_gpu("draft"));
  std::vector<ids> texts;
  for (const std::uint64_t seed : {1, 1, 2}) {
    const auto engine = pair.make(pair.guide, pair.decode);
    const specattn::sampler_options sampler{.temperature = 0.8f, .top_p = 0.95f, .seed = seed};
    const std::int32_t row = engine->add({.prompt = prompt, .max_new_tokens = 64, .sampler = sampler}, quiet);
    while (engine->step(go_on)) {
    }
    texts.push_back(continuation(*engine, row, prompt.size()));
  }
  CHECK(texts[0] == texts[1]);
  CHECK(texts[0] != texts[2]);
}

TEST_CASE("session on the GPU: what is not there is refused by name") {
  const auto refusal = [](const mini_llm::session_options& options) {
    try {
      const mini_llm::session pair = mini_llm::open_session(options);
      pair.make(pair.guide, pair.decode);
    } catch (const mini_llm::input_error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  CHECK(refusal(pair_on_the_gpu("none")).empty());
  CHECK(refusal(pair_on_the_gpu("quest")) ==
        "--guide quest is not there with --device cuda; none, draft and paper are");
  mini_llm::session_options options = pair_on_the_gpu("none");
  options.kv = "f32";
  CHECK(refusal(options) == "--kv f32 is not there with --device cuda; f16 is");
  options.device = "tpu";
  CHECK(refusal(options) == "device 'tpu' is none of cpu, cuda");
}
