// Concepts storage, scaled_storage and backend: closed lists, which nothing joins by looking alike.
#include <doctest/doctest.h>

#include <cstdint>

#include "concepts/archetypes.hpp"
#include "specattn/specattn.hpp"

using namespace concept_testing;

namespace {

struct same_bits_as_bf16 {
  std::uint16_t bits = 0;
};
struct derived_from_bf16 : bf16 {};
struct derived_from_fp8 : fp8_e4m3 {};
struct derived_from_cpu : cpu {};

static_assert(storage<float> && storage<bf16> && storage<fp16> && storage<fp8_e4m3>);
static_assert(!storage<double> && !storage<std::uint16_t> && !storage<std::uint8_t>);
static_assert(!storage<const float> && !storage<float&>);
static_assert(!storage<same_bits_as_bf16> && !storage<derived_from_bf16>);

static_assert(scaled_storage<fp8_e4m3>);
static_assert(!scaled_storage<float> && !scaled_storage<bf16> && !scaled_storage<fp16>);
static_assert(!scaled_storage<const fp8_e4m3> && !scaled_storage<derived_from_fp8> && !scaled_storage<std::uint8_t>);

static_assert(backend<cpu> && backend<cuda>);
static_assert(!backend<const cpu> && !backend<cpu&> && !backend<derived_from_cpu> && !backend<int>);

}  // namespace

TEST_CASE_TEMPLATE("concepts: keys and values of every storage are decoded with", T, float, bf16, fp16, fp8_e4m3) {
  context<cpu> ctx{1};
  archetype_model target, draft(3);
  archetype_guide<T> guide(nullptr);
  auto decoder = make_decoder<T>(ctx, target, draft, guide, {.draft_length = 3});
  const auto prompt = counted(0, 10);
  CHECK(finished(decoder, decoder.add({.prompt = prompt, .max_new_tokens = 20})) == counted(0, 30));
}
