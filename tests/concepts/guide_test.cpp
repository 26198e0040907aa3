// Concepts guide and guide_with_memory: the least guide is enough for a decoder, and each clause refuses what lacks it.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>

#include "concepts/archetypes.hpp"
#include "specattn/specattn.hpp"

using namespace concept_testing;

namespace {

using archetype = archetype_guide<>;

// What a near miss hides is all that it lacks: hidden by a member of the same name, the rest inherited.
struct nothing_hidden : archetype {};
struct without_prepare : archetype {
  void prepare() = delete;
};
struct without_needs : archetype {
  void needs() = delete;
};
struct needs_that_change_it : archetype {
  guide_needs needs() { return {}; }
};
struct needs_of_another_type : archetype {
  bool needs() const { return true; }
};
struct without_workspace_bytes : archetype {
  void workspace_bytes() = delete;
};
struct workspace_bytes_that_change_it : archetype {
  std::size_t workspace_bytes(const context<cpu>&) { return 0; }
};
struct workspace_bytes_of_a_context_to_change : archetype {
  std::size_t workspace_bytes(context<cpu>&) const { return 0; }
};
struct workspace_bytes_of_another_type : archetype {
  void workspace_bytes(const context<cpu>&) const {}
};
struct without_before_verify : archetype {
  void before_verify() = delete;
};
struct without_before_layer : archetype {
  void before_layer() = delete;
};
struct without_after_verify : archetype {
  void after_verify() = delete;
};
struct without_forget : archetype {
  void forget() = delete;
};
struct without_metadata_rows : archetype {
  void metadata_rows() = delete;
};
struct metadata_rows_that_change_it : archetype {
  std::int64_t metadata_rows(std::int32_t) { return 0; }
};
struct metadata_rows_of_another_type : archetype {
  void metadata_rows(std::int32_t) const {}
};

static_assert(guide<archetype, float>);
static_assert(guide<archetype, float, cpu>, "the CPU is the backend that is meant where none is named");
static_assert(guide<nothing_hidden, float>);
static_assert(!guide<without_prepare, float>);
static_assert(!guide<without_needs, float>);
static_assert(!guide<needs_that_change_it, float>);
static_assert(!guide<needs_of_another_type, float>);
static_assert(!guide<without_workspace_bytes, float>);
static_assert(!guide<workspace_bytes_that_change_it, float>);
static_assert(!guide<workspace_bytes_of_a_context_to_change, float>);
static_assert(!guide<workspace_bytes_of_another_type, float>);
static_assert(!guide<without_before_verify, float>);
static_assert(!guide<without_before_layer, float>);
static_assert(!guide<without_after_verify, float>);
static_assert(!guide<without_forget, float>);
static_assert(!guide<without_metadata_rows, float>);
static_assert(!guide<metadata_rows_that_change_it, float>);
static_assert(!guide<metadata_rows_of_another_type, float>);

// A guide of one storage, or of one backend, is none of another.
static_assert(guide<archetype_guide<fp16>, fp16> && !guide<archetype_guide<fp16>, float>);
static_assert(guide<archetype_guide<float, cuda>, float, cuda> && !guide<archetype_guide<float, cuda>, float, cpu>);
static_assert(!guide<archetype, double>);

// Memory: a type by that name, which a decoder can make and which the guide takes where it decides.
using remembering = archetype_guide_with_memory<>;

struct memory_that_is_a_member : archetype {
  int memory = 0;
};
struct memory_that_needs_arguments : remembering {
  struct memory {
    explicit memory(int) {}
  };
  using remembering::before_verify;
  void before_verify(context<cpu>&, round_state<float>&, memory&) {}
};
struct memory_that_no_decision_takes : archetype {
  using memory = int;
  using archetype::after_verify;
  void after_verify(context<cpu>&, round_state<float>&, memory&) {}
};
struct memory_taken_before_layers : archetype {
  using memory = int;
  using archetype::before_layer;
  void before_layer(context<cpu>&, round_state<float>&, std::int32_t, view<const float, 3>, memory&) {}
};

static_assert(guide_with_memory<remembering> && guide<remembering, float>);
static_assert(!guide_with_memory<archetype>);
static_assert(!guide_with_memory<memory_that_is_a_member> && guide<memory_that_is_a_member, float>);
static_assert(guide_with_memory<memory_that_needs_arguments> && !guide<memory_that_needs_arguments, float>);
static_assert(guide_with_memory<memory_that_no_decision_takes> && !guide<memory_that_no_decision_takes, float>);
static_assert(guide<memory_taken_before_layers, float>);

// The library's own, on both backends where they are made for both.
static_assert(guide<idle_guide, float> && guide<idle_guide, float, cuda>);
static_assert(guide<no_guide, fp8_e4m3> && guide<no_guide, fp8_e4m3, cuda>);
static_assert(guide<window_guide, bf16>);
static_assert(guide<page_guide<cpu>, bf16> && guide_with_memory<page_guide<cpu>>);
static_assert(guide<draft_guide<>, fp16> && guide_with_memory<draft_guide<>>);
static_assert(guide<oracle_guide<>, fp16> && guide_with_memory<oracle_guide<>>);

// A decoder asks the concept, so that what is missing is named where the decoder is written down.
template <class Guide>
concept decodes = requires {
  typename decoder<float, archetype_model, archetype_model, Guide>;
};
static_assert(decodes<archetype> && decodes<remembering>);
static_assert(!decodes<without_before_verify> && !decodes<memory_that_no_decision_takes>);

struct scene {
  context<cpu> ctx{1};
  archetype_model target;
  archetype_model draft{3};
};

}  // namespace

TEST_CASE("concepts: the least guide guides a decoder, which calls every hook") {
  scene s;
  archetype guide(nullptr);
  {
    auto decoder = make_decoder<float>(s.ctx, s.target, s.draft, guide, {.draft_length = 3});
    const auto prompt = counted(0, 12);
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 30});
    CHECK(finished(decoder, row) == counted(0, 42));
    const decode_counts counts = decoder.counts(row);
    CHECK(counts.kv_rows_read < counts.kv_rows_dense);
    CHECK(guide.calls.prepare == 1);
    CHECK(guide.calls.before_verify == counts.rounds);
    CHECK(guide.calls.before_layer == counts.rounds * archetype_shape.layers);
    CHECK(guide.calls.after_verify == counts.rounds);
    const int before = guide.calls.forget;
    decoder.remove(row);
    CHECK(guide.calls.forget == before + 1);
  }
}

TEST_CASE("concepts: the least guide is enough for every option of the loop") {
  const decode_options options[] = {
      {.draft_length = 0},
      {.draft_length = 2, .refresh_every = 2},
      {.draft_length = 3, .record_steps = 1, .record_every = 3},
      {.draft_length = 3, .adaptive = true},
      {.draft_length = 3, .sparse_draft = true, .page_size = 16},
  };
  scene s;
  archetype guide(nullptr);
  for (const decode_options& o : options) {
    auto decoder = make_decoder<float>(s.ctx, s.target, s.draft, guide, o);
    const auto prompt = counted(5, 9);
    CHECK(finished(decoder, decoder.add({.prompt = prompt, .max_new_tokens = 40})) == counted(5, 49));
  }
}

TEST_CASE("concepts: the least guide with memory is handed each decoder's own") {
  scene s;
  remembering guide(nullptr);
  const auto prompt = counted(2, 10);
  auto first = make_decoder<float>(s.ctx, s.target, s.draft, guide, {.draft_length = 3});
  auto second = make_decoder<float>(s.ctx, s.target, s.draft, guide, {.draft_length = 1});
  const auto first_row = first.add({.prompt = prompt, .max_new_tokens = 20});
  CHECK(finished(first, first_row) == counted(2, 30));
  CHECK(guide.rounds == first.counts(first_row).rounds);
  const auto second_row = second.add({.prompt = prompt, .max_new_tokens = 20});
  CHECK(finished(second, second_row) == counted(2, 30));
  CHECK(guide.rounds == second.counts(second_row).rounds);
  CHECK(second.counts(second_row).kv_rows_read < second.counts(second_row).kv_rows_dense);
}
