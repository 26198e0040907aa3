// The decoding loop after failures, on the device: the cases of both backends, and NaN logits in a chosen row.
#include "specattn/cuda/decode.cuh"

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "decode/device.cuh"
#include "specattn/specattn.hpp"

struct decode_fixture : decode_device {
  static constexpr std::int64_t fault_stride = 7;  // every run captures its rounds anew
};

#include "decode/failure_cases.hpp"

namespace decode_testing {

static __global__ void spoil_kernel(float* logits, std::int32_t rows, std::int32_t vocab, const std::int32_t* row) {
  if (*row >= 0 && *row < rows) logits[*row * vocab + 3] = nanf("");
}

/// A model of which a row of logits holds a NaN as long as a number in device memory says so: a captured round follows it.
struct switched_model {
  toy::device_model* inner;
  buffer<std::int32_t, specattn::cuda> row{1};

  explicit switched_model(toy::device_model& of) : inner(&of) { spoil(-1); }
  void spoil(std::int32_t which) {
    detail::check_cuda(cudaMemcpy(row.data(), &which, sizeof(which), cudaMemcpyHostToDevice), "test");
  }
  model_shape shape() const { return inner->shape(); }
  template <class Attention>
  void forward(context<specattn::cuda>& ctx, const forward_batch<specattn::cuda>& batch, Attention& attention,
               view<float, 2, specattn::cuda> logits) {
    inner->forward(ctx, batch, attention, logits);
    const auto rows = static_cast<std::int32_t>(batch.logit_rows.extent(0));
    if (rows > 0) spoil_kernel<<<1, 1, 0, ctx.stream()>>>(logits.data(), rows, shape().vocab, row.data());
  }
};

bool go(std::int32_t, std::span<const std::int32_t>) { return true; }

text_of_row alone(decode_fixture& f, const text_of_row& prompt, float top_p) {
  draft_guide<specattn::cuda> guide(flat_alignment({8}, true), toy_rule(top_p));
  auto decoder = make_decoder<float>(f.ctx, f.target, f.draft, guide, {.draft_length = 3});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30});
  while (decoder.step(go)) {
  }
  return {decoder.text(row).begin(), decoder.text(row).end()};
}

TEST_CASE("decode on the device: NaN among one sequence's target logits is its error; the others go on as if alone") {
  decode_fixture f;
  const text_of_row prompts[] = {prompt_of(30, 61), prompt_of(44, 62)};
  for (const float top_p : {1.0f, 0.6f}) {
    const text_of_row wanted[] = {alone(f, prompts[0], top_p), alone(f, prompts[1], top_p)};
    for (const bool removed : {false, true}) {
      for (int at = 0; at < 4; ++at) {
        for (const std::int32_t spoilt : {0, 4}) {  // the first slot of either sequence
          switched_model target(f.target);
          draft_guide<specattn::cuda> guide(flat_alignment({8}, true), toy_rule(top_p));
          auto decoder = make_decoder<float>(f.ctx, target, f.draft, guide, {.draft_length = 3, .max_sequences = 2});
          std::int32_t rows[2];
          for (std::size_t i = 0; i < 2; ++i) rows[i] = decoder.add({.prompt = prompts[i], .max_new_tokens = 30});
          const std::size_t lost = spoilt == 0 ? 0 : 1;
          for (int i = 0; i < at; ++i) decoder.step(go);
          target.spoil(spoilt);
          const std::size_t before[] = {decoder.text(rows[0]).size(), decoder.text(rows[1]).size()};
          const std::string named = "of row " + std::to_string(rows[lost]);
          CHECK_THROWS_WITH_AS(decoder.step(go), doctest::Contains(named.c_str()), contract_error);
          CHECK(decoder.text(rows[lost]).size() == before[lost]);
          CHECK(decoder.text(rows[1 - lost]).size() > before[1 - lost]);
          target.spoil(-1);
          if (removed) decoder.remove(rows[lost]);
          while (decoder.step(go)) {
          }
          for (std::size_t i = 0; i < 2; ++i) {
            if (removed && i == lost) continue;
            CHECK(text_of_row(decoder.text(rows[i]).begin(), decoder.text(rows[i]).end()) == wanted[i]);
          }
        }
      }
    }
  }
}

TEST_CASE("decode on the device: a draft whose logits hold NaN loses its tokens, and the text stays exact") {
  decode_fixture f;
  const auto prompt = prompt_of(30, 63), other_prompt = prompt_of(20, 64);
  const auto wanted = alone(f, prompt, 1.0f), other_wanted = alone(f, other_prompt, 1.0f);
  for (const float top_p : {1.0f, 0.3f}) {
    switched_model draft(f.draft);
    draft_guide<specattn::cuda> guide(flat_alignment({8}, true), toy_rule(top_p));
    auto decoder = make_decoder<float>(f.ctx, f.target, draft, guide, {.draft_length = 3, .max_sequences = 2});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30});
    const auto other = decoder.add({.prompt = other_prompt, .max_new_tokens = 30});
    draft.spoil(0);
    while (decoder.step(go)) {
    }
    CHECK(text_of_row(decoder.text(row).begin(), decoder.text(row).end()) == wanted);  // always dense
    CHECK(decoder.counts(row).proposed == 0);
    CHECK(decoder.counts(row).draft_failures > 20);
    CHECK(decoder.counts(other).draft_failures == 0);
    CHECK(decoder.counts(other).proposed > 10);
    if (top_p == 1.0f) CHECK(text_of_row(decoder.text(other).begin(), decoder.text(other).end()) == other_wanted);
  }
}

}  // namespace decode_testing
