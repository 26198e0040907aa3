// The decoding loop on the device: the CPU's cases, and what only a captured round can get wrong.
#include "specattn/cuda/decode.cuh"

#include <limits>

#include "decode/device.cuh"
#include "specattn/specattn.hpp"

using decode_fixture = decode_device;

#include "decode/batch_cases.hpp"
#include "decode/cases.hpp"

namespace decode_testing {

bool go(std::int32_t, std::span<const std::int32_t>) { return true; }

TEST_CASE("decode on the device: greedy text is the CPU's, dense and over a selection") {
  decode_fixture f;
  context<cpu> host{2};
  const auto prompt = prompt_of(120, 31);
  for (const float top_p : {1.0f, 0.8f}) {
    for (const bool history : {false, true}) {
      const decode_options options{.draft_length = 3};
      draft_guide<> host_guide(flat_alignment({8}, history), toy_rule(top_p));
      auto wanted = make_decoder<float>(host, f.host_target, f.host_draft, host_guide, options);
      const auto wanted_row = wanted.add({.prompt = prompt, .max_new_tokens = 60});
      const auto text = finish_row(wanted, wanted_row);
      guided guide(flat_alignment({8}, history), toy_rule(top_p));
      auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
      const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 60});
      CHECK(finish_row(decoder, row) == text);
      const decode_counts& ours = decoder.counts(row);
      const decode_counts& theirs = wanted.counts(wanted_row);
      CHECK(ours.rounds == theirs.rounds);
      CHECK(ours.kv_rows_dense == theirs.kv_rows_dense);
      CHECK(ours.draft_rows_dense == theirs.draft_rows_dense);
      CHECK(ours.draft_rows_read > theirs.draft_rows_read);  // recording reads the keys once more
      // Importance is rounded to bf16 there: positions at the threshold may differ.
      CHECK(static_cast<double>(ours.kv_rows_read) ==
            doctest::Approx(static_cast<double>(theirs.kv_rows_read)).epsilon(0.01));
    }
  }
}

TEST_CASE("decode on the device: a sparse draft reads what the CPU's reads") {
  decode_fixture f;
  context<cpu> host{2};
  const auto prompt = prompt_of(150, 32);
  decode_options options{.draft_length = 4};
  options.sparse_draft = true;
  options.draft_rule = toy_rule(0.7f);
  draft_guide<> host_guide(flat_alignment({8}), toy_rule(0.8f));
  auto wanted = make_decoder<float>(host, f.host_target, f.host_draft, host_guide, options);
  const auto wanted_row = wanted.add({.prompt = prompt, .max_new_tokens = 50});
  const auto text = finish_row(wanted, wanted_row);
  guided guide(flat_alignment({8}), toy_rule(0.8f));
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, options);
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 50});
  CHECK(finish_row(decoder, row) == text);
  const decode_counts& ours = decoder.counts(row);
  const decode_counts& theirs = wanted.counts(wanted_row);
  CHECK(ours.draft_rows_dense == theirs.draft_rows_dense);
  CHECK(static_cast<double>(ours.draft_rows_read) ==
        doctest::Approx(static_cast<double>(theirs.draft_rows_read)).epsilon(0.01));
  CHECK(static_cast<double>(ours.kv_rows_read) ==
        doctest::Approx(static_cast<double>(theirs.kv_rows_read)).epsilon(0.02));
}

TEST_CASE("decode on the device: sampled text is the CPU's where nothing is left out") {
  decode_fixture f;
  context<cpu> host{2};
  const auto prompt = prompt_of(40, 33);
  const sampler_options sampler{.temperature = 0.9f, .top_k = 30, .seed = 5};
  no_draft none;
  no_guide dense;
  auto wanted = make_decoder<float>(host, f.host_target, none, dense, {.draft_length = 0});
  const auto wanted_row = wanted.add({.prompt = prompt, .max_new_tokens = 60, .sampler = sampler});
  CHECK(autoregressive(f, prompt, 60, sampler) == finish_row(wanted, wanted_row));
}

TEST_CASE("decode on the device: a text that grows through several length buckets, paged and contiguous") {
  decode_fixture f;
  const auto prompt = prompt_of(200, 34);
  const auto expected = autoregressive(f, prompt, 115);
  for (const std::int32_t page_size : {0, 16}) {
    guided guide(flat_alignment({8}, true), toy_rule(1.0f));
    auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, {.draft_length = 5, .page_size = page_size});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 115});
    CHECK(finish_row(decoder, row) == expected);
  }
}

TEST_CASE("decode on the device: a sequence whose caches the caller fills goes on as one that was prefilled") {
  decode_fixture f;
  const auto prompt = prompt_of(64, 35);
  no_guide dense;
  const decode_options options{.draft_length = 3};
  auto first = make_decoder<float>(f.ctx, f.target, f.draft, dense, options);
  const auto row = first.add({.prompt = prompt, .max_new_tokens = 30});
  auto second = make_decoder<float>(f.ctx, f.target, f.draft, dense, options);
  const auto copy = second.add_cached({.prompt = prompt, .max_new_tokens = 30});
  const auto copy_rows = [&](const kv_cache<float, specattn::cuda>& from, const kv_cache<float, specattn::cuda>& to) {
    for (std::int32_t layer = 0; layer < from.shape().layers; ++layer) {
      const auto a = from.layer(layer), b = to.layer(layer);
      const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(a.page_stride);
      cudaMemcpyAsync(b.keys + copy * b.page_stride, a.keys + row * a.page_stride, bytes, cudaMemcpyDefault,
                      f.ctx.stream());
      cudaMemcpyAsync(b.values + copy * b.page_stride, a.values + row * a.page_stride, bytes, cudaMemcpyDefault,
                      f.ctx.stream());
    }
  };
  copy_rows(first.target_cache(), second.target_cache());
  copy_rows(first.draft_cache(), second.draft_cache());
  CHECK(finish_row(second, copy) == finish_row(first, row));
}

TEST_CASE("decode on the device: rounds run on, whatever happens to the workspace and between two decoders") {
  decode_fixture f;
  const auto prompt = prompt_of(50, 36);
  const auto expected = autoregressive(f, prompt, 40);
  no_guide dense;
  auto a = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 3});
  auto b = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 4});
  const auto row_a = a.add({.prompt = prompt, .max_new_tokens = 40});
  const auto row_b = b.add({.prompt = prompt, .max_new_tokens = 40});
  for (int i = 0; i < 4; ++i) {
    a.step(go);
    f.device.soil_workspace();
    b.step(go);
    if (i == 1) f.ctx.reserve_workspace(2 * f.ctx.workspace_bytes() + 1);
  }
  CHECK(finish_row(a, row_a) == expected);
  CHECK(finish_row(b, row_b) == expected);
}

TEST_CASE("decode on the device: adaptive dense rounds write the plain text, and a rewound row its own again") {
  decode_fixture f;
  const auto prompt = prompt_of(30, 37);
  const auto expected = autoregressive(f, prompt, 100);
  no_guide dense;
  decode_options options{.draft_length = 6};
  options.adaptive = true;
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, options);
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 100});
  CHECK(finish_row(decoder, row) == expected);
  decoder.rewind(row, {.max_new_tokens = 100});
  CHECK(finish_row(decoder, row) == expected);
  CHECK(decoder.last_round().seconds() > 0.0);
  CHECK(decoder.planner() != nullptr);
}

/// A row's keys of one layer, [length, kv_heads * head_dim], of a cache that is not paged.
std::vector<float> keys_of(const kv_cache<float, specattn::cuda>& cache, std::int32_t layer, std::int32_t row,
                           std::int32_t length) {
  auto from = cache.layer(layer);
  std::vector<std::int32_t> table(static_cast<std::size_t>(from.block_table.size()));
  cudaMemcpy(table.data(), from.block_table.data(), table.size() * sizeof table[0], cudaMemcpyDeviceToHost);
  from.block_table = {table.data(), from.block_table.extents()};  // the host looks positions up
  std::vector<float> keys;
  std::vector<float> head(static_cast<std::size_t>(length) * static_cast<std::size_t>(from.head_dim));
  for (std::int32_t h = 0; h < from.kv_heads; ++h) {
    for (std::int32_t i = 0; i < length; ++i) {
      const float* key = from.keys + from.offset(row, i, h);
      cudaMemcpy(head.data() + std::ptrdiff_t{i} * from.head_dim, key,
                 sizeof(float) * static_cast<std::size_t>(from.head_dim), cudaMemcpyDeviceToHost);
    }
    keys.insert(keys.end(), head.begin(), head.end());
  }
  return keys;
}

TEST_CASE("decode on the device: a refresh rewrites approximate keys with the dense ones, in chunks too") {
  decode_fixture f;
  const auto prompt = prompt_of(60, 5);
  const auto worst_difference = [&](std::int32_t refresh_every, std::int32_t chunk) {
    guided guide(flat_alignment(), toy_rule(0.3f));
    auto sparse = make_decoder<float>(f.ctx, f.target, f.draft, guide,
                                      {.draft_length = 3, .refresh_every = refresh_every, .prefill_chunk = chunk});
    const auto row = sparse.add({.prompt = prompt, .max_new_tokens = 50});
    finish_row(sparse, row);
    const decode_counts& counts = sparse.counts(row);
    CHECK((counts.refreshed > 0) == (refresh_every > 0));
    CHECK(counts.refreshed <= counts.dense_rounds);
    CHECK(counts.kv_rows_read < counts.kv_rows_dense);
    no_draft none;
    no_guide dense;
    auto exact = make_decoder<float>(f.ctx, f.target, none, dense, {.draft_length = 0});
    const auto exact_row = exact.add({.prompt = sparse.text(row), .max_new_tokens = 1});
    // The last two rounds may still be approximate: the newest refresh came before them.
    const std::int32_t settled = static_cast<std::int32_t>(sparse.text(row).size()) - 1 - 2 * 4;
    cudaStreamSynchronize(f.ctx.stream());
    const auto ours = keys_of(sparse.target_cache(), 2, row, settled);
    const auto theirs = keys_of(exact.target_cache(), 2, exact_row, settled);
    double worst = 0.0;
    for (std::size_t i = 0; i < ours.size(); ++i) worst = std::max(worst, std::abs(double{ours[i]} - theirs[i]));
    return worst;
  };
  CHECK(worst_difference(0, 64) > 1e-2);
  CHECK(worst_difference(1, 64) < 1e-4);
  CHECK(worst_difference(1, 2) < 1e-4);
}

TEST_CASE("decode on the device: what it cannot do is refused with the values, and NaN logits lose no text") {
  decode_fixture f;
  no_guide dense;
  const auto prompt = prompt_of(20, 38);
  CHECK_THROWS_WITH_AS(make_decoder<float>(f.ctx, f.target, f.draft, dense, {.refresh_every = -2}),
                       doctest::Contains("refresh_every -2"), contract_error);
  context<specattn::cuda> on_default_stream;
  CHECK_THROWS_WITH_AS(make_decoder<float>(on_default_stream, f.target, f.draft, dense, {}),
                       "decode: the default stream cannot be captured; give the context another", contract_error);
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, dense, {.draft_length = 3});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30});
  decoder.step(go);
  const std::vector<std::int32_t> before(decoder.text(row).begin(), decoder.text(row).end());
  f.target.spoil(5, std::numeric_limits<float>::quiet_NaN());
  std::string message;
  try {
    decoder.step(go);
  } catch (const contract_error& error) {
    message = error.what();
  }
  CHECK(message.find("the target's logits for position") != std::string::npos);
  CHECK(std::vector<std::int32_t>(decoder.text(row).begin(), decoder.text(row).end()) == before);
}

}  // namespace decode_testing
