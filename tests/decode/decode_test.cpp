// The decoding loop over toy models: exactness, batches, stops, limits, roll-back, counts, refresh, allocation.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#include <new>
#include <string>
#include <vector>

#include "decode/problem.hpp"
#include "decode/toy_model.hpp"
#include "specattn/specattn.hpp"

struct decode_fixture {
  using backend = specattn::cpu;
  specattn::context<specattn::cpu> ctx{2};
  toy::model target{7, decode_testing::target_shape};
  toy::model draft{7, decode_testing::draft_shape, 0.15f};
};

#include "decode/batch_cases.hpp"
#include "decode/cases.hpp"

using namespace decode_testing;

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

TEST_CASE("decode: a refresh rewrites approximate keys and values with the dense ones") {
  decode_fixture f;
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
        const float* ours = sparse.target_cache().layer(2).key(row, i, h);
        const float* theirs = exact.target_cache().layer(2).key(exact_row, i, h);
        differences += !std::equal(ours, ours + 8, theirs);
      }
    }
    return differences;
  };
  CHECK(count_differences(0) > 20);
  CHECK(count_differences(1) == 0);
}

TEST_CASE("decode: every guide runs, keeps what it says and reads fewer rows than dense") {
  decode_fixture f;
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

TEST_CASE("decode: over caches of fp8, keeping every position equals plain decoding") {
  decode_fixture f;
  const auto prompt = prompt_of(50, 2);
  no_draft none;
  no_guide dense;
  auto plain = make_decoder<fp8_e4m3>(f.ctx, f.target, none, dense, {.draft_length = 0, .prefill_chunk = 32});
  const auto expected = finish_row(plain, plain.add({.prompt = prompt, .max_new_tokens = 40}));
  for (const std::int32_t page_size : {0, 8}) {
    guided guide(flat_alignment({4, 16}, true), toy_rule(1.0f));
    auto decoder = make_decoder<fp8_e4m3>(f.ctx, f.target, f.draft, guide,
                                          {.draft_length = 3, .prefill_chunk = 32, .page_size = page_size});
    CHECK(finish_row(decoder, decoder.add({.prompt = prompt, .max_new_tokens = 40})) == expected);
  }
}

TEST_CASE("decode: a round allocates nothing") {
  decode_fixture f;
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

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST_CASE("decode: what a decoder allocates is what was announced") {
  decode_fixture f;
  const auto in_use = [] {
    const struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
  };
  for (int kind = 0; kind < 4; ++kind) {
    decode_options options{
        .draft_length = 4, .max_sequences = 6, .max_positions = 300, .page_size = kind == 2 ? 8 : 0};
    options.sparse_draft = kind == 1;
    draft_guide<> guide(flat_alignment({8}, kind == 3), toy_rule(0.7f));
    const guide_needs needs = guide.needs();
    const decode_memory announced = decoder_bytes<float>(target_shape, draft_shape, options, needs);
    f.ctx.reserve_workspace(std::size_t{1} << 24);  // not a decoder's
    const std::size_t before = in_use();
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
    const std::size_t taken = in_use() - before;
    // Beside it: the guide's memory, texts, lists of free pages.
    detail::draft_guide_memory<cpu> memory;
    const std::size_t start = in_use();
    guide.prepare({target_shape, draft_shape, options.max_sequences, options.max_positions, 30, 5}, memory);
    const std::size_t guides = in_use() - start;
    const std::size_t texts = 6 * (300 + 17) * sizeof(std::int32_t);
    CAPTURE(kind);
    CHECK(taken >= announced.total() + guides);
    CHECK(taken < announced.total() + guides + texts + 24000);
  }
}
#endif

TEST_CASE("decode: models and options that do not fit are refused with the values") {
  decode_fixture f;
  no_guide dense;
  no_draft none;
  const auto make = [&](auto& draft, decode_options options) {
    make_decoder<float>(f.ctx, f.target, draft, dense, options);
  };
  CHECK_THROWS_WITH_AS(make(f.draft, {.draft_length = 16}), "decode: draft_length 16 is outside 0 … 15",
                       contract_error);
  CHECK_THROWS_WITH_AS(make(none, {.draft_length = 2}), "decode: draft_length 2 without a draft model",
                       contract_error);
  CHECK_THROWS_WITH_AS(make(f.draft, {.record_every = 0}), "decode: record_every 0 must be at least 1",
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
