// The decoding loop over toy models: exactness, batches, stops, limits, roll-back, counts, refresh, allocation.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "specattn/specattn.hpp"
#include "toy_model.hpp"

using namespace specattn;

namespace {

std::atomic<std::int64_t> allocations{0};

}  // namespace

void* operator new(std::size_t size) {
  ++allocations;
  if (void* p = std::malloc(size != 0 ? size : 1)) return p;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  ++allocations;
  const auto a = static_cast<std::size_t>(alignment);
  if (void* p = std::aligned_alloc(a, (size + a - 1) / a * a)) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, std::size_t) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

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

std::vector<std::int32_t> prompt_of(int length, std::uint64_t seed) {
  std::vector<std::int32_t> prompt;
  for (int i = 0; i < length; ++i) {
    prompt.push_back(static_cast<std::int32_t>(uniform(seed, static_cast<std::uint64_t>(i), random_use::emit) * 61));
  }
  return prompt;
}

template <class Decoder>
std::vector<std::int32_t> finish_row(Decoder& decoder, std::int32_t row) {
  while (decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
  }
  return {decoder.text(row).begin(), decoder.text(row).end()};
}

std::vector<std::int32_t> autoregressive(fixture& f, std::span<const std::int32_t> prompt, std::int32_t new_tokens,
                                         sampler_options sampler = {}) {
  no_draft none;
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, none, dense, {.draft_length = 0, .prefill_chunk = 32});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = new_tokens, .sampler = sampler});
  return finish_row(decoder, row);
}

/// An alignment over the toy pair: every draft head counts the same.
alignment flat_alignment(std::vector<std::int32_t> windows = {}, bool history = false) {
  alignment a;
  a.target = {.name = "toy", .layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .vocab = 61};
  a.draft = {.name = "toy draft", .layers = 2, .q_heads = 4, .kv_heads = 1, .head_dim = 8, .vocab = 61};
  a.signals = {2, 4, std::move(windows), 0, history};
  const auto signals = static_cast<std::size_t>(a.signals.count());
  a.coefficients.assign(6 * signals, 1.0f / static_cast<float>(signals));
  a.mixture_divergence.assign(6, 0.1f);
  a.divergence.assign(6, 0.5f);
  a.layer_map = {0, 0, 1};
  return a;
}

selection_rule toy_rule(float top_p) { return {.top_p = top_p, .sinks = 2, .recent = 4, .rows = combine::mean}; }

}  // namespace

TEST_CASE("decode: dense speculation emits exactly the autoregressive greedy text for every draft length") {
  fixture f;
  const auto prompt = prompt_of(37, 1);
  const auto expected = autoregressive(f, prompt, 60);
  std::int64_t accepted = 0;
  for (std::int32_t gamma = 1; gamma <= 8; ++gamma) {
    no_guide dense;
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = gamma, .prefill_chunk = 16});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 60});
    CHECK(finish_row(decoder, row) == expected);
    CHECK(decoder.finish(row) == finish_reason::length);
    accepted += decoder.counts(row).accepted;
    CHECK(decoder.counts(row).emitted == 60);
  }
  CHECK(accepted > 100);  // the draft resembles the target: both outcomes of a round occur
}

TEST_CASE("decode: keeping every position equals plain decoding, with every guide signal and a sparse draft") {
  fixture f;
  const auto prompt = prompt_of(50, 2);
  const auto expected = autoregressive(f, prompt, 40);
  for (const bool history : {false, true}) {
    for (const bool unite : {false, true}) {
      selection_rule rule = toy_rule(1.0f);
      if (unite) rule.rows = combine::unite;
      draft_guide<> guide(flat_alignment({4, 16}, history), rule);
      decode_options options{.draft_length = 3, .prefill_chunk = 32};
      options.record_steps = unite ? 0 : 1;
      options.sparse_draft = !unite;
      auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
      const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 40});
      CHECK(finish_row(decoder, row) == expected);
      CHECK(decoder.counts(row).kv_rows_read == decoder.counts(row).kv_rows_dense);
    }
  }
}

TEST_CASE("decode: a ragged batch gives every sequence the text it has alone") {
  fixture f;
  std::vector<std::vector<std::int32_t>> prompts;
  std::vector<std::vector<std::int32_t>> expected;
  for (int i = 0; i < 5; ++i) {
    prompts.push_back(prompt_of(1 + 17 * i, 10 + static_cast<std::uint64_t>(i)));
    expected.push_back(autoregressive(f, prompts.back(), 20 + 3 * i));
  }
  for (const float top_p : {2.0f, 0.8f}) {
    draft_guide<> guide(flat_alignment({8}, true), toy_rule(top_p));
    if (top_p < 1.0f) {  // sparse: the reference is the same method, alone
      for (int i = 0; i < 5; ++i) {
        draft_guide<> own(flat_alignment({8}, true), toy_rule(top_p));
        auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, own, {.draft_length = 3, .prefill_chunk = 32});
        const auto row = decoder.add({
            .prompt = prompts[static_cast<std::size_t>(i)],
            .max_new_tokens = 20 + 3 * i,
        });
        expected[static_cast<std::size_t>(i)] = finish_row(decoder, row);
      }
    }
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide,
                                       {.draft_length = 3, .max_sequences = 5, .prefill_chunk = 32});
    std::vector<std::int32_t> rows;
    for (int i = 0; i < 5; ++i) {
      rows.push_back(decoder.add({
          .prompt = prompts[static_cast<std::size_t>(i)],
          .max_new_tokens = 20 + 3 * i,
      }));
    }
    finish_row(decoder, rows[0]);
    for (std::size_t i = 0; i < 5; ++i) {
      const auto text = decoder.text(rows[i]);
      CHECK(std::vector<std::int32_t>(text.begin(), text.end()) == expected[i]);
    }
  }
}

TEST_CASE("decode: sequences join and leave between rounds without changing the others' text") {
  fixture f;
  const auto first = prompt_of(40, 21);
  const auto second = prompt_of(23, 22);
  const auto third = prompt_of(31, 23);
  for (const std::int32_t page_size : {0, 8}) {
    draft_guide<> guide(flat_alignment({8}), toy_rule(1.5f));
    auto decoder =
        make_decoder<float>(f.ctx, f.target, f.draft, guide,
                            {.draft_length = 4, .max_sequences = 2, .prefill_chunk = 32, .page_size = page_size});
    const auto go = [](std::int32_t, std::span<const std::int32_t>) { return true; };
    const auto a = decoder.add({.prompt = first, .max_new_tokens = 50});
    decoder.step(go);
    const auto b = decoder.add({.prompt = second, .max_new_tokens = 50});
    CHECK_THROWS_WITH_AS(decoder.add({.prompt = third, .max_new_tokens = 1}),
                         "decode: all 2 rows are taken; remove() one first", contract_error);
    for (int i = 0; i < 3; ++i) decoder.step(go);
    decoder.remove(b);
    const auto c = decoder.add({.prompt = third, .max_new_tokens = 30});
    CHECK(c == b);
    CHECK(finish_row(decoder, a) == autoregressive(f, first, 50));
    CHECK(std::vector<std::int32_t>(decoder.text(c).begin(), decoder.text(c).end()) == autoregressive(f, third, 30));
  }
}

TEST_CASE("decode: nothing behind a stop token is emitted or counted, and the stop inside the budget wins") {
  fixture f;
  const auto prompt = prompt_of(37, 1);
  const auto plain = autoregressive(f, prompt, 40);
  for (std::size_t at = prompt.size(); at < prompt.size() + 12; ++at) {
    const std::int32_t stop = plain[at];
    const auto first = std::find(plain.begin() + static_cast<std::ptrdiff_t>(prompt.size()), plain.end(), stop);
    const auto expected = std::vector<std::int32_t>(plain.begin(), first + 1);
    for (const std::int32_t gamma : {1, 4, 8}) {
      no_guide dense;
      auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = gamma});
      std::vector<std::int32_t> seen = prompt;
      const auto row =
          decoder.add({.prompt = prompt, .max_new_tokens = 40, .stop_tokens = {&stop, 1}, .sampler = {}});
      while (decoder.step([&](std::int32_t, std::span<const std::int32_t> tokens) {
        seen.insert(seen.end(), tokens.begin(), tokens.end());
        return true;
      })) {
      }
      CHECK(seen == expected);
      CHECK(decoder.finish(row) == finish_reason::stop_token);
      const decode_counts& c = decoder.counts(row);
      CHECK(c.emitted == static_cast<std::int64_t>(expected.size() - prompt.size()));
      CHECK(c.accepted + c.rounds == c.emitted + c.discarded);
      CHECK(c.corrected + c.bonus == c.rounds);
    }
  }
}

TEST_CASE("decode: the token limit and the context limit end a text exactly there") {
  fixture f;
  const auto prompt = prompt_of(30, 3);
  for (std::int32_t limit = 0; limit <= 7; ++limit) {
    no_guide dense;
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 4});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = limit});
    CHECK(finish_row(decoder, row).size() == prompt.size() + static_cast<std::size_t>(limit));
    CHECK(decoder.finish(row) == finish_reason::length);
  }
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 4, .max_positions = 40});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 1000});
  const auto text = finish_row(decoder, row);
  CHECK(decoder.finish(row) == finish_reason::context_full);
  CHECK(text.size() == 41);  // 40 cached positions and the token they predict
  const auto expected = autoregressive(f, prompt, 11);
  CHECK(text == expected);
}

TEST_CASE("decode: a row starts over from its prompt, with another draft length, and gives the same text") {
  fixture f;
  const auto prompt = prompt_of(45, 12);
  const auto expected = autoregressive(f, prompt, 30);
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 6, .prefill_chunk = 16});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30, .draft_length = 0});
  CHECK(finish_row(decoder, row) == expected);
  CHECK(decoder.counts(row).proposed == 0);
  for (const std::int32_t gamma : {6, 0, 1, 3}) {
    decoder.rewind(row, {.max_new_tokens = 30, .draft_length = gamma});
    CHECK(finish_row(decoder, row) == expected);
    CHECK((decoder.counts(row).proposed > 0) == (gamma > 0));
  }
  CHECK_THROWS_WITH_AS(decoder.rewind(row, {.draft_length = 7}),
                       "decode: a request's draft_length 7 is over the options' 6", contract_error);
}

TEST_CASE("decode: a callback that returns false cancels its sequence alone") {
  fixture f;
  no_guide dense;
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 2, .max_sequences = 2});
  const auto prompt = prompt_of(12, 4);
  const auto a = decoder.add({.prompt = prompt, .max_new_tokens = 30});
  const auto b = decoder.add({.prompt = prompt, .max_new_tokens = 30});
  while (decoder.step([&](std::int32_t row, std::span<const std::int32_t>) { return row != a; })) {
  }
  CHECK(decoder.finish(a) == finish_reason::cancelled);
  CHECK(decoder.counts(a).rounds == 1);
  CHECK(decoder.text(b).size() == 42);
}

TEST_CASE("decode: a refresh rewrites approximate keys and values with the dense ones") {
  fixture f;
  const auto prompt = prompt_of(60, 5);
  const auto count_differences = [&](std::int32_t refresh_every) {
    draft_guide<> guide(flat_alignment(), toy_rule(0.3f));
    auto sparse =
        make_decoder<float>(f.ctx, f.target, f.draft, guide, {.draft_length = 3, .refresh_every = refresh_every});
    const auto row = sparse.add({.prompt = prompt, .max_new_tokens = 50});
    finish_row(sparse, row);
    CHECK((sparse.counts(row).refreshed > 0) == (refresh_every > 0));
    CHECK(sparse.counts(row).kv_rows_read < sparse.counts(row).kv_rows_dense);
    no_draft none;
    no_guide dense;
    auto exact = make_decoder<float>(f.ctx, f.target, none, dense, {.draft_length = 0});
    const auto exact_row = exact.add({.prompt = sparse.text(row), .max_new_tokens = 1});
    // The last two rounds may still be approximate: the newest refresh came before them.
    const std::int32_t settled = static_cast<std::int32_t>(sparse.text(row).size()) - 1 - 2 * 4;
    std::int32_t differences = 0;
    for (std::int32_t i = 0; i < settled; ++i) {
      for (std::int32_t h = 0; h < 2; ++h) {
        const float* ours = sparse.cache().layer(2).key(row, i, h);
        const float* theirs = exact.cache().layer(2).key(exact_row, i, h);
        differences += !std::equal(ours, ours + 8, theirs);
      }
    }
    return differences;
  };
  CHECK(count_differences(0) > 20);
  CHECK(count_differences(1) == 0);
}

TEST_CASE("decode: below the minimum context and in dense layers everything is read") {
  fixture f;
  const auto prompt = prompt_of(60, 6);
  const auto expected = autoregressive(f, prompt, 30);
  draft_guide<> guide(flat_alignment(), toy_rule(0.3f));
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, {.draft_length = 3, .min_context = 300});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30});
  CHECK(finish_row(decoder, row) == expected);
  CHECK(decoder.counts(row).dense_rounds == decoder.counts(row).rounds);

  draft_guide<> layered(flat_alignment(), toy_rule(0.3f));
  auto all_layers = make_decoder<float>(f.ctx, f.target, f.draft, layered, {.draft_length = 3, .dense_layers = 3});
  const auto second = all_layers.add({.prompt = prompt, .max_new_tokens = 30});
  CHECK(finish_row(all_layers, second) == expected);
}

TEST_CASE("decode: every guide runs, keeps what it says and reads fewer rows than dense") {
  fixture f;
  const auto prompt = prompt_of(150, 7);
  const auto run = [&](auto guide) {
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, {.draft_length = 3});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 40});
    finish_row(decoder, row);
    const decode_counts& c = decoder.counts(row);
    CHECK(c.kv_rows_read < c.kv_rows_dense);
    CHECK(c.emitted == 40);
    return static_cast<double>(c.kv_rows_read) / static_cast<double>(c.kv_rows_dense);
  };
  window_guide window;
  window.sinks = 2;
  window.recent = 20;
  CHECK(run(window) < 0.25);
  const double quest = run(page_guide<cpu>(0.25f));
  CHECK(quest > 0.25);  // a quarter of the pages, and a sixteenth for the boxes
  CHECK(quest < 0.45);
  run(oracle_guide<>(toy_rule(0.6f)));
  run(draft_guide<>(flat_alignment({8}, true), toy_rule(0.6f)));
  run(draft_guide<>(flat_alignment().layer_map_only(), {.top_p = 0.6f, .rows = combine::unite}));
}

TEST_CASE("decode: scoring equals the dense losses when everything is kept, and reports the reduction when not") {
  fixture f;
  const auto text = prompt_of(120, 8);
  std::vector<float> dense_loss(100), sparse_loss(100), all_loss(100);
  no_draft none;
  no_guide dense;
  auto plain = make_decoder<float>(f.ctx, f.target, none, dense, {.draft_length = 0});
  plain.score(text, 20, dense_loss);
  draft_guide<> everything(flat_alignment(), toy_rule(1.0f));
  auto all = make_decoder<float>(f.ctx, f.target, f.draft, everything, {.draft_length = 4});
  const decode_counts full = all.score(text, 20, all_loss);
  CHECK(all_loss == dense_loss);
  CHECK(full.emitted == 100);
  CHECK(full.accepted == full.proposed);
  draft_guide<> few(flat_alignment(), toy_rule(0.3f));
  auto sparse = make_decoder<float>(f.ctx, f.target, f.draft, few, {.draft_length = 4});
  const decode_counts counts = sparse.score(text, 20, sparse_loss);
  CHECK(counts.kv_rows_read < counts.kv_rows_dense);
  CHECK(sparse_loss != dense_loss);
}

TEST_CASE("decode: sampling is reproducible, alone and in a batch") {
  fixture f;
  const auto prompt = prompt_of(30, 9);
  const sampler_options sampler{.temperature = 0.9f, .top_p = 0.95f, .seed = 42};
  std::vector<std::vector<std::int32_t>> texts;
  for (const std::int32_t batch : {1, 3}) {
    no_guide dense;
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 4, .max_sequences = batch});
    std::int32_t row = 0;
    for (std::int32_t i = 0; i < batch; ++i) {
      sampler_options own = sampler;
      if (i + 1 < batch) own.seed = 100 + static_cast<std::uint64_t>(i);
      row = decoder.add({.prompt = prompt, .max_new_tokens = 40, .sampler = own});
    }
    texts.push_back(finish_row(decoder, row));
  }
  CHECK(texts[0] == texts[1]);
  no_guide dense;
  auto other = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 4});
  sampler_options different = sampler;
  different.seed = 43;
  const auto row = other.add({.prompt = prompt, .max_new_tokens = 40, .sampler = different});
  CHECK(finish_row(other, row) != texts[0]);
}

TEST_CASE("decode: a round allocates nothing") {
  fixture f;
  const auto prompt = prompt_of(100, 11);
  draft_guide<> guide(flat_alignment({8}, true), toy_rule(0.7f));
  decode_options options{.draft_length = 4, .max_sequences = 2, .refresh_every = 3, .prefill_chunk = 32};
  options.sparse_draft = true;
  options.record_steps = 1;
  auto decoder = make_decoder<fp16>(f.ctx, f.target, f.draft, guide, options);
  const auto go = [](std::int32_t, std::span<const std::int32_t>) { return true; };
  decoder.add({.prompt = prompt,
               .max_new_tokens = 100,
               .sampler = {.temperature = 0.8f, .top_k = 20, .top_p = 0.9f, .seed = 1}});
  decoder.add({.prompt = prompt, .max_new_tokens = 100});
  const std::int64_t before = allocations.load();
  for (int i = 0; i < 20; ++i) decoder.step(go);
  CHECK(allocations.load() == before);
}

TEST_CASE("decode: models and options that do not fit are refused with the values") {
  fixture f;
  no_guide dense;
  no_draft none;
  const auto make = [&](auto& draft, decode_options options) {
    make_decoder<float>(f.ctx, f.target, draft, dense, options);
  };
  CHECK_THROWS_WITH_AS(make(f.draft, {.draft_length = 16}), "decode: draft_length 16 is outside 0 … 15",
                       contract_error);
  CHECK_THROWS_WITH_AS(make(none, {.draft_length = 2}), "decode: draft_length 2 without a draft model",
                       contract_error);
  CHECK_THROWS_WITH_AS(make(f.draft, {.max_positions = 321}),
                       "decode: max_positions 321 is outside 1 … 320, the target's context", contract_error);
  toy::model stranger(
      1,
      {.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 8, .vocab = 60, .max_positions = 320, .max_slots = 256});
  CHECK_THROWS_WITH_AS(make(stranger, {}), "decode: the draft's vocab is 60, the target's 61", contract_error);
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {});
  const std::vector<std::int32_t> none_at_all;
  CHECK_THROWS_WITH_AS(decoder.add({.prompt = none_at_all}), "decode: the prompt is empty; give at least one token",
                       contract_error);
  const std::vector<std::int32_t> wild{1, 2, 61};
  CHECK_THROWS_WITH_AS(decoder.add({.prompt = wild}), "decode: the prompt has token 61 at 2, outside a vocab of 61",
                       contract_error);
  const auto too_long = prompt_of(321, 1);
  CHECK_THROWS_WITH_AS(decoder.add({.prompt = too_long}), "decode: the prompt has 321 tokens, the context holds 320",
                       contract_error);
}
