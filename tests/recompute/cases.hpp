// What recompute() promises, one claim a case, for any backend. The including file defines `attend_fixture` as for the
// cases of attend.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "attend/problem.hpp"
#include "specattn/recompute.hpp"

namespace attend_testing {

using specattn::bf16;
using specattn::fp16;
using specattn::fp8_e4m3;

/// What recompute() leaves for a problem, given the log-sum-exp of `with`.
template <class Fixture, specattn::storage T>
std::vector<float> recomputed(Fixture& fixture, const problem<T>& p, const answer& with,
                              const specattn::kv_cache<T, typename Fixture::backend>& cache) {
  using B = typename Fixture::backend;
  const std::ptrdiff_t slots = p.slots(), heads = p.q_heads();
  const auto sequences = static_cast<std::ptrdiff_t>(p.shape.slots.size());
  std::vector<std::int32_t> offsets = {0};
  for (std::int32_t count : p.shape.slots) offsets.push_back(offsets.back() + count);
  const auto q = fixture.upload(laid_out(p, p.q)), lse = fixture.upload(with.lse);
  const auto slot_offsets = fixture.upload(offsets), kv_lens = fixture.upload(p.shape.kv_lens);
  const uploaded_selection<Fixture> kept(fixture, p);
  const std::ptrdiff_t rows = p.recorded == record_slots::newest ? sequences : slots;
  const auto weights = fixture.upload(std::vector<float>(with.weights.size(), stale));
  specattn::recompute_args<T, B> args;
  args.q = shaped<B>(q.data(), slots, heads, p.shape.head_dim, p.shape.strided);
  args.kv = cache.layer(1);
  args.kv.values = nullptr;
  args.slot_offsets = slot_offsets.shaped({sequences + 1});
  args.kv_lens = kv_lens.shaped({sequences});
  args.scale = p.shape.scale;
  args.kept = kept.view;
  args.kept_sequence_stride = p.shape.kv_heads + 1;
  args.lse = lse.shaped({slots, heads});
  args.recording = {weights.shaped({rows, heads, with.capacity}), p.recorded};
  specattn::recompute(fixture.context(), args);
  return fixture.download(weights);
}

/// Over the cache that attend() reads, with attend()'s log-sum-exp: its recording, and the oracle's weights.
template <class Fixture, specattn::storage T>
void equals_recording(Fixture& fixture, problem<T> p) {
  constexpr double tolerance = Fixture::template tolerance<T>;
  p.record = true;
  const auto cache = filled_cache(fixture, p);
  answer a = run(fixture, p, cache);
  const std::vector<float> recorded = a.weights;
  a.weights = recomputed(fixture, p, a, cache);
  REQUIRE(a.weights.size() == recorded.size());
  double largest = 0.0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < recorded.size(); ++i) {
    const double d = std::abs(double{a.weights[i]} - double{recorded[i]});
    if (!(d <= largest)) largest = d, at = i;
  }
  CAPTURE(at);
  CAPTURE(a.weights[at]);
  CAPTURE(recorded[at]);
  CHECK_FALSE(!(largest <= tolerance));
  if constexpr (specattn::scaled_storage<T>) return;  // the oracle's texts are not what such a cache holds
  const auto d = compare(p, a);
  CHECK_FALSE(!(d.weights <= tolerance));
  CHECK_FALSE(!(d.sum <= tolerance));
  CHECK(d.untouched_behind);
}

template <class Fixture>
void equals_recording_in_all_storage(Fixture& fixture, const pass_shape& shape, record_slots recorded) {
  const auto check = [&]<class T>(T) {
    auto p = random_problem<T>(shape);
    p.recorded = recorded;
    equals_recording(fixture, p);
    keep_random(p, 0.3);
    equals_recording(fixture, p);
  };
  check(float{});
  check(fp16{});
  check(bf16{});
}

TEST_CASE_TEMPLATE("recompute: a prefix of any length leaves attend's recording and sums to one", Fixture,
                   attend_fixture) {
  Fixture fixture;
  for (auto recorded : {record_slots::newest, record_slots::all}) {
    for (std::int32_t kv_len : {0, 1, 2, 15, 63, 255, 600, 1500}) {
      CAPTURE(kv_len);
      pass_shape shape;
      shape.kv_lens = {kv_len};
      shape.slots = {4};
      equals_recording_in_all_storage(fixture, shape, recorded);
    }
  }
}

TEST_CASE_TEMPLATE("recompute: any group and head_dim, contiguous and paged, leaves attend's recording", Fixture,
                   attend_fixture) {
  Fixture fixture;
  for (std::int32_t group : {1, 3, 4, 8, 12}) {
    for (std::int32_t head_dim : {7, 64, 96, 128, 256}) {
      CAPTURE(group);
      CAPTURE(head_dim);
      pass_shape shape;
      shape.kv_lens = {333};
      shape.slots = {3};
      shape.group = group;
      shape.head_dim = head_dim;
      shape.page_size = group % 2 == 0 ? 16 : 0;
      shape.strided = group == 3;
      equals_recording_in_all_storage(fixture, shape, record_slots::newest);
      equals_recording_in_all_storage(fixture, shape, record_slots::all);
    }
  }
}

TEST_CASE_TEMPLATE("recompute: ragged batches, some heads dense, some empty, and sequences without slots", Fixture,
                   attend_fixture) {
  Fixture fixture;
  for (auto recorded : {record_slots::newest, record_slots::all}) {
    pass_shape shape;
    shape.kv_lens = {700, 0, 41, 1, 260};
    shape.slots = {6, 2, 0, 1, 9};
    shape.group = 4;
    shape.scale = 0.2f;
    auto p = random_problem<bf16>(shape);
    p.recorded = recorded;
    keep_random(p, 0.2);
    p.kept[0][1].clear();
    p.all.assign(5, std::vector<bool>(2, false));
    p.all[4][0] = true;
    equals_recording(fixture, p);
  }
}

TEST_CASE_TEMPLATE("recompute: by a log-sum-exp far too small, weights are exp of the difference, or infinite",
                   Fixture, attend_fixture) {
  Fixture fixture;
  auto p = random_problem<float>(pass_shape{});
  p.record = true;
  const auto cache = filled_cache(fixture, p);
  const answer right = run(fixture, p, cache);
  for (const float less : {80.0f, 88.0f, 95.0f, 200.0f}) {
    CAPTURE(less);
    answer a = right;
    for (float& lse : a.lse) lse -= less;
    a.weights = recomputed(fixture, p, a, cache);
    int wrong = 0, infinite = 0;
    for (std::size_t i = 0; i < a.weights.size(); ++i) {
      if (right.weights[i] < 1e-5f) continue;  // and what is stale
      const double exact = double{right.weights[i]} * std::exp(double{less}),
                   most = std::numeric_limits<float>::max();
      if (exact < 0.99 * most) {
        wrong += std::abs(double{a.weights[i]} - exact) <= 1e-2 * exact ? 0 : 1;
      } else if (exact > 1.01 * most) {
        wrong += std::isinf(a.weights[i]) && a.weights[i] > 0.0f ? 0 : 1;
        ++infinite;
      }
    }
    CHECK(wrong == 0);
    CHECK((infinite > 0) == (less > 90.0f));
  }
}

TEST_CASE_TEMPLATE("recompute: misuse throws a message that names the values", Fixture, attend_fixture) {
  Fixture fixture;
  using B = typename Fixture::backend;
  const auto p = random_problem<float>(pass_shape{});
  const auto cache = filled_cache(fixture, p);
  const auto q = fixture.upload(p.q), lse = fixture.upload(std::vector<float>(4)),
             weights = fixture.upload(std::vector<float>(4 * 41));
  const auto offsets = fixture.upload(std::vector<std::int32_t>{0, 1}), kv_lens = fixture.upload(p.shape.kv_lens),
             counts = fixture.upload(std::vector<std::int32_t>{0, 0});
  const auto refused = [&](auto spoil, const char* part) {
    specattn::recompute_args<float, B> args;
    args.q = q.shaped({1, 4, 64});
    args.kv = cache.layer(1);
    args.slot_offsets = offsets.shaped({2});
    args.kv_lens = kv_lens.shaped({1});
    args.lse = lse.shaped({1, 4});
    args.recording.weights = weights.shaped({1, 4, 41});
    spoil(args);
    CHECK_THROWS_WITH_AS(specattn::recompute(fixture.context(), args), doctest::Contains(part),
                         specattn::contract_error);
  };
  using args = specattn::recompute_args<float, B>;
  refused([&](args& a) { a.q = q.shaped({1, 3, 64}); }, "recompute: 3 q_heads over 2 kv_heads");
  refused([&](args& a) { a.q = q.shaped({1, 4, 32}); }, "q has head_dim 32, the cache 64");
  refused([&](args& a) { a.slot_offsets = offsets.shaped({1}); }, "1 slot_offsets for 1 sequences");
  refused([&](args& a) { a.lse = {}; }, "lse is [0, 0], needed [1, 4]");
  refused([&](args& a) { a.cache_rows = offsets.shaped({2}); }, "2 cache_rows for 1 sequences");
  refused([&](args& a) { a.kept.counts = counts.shaped({1}); }, "the selection has 1 groups, 2 are needed");
  refused([&](args& a) { a.recording.weights = weights.shaped({1, 2, 41}); }, "the recording is [1, 2, …]");
  refused([&](args& a) { a.recording.weights = {}; }, "needed [1, 4, …]");
}

}  // namespace attend_testing
