// What attend() promises of a cache of fp8_e4m3, for any backend: the oracle's answer over the numbers that the cache
// holds. The including file defines `attend_fixture` as attend/cases.hpp has it.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "attend/problem.hpp"

namespace attend_testing {

using specattn::fp8_e4m3;

/// A problem whose heads have scales of their own, as a cache of real keys and values would have them: the largest
/// magnitudes are near 448 of them.
struct scaled_problem : problem<fp8_e4m3> {
  std::vector<float> key_scales, value_scales;  // [layer][kv head]

  explicit scaled_problem(const pass_shape& of, std::uint32_t seed = 3) {
    const auto exact = random_problem<float>(of, seed);
    shape = of;
    q = exact.q;
    for (int i = 0; i < 2 * of.kv_heads; ++i) {
      key_scales.push_back(0.009f * (1.0f + 0.3f * static_cast<float>(i)));
      value_scales.push_back(0.011f / (1.0f + 0.2f * static_cast<float>(i)));
    }
    const auto round_rows = [&](std::vector<float> rows, const std::vector<float>& scales) {
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const auto head = i / static_cast<std::size_t>(of.head_dim) % static_cast<std::size_t>(of.kv_heads);
        const float scale = scales[static_cast<std::size_t>(of.kv_heads) + head];  // layer 1 is the one that is read
        rows[i] = specattn::to_float(specattn::from_float<fp8_e4m3>(rows[i] / scale)) * scale;
      }
      return rows;
    };
    for (const auto& t : exact.texts) texts.push_back({round_rows(t.k, key_scales), round_rows(t.v, value_scales)});
  }
};

template <class Fixture>
void scaled_agrees_with_oracle(Fixture& fixture, const scaled_problem& p) {
  const std::ptrdiff_t heads = p.shape.kv_heads;
  const auto key_scales = fixture.upload(p.key_scales), value_scales = fixture.upload(p.value_scales);
  specattn::kv_cache<fp8_e4m3, typename Fixture::backend> cache(cache_shape(p.shape), key_scales.shaped({2, heads}),
                                                                value_scales.shaped({2, heads}));
  fill<Fixture, fp8_e4m3>(fixture, p, cache);
  agrees_with_oracle<Fixture, fp8_e4m3>(fixture, p, cache);
}

TEST_CASE_TEMPLATE("attend over fp8: every bit pattern is read as the number that it means, in keys and in values",
                   Fixture, attend_fixture) {
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {0};
  shape.kv_heads = 4;
  shape.group = shape.head_dim = 64;
  shape.scale = 1.0f;
  auto p = random_problem<fp8_e4m3>(shape);
  for (unsigned i = 0; i < 256; ++i) {  // 127 and 255 are no numbers
    const float x = specattn::to_float(fp8_e4m3{static_cast<std::uint8_t>(i % 128 == 127 ? 0 : i)});
    p.texts[0].k[i] = p.texts[0].v[255 - i] = x;
    for (unsigned d = 0; d < 64; ++d) p.q[i * 64 + d] = i % 64 == d ? 1.0f : 0.0f;  // head i sees element i
  }
  const answer got = run(fixture, p);
  CHECK(got.lse == p.texts[0].k);
  int wrong = 0;
  for (std::size_t head = 0; head < 256; ++head)
    for (std::size_t d = 0; d < 64; ++d) wrong += got.out[head * 64 + d] != p.texts[0].v[head / 64 * 64 + d] ? 1 : 0;
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE(
    "attend over fp8: dense attention of any prefix length, with scales and without, equals the oracle", Fixture,
    attend_fixture) {
  Fixture fixture;
  for (std::int32_t kv_len : {0, 1, 15, 16, 17, 255, 256, 257, 513, 1031}) {
    CAPTURE(kv_len);
    pass_shape shape;
    shape.kv_lens = {kv_len};
    shape.slots = {3};
    agrees_with_oracle(fixture, random_problem<fp8_e4m3>(shape));
    scaled_agrees_with_oracle(fixture, scaled_problem(shape));
  }
}

TEST_CASE_TEMPLATE("attend over fp8: any head_dim and number of slots equals the oracle", Fixture, attend_fixture) {
  Fixture fixture;
  for (std::int32_t head_dim : {1, 7, 16, 31, 32, 48, 64, 72, 80, 96, 128, 130, 144, 256}) {
    for (std::int32_t slots : {1, 4, 9, 15}) {
      CAPTURE(head_dim);
      CAPTURE(slots);
      pass_shape shape;
      shape.kv_lens = {77};
      shape.slots = {slots};
      shape.head_dim = head_dim;
      scaled_agrees_with_oracle(fixture, scaled_problem(shape));
    }
  }
}

TEST_CASE_TEMPLATE("attend over fp8: ragged batches, dense, listed and mixed, and what they record equal the oracle",
                   Fixture, attend_fixture) {
  Fixture fixture;
  for (std::int32_t page_size : {0, 1, 16}) {
    for (std::int32_t group : {1, 4, 7}) {
      CAPTURE(page_size);
      CAPTURE(group);
      pass_shape shape;
      shape.kv_lens = {300, 0, 17, 640, 5};
      shape.slots = {3, 2, 0, 1, 20};
      shape.group = group;
      shape.head_dim = page_size == 1 ? 128 : 64;
      shape.page_size = page_size;
      scaled_problem p(shape);
      p.record = true;
      scaled_agrees_with_oracle(fixture, p);
      p.recorded = record_slots::all;
      keep_random(p, 0.3);
      p.kept[3][1] = {};
      scaled_agrees_with_oracle(fixture, p);
      p.all.assign(5, {false, true});
      scaled_agrees_with_oracle(fixture, p);
    }
  }
}

TEST_CASE_TEMPLATE("attend over fp8: a key that is not a number makes its sequence's results none", Fixture,
                   attend_fixture) {
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {40, 40};
  shape.slots = {1, 1};
  auto p = random_problem<fp8_e4m3>(shape);
  p.texts[1].k[5] = std::nanf("");
  const answer got = run(fixture, p);
  CHECK(std::isfinite(got.out[0]));
  CHECK(std::isnan(got.lse[4]));
}

TEST_CASE_TEMPLATE("attend over fp8: scales of another number of heads, and of other storage, are refused", Fixture,
                   attend_fixture) {
  Fixture fixture;
  const auto scales = fixture.upload(std::vector<float>(3, 1.0f));
  const auto message = [&]<class T>(T) {
    auto p = random_problem<T>(pass_shape{});
    specattn::attend_args<T, typename Fixture::backend> args;
    const auto cache = filled_cache(fixture, p);
    const auto q = fixture.upload(p.q);
    args.kv = cache.layer(1);
    args.kv.value_scales = scales.shaped({3});
    args.q = q.shaped({1, p.q_heads(), p.shape.head_dim});
    try {
      specattn::attend(fixture.context(), args);
    } catch (const specattn::contract_error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK(message(fp8_e4m3{}).find("3 scales for 2 kv_heads") != std::string::npos);
  CHECK(message(specattn::bf16{}).find("scales of a storage type that has none") != std::string::npos);
}

}  // namespace attend_testing
