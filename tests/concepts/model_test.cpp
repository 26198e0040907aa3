// Concepts language_model and layer_attention: the least models and attention are enough, and each clause refuses what
// lacks it.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "concepts/archetypes.hpp"
#include "specattn/specattn.hpp"

using namespace concept_testing;

namespace {

using rows_in = view<const float, 3>;
using rows_out = view<float, 3>;

/// Attends to nothing: every output is one.
struct archetype_attention : stays_in_place {
  using stays_in_place::stays_in_place;
  void operator()(std::int32_t, rows_in, rows_in, rows_in, rows_out out) {
    for (std::ptrdiff_t s = 0; s < out.extent(0); ++s) {
      for (std::ptrdiff_t h = 0; h < out.extent(1); ++h) {
        for (std::ptrdiff_t d = 0; d < out.extent(2); ++d) out(s, h, d) = 1.0f;
      }
    }
  }
};
struct attention_without_layer {
  void operator()(rows_in, rows_in, rows_in, rows_out) {}
};
struct attention_without_values {
  void operator()(std::int32_t, rows_in, rows_in, rows_out) {}
};
struct attention_that_changes_its_input {
  void operator()(std::int32_t, rows_out, rows_out, rows_out, rows_out) {}
};
struct attention_that_changes_the_views_read {
  void operator()(std::int32_t, rows_in&, rows_in&, rows_in&, rows_out) {}
};
struct attention_that_changes_the_view_written {
  void operator()(std::int32_t, rows_in, rows_in, rows_in, rows_out&) {}
};
struct attention_that_changes_the_layer {
  void operator()(std::int32_t&, rows_in, rows_in, rows_in, rows_out) {}
};
struct attention_of_the_device {
  using in = view<const float, 3, cuda>;
  void operator()(std::int32_t, in, in, in, view<float, 3, cuda>) {}
};

static_assert(layer_attention<archetype_attention>);
static_assert(layer_attention<archetype_attention, cpu>, "the CPU is meant where no backend is named");
static_assert(!layer_attention<int>);
static_assert(!layer_attention<const archetype_attention>, "attending may change the attention: a cache grows");
static_assert(!layer_attention<attention_without_layer>);
static_assert(!layer_attention<attention_without_values>);
static_assert(!layer_attention<attention_that_changes_its_input>);
static_assert(!layer_attention<attention_that_changes_the_views_read>, "models may write views where they call");
static_assert(!layer_attention<attention_that_changes_the_view_written>);
static_assert(!layer_attention<attention_that_changes_the_layer>);
static_assert(!layer_attention<archetype_attention, cuda>);
static_assert(layer_attention<attention_of_the_device, cuda> && !layer_attention<attention_of_the_device>);
static_assert(layer_attention<attention_pass<float>> && layer_attention<attention_pass<fp8_e4m3, cuda>, cuda>);

// What a near miss hides is all that it lacks: hidden by a member of the same name, the rest inherited.
struct nothing_hidden : archetype_model {};
struct without_shape : archetype_model {
  void shape() = delete;
};
struct shape_that_changes_it : archetype_model {
  model_shape shape() { return archetype_shape; }
};
struct shape_of_another_type : archetype_model {
  std::int32_t shape() const { return 0; }
};
struct shape_that_only_converts : archetype_model {
  only_converts<model_shape> shape() const { return {archetype_shape}; }
};
struct shape_by_reference : archetype_model {
  const model_shape& shape() const { return archetype_shape; }
};
struct without_forward : archetype_model {
  void forward() = delete;
};
struct forward_of_one_attention : archetype_model {
  void forward(context<cpu>&, const forward_batch<>&, attention_pass<float>&, view<float, 2>) {}
};
struct forward_that_copies_attention : archetype_model {
  template <class Attention>
  void forward(context<cpu>&, const forward_batch<>&, Attention&&,
               view<float, 2>) requires(!std::is_reference_v<Attention>) {}
};
struct forward_that_changes_the_batch : archetype_model {
  template <class Attention>
  void forward(context<cpu>&, forward_batch<>&, Attention&, view<float, 2>) {}
};
struct forward_that_changes_the_logits_view : archetype_model {
  template <class Attention>
  void forward(context<cpu>&, const forward_batch<>&, Attention&, view<float, 2>&) {}
};
struct forward_without_logits : archetype_model {
  template <class Attention>
  void forward(context<cpu>&, const forward_batch<>&, Attention&) {}
};
struct model_of_the_device : archetype_model {
  template <layer_attention<cuda> Attention>
  void forward(context<cuda>&, const forward_batch<cuda>&, Attention&, view<float, 2, cuda>) {}
};

static_assert(language_model<archetype_model>);
static_assert(language_model<archetype_model, cpu>, "the CPU is meant where no backend is named");
static_assert(language_model<nothing_hidden>);
static_assert(!language_model<const archetype_model>, "a pass may change the model: its buffers hold the pass");
static_assert(!language_model<without_shape>);
static_assert(!language_model<shape_that_changes_it>);
static_assert(!language_model<shape_of_another_type>);
static_assert(!language_model<shape_that_only_converts>);
static_assert(language_model<shape_by_reference>);
static_assert(!language_model<without_forward>);
static_assert(!language_model<forward_of_one_attention>);
static_assert(!language_model<forward_that_copies_attention>);
static_assert(!language_model<forward_that_changes_the_batch>);
static_assert(!language_model<forward_that_changes_the_logits_view>);
static_assert(!language_model<forward_without_logits>);
static_assert(!language_model<archetype_model, cuda>);
static_assert(language_model<model_of_the_device, cuda> && !language_model<model_of_the_device>);
static_assert(language_model<no_draft> && language_model<no_draft, cuda>);

// A decoder asks the concept, of both models.
template <class Target, class Draft>
concept decodes = requires {
  typename decoder<float, Target, Draft, no_guide>;
};
static_assert(decodes<archetype_model, archetype_model>);
static_assert(!decodes<without_forward, archetype_model> && !decodes<archetype_model, without_forward>);

}  // namespace

TEST_CASE("concepts: the least model runs over the least attention") {
  context<cpu> ctx{1};
  archetype_model model;
  archetype_attention attention(nullptr);
  const std::vector<std::int32_t> tokens = {4, 6}, positions = {0, 1}, wanted = {0, 1};
  std::vector<float> logits(2 * archetype_vocab, -1.0f);
  model.forward(ctx, {tokens, positions, wanted}, attention, view<float, 2>(logits.data(), {2, archetype_vocab}));
  for (std::int32_t v = 0; v < archetype_vocab; ++v) {
    CHECK(logits[static_cast<std::size_t>(v)] == (v == 5 ? 20.0f : 0.0f));
    CHECK(logits[static_cast<std::size_t>(archetype_vocab + v)] == (v == 0 ? 20.0f : 0.0f));
  }
}

TEST_CASE("concepts: the least target and draft are decoded, alone and together") {
  context<cpu> ctx{1};
  archetype_model target, draft(3);
  no_draft none;
  no_guide dense;
  const auto prompt = counted(1, 8);
  auto plain = make_decoder<bf16>(ctx, target, none, dense, {.draft_length = 0});
  CHECK(finished(plain, plain.add({.prompt = prompt, .max_new_tokens = 24})) == counted(1, 32));
  auto drafted = make_decoder<bf16>(
      ctx, target, draft, dense, {.draft_length = 4, .max_sequences = 2, .sparse_draft = true, .prefill_chunk = 3});
  const auto row = drafted.add({.prompt = prompt, .max_new_tokens = 24});
  CHECK(finished(drafted, row) == counted(1, 32));
  CHECK(drafted.counts(row).accepted > 0);
  CHECK(drafted.counts(row).corrected > 0);
  drafted.remove(row);
  std::vector<float> loss(20);
  CHECK(drafted.score(counted(0, 30), 10, loss).proposed > 0);
  for (const float one : loss) CHECK(one < 1e-6f);
}

TEST_CASE("concepts: the least target and draft are calibrated") {
  context<cpu> ctx{1};
  archetype_model target, draft(3);
  const alignment fitted = calibrate<float>(ctx, target, draft, counted(0, 40), {.prefill = 8, .draft_length = 2},
                                            [](std::int32_t, std::int32_t) {});
  CHECK(fitted.target.layers == archetype_shape.layers);
  CHECK(fitted.divergence.size() == 4);
}
